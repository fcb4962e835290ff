import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hatemm_clip.base import InputError
from hatemm_clip.data import LeakError
from hatemm_clip.features import read_features
from hatemm_clip.heads import HEADS, LEFT_OUT, fitting_heads, make_head, pool_features
from hatemm_clip.fusion import REFERENCES, best_head, blend_runs, choose_runs, combine_heads, compare_protocols, crossval, crossval_folds, cut_clips, modality_sets, run_name, val_losses, with_protocol
from hatemm_clip.classifier import FusionClassifier, explain, load_bundle, save_bundle
from hatemm_clip.members import ClipTensors, MemberPlan, TrainSettings, predict_members, take_members, train_members
from hatemm_clip.compare import accuracy_by, compare_heads, plot_heads
from hatemm_clip.bench import bench_fusion
from hatemm_clip.features import find_leak, make_features
from hatemm_clip.experts import KINDS
from hatemm_clip.compare import summarise_runs

HATEMM = Path(__file__).resolve().parents[2]/'shared/data/hatemm/hatemm_bert_mfcc.npz'
real = pytest.mark.skipif(not HATEMM.is_file(), reason='needs ../shared/data/hatemm')
names = pytest.mark.parametrize('name', HEADS)


@pytest.fixture(scope='module')
def data(): return make_features(60, 'xor', frames=6, dim=8)


@pytest.fixture(scope='module')
def folds(data):
    "The same clips with the first two folds only."
    return dataclasses.replace(data, split=data.split[:2])


@pytest.fixture(scope='module')
def permuted():
    "Clips whose labels have nothing to do with them."
    features = make_features(720, 'text', frames=3, dim=4)
    return dataclasses.replace(features, labels=np.random.default_rng(0).permutation(features.labels))


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
    if name in LEFT_OUT: assert why['modalities'].get(LEFT_OUT[name], 0) == pytest.approx(0, abs=1e-9)


SETTINGS = TrainSettings(hidden=8, dropout=0., epochs=4, patience=2, batch_size=13, mixup=.4, label_smoothing=.1)


@names
def test_batched_is_one_by_one(data, name, monkeypatch):
    "K folds x S seeds at once are the same networks as one at a time, but for the dropout, which they draw in common."
    settings = dataclasses.replace(SETTINGS, head=name)
    monkeypatch.setattr('hatemm_clip.heads._MODALITY_DROPOUT', 0.)
    rows = ClipTensors(HEADS[name].prepare(without_text(data, [2, 5, 40])))
    parts = [{p: np.flatnonzero(s == p) for p in ('train', 'val', 'test')} for s in data.split[:2]]
    members = [MemberPlan(f['train'][:35 - 9 * k], f['val'][:9 + k], s, k, lr=1e-3 * (k + 1)) for k, f in enumerate(parts) for s in (0, 1)]
    together, alone = train_members(rows, data.labels, members, settings), [train_members(rows, data.labels, [m], settings) for m in members]
    np.testing.assert_array_equal(together.epoch, [a.epoch[0] for a in alone])
    test = np.stack([parts[m.fold]['test'][:11] for m in members])
    for i, one in enumerate(alone):
        np.testing.assert_allclose(predict_members(together, rows, test)[i], predict_members(one, rows, test[i][None])[0], atol=5e-4)
        np.testing.assert_allclose(together.val_loss[i], one.val_loss[0], atol=1e-4)


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


@pytest.mark.parametrize('name', [n for n in HEADS if n != 'KNNHead'])  # every clip is KNNHead's nearest, and it may not ask itself
def test_constant_features_give_the_prior(data, name):
    few, labels = data[:20], (np.arange(20) % 5 < 2).astype(int)
    constant = dataclasses.replace(few, labels=labels, arrays={m: np.ones_like(a) for m, a in few.arrays.items()}, masks={m: np.ones_like(a) for m, a in few.masks.items()})
    model = FusionClassifier(name, class_weight=None, dropout=0., epochs=60, lr=.05, hidden=8, batch_size=20).fit(constant)
    np.testing.assert_allclose(model.predict_proba(constant[:1])[0], [.6, .4], atol=.03)


