import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner
from vlm import tiny_llama, tiny_llava

from hatemm_clip.base import InputError
from hatemm_clip.cli import app
from hatemm_clip.experts import CombinedClassifier
from hatemm_clip.features import deal_folds
from hatemm_clip.lexical import count_bayes, count_ngrams, CountedTexts, BayesColumns, NgramColumns, texts_only
from hatemm_clip.memes import DEFINITIONS, make_memes
from hatemm_clip.sides import find_quoted, join_sides, load_sides, read_meme_labels, words_of
from hatemm_clip.transfer import (
    CONDITIONS, draw_share, fold_parts, meme_rows, study_transfer, summarise_transfer, transfer_differences, TransferSettings)

FILL = [f'w{i}' for i in range(60)]
KEYS = ['train_condition', 'share', 'fold', 'seed', 'part', 'clip_id']


def draw_texts(rng, n, words): # kinds: 1 rude, 2 hateful, 3 both
    kinds = rng.integers(0, 4, n)
    texts = [' '.join([*rng.choice(FILL, words), *(['rude'] if k & 1 else []), *(['vile'] if k & 2 else [])]) for k in kinds]
    return np.array(texts, object), kinds & 1, kinds >> 1


@pytest.fixture(scope='module')
def sides():
    "Words of videos and memes; the memes' original labels follow another word than those of the videos."
    rng = np.random.default_rng(0)
    texts, _, hateful = draw_texts(rng, 90, 30)
    ids = np.array([f'v{i:03d}' for i in range(90)])
    videos = texts_only(texts, hateful, ['fine', 'hateful'], deal_folds(hateful, ids, 3, 0), ids)
    texts, rude, hateful = draw_texts(rng, 150, 8)
    memes = texts_only(texts, rude, ['0', '1'], np.where(rng.random((1, 150)) < .2, 'val', 'train'), [f'meme {i}' for i in range(150)])
    return videos, memes, dict(OM=rude.astype(float), RM=hateful.astype(float))


@pytest.fixture(scope='module')
def data(sides): return join_sides(*sides)


SETTINGS = TransferSettings((.5, 1.), draws=2)


@pytest.fixture(scope='module')
def predictions(data): return study_transfer(data, SETTINGS)


@pytest.mark.parametrize('seed', range(3))
def test_counting_once_is_fitting_in_the_fold(seed):
    rng = np.random.default_rng(seed)
    texts, rude, _ = draw_texts(rng, 60, 12)
    train, counted = np.sort(rng.choice(60, 25, replace=False)), CountedTexts(texts)
    for columns, vectoriser in ((NgramColumns, count_ngrams), (BayesColumns, count_bayes)):
        ours = columns(counted).fit(train, rude[train]).transform(np.arange(60))
        theirs = vectoriser().fit(texts[train], rude[train]).transform(texts)
        assert ours.shape == theirs.shape and abs(ours - theirs).max() < 1e-12


def test_all_videos_alone_are_the_stack_of_experts(data, predictions):
    parts, videos = fold_parts(data, 0), data.videos
    model = CombinedClassifier('Stack').fit(videos[parts['train']], val=videos[parts['val']])
    own = predictions.query("train_condition == 'Vid-FT' and share == 1 and fold == 0 and part == 'test'").set_index('clip_id')
    expected = model.predict_proba(videos[parts['test']])[:, 1]
    assert np.allclose(own.prob.loc[videos.ids[parts['test']]], expected) and np.isclose(own.threshold.iloc[0], model.threshold_)


def test_shares_are_nested_and_stratified():
    rows, labels, groups = np.arange(80), np.arange(80) % 5 == 0, np.arange(80)//2
    found = [set(draw_share(rows, labels.astype(int), groups, s, [3, 0])) for s in (.1, .25, .5, 1.)]
    assert found[0] < found[1] < found[2] < found[3] == set(rows)
    for some in found: assert all((r ^ 1) in some for r in some), 'a group is torn'
    assert labels[sorted(found[0])].any() and found[0] != set(draw_share(rows, labels.astype(int), groups, .1, [4, 0]))


def test_no_video_label_reaches_a_condition_without_videos(sides, predictions):
    videos, memes, labels = sides
    flipped = join_sides(dataclasses.replace(videos, labels=1 - videos.labels), memes, labels)
    columns = ['prob', 'threshold']
    before, after = (t[t.share == 0].set_index(KEYS)[columns].sort_index() for t in (predictions, study_transfer(flipped, TransferSettings((1.,)))))
    pd.testing.assert_frame_equal(before, after)


