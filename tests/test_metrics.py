"""Metrics against scikit-learn, brute force and real features."""
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as skm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hatemm_clip.base import InputError, read_table, write_table, PREDICTIONS
from hatemm_clip.metrics import BINARY_METRICS, ConstantPredictorWarning, binary_metrics, bootstrap_ci, choose_threshold, expected_calibration_error, fit_temperature, multiclass_metrics, resample_videos, retrieval_metrics, retrieval_ranks, simulate_predictions, temporal_map
from hatemm_clip.compare import delong_test, paired_difference, summarise_runs

SHARED = Path(__file__).resolve().parents[2] / 'shared'
shared = pytest.mark.skipif(not SHARED.exists(), reason='needs the data beside the checkout')


@pytest.mark.parametrize('seed', range(5))
def test_binary_equals_sklearn_with_weights_and_ties(seed):
    rng = np.random.default_rng(seed)
    labels, probs, weight = rng.integers(0, 2, 150), rng.random(150).round(1), rng.random(150)
    preds, ours = probs >= .35, binary_metrics(labels, probs, .35, weight)
    assert ours['kappa'] == pytest.approx(skm.cohen_kappa_score(labels, preds, sample_weight=weight))
    assert ours['macro_f1'] == pytest.approx(skm.f1_score(labels, preds, average='macro', sample_weight=weight))
    assert ours['auroc'] == pytest.approx(skm.roc_auc_score(labels, probs, sample_weight=weight))
    table = bootstrap_ci(labels, probs, np.arange(150), threshold=.35, weight=weight, n=20)
    assert table['mean'][list(BINARY_METRICS)].to_dict() == pytest.approx(ours)


def test_resampled_rows_equal_repeated_rows():
    rng = np.random.default_rng(0)
    labels, probs, groups = rng.integers(0, 2, 60), rng.random(60).round(2), np.arange(60) // 3
    draw = resample_videos(groups, 1, 4)[0].astype(int)
    again = np.repeat(np.arange(60), draw)
    values = binary_metrics(labels[again], probs[again])
    table = bootstrap_ci(labels, probs, groups, n=1, seed=4)
    for name in BINARY_METRICS:
        if name != 'ece': assert table.low[name] == pytest.approx(values[name]), name


def test_interval_covers_the_truth():
    truth = 0.8413  # Phi(sqrt 2 / sqrt 2)
    hits = 0
    for seed in range(60):
        d = simulate_predictions(150, clips_per_video=2, seeds=1, runs={'r': 2**.5}, seed=seed)
        row = bootstrap_ci(d.label, d.prob, d.video_id, 'auroc', n=200, seed=seed).loc['auroc']
        hits += row.low <= truth <= row.high
    assert 50 <= hits <= 60


def test_undefined_is_nan_and_says_why():
    with pytest.warns(match='only label 1 occurs'):
        values = binary_metrics([1, 1], [.4, .6])
    assert np.isnan([values['auroc'], values['specificity']]).all()
    with pytest.warns(ConstantPredictorWarning, match='all 4 items 1'):
        assert binary_metrics([0, 1, 0, 1], [.7, .7, .7, .7])['auroc'] == .5


def test_constant_run_is_named():
    predictions = simulate_predictions(20, seeds=2, runs={'lazy': 1.}).assign(prob=.2)
    with pytest.warns(ConstantPredictorWarning, match='lazy'), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*undefined.*')
        summary = summarise_runs(predictions, ['accuracy', 'auroc'], n=10).set_index('metric')
    assert summary.loc['accuracy', 'mean'] == pytest.approx(.6) and summary.loc['auroc', 'mean'] == .5


def test_thresholds_of_the_table_are_used():
    predictions = simulate_predictions(80, seeds=2, runs={'r': 1.5})
    strict = summarise_runs(predictions.assign(threshold=.9), 'recall', n=10)['mean'].item()
    assert strict < summarise_runs(predictions, 'recall', n=10)['mean'].item()
    assert summarise_runs(predictions.assign(threshold=np.nan), 'recall', n=10)['mean'].item() == \
        summarise_runs(predictions, 'recall', n=10)['mean'].item()