@names
def test_permuted_labels_give_chance(permuted, name):
    from sklearn.metrics import roc_auc_score
    part = {p: permuted[permuted.split[0] == p] for p in ('train', 'val', 'test')}
    model = FusionClassifier(name, hidden=8, epochs=4, batch_size=108).fit(part['train'], val=part['val'])
    assert .36 < roc_auc_score(part['test'].labels, model.predict_proba(part['test'])[:, 1]) < .64  # three standard errors of 144 clips


@names
def test_batches_of_any_size_give_the_same_answer(models, data, name):
    rows = ClipTensors(HEADS[name].prepare(data))
    members = models[name].members_
    scores = [predict_members(members, rows, np.arange(60)[None], block=block) for block in (1, 7, 4096)]
    for other in scores[1:]: np.testing.assert_allclose(other, scores[0], atol=1e-5)


def test_history_holds_every_epoch(data):
    members = train_members(ClipTensors(data), data.labels, [MemberPlan(np.arange(40), np.arange(40, 60), s) for s in range(3)], SETTINGS)
    loss = members.history['val_loss']
    assert loss.shape == (3, 4) and np.nanmin(loss, axis=1) == pytest.approx(members.val_loss)
    assert [np.nanargmin(row) + 1 for row in loss] == members.epoch.tolist()
    assert take_members(members, [1]).history['val_accuracy'].shape == (1, 4)


def test_a_start_goes_on(data):
    "The last epoch counts, the networks are those of the start, and the start itself stays as it was."
    rows, plan = ClipTensors(data), [MemberPlan(np.arange(40), np.arange(40, 60), s) for s in range(3)]
    begun = train_members(rows, data.labels, plan, SETTINGS)
    before, more = begun.params.clone(), [dataclasses.replace(m, train=np.arange(5, 45), val=np.arange(0)) for m in plan]
    longer = train_members(rows, data.labels, more, dataclasses.replace(SETTINGS, epochs=3), start=begun)
    assert torch.equal(begun.params, before) and (longer.epoch == begun.epoch + 3).all()
    assert 0 < (longer.params - before).abs().max() < .1
    alone = train_members(rows, data.labels, more[1:2], dataclasses.replace(SETTINGS, epochs=3), start=take_members(begun, 1))
    np.testing.assert_allclose(longer.params[1], alone.params[0], atol=1e-4)


def test_more_members_than_one_block(data, monkeypatch):
    rows, plan = ClipTensors(data), [MemberPlan(np.arange(40), np.arange(40, 60), s) for s in range(3)]
    whole = train_members(rows, data.labels, plan, SETTINGS)
    monkeypatch.setattr('hatemm_clip.members._MOST_MEMBERS', 2)
    np.testing.assert_allclose(train_members(rows, data.labels, plan, SETTINGS).params, whole.params, atol=1e-4)
    longer = train_members(rows, data.labels, plan, SETTINGS, start=whole)
    assert longer.params.shape == whole.params.shape and (longer.epoch > whole.epoch).all()


@pytest.mark.parametrize('policy, least', [('recall>=0.9', .9), ('recall >= 1', 1.), ('precision>=0.6', .6), ('balanced_accuracy', 0)])
@pytest.mark.parametrize('calibration', ['temperature', 'isotonic'])
def test_threshold_policies(data, policy, least, calibration, tmp_path):
    train, val = data[data.split[0] == 'train'], data[data.split[0] == 'val']
    model = FusionClassifier(hidden=8, epochs=20, threshold=policy, calibration=calibration).fit(train, val=val)
    decided, hateful = model.predict(val) == 1, val.labels == 1
    reached = decided[hateful].mean() if policy.startswith('recall') else hateful[decided].mean()
    assert reached >= least
    loaded = load_bundle(save_bundle(tmp_path/'bundle', model))
    np.testing.assert_array_equal(loaded.predict_proba(data), model.predict_proba(data))
    assert (loaded.threshold, loaded.calibration, loaded.threshold_) == (policy, calibration, model.threshold_)


