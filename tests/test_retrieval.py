"An index of moments, and a search that answers with files and seconds."
import json
import shutil
import sys

import lancedb
import numpy as np
import pandas as pd
import pytest
import warm
from conftest import ROOT, SHARED
from demo import copy_run, small_corpus
from killing import kill_runs

from hatemm_clip.base import CLIPS, TRANSCRIPTS, InputError, Run, read_table, table_hash, write_table
from hatemm_clip.moments import (
    make_searchable, moment_schema, nearest_moments, open_tables, read_about, sync_table, worded_moments, write_about)
from hatemm_clip.ranking import compare_ranks, mean_ranks, measure_ranks, rank_items, read_captions, recall_at, retrieval_table
from hatemm_clip.retrieval import Index, IndexSettings, Query, fuse_ranks, index_folder

QUICK = IndexSettings(words='minilm', ocr=False, fps=.5)


def keep_clips(run, clips, said):
    "Make these the clips of a run; its store holds more."
    for table in (run.clips, run.transcripts): table.unlink()
    write_table(clips, run.clips, CLIPS, table_hash(clips[['clip_id']]))
    write_table(said.drop(columns='inputs', errors='ignore'), run.transcripts, TRANSCRIPTS)


@pytest.fixture(scope='module')
def run(demo, tmp_path_factory):
    "Some two dozen clips of the demo's run, with those in which a violin or a cake is mentioned."
    run = copy_run(demo, tmp_path_factory.mktemp('few')/'run', 'bundle')
    clips, said = read_table(run.clips), read_table(run.transcripts)
    wanted = {*clips.clip_id[:20], *said.clip_id[said.text.str.contains('violin|cake')]}
    keep_clips(run, *(table[table.clip_id.isin(wanted)].reset_index(drop=True) for table in (clips, said)))
    return run


@pytest.fixture(scope='module')
def index(run, tmp_path_factory): return index_folder(run.folder, tmp_path_factory.mktemp('index')/'ix')


@pytest.fixture(scope='module')
def found(index): return Index(index)


def test_recall_grows_with_k_whatever_ties():
    rng = np.random.default_rng(0)
    for _ in range(50):
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


def test_what_is_said_is_found_at_its_second(found, demo):
    truth = json.loads((demo/'demo_data/truth.json').read_text())['videos']
    video, sentence = next((v, s) for v in truth for s in v['sentences'] if s['kind'] == 'filler' and 'violin' in s['text'])
    hits = found.search(Query('she plays the violin', where=('said',), k=50))
    mine = next(h for h in hits if h['file'].endswith(video['video_file_name']))
    assert 'violin' in hits[0]['snippet'].lower() and abs(mine['time'] - sentence['start']) < 3 and mine['where'] == 'said'
    assert [h['score'] for h in hits] == sorted((h['score'] for h in hits), reverse=True) and len({h['file'] for h in hits}) == len(hits)


def test_all_moments_of_a_file(found):
    some = found.search(Query('the museum opens', all_moments=True, k=40))
    assert len(some) == 40 and len({h['file'] for h in some}) < 40


def test_more_answers_than_there_are(found, run):
    assert len(found.search(Query('a boat', k=10_000))) <= len(read_table(run.clips))


def test_places_and_emotions(found):
    assert {h['where'] for h in found.search(Query('blue hats', where=('seen',)))} == {'seen'}
    joy = found.search(Query(emotion='joy', where=('said',), k=5))
    assert all(max(h['emotion'], key=h['emotion'].get) == 'joy' for h in joy) and len(joy) == 5


def test_like_a_file_and_not_itself(found, run):
    file = read_table(run.clips).path[0]
    hits = found.search(Query(like=file, k=5))
    assert len(hits) == 5 and all(h['file'] != file for h in hits) and {h['where'] for h in hits} == {'seen'}


def test_words_that_no_analyser_likes(found):
    for text in ('"', 'a AND (', '*', "o'clock \\ ; --", 'word '*10_000, '冬'): assert isinstance(found.search(Query(text, k=1)), list)


