"Memes: collections as they were published, labels and what they mean, words that are given or read, a batch, and the search."
import shutil
import sys
import time

import numpy as np
import pandas as pd
import pytest
import warm
from conftest import ROOT, SHARED
from PIL import Image

from hatemm_clip.base import InputError, Run, read_json, read_table, write_text
from hatemm_clip.memes import DEFINITIONS, majority_label, make_memes, prepare_memes, read_definition, read_memes
from hatemm_clip.pipeline import run_pipeline

ALIGNED = SHARED/'data/memes/fhm_aligned_with_hatemm.csv'


@pytest.fixture(scope='module')
def invented(tmp_path_factory): return make_memes(tmp_path_factory.mktemp('memes'), 60)


@pytest.mark.parametrize('header, row, message', [
    ('image,text,label', 'a.png,hello,funny', "line 3: label is 'funny'; the definition 'fhm' knows not hateful, hateful"),
    ('image,text,label', 'a.png,hello,', 'line 3: label is empty'),
    ('image,text', 'a.png,hello', 'lacks the column label'),
    ('text,label', 'hello,1', 'lacks the column image'),
    ('id,image,text,label', '1,b.png,hello,1', 'line 3: the id 1 stands in memes.csv line 2 too')])
def test_bad_tables_are_one_line(header, row, message, tmp_path):
    first = '1,' * ('id' in header) + ','.join({'image': 'x.png', 'text': 'words', 'label': '0'}[c] for c in header.split(',') if c != 'id')
    write_text(tmp_path/'memes.csv', f'{header}\n{first}\n{row}\n')
    with pytest.raises(InputError) as e: read_memes(tmp_path/'memes.csv', definition='fhm')
    assert message in str(e.value) and '\n' not in str(e.value) and 'memes.csv' in str(e.value)


@pytest.mark.parametrize('text, message', [
    ('name: x\nlabels: [a, b]\n', 'lacks text'), ('name: x\nlabels: [a]\ntext: y\n', 'expected two words'), ('- a\n', 'expected `name: value` lines'),
    ('name: x\nlabels: [a, A]\ntext: y\n', 'expected two words'), ('name: x\nlabels: [a, b]\ntext: y\ncolour: red\n', 'colour is unknown'), ('a: [', 'not YAML')])
def test_bad_definitions_are_one_line(text, message, tmp_path):
    write_text(tmp_path/'d.yml', text)
    with pytest.raises(InputError, match=message): read_definition(tmp_path/'d.yml')


def test_words_of_known_definitions_are_read_however_they_are_spelt():
    assert [DEFINITIONS['multioff'].number(w, '') for w in ('Non-offensiv', 'non-offensive', 'OFFENSIVE', ' Offensive ')] == [0, 0, 1, 1]
    assert [DEFINITIONS['mhc'].number(w, '') for w in ('Normal', 'Offensive', 'Hateful')] == [0, 1, 1]


def test_pictures_are_found_where_collections_keep_them(tmp_path):
    for name in ('img/1.png', 'Labelled Images/2.png'):
        (tmp_path/name).parent.mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path/name)
    write_text(tmp_path/'memes.csv', 'image,text,label\n..\\FHM\\img\\1.png,a,0\n2.png,b,1\nnowhere.png,c,1\n')
    found = read_memes(tmp_path/'memes.csv', definition='fhm')
    assert found.path.tolist() == [str(tmp_path/'img/1.png'), str(tmp_path/'Labelled Images/2.png'), str(tmp_path/'nowhere.png')]


def test_a_folder_with_several_tables_is_asked_about(tmp_path):
    for name in ('one', 'two'): write_text(tmp_path/f'{name}.csv', 'image,text,label\n1.png,a,0\n')
    with pytest.raises(InputError, match='which table holds the memes.*one.csv, two.csv'): read_memes(tmp_path)