def test_a_dear_miss_lowers_the_threshold(folds):
    predictions = [crossval(folds, 'MeanLinear', ['image+text'], 1, grid={}, epochs=8, threshold=f'cost={c}') for c in (.2, 1, 5)]
    assert predictions[0].prob.equals(predictions[2].prob)
    means = [p.threshold.mean() for p in predictions]
    assert means[0] > means[1] > means[2]
    combined = combine_heads(predictions[2], threshold='cost=5')
    rows = combined[combined.run == 'AllHeads:image+text'].set_index(['fold', 'clip_id', 'part'])
    known = predictions[2].set_index(['fold', 'clip_id', 'part'])
    np.testing.assert_allclose(rows.threshold, known.threshold.loc[rows.index], atol=.05)


@pytest.mark.parametrize('wrong', [dict(threshold='recall>0.9'), dict(threshold='recall>=1.5'), dict(threshold='cost=-1'), dict(calibration='platt')])
def test_a_policy_that_does_not_exist_is_one_line(data, wrong):
    with pytest.raises(InputError, match='is unknown; choose from') as error: crossval(data, 'LogisticRegression', ['image'], 1, **wrong)
    assert '\n' not in str(error.value)


def test_isotonic_calibration_takes_two_classes(data):
    topics = dataclasses.replace(data, labels=np.arange(60) % 3, label_names=['a', 'b', 'c'])
    with pytest.raises(InputError, match="'isotonic' takes two classes"): FusionClassifier(calibration='isotonic').fit(topics)


def test_a_bundle_without_a_policy_loads(models, data, tmp_path):
    "Bundles of earlier versions say neither threshold policy nor calibration."
    folder = save_bundle(tmp_path/'bundle', models['LateFusion'])
    config = json.loads((folder/'config.json').read_text())
    for name in ('threshold', 'calibration'): del config['params'][name]
    (folder/'config.json').write_text(json.dumps(config))
    np.testing.assert_array_equal(load_bundle(folder).predict(data), models['LateFusion'].predict(data))


def test_sets_of_modalities():
    assert modality_sets(['text', 'image']) == [['image', 'text'], ['image'], ['text']]
    assert modality_sets(['bert']) == [['bert']]
    assert modality_sets(['image', 'text'], ['text+image', ['text']]) == [['image', 'text'], ['text']]
    with pytest.raises(InputError, match='give a list of sets'): modality_sets(['image'], 'image')


def test_runs_in_processes_are_the_same(folds):
    alone, together = (crossval(folds, ['MeanLinear', 'LateFusion'], ['image+text'], 1, grid={}, epochs=2, jobs=jobs) for jobs in (1, 2))
    assert alone.equals(together)