def test_another_encoder_is_refused(index, tmp_path):
    copy = shutil.copytree(index, tmp_path/'ix')
    tables = open_tables(copy/'moments')
    about = read_about(tables)
    about['sentences']['weights_sha256'] = '0'*64
    write_about(tables, about)
    with pytest.raises(InputError, match='other weights'): Index(copy).search(Query('a boat'))


def test_deleted_and_changed_files_leave_the_index(run, index, tmp_path):
    copy, place = Run(shutil.copytree(run.folder, tmp_path/'run')), shutil.copytree(index, tmp_path/'ix')
    clips, said = read_table(run.clips), read_table(run.transcripts)
    gone, changed = clips.path[0], said.index[said.clip_id == clips.clip_id[1]][0]
    said.at[changed, 'segments'] = [dict(start=1., end=2., text='zebras dance on the roof')]
    keep_clips(copy, clips[1:], said)
    index_folder(copy.folder, place)
    hits = Index(place).search(Query('zebras dance on the roof', k=500))
    assert hits[0]['file'] == clips.path[1] and hits[0]['time'] == pytest.approx(clips.start[1] + 1) and gone not in {h['file'] for h in hits}


def test_killed_while_indexing(run, tmp_path, monkeypatch):
    "Kills at random moments; then nothing is lost or doubled."
    monkeypatch.setattr('hatemm_clip.moments._BATCH', 8)  # clips a commit: there are several

    def make(ready):
        ready()
        index_folder(run.folder, tmp_path/'ix')
    kill_runs(make, 5, 3.)
    index_folder(run.folder, tmp_path/'ix')
    database = lancedb.connect(str(tmp_path/'ix/moments'))
    words, said = database.open_table('words').to_pandas(), read_table(run.transcripts)
    assert not words.duplicated(['clip_id', 'source', 'time', 'text']).any()
    assert set(words.clip_id) == {c for c, segments in zip(said.clip_id, said.segments) if any(s['text'].strip() for s in segments)}


def test_two_writers_wait_for_each_other(run, tmp_path):
    code = f"from hatemm_clip.retrieval import index_folder; index_folder({str(run.folder)!r}, {str(tmp_path/'ix')!r})"
    both = [warm.Fork([sys.executable, '-c', code], cwd=ROOT) for _ in range(2)]
    ends = [p.communicate() for p in both]
    assert any(p.returncode == 0 for p in both) and all(p.returncode == 0 or 'another' in e for p, (_, e) in zip(both, ends))
    words = lancedb.connect(str(tmp_path/'ix/moments')).open_table('words').to_pandas()
    assert not words.duplicated(['clip_id', 'source', 'time', 'text']).any()


def test_a_folder_of_videos(demo, tmp_path, capsys):
    "Made, brought up to date, with a file that cannot be used."
    small_corpus(demo, tmp_path/'data', 6)
    (tmp_path/'data/hate_videos/broken.mp4').write_bytes(b'nothing')
    index_folder(tmp_path/'data', tmp_path/'ix', QUICK)
    assert 'left out:' in (first := capsys.readouterr().out) and 'broken.mp4' in first
    victim = next((tmp_path/'data/non_hate_videos').glob('*.mp4'))
    victim.unlink()
    index_folder(tmp_path/'data', tmp_path/'ix', QUICK)
    assert '5 files in the index (seen: 0 new, 1 gone' in capsys.readouterr().out
    hits = Index(tmp_path/'ix').search(Query('people', k=99))
    assert str(victim) not in {h['file'] for h in hits} and len(hits) == 5
    with pytest.raises(InputError, match='was made with hatemm-tiny/demo, asked for ViT-B-32'): index_folder(tmp_path/'data', tmp_path/'ix', IndexSettings('ViT-B-32', ''))


