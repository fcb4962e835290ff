"Words in pictures: drawn ones are read, at their times, once; runs that are killed; pictures that are odd; no network."
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm
from PIL import Image, ImageDraw, ImageFont
from test_score import check_scored, write_bundle

from hatemm_clip.base import CLIPS, InputError, write_table
from hatemm_clip.embed import embed_clips
from hatemm_clip.encoders import load_encoder
from hatemm_clip.media import MediaError, write_video
from hatemm_clip.score import format_scores
from hatemm_clip.scorer import Scorer

pytest.importorskip('rapidocr', reason='reading words needs the extra hatemm_clip[real]')
from hatemm_clip import ocr as module  # noqa: E402
from hatemm_clip.ocr import find_ocr_models, load_ocr, ocr_clips, ocr_of, read_ocr, read_words, same_picture  # noqa: E402


def draw(*lines, size=(320, 240), height=20, font=None):
    image = Image.new('RGB', size, (90, 120, 90))
    canvas, font = ImageDraw.Draw(image), font or ImageFont.load_default(size=height)
    for i, line in enumerate(lines): canvas.text((.1*size[0], .5*size[1] + 1.6*height*i), line, font=font, fill='white')
    return np.asarray(image)


def still(path, *lines, **options):
    Image.fromarray(draw(*lines, **options)).save(path)
    return path


def table_of(*paths, **columns): return pd.DataFrame([dict(clip_id=Path(p).stem, path=str(p), start=0., end=60.) for p in paths]).assign(**columns)


@pytest.fixture(scope='module')
def ocr(): return load_ocr()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Four short videos, each with a caption of its own; two have another after it."
    folder = tmp_path_factory.mktemp('ocr')
    for i, word in enumerate('apple bread choir hotel'.split()):
        write_video(folder/f'{word}.mp4', [draw(f'THE {word.upper()} IS HERE')]*8 + [draw(f'number {i} is ready')]*8*(i > 1), 4)
    return folder


@pytest.fixture(scope='module')
def undisturbed(ocr, folder, tmp_path_factory):
    "The table of all four, made by one worker."
    out = tmp_path_factory.mktemp('undisturbed')
    ocr_clips(table_of(*sorted(folder.glob('*.mp4'))), out, ocr, workers=1)
    return out/'ocr.parquet'


@pytest.fixture
def pictures_read(monkeypatch):
    "The sizes of pictures that the engine gets."
    sizes, found = [], module._found
    monkeypatch.setattr(module, '_found', lambda engine, picture: (sizes.append(picture.shape), found(engine, picture))[1])
    return sizes


def test_known_words_are_read_with_their_places(ocr):
    lines, flags = ocr.read(draw('BREAD COSTS LESS', 'in our town'))
    assert [line['text'] for line in lines] == ['BREAD COSTS LESS', 'in our town'] and flags == []
    (left, top, right, bottom), below = lines[0]['box'], lines[1]['box']
    assert left == pytest.approx(.1, abs=.03) and .45 < top < bottom < .65 and right > .5 and below[1] > top
    assert all(line['confidence'] > .9 for line in lines)


def test_a_picture_on_its_side_and_upside_down(ocr):
    picture = draw('LOOK AT THESE', height=24)
    for turned in (np.rot90(picture), np.rot90(picture, 2)): assert ocr.read(np.ascontiguousarray(turned))[0][0]['text'] == 'LOOK AT THESE'


def test_a_caption_that_changes_is_two_segments_at_their_times(ocr, tmp_path):
    film = write_video(tmp_path/'a.mp4', [draw('the soup is ready')]*30 + [draw('two more songs')]*30, 10)
    found = read_words(film, ocr, fps=1.)
    assert [(s['start'], s['end'], s['text']) for s in found['segments']] == [(0., 3., 'the soup is ready'), (3., 6., 'two more songs')]
    later = read_words(film, ocr, fps=1., start=2., end=5.)
    assert [(s['start'], s['end']) for s in later['segments']] == [(0., 1.), (1., 3.)]


def test_the_same_frame_is_not_read_again(ocr, tmp_path, pictures_read):
    film = write_video(tmp_path/'a.mp4', [draw('we are here')]*60, 10)
    found = read_words(film, ocr, fps=2.)
    assert (found['frames'], found['read'], len(pictures_read)) == (12, 1, 1) and found['segments'][0]['end'] == 6.
    fade = write_video(tmp_path/'fade.mp4', [np.full((240, 320, 3), 4*i, np.uint8) for i in range(20)], 10)
    assert 2 < read_words(fade, ocr, fps=5.)['read'] < 10  # slow changes add up


def test_pictures_of_another_size_may_be_the_same():
    assert same_picture(draw('A'), np.asarray(Image.fromarray(draw('A')).resize((640, 480)))) and not same_picture(draw('A'), draw('B'))


