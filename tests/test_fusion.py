import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hatemm_clip.data import InputError
from hatemm_clip.embed import read_features
from hatemm_clip.fusion import (HEADS, FusionClassifier, Member, Rows, check_training, crossval, explain, fit_bundle, fitting_heads, load_bundle, make_features,
                                make_head, predict_members, save_bundle, tfidf_features, train_members)
from hatemm_clip.metrics import summarise_runs

HATEMM = Path(__file__).resolve().parents[2]/'shared/data/hatemm/hatemm_bert_mfcc.npz'
real = pytest.mark.skipif(not HATEMM.is_file(), reason='needs ../shared/data/hatemm')
names = pytest.mark.parametrize('name', HEADS)


@pytest.fixture(scope='module')
def data(): return make_features(60, 'xor', frames=6, dim=8)


@pytest.fixture(scope='module')
def models(data):
    "One briefly trained model a head."
    train, val = data[data.split[0] == 'train'], data[data.split[0] == 'val']
    return {name: FusionClassifier(name, hidden=16, epochs=3).fit(train, val=val) for name in HEADS}


def padded(features, more=5):
    "The same features, padded further, with junk under the masks."
    longer = lambda a, fill: np.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
    masks = {m: longer(a, False) for m, a in features.masks.items()}
    arrays = {m: np.where(masks[m][..., None], longer(a, 0), 1e3).astype(np.float32) for m, a in features.arrays.items()}
    return dataclasses.replace(features, arrays=arrays, masks=masks)


def without_text(features, rows):
    mask = features.masks['text'].copy()
    mask[rows] = False
    return dataclasses.replace(features, masks={**features.masks, 'text': mask})


@names
def test_padding_batch_and_masked(models, data, name):
    model, few = models[name], without_text(data[:12], [1, 3])
    probs = model.predict_proba(few)
    assert np.isfinite(probs).all() and np.allclose(probs.sum(1), 1)
    np.testing.assert_allclose(model.predict_proba(padded(few)), probs, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([model.predict_proba(few[[i]]) for i in range(12)]), probs, atol=1e-5)


@names
def test_order_of_frames(models, data, name):
    full = dataclasses.replace(data, masks={m: np.ones_like(a) for m, a in data.masks.items()})[:12]
    turned = dataclasses.replace(full, arrays={**full.arrays, 'image': full.arrays['image'][:, ::-1].copy()})
    change = np.abs(models[name].predict_proba(full) - models[name].predict_proba(turned)).max()
    if name in ('FrameTransformer', 'RandomFrame'): assert change > 1e-5
    else: assert change < 1e-5


@names
def test_bundle_and_explanation(models, data, name, tmp_path):
    model = models[name]
    loaded = load_bundle(save_bundle(tmp_path/'bundle', model))
    np.testing.assert_array_equal(loaded.predict_proba(data), model.predict_proba(data))
    why = explain(loaded, data[[0]])
    assert why['base'] + sum(why['modalities'].values()) == pytest.approx(why['prob'], abs=1e-9)
    if hasattr(HEADS[name], 'left_out'): assert why['modalities'].get(HEADS[name].left_out, 0) == pytest.approx(0, abs=1e-9)


class Config:
    head, hidden, dropout, epochs, patience, batch_size, mixup, label_smoothing, class_weight, seed = 'BinaryClassifier', 8, 0., 4, 2, 8, .4, .1, 'balanced', 0


@pytest.mark.parametrize('name', [n for n in HEADS if n != 'GatedFusion'])  # GatedFusion draws its modality dropout in common
def test_batched_is_one_by_one(data, name):
    class Setting(Config): head = name
    rows = Rows(HEADS[name].prepare(without_text(data, [2, 5, 40])))
    parts = [{p: np.flatnonzero(s == p) for p in ('train', 'val', 'test')} for s in data.split[:2]]
    members = [Member(f['train'][:35 - 9 * k], f['val'][:9 + k], s, k, lr=1e-3 * (k + 1)) for k, f in enumerate(parts) for s in (0, 1)]
    together, alone = train_members(rows, data.labels, members, Setting), [train_members(rows, data.labels, [m], Setting) for m in members]
    np.testing.assert_array_equal(together.epoch, [a.epoch[0] for a in alone])
    test = np.stack([parts[m.fold]['test'][:11] for m in members])
    for i, one in enumerate(alone):
        np.testing.assert_allclose(predict_members(together, rows, test)[i], predict_members(one, rows, test[i][None])[0], atol=2e-3)
        np.testing.assert_allclose(together.val_loss[i], one.val_loss[0], atol=1e-3)