def test_no_test_label_reaches_its_fold(sides, predictions):
    videos, memes, labels = sides
    test = videos.split[0] == 'test'
    shuffled = videos.labels.copy()
    shuffled[test] = np.random.default_rng(1).permutation(shuffled[test])
    other = study_transfer(join_sides(dataclasses.replace(videos, labels=shuffled), memes, labels), dataclasses.replace(SETTINGS, draws=1))
    columns = ['prob', 'threshold', 'threshold_tuned']
    before, after = (t[(t.fold == 0) & (t.seed == 0)].set_index(KEYS)[columns].sort_index() for t in (predictions, other))
    pd.testing.assert_frame_equal(before, after)


def test_the_claims_hold_where_they_are_built_in(predictions):
    found = transfer_differences(predictions, 200).set_index(['a', 'share_a', 'b', 'metric'])
    reannotated = found.loc[('RM-FT', 0., 'OM-FT', 'auroc')]
    assert reannotated.low > .2 and reannotated.p_holm < .2
    assert found.loc[('Vid+RM-FT', .5, 'Vid-FT', 'auroc')].delta > 0


def test_rows_are_what_the_interface_says(predictions):
    rows = summarise_transfer(predictions, [], 50)['rows']
    assert [r['condition'] for r in rows if r['share'] in (None, 1.)] == list(CONDITIONS)
    for r in rows:
        assert {'mean', 'low', 'high'} == r['macro_f1'].keys() == r['auroc'].keys()
        assert (r['share'] is None) == (r['n_videos'] == 0) and ('M-FT' in r['condition']) == (r['n_memes'] > 0)
        assert (r['p_holm'] is None) == (r['condition'] == 'Vid-FT') == (r['delta_vs_vid_ft'] is None)


def test_quoted_memes_are_not_trained_on(sides):
    videos, memes, labels = sides
    texts = memes.texts.copy()
    texts[:2] = videos.texts[0], ' '.join(videos.texts[1].split()[:9])
    data = join_sides(videos, dataclasses.replace(memes, texts=texts), labels)
    assert data.quoted.tolist() == [True, True, *[False]*148]
    used = np.concatenate([meme_rows(data, 'OM', part)[0] for part in ('train', 'val')])
    assert len(used) == 148 and not {90, 91} & set(used)
    assert not find_quoted(words_of(['a b']), words_of(['a b c'])).any()


def test_a_copy_of_a_test_video_is_not_trained_on(sides):
    videos, memes, labels = sides
    test, train = (np.flatnonzero(videos.split[0] == p)[0] for p in ('test', 'train'))
    texts = videos.texts.copy()
    texts[train] = 'listen: ' + texts[test]
    parts = fold_parts(join_sides(dataclasses.replace(videos, texts=texts), memes, labels), 0)
    assert train not in np.concatenate([parts['train'], parts['val']]) and test in parts['test']


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    "A table of memes and one of videos."
    folder = tmp_path_factory.mktemp('tables')
    memes = make_memes(folder/'memes', 60)
    found = pd.read_csv(make_memes(folder/'more', 90, seed=1), keep_default_na=False)
    found.rename(columns=dict(majority_voting='label'))[['id', 'text', 'label']].to_csv(folder/'videos.csv', index=False)
    return memes, folder/'videos.csv'


def test_command(hatemm, tables, tmp_path):
    memes, videos = tables
    given = ('transfer', '--memes', memes, '--videos', videos, '--encoder', '', '--shares', '0.6,1', '--draws', 1)
    done = hatemm(*given, '--out', tmp_path/'out', '--json', '-')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {r['condition'] for r in result['rows']} == set(CONDITIONS) and len(result['rows']) == 9
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['bars.png', 'curves.png', 'predictions.parquet', 'transfer.json']
    assert any('prior alone' in note for note in result['notes'])
    printed = hatemm(*given, '--label-from', 'original', '--shares', 1)
    assert printed.returncode == 0 and 'RM-FT' not in printed.stdout and 'positive means' in printed.stdout


@pytest.mark.parametrize('change, options, words', [
    (dict(drop='majority_voting'), (), 'majority_voting'),
    ({}, ('--label-from', 'guess'), 'label_from is'),
    ({}, ('--shares', '0.02,1'), 'take larger shares'),
    ({}, ('--shares', 'all'), '--shares all'),
    ({}, ('--shares', '2'), 'at most 1'),
    ({}, ('--videos', 'own.npz'), 'give --text FILE'),
    (dict(label='odd'), (), 'transfer takes two'),
    (dict(test='test'), (), 'every meme is of the part test')])