def test_a_still_is_a_clip_of_no_length(ocr, tmp_path):
    found = read_words(still(tmp_path/'meme.png', 'WHEN THE BUS', 'is late again'), ocr)
    assert found['text'] == 'WHEN THE BUS is late again' and {(s['start'], s['end']) for s in found['segments']} == {(0., 0.)}


def test_sound_alone_has_no_picture(ocr, shared):
    found = read_words(shared/'data/odd_files/song.mp3', ocr)
    assert found == dict(text='', segments=[], flags=['no_picture'], frames=0, read=0)


@pytest.mark.parametrize('words', ['Привет всем друзья', 'שלום לכולם כאן', 'ქართული ენა'])
def test_another_script_is_nothing_or_a_guess_and_never_a_crash(ocr, tmp_path, words):
    from matplotlib import get_data_path
    font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSans.ttf', 24)
    row = ocr_clips(table_of(still(tmp_path/'a.png', words, size=(480, 270), font=font)), tmp_path, ocr).iloc[0]
    assert row.text or 'unread' in row['flags']


def test_a_large_picture_is_scaled_down_and_says_so(tmp_path, pictures_read):
    ocr = load_ocr(longest=640)
    found = read_words(still(tmp_path/'a.jpg', 'LARGE LETTERS', size=(1500, 1000), height=75), ocr)
    assert found['text'] == 'LARGE LETTERS' and found['flags'] == ['scaled_down'] and max(pictures_read[0]) == ocr.longest


HUGE = """
import resource, sys
from PIL import Image, ImageDraw, ImageFont
from hatemm_clip.ocr import load_ocr, read_words
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read_words(sys.argv[1], load_ocr())
print(found['text'], found['flags'], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1000, sep='|')
"""


def test_a_jpeg_of_20000_by_20000_pixels_is_read_in_bounded_memory(tmp_path):
    image = Image.new('L', (20_000, 20_000), 90)
    ImageDraw.Draw(image).text((2000, 8000), 'LARGE LETTERS', font=ImageFont.load_default(size=1200), fill=255)
    image.save(tmp_path/'a.jpg')
    done = subprocess.run([sys.executable, '-c', HUGE, str(tmp_path/'a.jpg')], capture_output=True, text=True, check=True)
    text, flags, memory = done.stdout.strip().split('|')
    assert (text, flags) == ('LARGE LETTERS', "['scaled_down']") and int(memory) < 700  # MB; the picture itself has 1200


def test_a_png_of_20000_by_20000_pixels_is_one_line(ocr, tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path/'a.png')
    with pytest.raises(MediaError, match='a.png: 400 million pixels are too many to decode; make the picture smaller') as e: read_words(tmp_path/'a.png', ocr)
    assert '\n' not in str(e.value)


def test_no_connection_is_made(monkeypatch):
    def refuse(*args): raise AssertionError('a connection was asked for')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    module._OF_THREAD.__dict__.clear()
    assert load_ocr().read(draw('NO NETWORK HERE'))[0][0]['text'] == 'NO NETWORK HERE'


def test_without_the_extra_the_message_names_it(monkeypatch):
    find_ocr_models.cache_clear()
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hatemm_clip\[real\]'") as e: load_ocr()
    assert '\n' not in str(e.value)


def test_another_model_is_refused(monkeypatch):
    find_ocr_models.cache_clear()
    monkeypatch.setattr(module, 'file_sha256', lambda path: '0'*64)
    with pytest.raises(InputError, match='another sha256'): load_ocr()
    monkeypatch.undo()
    assert load_ocr() == ocr_of(load_ocr().settings())
    with pytest.raises(InputError, match='other weights'): ocr_of(dict(load_ocr().settings(), weights_sha256='0'*64))


@pytest.mark.parametrize('options, told', [(dict(size=4), 'size is 4'), (dict(longest=100), 'longest 100'), (dict(min_confidence=90), 'expected 0 to 1')])
def test_bad_settings_are_one_line(options, told):
    with pytest.raises(InputError, match=told): load_ocr(**options)