def test_three_classes_through_a_table(tmp_path):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 90)
    prob = .5 * np.eye(3)[label] + .5 * rng.dirichlet([1, 1, 1], 90)
    table = pd.DataFrame(dict(run='r', train_condition='normal', test_condition='normal', fold=0, seed=0, part='test', label=label,
                              clip_id=[f'c{i}' for i in range(90)], video_id=[f'v{i}' for i in range(90)], prob=list(prob), weight=1.))
    from hatemm_clip.base import PREDICTIONS_BY_CLASS
    back = read_table(write_table(table, tmp_path / 'p.parquet', PREDICTIONS_BY_CLASS))
    summary = summarise_runs(back, n=20).set_index('metric')['mean']
    assert summary.to_dict() == pytest.approx(multiclass_metrics(label, prob))


def test_survives_the_parquet_table(tmp_path):
    predictions = simulate_predictions(30, seeds=2)
    back = read_table(write_table(predictions, tmp_path / 'p.parquet', PREDICTIONS))
    pd.testing.assert_frame_equal(summarise_runs(back, n=20), summarise_runs(predictions, n=20))


def test_choose_threshold_beats_every_cut():
    rng = np.random.default_rng(2)
    labels, probs = rng.integers(0, 2, 80), rng.random(80).round(2)
    cuts = np.unique(np.append(probs, [0, 1.1]))
    cost = lambda t: 3 * ((probs < t) & (labels == 1)).sum() + ((probs >= t) & (labels == 0)).sum()
    assert cost(choose_threshold(labels, probs, 'cost', cost_fn=3)) == min(map(cost, cuts))
    t = choose_threshold(labels, probs, 'recall', floor=.9)
    allowed = [c for c in cuts if skm.recall_score(labels, probs >= c) >= .9]
    false_alarms = lambda c: ((probs >= c) & (labels == 0)).sum()
    assert skm.recall_score(labels, probs >= t) >= .9 and false_alarms(t) == min(map(false_alarms, allowed))
    with pytest.raises(InputError, match='needs both'): choose_threshold([0, 0], [.1, .2])


def test_temporal_map_without_annotation_is_undefined():
    spans = pd.DataFrame(dict(video_id=['a'], start=[0.], end=[1.], score=[.5]))
    with pytest.warns(match='no span is annotated'): assert temporal_map(spans, spans.iloc[:0]).isna().all()


def test_constant_similarity_is_not_rewarded():
    assert retrieval_metrics(retrieval_ranks(np.zeros((20, 20))))['R@10'] == 0


@shared
def test_on_real_features():
    "BERT features of HateMM, fold 0: logistic regression, thresholds and temperature from val, DeLong against MFCC."
    store = np.load(SHARED / 'data/hatemm/hatemm_bert_mfcc.npz')
    labels, part = store['labels'].astype(int), store['split'][0]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=.001, max_iter=500))
    probs = {m: model.fit(store[m][part == 'train'], labels[part == 'train']).predict_proba(store[m])[:, 1] for m in ('bert', 'mfcc')}
    val, test = part == 'val', part == 'test'
    threshold = choose_threshold(labels[val], probs['bert'][val])
    table = bootstrap_ci(labels[test], probs['bert'][test], store['ids'][test], threshold=threshold)
    assert (table.low <= table['mean']).all() and (table['mean'] <= table.high).all()
    assert table.loc['auroc', 'mean'] == pytest.approx(skm.roc_auc_score(labels[test], probs['bert'][test]))
    assert .02 < fit_temperature(labels[val], probs['bert'][val]) < 50
    result = delong_test(labels[test], probs['bert'][test], probs['mfcc'][test])
    assert result['delta'] == pytest.approx(result['auroc_a'] - result['auroc_b']) and 0 <= result['p'] <= 1
    assert 0 <= expected_calibration_error(labels[test], probs['bert'][test]) <= 1
    rows = [pd.DataFrame(dict(run=m, train_condition='normal', test_condition='normal', fold=0, seed=0, clip_id=store['ids'][test],
                              video_id=store['ids'][test], part='test', label=labels[test], prob=probs[m][test])) for m in probs]
    pair = paired_difference(pd.concat(rows), 'bert', 'mfcc', 'auroc').loc['auroc']
    assert pair.delta == pytest.approx(result['delta'])
