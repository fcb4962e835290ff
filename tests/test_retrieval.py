"An index of moments, and a search that answers with files and seconds."
import json
import shutil
import subprocess
import sys

import lancedb
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED
from demo import copy_run, small_corpus
from killing import kill_runs

from hatemm_clip.base import CLIPS, InputError, Run, read_json, read_table, table_hash, write_json, write_table
from hatemm_clip.ranking import compare_ranks, mean_ranks, measure_ranks, rank_items, read_captions, recall_at, retrieval_table
from hatemm_clip.retrieval import Index, IndexSettings, Query, fuse_ranks, index_folder

QUICK = IndexSettings(words='minilm', ocr=False, fps=.5)


@pytest.fixture(scope='module')
def index(demo, tmp_path_factory): return index_folder(demo/'runs/notebook', tmp_path_factory.mktemp('index')/'ix')


def test_recall_grows_with_k_whatever_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores, n = rng.integers(0, rng.integers(1, 6), (9, 9)), rng.integers(1, 4)
        right = np.zeros((9, 9), bool)
        for row in right: row[rng.choice(9, n, replace=False)] = True
        at = [recall_at(rank_items(scores, right), k).mean() for k in range(1, 10)]
        assert np.all(np.diff(at) >= -1e-12) and at[-1] == pytest.approx(1)
        table = retrieval_table(scores, rng.permutation(9), n=20)
        assert (table.R1 <= table.R5 + 1e-12).all() and (table.R5 <= table.R10 + 1e-12).all()


def test_ranks_are_those_of_a_sort_where_nothing_ties():
    scores, right = np.random.default_rng(1).normal(size=(30, 30)), np.random.default_rng(2).permutation(30)
    order = (-scores).argsort(1)
    wanted = [list(row).index(r) + 1 for row, r in zip(order, right)]
    assert mean_ranks(rank_items(scores, right)).tolist() == wanted
    found = measure_ranks(rank_items(scores, right), n=50)
    assert found.value['R5'] == pytest.approx(np.mean(np.array(wanted) <= 5)) and found.value['mean_rank'] == pytest.approx(np.mean(wanted))


def test_a_shuffled_list_of_queries_does_not_help_a_collapsed_model():
    collapsed = np.zeros((50, 50))
    assert recall_at(rank_items(collapsed, np.arange(50)), 1).mean() == pytest.approx(1/50)
    with pytest.raises(InputError, match='must answer the same'): compare_ranks(rank_items(collapsed, np.arange(50)), rank_items(collapsed[:9], np.arange(9)))


@pytest.mark.skipif(not SHARED.is_dir(), reason='needs ../shared')
def test_published_captions():
    found = read_captions(SHARED/'data/retrieval/msrvtt_ret_test1k.json')
    assert len(found) == 1000 and found.video_id.is_unique and found.video_id[0].startswith('video')


def test_what_is_said_is_found_at_its_second(index, demo):
    truth = json.loads((demo/'demo_data/truth.json').read_text())['videos']
    video, sentence = next((v, s) for v in truth for s in v['sentences'] if s['kind'] == 'filler' and 'violin' in s['text'])
    hits = Index(index).search(Query('she plays the violin', where=('said',), k=50))
    mine = next(h for h in hits if h['file'].endswith(video['video_file_name']))
    assert 'violin' in hits[0]['snippet'].lower() and abs(mine['time'] - sentence['start']) < 3 and mine['where'] == 'said'
    assert [h['score'] for h in hits] == sorted((h['score'] for h in hits), reverse=True) and len({h['file'] for h in hits}) == len(hits)


def test_all_moments_of_a_file(index):
    some = Index(index).search(Query('the museum opens', all_moments=True, k=40))
    assert len(some) == 40 and len({h['file'] for h in some}) < 40


def test_more_answers_than_there_are(index):
    assert len(Index(index).search(Query('a boat', k=10_000))) <= 160


def test_places_and_emotions(index):
    found = Index(index)
    assert {h['where'] for h in found.search(Query('blue hats', where=('seen',)))} == {'seen'}
    joy = found.search(Query(emotion='joy', where=('said',), k=5))
    assert all(max(h['emotion'], key=h['emotion'].get) == 'joy' for h in joy) and len(joy) == 5


def test_like_a_file_and_not_itself(index, demo):
    file = next((demo/'demo_data/hate_videos').glob('*.mp4'))
    hits = Index(index).search(Query(like=str(file), k=5))
    assert len(hits) == 5 and all(h['file'] != str(file) for h in hits) and {h['where'] for h in hits} == {'seen'}


