"Words as features, experts averaged and stacked, and texts beside a file of features."
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from hatemm_clip.base import InputError
from hatemm_clip.classifier import explain, load_bundle, save_bundle
from hatemm_clip.compare import summarise_runs
from hatemm_clip.experts import COMBINED, KINDS, CombinedClassifier, fit_expert
from hatemm_clip.features import make_features
from hatemm_clip.fusion import combine_heads, crossval, fit_bundle
from hatemm_clip.lexical import copied_clips, find_copies, join_groups, lexical_features, read_texts, with_texts


def say(labels, rng, right=.85):
    "Texts in which one of two words goes with the label."
    shown = np.where(rng.random(len(labels)) < right, labels, 1 - labels)
    return np.array([f"{('bread', 'planes')[s]} and {rng.integers(5)} of them" for s in shown], object)


@pytest.fixture(scope='module')
def data():
    features = make_features(120, 'text', dim=16, folds=4, signal=.5)
    return dataclasses.replace(features, texts=say(features.labels, np.random.default_rng(0)))


@pytest.fixture(autouse=True)
def small_forests(monkeypatch):
    "Thirty trees instead of 150."
    trees = KINDS['trees']
    monkeypatch.setitem(KINDS, 'trees', trees._replace(make=lambda leaf: trees.make(leaf).set_params(n_estimators=30)))


def test_words_outside_the_training_part_have_no_place():
    texts = ['tram stops'] * 10 + ['tram stops later'] * 10 + ['qqq zzz'] * 5 + ['']
    found = lexical_features(texts, 3)(np.arange(20))
    assert not found[20:25].any() and found[:20].any(1).all() and np.isnan(found[25]).all()


def test_a_test_part_changes_nothing_that_is_chosen(data):
    test = data.split[0] == 'test'
    other = dataclasses.replace(data, labels=np.where(test, 1 - data.labels, data.labels), texts=np.where(test, 'unheard of', data.texts))
    val = []
    for features in (data, other):
        kept = dataclasses.replace(features, split=features.split[:1])
        table = crossval(kept, ['Average', 'Stack', 'MeanLinear'], ['text+lexical'], 1, epochs=3, grid={})
        val.append(table[table.part == 'val'].reset_index(drop=True))
    pd.testing.assert_frame_equal(*val)


def test_experts_know_more_together(data):
    table = crossval(data, COMBINED, ['text', 'lexical', 'text+lexical'], 1)
    auroc = summarise_runs(table, ['auroc'], n=50).set_index('run')['mean']
    for head in COMBINED: assert auroc[f'{head}:lexical+text'] > max(auroc[f'{head}:text'], auroc[f'{head}:lexical'])


def test_one_answer_stands_for_every_seed(data):
    table = crossval(dataclasses.replace(data, split=data.split[:1]), 'Average', ['lexical'], 3)
    assert table.groupby('clip_id').prob.nunique().eq(1).all() and table.seed.nunique() == 3


def test_all_heads_and_the_combined_stand_beside_each_other(data):
    kept = dataclasses.replace(data.only(['text']), split=data.split[:1], texts=None)
    table = combine_heads(crossval(kept, 'all', ['text'], 1, epochs=2, grid={}))
    runs = set(table.run)
    assert {'Average:text', 'Stack:text', 'AllHeads:text', 'Chosen:text'} <= runs
    without = combine_heads(table[~table.run.str.contains('Average|Stack|AllHeads|Chosen')])
    pd.testing.assert_frame_equal(*(t[t.run == 'AllHeads:text'].reset_index(drop=True) for t in (table, without)))