@names
def test_gradients_reach_every_parameter(data, name):
    torch.manual_seed(0)
    head = make_head(name, dict(image=8, text=8), hidden=8, dropout=0.).train()
    few = head.prepare(without_text(data[:10], [0, 1]))
    few = dataclasses.replace(few, masks={**few.masks, 'image': few.masks['image'] & (np.arange(10) > 1)[:, None]})
    tensors = lambda f: ({m: torch.as_tensor(a) for m, a in f.arrays.items()}, {m: torch.as_tensor(a) for m, a in f.masks.items()})
    if name == 'KNNHead': head.remember(*tensors(head.prepare(data[20:])), torch.eye(2)[data.labels[20:]])
    F.cross_entropy(head(*tensors(few)), torch.as_tensor(few.labels)).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_more_classes_than_two(data):
    topics = dataclasses.replace(data, labels=np.arange(60) % 3, label_names=['a', 'b', 'c'])
    predictions = crossval(dataclasses.replace(topics, split=np.tile(np.array(['train', 'train', 'val', 'test'])[np.arange(60) // 3 % 4], (1, 1))), ['MeanLinear', 'KNNHead'], ['image'], 2, grid={}, epochs=2)
    assert all(len(p) == 3 for p in predictions.prob)
    assert len(summarise_runs(predictions, ['macro_f1'], n=10)) == 2


def test_strong_mixup_and_absent_modality_train(data):
    silent = without_text(data, np.arange(0, 60, 2))
    model = FusionClassifier('MultiModalClassifier', mixup=1., epochs=3).fit(silent)
    assert np.isfinite(model.predict_proba(silent)).all()


def test_tfidf_sees_the_training_part_only():
    texts = ['tram stops'] * 10 + ['tram stops later'] * 10 + ['qqq zzz'] * 5
    found = tfidf_features(texts, 3)(np.arange(20))
    assert not found[20:].any() and found[:20].any(1).all()


def test_nothing_of_the_test_part_is_used(data):
    "Other features and labels in the test part: the same choices on val."
    test = data.split[0] == 'test'
    other = dataclasses.replace(data, split=data.split[:1], labels=np.where(test, 1 - data.labels, data.labels),
                                arrays={m: np.where(test[:, None, None], 9., a).astype(np.float32) for m, a in data.arrays.items()})
    kept = dataclasses.replace(data, split=data.split[:1])
    grid = dict(lr=[1e-3, 1e-2])
    val = [p[p.part == 'val'].reset_index(drop=True) for p in (crossval(f, 'KNNHead', ['image+text'], 2, grid=grid, epochs=4) for f in (kept, other))]
    assert val[0].equals(val[1])


@pytest.mark.parametrize('change, words', [
    (lambda f: dataclasses.replace(f, masks={**f.masks, 'text': np.zeros_like(f.masks['text'])}), 'text is absent from every clip'),
    (lambda f: dataclasses.replace(f, labels=f.labels.astype(str)), 'expected int'),
    (lambda f: f[[0]], '1 sample'),
    (lambda f: f[np.r_[0, np.arange(20)]], 'is there twice'),
    (lambda f: dataclasses.replace(f, arrays={**f.arrays, 'image': f.arrays['image'] * np.inf}), 'clip v0000: image holds NaN or inf')])
def test_bad_input_is_one_line(data, change, words):
    with np.errstate(invalid='ignore'), pytest.raises(InputError, match=words) as error: FusionClassifier(epochs=1).fit(change(data))
    assert '\n' not in str(error.value)


def test_unknown_names(data):
    with pytest.raises(InputError, match='head .Transformer. is unknown'): FusionClassifier('Transformer').fit(data)
    with pytest.raises(InputError, match='audio'): FusionClassifier(modalities='image+audio').fit(data)
    with pytest.raises(InputError, match='unknown'): crossval(data, 'Transformer', grid={})


@real
def test_hatemm_both_modalities_beat_either():
    features = read_features(HATEMM)
    first = dataclasses.replace(features, split=features.split[:1])
    predictions = crossval(first, 'GatedFusion', seeds=1, grid={}, lr=1e-3, epochs=15)
    auroc = summarise_runs(predictions, ['auroc'], n=20).set_index('run')['mean']
    assert auroc['GatedFusion:bert+mfcc'] > .75
    assert auroc['GatedFusion:bert+mfcc'] > auroc[['GatedFusion:bert', 'GatedFusion:mfcc']].max()


@real
def test_all_heads_take_bert_and_mfcc():
    features = read_features(HATEMM)
    heads = fitting_heads(['bert', 'mfcc'])
    assert len(heads) == 11
    predictions = crossval(dataclasses.replace(features, split=features.split[:1]), 'all', ['bert+mfcc'], 1, grid={}, epochs=3)
    assert predictions.run.nunique() == 11 and (summarise_runs(predictions, ['auroc'], n=10)['mean'] > .6).all()