def test_bad_input_is_one_line(tables, tmp_path, change, options, words):
    table, rows = (pd.read_csv(file, keep_default_na=False) for file in tables)
    memes, videos = tmp_path/'memes.csv', tmp_path/'videos.csv'
    if 'drop' in change: table = table.drop(columns=change['drop'])
    if 'test' in change: table['type'] = 'test'
    if 'label' in change: rows['label'] = rows.label.astype(str).where(rows.index > 5, change['label'])
    table.to_csv(memes, index=False)
    rows.to_csv(videos, index=False)
    np.savez(tmp_path/'own.npz', ids=rows.id.to_numpy(str), labels=np.arange(90) % 2, split=np.full((1, 90), 'train'), sound=np.ones((90, 2)))
    options = [str(tmp_path/o) if o == 'own.npz' else o for o in options]
    given = ['transfer', '--memes', memes, '--videos', videos, '--encoder', '', '--draws', 1, *options]
    done = CliRunner().invoke(app, list(map(str, given)))  # `main` makes one line of it, which test_cli sees
    assert isinstance(done.exception, InputError), done.output
    assert words in str(done.exception) and len(str(done.exception).splitlines()) == 1


def test_labels_of_people_alone(tables):
    memes, labels = read_meme_labels(tables[0], 'human')
    assert 0 < (~np.isnan(labels['RM'])).sum() < len(memes) == (~np.isnan(labels['OM'])).sum()


def test_real_words_beat_chance(shared):
    folder = shared/'data'
    data, _ = load_sides(folder/'memes/fhm_aligned_with_hatemm.csv', folder/'hatemm/hatemm_bert_mfcc.npz',
                         folder/'hatemm/hatemm_vosk_transcripts.json', encoder='')
    data.videos.split = data.videos.split[2:3]
    rows = summarise_transfer(study_transfer(data, TransferSettings((1.,))), [], 20)['rows']
    auroc = {r['condition']: r['auroc']['mean'] for r in rows}
    assert min(auroc['OM-FT'], auroc['RM-FT']) > .74 and auroc['Vid-FT'] > .81


def coloured(n):
    from hatemm_clip.vlm import Item
    labels = np.arange(n) % 2
    return [Item(f'nothing {i}', lambda r=255*l: [np.full((28, 28, 3), (r, 0, 255 - r), np.uint8)]) for i, l in enumerate(labels)], labels


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('make', [tiny_llama, tiny_llava], ids=['llama', 'llava'])
def test_adapters_learn_and_the_rest_stays(make, dtype):
    from hatemm_clip.vlm import add_adapters, finetune_vlm, predict_vlm, VlmSettings
    torch.manual_seed(0)
    model, processor = make()
    model = model.to(dtype)
    model.get_output_embeddings().weight.data *= 10
    before = {n: p.clone() for n, p in model.named_parameters()}
    items, labels = coloured(8)
    settings = VlmSettings(lr=1e-2, epochs=3, accumulate=4)
    model = add_adapters(model, settings)
    losses = finetune_vlm(model, processor, items, labels, DEFINITIONS['hatemm'], settings)
    probs = predict_vlm(model, processor, items, DEFINITIONS['hatemm'])
    assert losses[-1] < losses[0] and ((0 < probs) & (probs < 1)).all()
    changed = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed and all('lora' in n and 'language_model' in n for n in changed)
    frozen = {n: p for n, p in model.get_base_model().named_parameters() if 'lora' not in n}
    assert all(torch.equal(p, before[n.replace('.base_layer', '')]) for n, p in frozen.items())


def test_a_large_model_enters_the_same_table(sides, predictions):
    from hatemm_clip.vlm import study_vlm, VlmSettings, VlmStudy
    videos, memes, labels = sides
    few, some = np.arange(18), np.arange(24)
    data = join_sides(dataclasses.replace(videos[few], split=deal_folds(videos.labels[few], videos.groups[few], 3, 0)), memes[some],
                      {k: v[some] for k, v in labels.items()})
    study = VlmStudy(tiny_llava, 'tiny', data, coloured(18)[0], coloured(24)[0], DEFINITIONS['hatemm'], VlmSettings(accumulate=12))
    found = study_vlm(study)
    assert set(found.columns) == set(predictions.columns) and found.prob.notna().all()
    rows = summarise_transfer(pd.concat([predictions, found]), [], 20)['rows']
    assert {r['model'] for r in rows} == {'tiny', data.name} and len(rows) == 9 + 6