@pytest.mark.parametrize('head', COMBINED)
def test_a_bundle_says_the_same_again(data, head, tmp_path):
    model = fit_bundle(data, head, tmp_path, 'text+lexical')
    again = load_bundle(tmp_path)
    assert not (tmp_path/'model.safetensors').exists()
    np.testing.assert_array_equal(model.predict_proba(data), again.predict_proba(data))
    clip = data[[3]]
    why = explain(again, clip, windows=clip.texts[0].split(maxsplit=1)[:clip.masks['text'][0].sum()])
    assert sum(why['modalities'].values()) == pytest.approx(why['prob'] - why['base'])
    assert set(why['modalities']) == {'lexical', 'text'}


def test_a_window_is_taken_from_what_is_seen_and_from_what_is_counted(data):
    model = CombinedClassifier('Average', 'lexical').fit(data[data.split[0] == 'train'], val=data[data.split[0] == 'val'])
    clip = dataclasses.replace(data[[0]], texts=np.array(['planes and some of them'], object))
    effects = explain(model, clip, windows=['planes', 'and some', 'of them'])['tokens']['text']
    assert effects.argmax() == 0 and effects[0] > 0


def test_a_bundle_of_another_kind_leaves_nothing_behind(data, tmp_path):
    fit_bundle(data, 'Average', tmp_path, 'lexical')
    fit_bundle(data, 'MeanLinear', tmp_path, 'text', grid={}, epochs=2)
    assert {p.name for p in tmp_path.iterdir()} == {'config.json', 'model.safetensors', 'review.safetensors'}
    with pytest.raises(InputError, match='lexical goes into a bundle with Average or Stack'): fit_bundle(data, 'MeanLinear', None, 'text+lexical')
    with pytest.raises(InputError, match='not fitted'): save_bundle(tmp_path, CombinedClassifier())