def test_words_that_no_analyser_likes(index):
    for text in ('"', 'a AND (', '*', "o'clock \\ ; --", 'word '*10_000, '冬'): assert isinstance(Index(index).search(Query(text, k=1)), list)


def test_another_encoder_is_refused(index, tmp_path):
    copy = shutil.copytree(index, tmp_path/'ix')
    about = read_json(copy/'index.json')
    about['sentences']['weights_sha256'] = '0'*64
    write_json(copy/'index.json', about)
    with pytest.raises(InputError, match='other weights'): Index(copy).search(Query('a boat'))


def test_deleted_and_changed_files_leave_the_index(demo, tmp_path):
    run = copy_run(demo, tmp_path/'run', 'bundle')
    index_folder(run.folder, tmp_path/'ix')
    clips, said = read_table(run.clips), read_table(run.transcripts)
    gone, changed = clips.path[0], said.index[said.clip_id == clips.clip_id[1]][0]
    said.at[changed, 'segments'] = [dict(start=1., end=2., text='zebras dance on the roof')]
    write_table(clips[1:], run.clips, CLIPS, table_hash(clips[['clip_id']][1:]))
    said.drop(columns='inputs', errors='ignore').to_parquet(tmp_path/'said.parquet')
    run.transcripts.unlink()
    from hatemm_clip.base import TRANSCRIPTS
    write_table(said, run.transcripts, TRANSCRIPTS)
    index_folder(run.folder, tmp_path/'ix')
    hits = Index(tmp_path/'ix').search(Query('zebras dance on the roof', k=500))
    assert hits[0]['file'] == clips.path[1] and hits[0]['time'] == pytest.approx(clips.start[1] + 1) and gone not in {h['file'] for h in hits}


def test_killed_while_indexing(demo, tmp_path):
    "Kills at random moments; then nothing is lost or doubled."
    run = demo/'runs/notebook'

    def make(ready):
        ready()
        index_folder(run, tmp_path/'ix')
    kill_runs(make, 5, 3.)
    index_folder(run, tmp_path/'ix')
    database = lancedb.connect(str(tmp_path/'ix/moments'))
    words, said = database.open_table('words').to_pandas(), read_table(Run(run).transcripts)
    assert not words.duplicated(['clip_id', 'source', 'time', 'text']).any()
    assert set(words.clip_id) == {c for c, segments in zip(said.clip_id, said.segments) if any(s['text'].strip() for s in segments)}


def test_two_writers_wait_for_each_other(demo, tmp_path):
    code = f"from hatemm_clip.retrieval import index_folder; index_folder({str(demo/'runs/notebook')!r}, {str(tmp_path/'ix')!r})"
    both = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [p.communicate() for p in both]
    assert any(p.returncode == 0 for p in both) and all(p.returncode == 0 or 'another' in e for p, (_, e) in zip(both, ends))
    words = lancedb.connect(str(tmp_path/'ix/moments')).open_table('words').to_pandas()
    assert not words.duplicated(['clip_id', 'source', 'time', 'text']).any()


def test_a_folder_of_videos(demo, tmp_path, capsys):
    "Made, brought up to date, with a file that cannot be used."
    small_corpus(demo, tmp_path/'data', 12)
    (tmp_path/'data/hate_videos/broken.mp4').write_bytes(b'nothing')
    index_folder(tmp_path/'data', tmp_path/'ix', QUICK)
    assert 'left out:' in (first := capsys.readouterr().out) and 'broken.mp4' in first
    victim = next((tmp_path/'data/non_hate_videos').glob('*.mp4'))
    victim.unlink()
    index_folder(tmp_path/'data', tmp_path/'ix', QUICK)
    assert '11 files in the index (seen: 0 new, 1 gone' in capsys.readouterr().out
    hits = Index(tmp_path/'ix').search(Query('people', k=99))
    assert str(victim) not in {h['file'] for h in hits} and len(hits) == 11
    with pytest.raises(InputError, match='was made with hatemm-tiny/demo, asked for ViT-B-32'): index_folder(tmp_path/'data', tmp_path/'ix', IndexSettings('ViT-B-32', ''))


def test_an_empty_index_answers_nothing(tmp_path):
    write_json(tmp_path/'ix/index.json', dict(seen='', words='minilm', made={}, sentences={}))
    assert Index(tmp_path/'ix').search(Query('anything')) == []


def test_fusion_counts_a_key_once_a_ranking(): assert fuse_ranks([['a', 'a', 'b']]) == {'a': 1/61, 'b': 1/62}