def test_failures_are_counted_and_only_they_are_tried_again(ocr, folder, tmp_path, capsys):
    clips = table_of(*sorted(folder.glob('*.mp4'))[:2], tmp_path/'torn.mp4')
    (tmp_path/'torn.mp4').write_text('no video')
    with pytest.raises(InputError, match='12_ocr: 1 of 3 items failed'): ocr_clips(clips, tmp_path, ocr)
    assert len(ocr_clips(clips, tmp_path, ocr, max_failed=.5)) == 2
    assert pd.read_csv(tmp_path/'failed_ocr.csv').clip_id.tolist() == ['torn']
    (tmp_path/'torn.mp4').write_bytes((folder/'hotel.mp4').read_bytes())
    capsys.readouterr()
    table = ocr_clips(clips, tmp_path, ocr)
    assert '1 of 3 clips are new or have changed' in capsys.readouterr().out and not (tmp_path/'failed_ocr.csv').exists()
    assert table.text.iloc[-1] == 'THE HOTEL IS HERE number 3 is ready' and table.model.iloc[0].startswith('PP-OCRv6')
    assert read_ocr(tmp_path).attrs['params']['weights_sha256'] == ocr.weights_sha256


def test_rows_do_not_depend_on_workers(ocr, folder, undisturbed, tmp_path):
    table = ocr_clips(table_of(*folder.glob('*.mp4')), tmp_path, ocr, workers=3)
    assert (tmp_path/'ocr.parquet').read_bytes() == undisturbed.read_bytes() and len(table) == 4


RUN = """
import sys, time
import filelock, pyarrow.parquet, rapidocr, tqdm
from hatemm_clip import ocr as module, rows
from hatemm_clip.base import read_table
sys.path.append(sys.argv[3])
from killing import kill_runs
clips, append = read_table(sys.argv[1]), rows._append

def slowly(*args):
    time.sleep(.1)
    append(*args)

def run(ready):
    rows._append = slowly
    ready()
    module.ocr_clips(clips, sys.argv[2], workers=1)
print(kill_runs(run, times=5, longest=1.5))
"""


def test_killed_and_resumed_equals_undisturbed(ocr, folder, undisturbed, tmp_path):
    clips = table_of(*sorted(folder.glob('*.mp4')))
    more = {name: None for name in CLIPS.names if name not in clips}
    write_table(clips.assign(**more), tmp_path/'clips.parquet', CLIPS)
    done = warm.run([sys.executable, '-c', RUN, tmp_path/'clips.parquet', tmp_path/'killed', Path(__file__).parent], timeout=300)
    assert int(done.stdout.split()[-1]) >= 3
    ocr_clips(clips, tmp_path/'killed', ocr)
    assert (tmp_path/'killed/ocr.parquet').read_bytes() == undisturbed.read_bytes()
    assert not list((tmp_path/'killed').glob('*.journal'))


def test_words_become_a_modality_and_absent_is_a_mask(ocr, folder, tmp_path):
    clips = table_of(folder/'apple.mp4', still(tmp_path/'blank.png'))
    words, enc = ocr_clips(clips, tmp_path, ocr, fps=1.), load_encoder(device='cpu')
    silent = pd.DataFrame([dict(clip_id=c, segments=[]) for c in clips.clip_id])
    store = embed_clips(clips, silent, tmp_path/'a.lance', enc, ocr=words)
    rows = {row['clip_id']: row for row in store.read().to_pylist()}
    assert len(rows['apple']['ocr']) == 1 and rows['apple']['ocr_times'] == [0.] and rows['blank']['ocr'] == [] and rows['apple']['text'] == []
    spoken = embed_clips(clips, words, tmp_path/'b.lance', enc).read().to_pylist()  # the same words, spoken
    assert next(row for row in spoken if row['clip_id'] == 'apple')['text'] == rows['apple']['ocr']
    assert ocr_of(store.provenance['ocr']) == ocr and store.provenance['ocr']['fps'] == 1.


def test_a_bundle_that_takes_words_in_pictures_reads_them(ocr, folder, tmp_path):
    recorded = dict(ocr.settings(), fps=1.)
    scorer = Scorer(write_bundle(tmp_path/'bundle', dict(ocr=128), 'image+text+ocr', ocr=recorded), 'cpu')
    row = scorer.score(folder/'choir.mp4')
    check_scored(row)
    written = [w for w in row['windows'] if w['kind'] == 'ocr']
    assert row['ocr'] == 'THE CHOIR IS HERE number 2 is ready' and ' '.join(w['text'] for w in written) == row['ocr'] and row['transcript'] == ''
    assert row['modalities'].keys() == {'image', 'text', 'ocr'} and written[0]['contribution'] != 0 and 'in the picture' in format_scores([row])


def test_a_bundle_without_words_does_not_read_them(folder, tmp_path, pictures_read):
    row = Scorer(write_bundle(tmp_path/'bundle'), 'cpu').score(folder/'choir.mp4')
    assert row['ocr'] == '' and row['windows'] == [] and pictures_read == []


def test_a_bundle_that_does_not_say_how_words_were_read_is_refused(tmp_path):
    with pytest.raises(InputError, match='ocr not recorded'): Scorer(write_bundle(tmp_path/'bundle', dict(ocr=128), 'image+ocr'), 'cpu')