def test_an_index_elsewhere_has_the_same_rows(run, index, found, tmp_path):
    "By a URI, made from a folder of this machine; searched with nothing but the URI."
    uri, run = f'file://{tmp_path}/films', run.folder
    with pytest.raises(InputError, match='name a folder for what the index is made from'): index_folder(run, uri)
    index_folder(run, uri, work=tmp_path/'work')
    rows = [open_tables(place).open_table('words').to_pandas().drop(columns=['vector', 'emotions'])
            .sort_values(['clip_id', 'source', 'time'], ignore_index=True) for place in (uri, index/'moments')]
    pd.testing.assert_frame_equal(*rows)
    asked = Query('somebody made a cake with apples', k=3)
    assert Index(uri).search(asked) == found.search(asked)
    with pytest.raises(InputError, match='not an index'): Index(f'file://{tmp_path}/nothing')


def test_names_with_quotes(demo, tmp_path):
    small_corpus(demo, tmp_path/'data', 4)
    file = next((tmp_path/'data').rglob('*.mp4'))
    odd = file.rename(file.with_name("mother's \"day\".mp4"))
    index_folder(tmp_path/'data', tmp_path/'ix', QUICK)
    assert str(odd) in {h['file'] for h in Index(tmp_path/'ix').search(Query('people', k=9))}
    odd.unlink()
    index_folder(tmp_path/'data', tmp_path/'ix', QUICK)
    assert str(odd) not in {h['file'] for h in Index(tmp_path/'ix').search(Query('people', k=9))}


def test_killed_between_rows_and_words(run, tmp_path, monkeypatch):
    "The next run makes the index of words that the killed one did not come to."
    def killed(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('hatemm_clip.moments.make_searchable', killed)
        with pytest.raises(KeyboardInterrupt): index_folder(run.folder, tmp_path/'ix')
    index_folder(run.folder, tmp_path/'ix')
    assert worded_moments(open_tables(tmp_path/'ix/moments').open_table('words'), 'cake', 5)


def test_cells_of_vectors_find_what_a_scan_finds(tmp_path):
    "Clusters, as frames of a video are; also the rows that come later, and those of a condition."
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((150, 32)), 20, axis=0) + .3*rng.standard_normal((3000, 32))
    rows = [dict(clip_id=f'c{i//20}', file=f'{i}', source='seen', time=0., vector=v.astype(np.float32)) for i, v in enumerate(vectors)]
    wanted = {f'c{i}': 'x' for i in range(150)}
    tables, schema = open_tables(tmp_path), moment_schema(32, False)
    sync_table(tables, 'frames', schema, wanted, lambda some: [r for r in rows if r['clip_id'] in set(some)])
    table = tables.open_table('frames')
    exact = [[h['file'] for h in nearest_moments(table, v, 10)] for v in vectors[::100]]
    make_searchable(table, approximate_from=1000)
    assert 'IvfRq' in str(table.list_indices())
    found = [[h['file'] for h in nearest_moments(table, v, 10)] for v in vectors[::100]]
    assert np.mean([len({*a} & {*b})/10 for a, b in zip(exact, found)]) > .97
    assert {h['clip_id'] for h in nearest_moments(table, vectors[0], 10, "clip_id IN ('c7')")} == {'c7'}
    late = dict(rows[0], clip_id='late', file='late')
    added = sync_table(tables, 'frames', schema, wanted | {'late': 'x'}, lambda some: [late])
    assert added == (1, 0) and 'late' in [h['file'] for h in nearest_moments(tables.open_table('frames'), vectors[0], 2)]


def test_an_empty_index_answers_nothing(tmp_path):
    write_about(open_tables(tmp_path/'ix/moments'), dict(seen='', words='minilm', made={}, sentences={}))
    assert Index(tmp_path/'ix').search(Query('anything')) == []


def test_fusion_counts_a_key_once_a_ranking(): assert fuse_ranks([['a', 'a', 'b']]) == {'a': 1/61, 'b': 1/62}
