"Annotation tables as people have them: read as they are meant, or refused with their line; the positive class is named, never guessed."
import itertools
import json

import numpy as np
import pandas as pd
import pytest

from hatemm_clip.base import InputError, read_table
from hatemm_clip.check import check_dataset, detect_dataset, format_report
from hatemm_clip.readers import positive_name, read_dataset
from hatemm_clip.data import read_splits
from hatemm_clip.tables import is_harmless, order_labels, parse_seconds, read_rows

PLAIN = 'file,label\na.mp4,hateful\nb.mp4,normal\nc.mp4,hateful\n'
MEANT = {'a': 'hateful', 'b': 'normal', 'c': 'hateful'}


def write(folder, text, name='annotations.csv', encoding='utf-8'):
    folder.mkdir(exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode(encoding)
    (folder/name).write_bytes(data)
    return folder


def labels_of(folder, **options):
    videos = read_dataset('folder', folder, **options)
    return dict(zip(videos.video_id, videos.label_name))


@pytest.mark.parametrize('column', ['file', 'filename', 'video', 'path', 'File', 'VIDEO', ' Path ', '"filename"', 'File Name', 'file_name'])
@pytest.mark.parametrize('label', ['label', 'LABEL', ' Label'])
def test_columns_by_any_name_and_case(tmp_path, column, label):
    assert labels_of(write(tmp_path, PLAIN.replace('file,label', f'{column},{label}'))) == MEANT


@pytest.mark.parametrize('change', [
    lambda t: t.replace(',', ';'), lambda t: t.replace(',', '\t'), lambda t: t.replace(',', '|'), lambda t: t.replace('\n', '\r\n'), lambda t: t.replace('\n', '\r'),
    lambda t: 'sep=;\n' + t.replace(',', ';'), lambda t: t.replace('\n', '\n\n'), lambda t: t.replace('\n', ',,\n'), lambda t: t + ',,\n \n',
    lambda t: t.replace('a.mp4', '"a.mp4"'), lambda t: t.replace(',', ' , '), lambda t: t.replace('a.mp4', './a.mp4'),
    lambda t: ''.join(f'{i},{line}' if i else f',{line}' for i, line in enumerate(t.splitlines(True)))])  # the last: pandas' index
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_layouts_and_encodings(tmp_path, change, encoding):
    assert labels_of(write(tmp_path, change(PLAIN), encoding=encoding)) == MEANT


@pytest.mark.parametrize('name', ['annotations.tsv', 'labels.csv', 'My table.CSV'])
def test_a_table_by_another_name(tmp_path, name):
    assert labels_of(write(tmp_path, PLAIN, name)) == MEANT and detect_dataset(tmp_path) == 'folder'


def test_two_tables_are_one_too_many(tmp_path):
    write(tmp_path, PLAIN, 'x.csv'), write(tmp_path, PLAIN, 'y.csv')
    with pytest.raises(InputError, match='holds x.csv, y.csv'): read_dataset('folder', tmp_path)
    write(tmp_path, PLAIN)
    assert labels_of(tmp_path) == MEANT


def test_json_lines(tmp_path):
    rows = [dict(Video='a.mp4', LABEL=1, start=1.5, end='00:00:02', other=[1]), dict(path='b.mp4', label=0.0), dict(file='c.mp4', label='1')]
    write(tmp_path, '\n'.join(map(json.dumps, rows)), 'annotations.jsonl')
    assert labels_of(tmp_path) == {'a': '1', 'b': '0', 'c': '1'}
    assert read_dataset('folder', tmp_path).set_index('video_id').spans['a'] == [dict(start=1.5, end=2.)]


REFUSED = {
    'file,label\na.mp4,hateful\nb.mp4,\n': 'csv line 3: the label is empty',
    'file,label\na.mp4,hateful\nb.mp4,  \n': 'csv line 3: the label is empty',
    'file,label\na.mp4,hateful\nb.mp4,NaN\n': 'csv line 3: the label is empty',
    'file,label\na.mp4,hateful\n\nb.mp4\n': 'csv line 4: a short row, with 1 of 2 columns',
    'file,label,start,end\na.mp4,hateful,1,2\nb.mp4,normal\n': 'csv line 3: a short row, with 2 of 4',
    'file,label\na.mp4,hateful,really\n': 'csv line 2: 3 cells under 2 columns',
    'file,label\na, b.mp4,hateful\n': 'csv line 2: 3 cells under 2 columns',
    'file,label,label\na.mp4,hateful,normal\n': 'csv: has the column label and label twice',
    'file,Label,label\na.mp4,hateful,normal\n': 'csv: has the column Label and label twice',
    'file,class\na.mp4,hateful\n': 'csv: lacks the column label; it has path, class',
    'name,label\na.mp4,hateful\n': r'csv: lacks the column path \(or file, filename, video\); it has name, label',
    'file,label\n': 'csv: holds no rows', '': 'csv: holds no rows', '\n \n': 'csv: holds no rows',
    'file,label\n"a.mp4,hateful\nb.mp4,normal\n': 'csv line 2: cannot be read as a table',
    'file,label\n,hateful\n': "csv line 2: the file's name is ''",
    'file,label\na.mp4,hateful\na.mp4,normal\n': "a is listed twice, in annotations.csv line 2 and annotations.csv line 3: labelled 'hateful' and 'normal'",
    'file,label\na.mp4,hateful\nb.mp4,normal\na.mp4,hateful\n': 'a is listed twice, in annotations.csv line 2 and annotations.csv line 4: keep one row',
    'file,label\na.mp4,hateful\n./a.mp4,HATEFUL\n': 'a is listed twice',
    PLAIN.replace('a.mp4', 'caf\0.mp4'): 'csv line 2: holds a zero byte',
    PLAIN.replace('b.mp4', 'café.mp4').encode('latin-1'): r'csv line 3: not UTF-8 \(byte 0xe9\); save the table as UTF-8',
    b'PK\x03\x04 and so on': 'an Excel workbook; save it as `CSV UTF-8`'}


@pytest.mark.parametrize('text', REFUSED, ids=lambda t: repr(t)[:40])
def test_refused_with_its_line(tmp_path, text):
    with pytest.raises(InputError, match=REFUSED[text]): read_dataset('folder', write(tmp_path, text))


@pytest.mark.parametrize('line,why', [
    ('{"file": "b.mp4"}', 'line 2: lacks the column label'), ('{"file": "b.mp4", "label": null}', 'line 2: the label is empty'), ('{"file": "b.mp4", "label": NaN}', 'line 2: the label is empty'),
    ('{"file": "b.mp4", "label": "x", "label": "y"}', 'line 2: has the column label and label twice'), ('{"file": "b.mp4"', 'line 2: cannot be read as JSON'), ('["b.mp4", "x"]', 'line 2: expected an object'),
    ('{"file": "b.mp4", "label": "normal", "start": Infinity, "end": 3}', 'line 2: a time is')])
def test_json_lines_refused(tmp_path, line, why):
    with pytest.raises(InputError, match=why): read_dataset('folder', write(tmp_path, '{"file": "a.mp4", "label": "hateful"}\n' + line, 'annotations.jsonl'))


@pytest.mark.parametrize('spelt', ['Hateful', 'HATEFUL', ' hateful', 'hateful ', 'hate-ful', 'hateful\u00a0', '\ufeffhateful'])
def test_one_class_in_many_spellings(tmp_path, spelt):
    text = PLAIN + f'd.mp4,{spelt}\n'
    assert labels_of(write(tmp_path, text)) == MEANT | {'d': 'hateful'}
    report = check_dataset(tmp_path, media=False)
    assert set(report['labels']) == {'hateful', 'normal'} and report['problems']['spelt_apart']['rows'][0]['id'] == 'hateful'


@pytest.mark.parametrize('a,b', [('1', '1.0'), ('1.0', '1'), ('1', ' 1'), ('1', '01'), ('Non Hate', 'non hate'), ('Non Hate', 'NonHate'), ('Non Hate', 'non_hate')])
def test_numbers_and_hyphens_make_no_class_of_their_own(tmp_path, a, b):
    other = '0' if a[0] == '1' else 'Hate'
    names = set(labels_of(write(tmp_path, f'file,label\na.mp4,{a}\nb.mp4,{b}\nc.mp4,{other}\n')).values())
    assert len(names) == 2 and '1.0' not in names


def test_minus_one_is_not_one(tmp_path):
    assert set(labels_of(write(tmp_path, 'file,label\na.mp4,1\nb.mp4,-1\n'), positive='1').values()) == {'1', '-1'}


TIMES = {'1,2': (1., 2.), '1.5,2.25': (1.5, 2.25), '00:00:01,00:01:02': (1., 62.), '1:02,1:03.5': (62., 63.5), '"1,5","2,5"': (1.5, 2.5), '0,0': (0., 0.), '1e1,2e1': (10., 20.), ',': None}
NO_TIMES = ['nan,2', '1,nan', 'inf,inf', '1,inf', '-1,2', '1,-2', '9,2', '00:01:00,00:00:10', '1,', ',2', 'soon,2', '"1,500",2000', '1_0,20', '0:99:00,1:99:00', '1e999,1e999', '0x1,5', '1 2,3']


@pytest.mark.parametrize('times', TIMES)
def test_times_read(tmp_path, times):
    videos = read_dataset('folder', write(tmp_path, f'file,label,Start,END\na.mp4,hateful,{times}\nb.mp4,normal,,\n'))
    wanted = [dict(zip(('start', 'end'), TIMES[times]))] if TIMES[times] else []
    assert videos.set_index('video_id').spans['a'] == wanted


@pytest.mark.parametrize('times', NO_TIMES)
def test_times_refused(tmp_path, times):
    with pytest.raises(InputError, match='annotations.csv line 3: '):
        read_dataset('folder', write(tmp_path, f'file,label,start,end\nb.mp4,normal,,\na.mp4,hateful,{times}\n'))


def test_seconds():
    assert [parse_seconds(t) for t in ('0', '.5', '5.', '90:15', '1:00:00', '00:00:01,5')] == [0, .5, 5, 5415, 3600, 1.5]


def test_semicolons_and_decimal_commas(tmp_path):
    videos = read_dataset('folder', write(tmp_path, 'Datei;File;Label;Start;End\n1;a.mp4;hateful;1,5;2,75\n2;b.mp4;normal;;\n'))
    assert videos.set_index('video_id').spans['a'] == [dict(start=1.5, end=2.75)]


def test_the_same_file_by_two_paths_is_listed_twice(tmp_path):
    with pytest.raises(InputError, match='a is listed twice'): read_dataset('folder', write(tmp_path, f'file,label\na.mp4,hateful\n{tmp_path}/x/../a.mp4,hateful\n'))


def test_a_row_for_each_span(tmp_path):
    text = 'file,label,start,end\na.mp4,hateful,1,2\na.mp4,Hateful,3,4\nb.mp4,normal,,\n'
    assert read_dataset('folder', write(tmp_path, text)).set_index('video_id').spans['a'] == [dict(start=1., end=2.), dict(start=3., end=4.)]
    with pytest.raises(InputError, match='a is listed twice'): read_dataset('folder', write(tmp_path, text + 'a.mp4,hateful,3,4\n'))


def test_lines_are_lines_of_the_file(tmp_path):
    text = 'file,note,label\na.mp4,"two\nlines",hateful\n\nb.mp4,,\n'
    with pytest.raises(InputError, match='line 5: the label is empty'): read_dataset('folder', write(tmp_path, text))


def test_files_as_the_disk_spells_them(tmp_path):
    for name in ('clips/a.mp4', 'u\u0308ber.mp4', 'two  blanks.mp4', '-dash.mp4', 'c.mp4', 'c.webm'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    names = ['clips\\a.mp4', 'über.mp4', 'two  blanks.mp4', '-dash.mp4', 'c.mp4', 'c.webm']
    videos = read_dataset('folder', write(tmp_path, 'file,label\n' + ''.join(f'{n},{"hateful" if i % 2 else "normal"}\n' for i, n in enumerate(names))))
    assert len(videos) == 6 and {'c.mp4', 'c.webm', 'clips/a'} <= set(videos.video_id)
    assert 'missing' not in {k for k in check_dataset(tmp_path)['problems']}


HATEMM = 'video_file_name,label,hate_snippet,target\nx.mp4,Hate,"[[\'00:00:01\', \'00:00:02\']]",Others\ny.mp4,Non Hate,,Others\n'


@pytest.mark.parametrize('change', [
    lambda t: t.replace('video_file_name', 'Video_File_Name'), lambda t: t.replace('Hate,', 'HATE ,'), lambda t: t.replace('Non Hate', 'non-hate'),
    lambda t: t.encode('utf-16'), lambda t: t.replace('\n', '\r\n').encode('utf-8-sig'), lambda t: t.replace(',"', ';"').replace('",', '";').replace('e,l', 'e;l').replace('l,h', 'l;h').replace('t,t', 't;t').replace('4,', '4;').replace('te,,', 'te;;')])
def test_hatemm_read_alike(tmp_path, change):
    videos = read_dataset('hatemm', write(tmp_path, change(HATEMM), 'HateMM_annotation.csv'))
    assert dict(zip(videos.label_name, videos.label)) == {'Hate': 1, 'Non Hate': 0} and videos.spans.map(len).sum() == 1


@pytest.mark.parametrize('change,why', [
    (lambda t: t.replace('Non Hate', ''), 'line 3: label is empty; expected one of Non Hate, Hate'), (lambda t: t.replace('Non Hate', 'Perhaps'), "line 3: label is 'Perhaps'"), (lambda t: t.replace(',,Others', ''), 'line 3: a short row'),
    (lambda t: t.replace('target', 'Label'), 'has the column label and Label twice'), (lambda t: t.replace('y.mp4', 'x.mp4'), 'x is listed twice'), (lambda t: t.replace('y.mp4', '../y.mp4'), 'line 3: video_file_name')])
def test_hatemm_refused(tmp_path, change, why):
    with pytest.raises(InputError, match=why): read_dataset('hatemm', write(tmp_path, change(HATEMM), 'HateMM_annotation.csv'))


MHC = 'Video_ID\tMajority_Voting\tTarget_Victim\tDuration\n'


def mhc(folder, *rows):
    for name in ('train', 'valid', 'test'): write(folder, MHC + f'{name}_1\tNormal\t[]\t[]\n' + ''.join(r for r in rows if r.startswith(name[:2])), f'{name}.tsv')
    return folder


@pytest.mark.parametrize('row,why', [('tr_9\t\t[]\t[]\n', 'train.tsv line 3: label is empty'), ('tr_9\tNormal\t[]\n', 'train.tsv line 3: a short row'), ('tr_9\tHateful\t[]\t[(1, nan)]\n', 'line 3: Duration'),
    ('tr_9\tHateful\t[]\t[(-1, 5)]\n', 'line 3: Duration'), ('tr_9\tHateful\t[]\t00:01:02\n', 'line 3: Duration'), ('train_1\tHateful\t[]\t[]\n', "train_1 is listed twice, .* labelled 'Normal' and 'Hateful'")])
def test_multihateclip_refused(tmp_path, row, why):
    with pytest.raises(InputError, match=why): read_dataset('mhc_en', mhc(tmp_path, row))


def test_published_split_in_any_layout(tmp_path):
    groups = pd.Series(['g0', 'g1', 'g2'], index=['v0', 'v1', 'v2'])
    (tmp_path/'s.csv').write_text('Video_ID;PART;Fold\nv0; Train;0.0\nv1;VALID;0\nv2;test ;0\nv3;test;0\n')
    splits = read_splits(tmp_path/'s.csv', groups, failed=['v3'])
    assert splits.part.tolist() == ['train', 'val', 'test'] and splits.fold.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match='v3 is not among the videos'): read_splits(tmp_path/'s.csv', groups)
    (tmp_path/'s.csv').write_text('video_id,part,fold\nv0,train,one\nv1,val,0\nv2,test,0\n')
    with pytest.raises(InputError, match='s.csv: fold holds something else'): read_splits(tmp_path/'s.csv', groups)


KNOWN = [('Hate', 'Non Hate'), ('hateful', 'normal'), ('hateful', 'non-hateful'), ('offensive', 'non-offensive'), ('Offensive', 'Normal'), ('toxic', 'normal'), ('TOXIC', 'NonToxic'), ('1', '0'), ('yes', 'no'), ('True', 'False'),
         ('positive', 'negative'), ('abusive', 'normal'), ('HOF', 'NOT'), ('OFF', 'NOT'), ('hate', 'none'), ('sexist', 'not sexist'), ('music', 'no music'), ('Hate', 'NoHate'), ('hate speech', 'not_hate_speech'), ('unsafe', 'safe'), ('harmful', 'benign')]


@pytest.mark.parametrize('positive,negative', KNOWN)
@pytest.mark.parametrize('case', [str, str.upper, str.lower, str.title])
def test_known_pairs_in_any_order_and_case(positive, negative, case):
    positive, negative = case(positive), case(negative)
    for names in itertools.permutations((positive, negative)): assert order_labels(names) == [negative, positive]
    for names in itertools.permutations((positive, negative)): assert order_labels(names, negative) == [positive, negative]  # who says so, is right


@pytest.mark.parametrize('names', [('cats', 'dogs'), ('normal', 'not normal'), ('1', '2'), ('hateful', 'offensive'), ('safe', 'normal'), ('a', 'b')])
def test_unknown_pairs_are_refused(names):
    with pytest.raises(InputError, match=f"'{names[0]}', '{names[1]}'.*`positive: NAME`"): order_labels(names)


def test_more_classes_keep_their_order():
    assert order_labels(['Normal', 'Offensive', 'Hateful']) == ['Normal', 'Offensive', 'Hateful'] and order_labels(['one']) == ['one'] and order_labels([]) == []
    with pytest.raises(InputError, match='there are 3 labels'): order_labels(['Normal', 'Offensive', 'Hateful'], 'Hateful')
    with pytest.raises(InputError, match="positive is 'hate'; expected one of"): order_labels(['cats', 'dogs'], 'hate')
    assert order_labels(['Cats', 'dogs'], ' cats') == ['dogs', 'Cats'] and is_harmless('Non-Hate') and not is_harmless('Hate')


def test_the_positive_class_of_a_folder(tmp_path):
    videos = read_dataset('folder', write(tmp_path, PLAIN))
    assert positive_name(videos) == 'hateful' and dict(zip(videos.video_id, videos.label)) == {'a': 1, 'b': 0, 'c': 1}
    turned = read_dataset('folder', tmp_path, positive='Normal')
    assert positive_name(turned) == 'normal' and dict(zip(turned.video_id, turned.label)) == {'a': 0, 'b': 1, 'c': 0}
    report = check_dataset(tmp_path, media=False)
    assert report['positive'] == 'hateful' and 'positive: hateful' in format_report(report)


def test_a_folder_without_a_positive_class(tmp_path, hatemm):
    write(tmp_path, PLAIN.replace('hateful', 'cats').replace('normal', 'dogs'))
    with pytest.raises(InputError, match="'cats', 'dogs'.*`positive: NAME`"): read_dataset('folder', tmp_path)
    report = check_dataset(tmp_path, media=False)
    assert report['positive'] == '' and report['problems']['no_positive']['rows'][0]['id'] == 'cats, dogs' and report['errors'] == 1
    assert 'positive: NAME' in format_report(report)
    assert check_dataset(tmp_path, media=False, positive='cats')['errors'] == 0
    done = hatemm('check', tmp_path, '--no-media', '--positive', 'dogs')
    assert done.returncode == 0 and 'positive: dogs' in done.stdout


def test_check_names_what_is_wrong_with_the_table(tmp_path):
    text = 'file,label\na.mp4,hateful\nA.mp4,normal\n../b.mp4,normal\n/elsewhere/c.mp4,hateful\na.mp4,normal\nd.mp4,hateful\nd.mp4,hateful\n'
    report = check_dataset(write(tmp_path/'data', text), media=False)
    found = {kind: [row['id'] for row in problem['rows']] for kind, problem in report['problems'].items()}
    assert found == dict(listed_twice=['a', 'd'], same_but_case=['a'], outside_folder=['../b', '/elsewhere/c'])
    assert report['errors'] == 2 and 'annotations.csv line 2 and annotations.csv line 6' in format_report(report)


def test_real_data_sets_keep_their_labels(shared):
    hatemm, mhc = (read_dataset(name, shared/'data'/folder) for name, folder in (('hatemm', 'hatemm'), ('mhc_en', 'mhc_en')))
    assert hatemm.label.sum() == 431 and positive_name(hatemm) == 'Hate' and hatemm.attrs['faults'] == []
    assert mhc.label_name.value_counts().to_dict() == dict(Normal=662, Offensive=256, Hateful=82) and positive_name(mhc) == ''
    assert {n: set(mhc.label[mhc.label_name == n]) for n in ('Normal', 'Offensive', 'Hateful')} == dict(Normal={0}, Offensive={1}, Hateful={2})


def test_quirks_of_multihateclip(shared):
    report = check_dataset(shared/'data/mhc_en', media=False)
    count = {kind: problem['count'] for kind, problem in report['problems'].items()}
    assert (count['span_without_hate'], count['hate_without_span'], count['repeated']) == (30, 38, 1)
    assert report['problems']['repeated']['rows'][0]['reason'].startswith('train.tsv line 669 and test.tsv line 118')
    assert report['errors'] == 0 and report['rows'] == 1000


def test_rows_of_a_small_table(tmp_path):
    (tmp_path/'x.tsv').write_text('B\ta\n1\t2\n')
    assert read_rows(tmp_path/'x.tsv', ['a'], ['b']) == [dict(b='1', a='2')]


def test_clips_record_the_positive_class(tmp_path, capsys):
    from hatemm_clip.data import prepare_data
    from hatemm_clip.media import write_video
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        picture = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        write_video(tmp_path/f'{i}.mp4', [picture]*4, 4)
        rows.append(f'{i}.mp4,{"normal" if i % 2 else "hateful"}\n')
    write(tmp_path, 'video,label\n' + ''.join(rows) + '9.mp4,normal\n')
    clips, _ = prepare_data('folder', tmp_path, tmp_path/'run', folds=3, max_failed=.2)
    assert read_table(tmp_path/'run/clips.parquet').attrs['params']['positive'] == 'hateful' and set(clips.label_name[clips.label == 1]) == {'hateful'}
    assert (tmp_path/'run/failed_videos.csv').read_text() == 'video_id,label_name,error\n9,normal,no such file\n'
    (tmp_path/'annotations.csv').write_text('video,label\n' + ''.join(rows))
    prepare_data('folder', tmp_path, tmp_path/'run', folds=3, positive='normal')
    assert read_table(tmp_path/'run/clips.parquet').attrs['params']['positive'] == 'normal' and not (tmp_path/'run/failed_videos.csv').exists()