def test_a_test_part_without_a_label_is_named(tmp_path):
    write_text(tmp_path/'training.csv', 'file_name\tmisogynous\tText Transcription\n1.jpg\t1\ta\n')
    write_text(tmp_path/'test.csv', 'file_name\tText Transcription\n2.jpg\tb\n3.jpg\tc\n')
    write_text(tmp_path/'test_labels.txt', '2.jpg\t0\t0\n')
    with pytest.raises(InputError, match='test.csv line 3: 3.jpg has no label in test_labels.txt'): read_memes(tmp_path)


def test_confounders_and_templates_stay_together(invented, tmp_path):
    memes = pd.read_csv(invented, keep_default_na=False, dtype=str)
    memes['image'] = [str(invented.parent/name) for name in memes.image]
    twin = memes.iloc[:1].assign(id='twin', type='test', text='other words altogether')  # the same picture
    echo = memes.iloc[1:2].assign(id='echo', type='test', image=memes.image[5])  # the same words
    memes = pd.concat([memes.assign(type=['train']*40 + ['test']*20), twin, echo])
    memes.to_csv(tmp_path/'memes.csv', index=False)
    prepare_memes(tmp_path/'memes.csv', tmp_path/'run', definition='fhm', read_text=False)
    splits = read_table(Run(tmp_path/'run').splits)
    parts = splits.set_index('video_id').part
    assert parts['twin'] == parts['echo'] == 'test' and '0000' not in parts and '0001' not in parts  # purged from train
    assert set(parts) == {'train', 'val', 'test'} and splits.attrs['params']['purged'] >= 2


def test_missing_pictures_are_counted_rows(invented, tmp_path):
    folder = shutil.copytree(invented.parent, tmp_path/'memes')
    for name in ('0003', '0004'): (folder/'img'/f'{name}.png').unlink()
    (folder/'img/0005.png').write_bytes(b'no picture')
    with pytest.raises(InputError, match='3 of 60'): prepare_memes(folder/'memes.csv', tmp_path/'run', definition='fhm', read_text=False)
    clips = prepare_memes(folder/'memes.csv', tmp_path/'run', definition='fhm', read_text=False, max_failed=.1)
    failed = pd.read_csv(tmp_path/'run/failed_videos.csv', dtype=str)
    assert len(clips) == 57 and set(failed.video_id) == {'0003', '0004', '0005'} and failed.error.str.len().min() > 5


def test_a_meme_without_words_is_read(invented, tmp_path):
    memes = pd.read_csv(invented, dtype=str, keep_default_na=False)
    memes['image'] = [str(invented.parent/name) for name in memes.image]
    words = memes.text.copy()
    memes.loc[words != '', 'text'] = words
    some = memes[words != ''].index[0]
    memes.loc[some, 'text'] = ''
    memes.iloc[:40].to_csv(tmp_path/'memes.csv', index=False)
    clips = prepare_memes(tmp_path/'memes.csv', tmp_path/'run', label_from='majority', definition='hatemm', split='grouped', folds=3)
    said = clips[['clip_id', 'video_id']].merge(read_table(Run(tmp_path/'run').transcripts)).set_index('video_id')
    read, given = said[said.backend == 'rapidocr'], said[said.backend == 'given']
    assert memes.id[some] in read.index and (given.text == words.set_axis(memes.id)[given.index]).all()
    wanted = set(words[some].replace('.', '').split())
    assert len(wanted & set(read.text[memes.id[some]].lower().split())) > .6*len(wanted)


def test_what_the_label_means_is_recorded(invented, tmp_path):
    prepare_memes(invented, tmp_path/'run', 'demo_memes', definition='fhm', read_text=False)
    meant = read_table(Run(tmp_path/'run').clips).attrs['params']
    assert meant['definition']['name'] == 'fhm' and meant['media'] == 'image' and meant['label_from'] == 'original'


def test_votes(): assert [majority_label(v) for v in ([1, 0, 1], [1, None, 1], [0, 1], [], [None, np.nan], ['1', '0', '1'])] == [1, 1, None, None, None, 1]