def test_changed_experts_are_refused(data, tmp_path):
    fit_bundle(data, 'Average', tmp_path, 'lexical')
    content = bytearray((tmp_path/'model.skops').read_bytes())
    content[len(content)//2] ^= 1
    (tmp_path/'model.skops').write_bytes(content)
    with pytest.raises(InputError): load_bundle(tmp_path)


def test_three_classes(data):
    labels = np.arange(120) % 3
    texts = np.array([f"{['bread', 'planes', 'trams'][c]} here" for c in labels], object)
    split = np.array(['train', 'train', 'val', 'test'])[np.arange(120)//3 % 4][None]
    topics = dataclasses.replace(data, labels=labels, label_names=['a', 'b', 'c'], texts=texts, split=split)
    table = crossval(topics, COMBINED, ['text+lexical'], 1)
    assert all(len(p) == 3 for p in table.prob)
    assert summarise_runs(table, ['macro_f1'], n=10)['mean'].min() > .9


def test_an_absent_modality_is_left_out(data):
    silent = dataclasses.replace(data, texts=np.where(np.arange(120) % 3 == 0, '', data.texts))
    table = crossval(dataclasses.replace(silent, split=silent.split[:1]), [*COMBINED, 'LateFusion'], ['text+lexical'], 1, epochs=2, grid={})
    assert np.isfinite(table.prob).all()


@pytest.mark.parametrize('texts, words', [
    (np.full(120, '', object), 'lexical is absent from every clip'),
    (np.array([f'w{i}' for i in range(120)], object), 'no word occurs in two'),
    (None, 'lexical needs texts')])
def test_nothing_to_learn_from(data, texts, words):
    with pytest.raises(InputError, match=words): fit_expert(dataclasses.replace(data, texts=texts), 'lexical', 'bayes')


def test_copies_are_found_and_kept_together(data):
    song = ' '.join(f'word{i}' for i in range(40))
    texts = data.texts.copy()
    texts[[3, 50]] = song, 'listen: ' + song
    uploads = dataclasses.replace(data, texts=texts)
    pairs = find_copies(uploads)
    assert pairs == [(3, 50)]
    joined = join_groups(uploads, pairs)
    assert joined.groups[3] == joined.groups[50] and len(set(joined.groups)) == 119
    where = uploads.split[:, [3, 50]].T.tolist()
    expected = [('test', 'train') in zip(a, b) for a, b in (where, where[::-1])]
    assert copied_clips(uploads, pairs)[[3, 50]].tolist() == expected


def test_crossval_with_texts_beside_a_file(data, hatemm, tmp_path):
    texts = data.texts.copy()
    song = ' '.join(f'word{i}' for i in range(40))
    a, b = np.flatnonzero((data.split[0] == 'test') & (data.labels == 1))[0], np.flatnonzero((data.split[0] == 'train') & (data.labels == 1))[0]
    texts[[a, b]] = song
    sound = np.tile(data.arrays['image'][:, 0], 8)  # wide enough for a single expert, of lines
    np.savez(tmp_path/'own.npz', ids=data.ids, labels=data.labels, split=data.split[:2], sound=sound)
    (tmp_path/'texts.json').write_text(json.dumps({i + '.mp4': t for i, t in zip(data.ids, texts)}))
    given = ('crossval', tmp_path/'own.npz', '--text', tmp_path/'texts.json', '--encoder', '', '--head', 'Average,Stack', '--seeds', 1)
    done = hatemm(*given, '--json', '-')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found['Average']) == {'lexical+sound', 'lexical', 'sound'} and found['copied'] >= 1
    assert set(found['without_copies']) >= {'Average', 'Stack'}
    dealt = hatemm(*given, '--protocol', 'grouped_3fold', '--json', '-')
    assert dealt.returncode == 0 and 'copied' not in json.loads(dealt.stdout)


@pytest.mark.parametrize('name, content, words', [
    ('none.json', None, 'no such file'), ('a.json', '{"x": "y"}', 'no text belongs to a clip'), ('b.json', '[1', 'not JSON'),
    ('c.csv', 'id,words\nv0000,hello\n', 'lacks the column text'), ('d.json', '{"v0000": 3}', 'the text of v0000 is int'),
    ('e.csv', 'id,text\nv0000,a\nv0000,b\n', 'v0000 is there twice')])
def test_texts_that_cannot_be_used(data, hatemm, tmp_path, name, content, words):
    np.savez(tmp_path/'own.npz', ids=data.ids, labels=data.labels, split=data.split, sound=data.arrays['image'][:, 0])
    if content is not None: (tmp_path/name).write_text(content)
    done = hatemm('crossval', tmp_path/'own.npz', '--text', tmp_path/name, '--encoder', '')
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_real_transcripts_are_read(shared):
    from hatemm_clip.features import read_features
    features = read_features(shared/'data/hatemm/hatemm_bert_mfcc.npz')
    found = with_texts(features, read_texts(shared/'data/hatemm/hatemm_vosk_transcripts.json'))
    assert (found.texts != '').sum() == 1068
    assert 10 < copied_clips(found, find_copies(found)).sum() < 150
    assert len(read_texts(shared/'data/hatemm/transcripts_train_validation.csv')) == 859


def test_a_run_with_words_scores_a_file(demo, tmp_path):
    "From the stage to a score: every window of speech has its share, and the words are a modality of their own."
    from demo import copy_run

    from hatemm_clip.base import read_table
    from hatemm_clip.fusion import run_fusion
    from hatemm_clip.score import score_files
    run = copy_run(demo, tmp_path/'run', 'predictions.parquet', 'bundle')
    predictions = run_fusion(run.folder, 'Average', 'text+lexical', seeds=1)
    assert set(predictions.run) == {'Average:lexical+text', 'Average:lexical', 'Average:text'}
    clips = read_table(run.clips).merge(read_table(run.transcripts)[['clip_id', 'text']], on='clip_id')
    row = score_files(run.bundle, [clips[clips.text.str.len() > 40].path.iloc[0]])[0]
    assert row['error'] is None and set(row['modalities']) == {'lexical', 'text'} and row['frames'] == []
    assert row['windows'] and all(w['contribution'] != 0 for w in row['windows'])