def test_protocols(data):
    videos = dataclasses.replace(data, video_ids=np.array([f'v{i // 3}' for i in range(60)]), labels=(np.arange(60) // 3 % 2))
    torn = lambda features: max(len(set(part[features.video_ids == g])) for part in features.split for g in features.video_ids)
    assert torn(with_protocol(videos, 'grouped_5fold')) == 1 < torn(with_protocol(videos, 'leaky_snippet'))
    assert with_protocol(videos, 'grouped_4fold').split.shape == (4, 60)
    import pandas as pd
    table = pd.DataFrame(dict(protocol='own', fold=0, video_id=[f'v{i}' for i in range(20)], group='g', part=['train', 'val', 'test', 'train'] * 5))
    assert (with_protocol(videos, 'own', table).split[0][:6] == ['train'] * 3 + ['val'] * 3).all()
    with pytest.raises(InputError, match="protocol 'mine' is unknown; choose from own, grouped_5fold, leaky_snippet"): with_protocol(videos, 'mine', table)


def test_a_leak_flatters(data):
    looks = np.random.default_rng(0).normal(size=(40, 8))
    videos = make_features(160, 'xor', frames=2, dim=8).only(['image'])
    owner = np.arange(160) // 4
    videos = dataclasses.replace(videos, video_ids=owner.astype(str), labels=owner % 2, arrays=dict(image=(videos.arrays['image'] * 0 + looks[owner][:, None]).astype(np.float32)))
    table = compare_protocols(videos, seeds=1, grid={}, epochs=6, lr=1e-2)
    assert table.delta['auroc'] > .2 and table.low['auroc'] > 0


def test_clips_are_cut_by_time():
    features = make_features(10, 'xor', frames=8, dim=2)
    features = dataclasses.replace(features, masks={m: np.ones_like(a) for m, a in features.masks.items()}, times={m: np.tile(np.arange(a.shape[1], dtype=np.float32), (10, 1)) for m, a in features.masks.items()})
    cut = cut_clips(features, length=4., stride=2.)
    first = cut.video_ids == features.ids[0]
    assert [np.flatnonzero(m).tolist() for m in cut.masks['image'][first]] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]


def test_the_choice_of_a_head_ignores_the_test_part(folds):
    predictions = crossval(folds, ['MeanLinear', 'BinaryClassifier'], ['image+text'], 2, grid={}, epochs=4)
    other = predictions.assign(label=np.where(predictions.part == 'test', 1 - predictions.label, predictions.label))
    assert choose_runs(predictions)[['fold', 'clip_id', 'prob']].equals(choose_runs(other)[['fold', 'clip_id', 'prob']])
    losses = val_losses(predictions).groupby('fold').min()
    assert len(losses) == 2 and (losses > 0).all()


def test_a_blend_averages(folds):
    predictions = crossval(folds, ['MeanLinear', 'LateFusion'], ['image+text'], 1, grid={}, epochs=3)
    runs = [run_name(h, ['image', 'text']) for h in ('MeanLinear', 'LateFusion')]
    same = blend_runs(predictions, [runs[0]] * 2, 'Blend:image+text')
    order = ['fold', 'seed', 'part', 'clip_id']
    first = predictions[predictions.run == runs[0]].sort_values(order)
    assert np.corrcoef(same.sort_values(order).prob.rank(), first.prob.rank())[0, 1] > .99
    assert set(blend_runs(predictions, runs, 'Blend:image+text').columns) == set(predictions.columns)


def test_accuracy_by_kind(data):
    predictions = crossval(data, 'MeanLinear', ['image+text'], 2, grid={}, epochs=2)
    kinds = {i: 'even' if n % 2 == 0 else 'odd' for n, i in enumerate(data.ids)}
    table = accuracy_by(predictions, kinds, n=50).set_index('kind')
    test = predictions[predictions.part == 'test']
    right = (test.prob >= test.threshold).astype(int) == test.label
    assert table.accuracy['even'] == pytest.approx(right[test.clip_id.map(kinds) == 'even'].mean())
    assert table.videos.tolist() == [30, 30] and (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()


def test_table_and_picture(data):
    predictions = crossval(dataclasses.replace(data, split=data.split[:1]), ['MeanLinear', 'BinaryClassifier'], seeds=2, grid={}, epochs=2)
    figure = plot_heads(compare_heads(predictions, n=20))
    assert [len(ax.get_yticklabels()) for ax in figure.axes] == [2, 2, 2]


def test_references_are_scikit_learn(data):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    features = without_text(dataclasses.replace(data, split=data.split[:1]), [1, 3, 30])
    predictions = crossval(features, ['LogisticRegression', 'SVM'], ['image'], 2)
    assert predictions.groupby(['run', 'seed']).size().unique().tolist() == [24]
    one = predictions.query("run == 'LogisticRegression:image' and seed == 1 and fold == 0")
    x, split = pool_features(features).arrays['image'][:, 0], features.split[0]
    scaler = StandardScaler().fit(x[split == 'train'])
    known = [LogisticRegression(C=C, class_weight='balanced', max_iter=2000).fit(scaler.transform(x[split == 'train']), features.labels[split == 'train']) for C in REFERENCES['LogisticRegression']]
    logits = np.log(one.prob / (1 - one.prob)) * one.temperature
    theirs = [model.decision_function(scaler.transform(x[np.r_[np.flatnonzero(split == 'val'), np.flatnonzero(split == 'test')]])) for model in known]
    assert min(np.abs(logits - t).max() for t in theirs) < 1e-6
    both = crossval(features, 'SVM', ['image+text'], 1)  # clips without text are imputed
    assert np.isfinite(both.prob).all()


def test_a_reference_takes_more_classes(data):
    topics = dataclasses.replace(data, labels=np.arange(60) % 3, label_names=['a', 'b', 'c'])
    split = np.array(['train', 'train', 'val', 'test'])[np.arange(60) // 3 % 4][None]
    predictions = crossval(dataclasses.replace(topics, split=split), ['LogisticRegression', 'SVM'], ['image'], 1)
    assert all(len(p) == 3 and sum(p) == pytest.approx(1) for p in predictions.prob)


def test_combined_runs_and_the_best_head(folds):
    predictions = crossval(folds, ['LogisticRegression', 'MeanLinear', 'BinaryClassifier'], ['image+text'], 2, grid={}, epochs=3)
    combined = combine_heads(predictions)
    assert list(combined.run.unique()[3:]) == ['Chosen:image+text', 'AllHeads:image+text']
    assert best_head(combined, 'image+text') in ('MeanLinear', 'BinaryClassifier')


def test_folds_may_have_features_of_their_own(data):
    some = dataclasses.replace(data, split=data.split[:3])
    shared = crossval(some, 'MeanLinear', ['image'], 1, grid={}, epochs=3)
    each = [dataclasses.replace(data, split=data.split[[k]], provenance=dict(fold=k)) for k in range(3)]
    own = crossval_folds(each, 'MeanLinear', ['image'], 1, grid={}, epochs=3)
    assert own[['fold', 'clip_id', 'part']].equals(shared[['fold', 'clip_id', 'part']])
    np.testing.assert_allclose(own.prob, shared.prob, atol=1e-3)


def test_bench_keeps_the_contract():
    result = bench_fusion(seeds=2, epochs=1, clips=40)
    assert result['name'] == 'fusion' and set(result['ratios']) == {'fusion_vs_seed'} and result['ratios']['fusion_vs_seed'] > 0
    assert all(set(row) == {'what', 'value', 'unit'} for row in result['rows'])


def test_more_classes_than_two(data):
    topics = dataclasses.replace(data, labels=np.arange(60) % 3, label_names=['a', 'b', 'c'])
    predictions = crossval(dataclasses.replace(topics, split=np.tile(np.array(['train', 'train', 'val', 'test'])[np.arange(60) // 3 % 4], (1, 1))), ['MeanLinear', 'KNNHead'], ['image'], 2, grid={}, epochs=2)
    assert all(len(p) == 3 for p in predictions.prob)
    assert len(summarise_runs(predictions, ['macro_f1'], n=10)) == 2


def test_strong_mixup_and_absent_modality_train(data):
    silent = without_text(data, np.arange(0, 60, 2))
    model = FusionClassifier('MultiModalClassifier', mixup=1., epochs=3).fit(silent)
    assert np.isfinite(model.predict_proba(silent)).all()


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
    (lambda f: dataclasses.replace(f, arrays={**f.arrays, 'image': f.arrays['image'] * np.inf}), 'clip v0000: image holds NaN or inf'),
    (lambda f: dataclasses.replace(f, arrays={**f.arrays, 'text': np.where(np.arange(60)[:, None, None] == 7, np.nan, f.arrays['text']).astype(np.float32)}), 'clip v0007: text holds NaN or inf'),
    (lambda f: dataclasses.replace(f, labels=np.zeros(60, int)), 'no clip of the training part has label 1'),
    (lambda f: dataclasses.replace(f, arrays={**f.arrays, 'text': f.arrays['text'][:, 0]}), 'expected .60, T, D.')])
def test_bad_input_is_one_line(data, change, words):
    with np.errstate(invalid='ignore'), pytest.raises(InputError, match=words) as error: FusionClassifier(epochs=1).fit(change(data))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('part', ['train', 'val', 'test'])
def test_a_class_missing_from_a_part_is_one_line(data, part):
    elsewhere = 'train' if part != 'train' else ''
    split = np.where((data.labels == 1) & (data.split == part), elsewhere, data.split)
    with pytest.raises(InputError, match='fold 0') as error: crossval(dataclasses.replace(data, split=split), seeds=1, grid={})
    assert '\n' not in str(error.value)


def test_other_dimensions_than_trained(data, models):
    with pytest.raises(InputError, match='D is 5, the model was trained with 8'): models['LateFusion'].predict(make_features(12, 'xor', frames=6, dim=5))
    with pytest.raises(InputError, match='D is 8 in one set and 5 in the other'): FusionClassifier(epochs=1).fit(data, val=make_features(12, 'xor', frames=6, dim=5))
    with pytest.raises(InputError, match='the model needs image, text'): models['LateFusion'].predict(data.only(['text']))


def test_unknown_names(data):
    with pytest.raises(InputError, match='head .Transformer. is unknown'): FusionClassifier('Transformer').fit(data)
    with pytest.raises(InputError, match='audio'): FusionClassifier(modalities='image+audio').fit(data)
    with pytest.raises(InputError, match='unknown'): crossval(data, 'Transformer', grid={})


@real
def test_hatemm_both_modalities_beat_either():
    features = read_features(HATEMM)
    first = dataclasses.replace(features, split=features.split[:1])
    predictions = crossval(first, 'GatedFusion', seeds=1, grid={}, lr=1e-3, epochs=8)
    auroc = summarise_runs(predictions, ['auroc'], n=20).set_index('run')['mean']
    assert auroc['GatedFusion:bert+mfcc'] > .75
    assert auroc['GatedFusion:bert+mfcc'] > auroc[['GatedFusion:bert', 'GatedFusion:mfcc']].max()


@real
def test_all_heads_take_bert_and_mfcc(monkeypatch):
    trees = KINDS['trees']
    monkeypatch.setitem(KINDS, 'trees', trees._replace(make=lambda leaf: trees.make(leaf).set_params(n_estimators=20)))
    features = read_features(HATEMM)[::4]
    heads = fitting_heads(['bert', 'mfcc'])
    assert len(heads) == 11
    predictions = crossval(dataclasses.replace(features, split=features.split[:1]), 'all', ['bert+mfcc'], 1, grid={}, epochs=2)
    assert predictions.run.nunique() == 14 and (summarise_runs(predictions, ['auroc'], n=10)['mean'] > .6).all()


def torn_in_pairs(data):
    "Neighbours are one video, and the folds know nothing of it."
    videos = np.repeat(data.ids[::2], 2)
    return dataclasses.replace(data, video_ids=videos, groups=videos)


def test_folds_that_leak_are_refused_or_marked(folds):
    from hatemm_clip.compare import crossval_summary, head_table, metric_table
    torn = torn_in_pairs(folds)
    leak = find_leak(torn)
    expected = [any(torn.video_ids[i] == torn.video_ids[j] for j in np.flatnonzero((parts != parts[i]) & (parts != '')))
                for parts in torn.split for i in np.flatnonzero(parts == 'test')]
    assert leak['share'] == np.mean(expected) > .5 and find_leak(folds) == {}
    with pytest.raises(LeakError, match=f"{leak['share']:.0%} of the test clips have a sibling") as error: crossval(torn, 'MeanLinear', ['image'], 1, grid={})
    assert leak['ids'][0] in str(error.value) and '--allow-leak' in str(error.value)
    heads = ['LogisticRegression', 'MeanLinear']
    found = combine_heads(crossval(torn, heads, ['image'], 1, grid={}, epochs=2, allow_leak=True))
    figures = [m for sets in crossval_summary(found, ['auroc'], n=20).values() for f in sets.values() for m in f.values()]
    assert len(figures) == 4 and all(f['leak'] == round(leak['share'], 4) for f in figures)
    assert all(name.endswith('(leaks)') for name in metric_table(found, ['auroc'], n=20).index) and ('auroc', 'leak') in head_table(found, ['auroc'], n=20)
    assert 'LEAK' in plot_heads(compare_heads(found, n=20))._suptitle.get_text()
    clean = crossval(folds, 'MeanLinear', ['image'], 1, grid={}, epochs=2, allow_leak=True)
    assert 'leak' not in clean and 'leak' not in crossval_summary(clean, ['auroc'], n=20)['MeanLinear']['image']['auroc']


def test_a_leak_by_group_alone_and_into_validation_alone(data):
    by_group = dataclasses.replace(torn_in_pairs(data), video_ids=data.ids)
    assert find_leak(by_group) == find_leak(torn_in_pairs(data))
    parts = np.array(['train', 'val', 'test', 'test'])[np.arange(60) % 4][None]
    assert find_leak(dataclasses.replace(torn_in_pairs(data), split=parts)) == dict(part='val', share=1., clips=15, ids=list(data.ids[::4]))