def test_a_batch_of_memes_ends_in_a_bundle_that_reads_pictures(tmp_path):
    "Every stage on invented memes, fine-tuning with a search included; then a picture alone, and one with its words."
    params = (ROOT/'nbs/params/memes.yml').read_text()
    for old, new in {'demo_data_memes': str(tmp_path/'data'), 'trials: 12': 'trials: 2', 'epochs: 8': 'epochs: 1', 'seeds: 5': 'seeds: 1',
                     'mode: lora': 'mode: projection', 'finetuned: lora': 'finetuned: projection',
                     'head: BinaryClassifier,LateFusion,GatedFusion,CrossModalFusion,Average,Stack': 'head: MeanLinear',
                     '70_memes:\n': '70_memes:\n  demo_memes: 60\n  folds: 3\n'}.items():
        assert old in params
        params = params.replace(old, new)
    write_text(tmp_path/'memes.yml', params)
    said = []
    for _ in range(2): run_pipeline(tmp_path/'memes.yml', tmp_path/'run', echo=said.append)
    assert sum('up to date' in line for line in said) == 5
    config = read_json(tmp_path/'run/bundle/config.json')
    assert config['demo'] and config['encoder']['definition']['name'] == 'hatemm' and config['encoder']['clips']['stills'] == 1
    assert "'hateful' follows the definition 'hatemm'" in (tmp_path/'run/bundle/MODEL_CARD.md').read_text()
    assert len(pd.read_csv(tmp_path/'run/finetune/projection-search/fold0/search.csv')) == 2
    assert '(0 found finished)' in (tmp_path/'run/30_finetune.ipynb').read_text()  # what the search has trained is not found

    from hatemm_clip.scorer import Scorer
    scorer, picture = Scorer(tmp_path/'run/bundle', 'cpu'), tmp_path/'data/img/0002.png'
    alone, given = scorer.score(picture), scorer.score(picture, 'the blue hats are welcome')
    assert alone['error'] is None and len(alone['transcript'].split()) > 4 and given['transcript'] == 'the blue hats are welcome'


SEARCH = '''
import sys
import numpy as np
from hatemm_clip.search import Search, search_config
from hatemm_clip.tuning import FinetuneConfig, make_clip_data
base = FinetuneConfig('projection', epochs=3, patience=3, num_frames=1)
best, study = search_config(make_clip_data(24), np.array(['train']*16 + ['val']*8), base, Search(sys.argv[1], 4, 'cpu'))
print(best, flush=True)
'''


def test_a_killed_search_goes_on(tmp_path):
    "SIGKILL while a trial runs: its settings are tried again, and nothing that ended is."
    command = [sys.executable, '-c', SEARCH, tmp_path]
    process = warm.Fork(command)
    journal = tmp_path/'study.journal'
    while process.poll() is None and not (journal.exists() and journal.read_text().count('"value_type"') + journal.read_text().count('"values": [') >= 1): time.sleep(.02)
    process.kill()
    process.wait()
    before = journal.read_text()
    done = warm.run(command)
    assert done.returncode == 0, done.stderr[-500:]
    rows = pd.read_csv(tmp_path/'search.csv')
    assert len(rows) == 4 and journal.read_text().startswith(before) and rows.trial.is_unique


@pytest.mark.skipif(not ALIGNED.is_file(), reason='needs ../shared/data/memes')
@pytest.mark.parametrize('source, n, positive', [('original', 3000, 977), ('model', 3000, 795), ('human', 1136, 283), ('majority', 3000, 601)])
def test_real_aligned_file(source, n, positive):
    memes = read_memes(ALIGNED, source, 'hatemm')
    assert (len(memes), memes.label.sum(), memes.attrs['unlabelled']) == (n, positive, 3000 - n)
    if source == 'majority': assert [majority_label(v) for v in memes[['original', 'model', 'human']].to_numpy(object)] == memes.majority.tolist()


@pytest.mark.skipif(not ALIGNED.is_file(), reason='needs ../shared/data/memes')
def test_real_multioff():
    memes = read_memes(ALIGNED.with_name('multioff_text_labels_clipzs.csv'), definition='multioff')
    assert memes.groupby(['part', 'label_name']).size().unstack().loc['test'].tolist() == [91, 58] and len(memes) == 743
