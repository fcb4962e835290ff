"""Analysis: the seed project's published figures, files that are written, and the notebook as a stage."""
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

from hatemm_clip import analysis as an, figures  # noqa: E402
from hatemm_clip.base import PREDICTIONS, SPLITS, InputError, write_table  # noqa: E402
from hatemm_clip.compare import metric_table  # noqa: E402
from hatemm_clip.metrics import shapley_values, simulate_predictions  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
shared = pytest.mark.skipif(not SHARED.exists(), reason='needs the data beside the checkout')


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@shared
def test_published_ee559_table():
    table = an.ee559_table(list((SHARED / 'data/ee559_results').glob('*.csv.gz')))
    published = [(.8072, .0219), (.7303, .0212), (.7996, .0278), (.8538, .0257)]
    np.testing.assert_allclose(table[['accuracy', 'accuracy_sd']], published, atol=5.1e-5)
    np.testing.assert_allclose(table.auroc, [.904, .810, .903, .936], atol=5.1e-4)
    assert (table.seeds == 10).all() and table.index.is_unique
    assert 'finetuned' in table.index[3] and 'tested shuffled_text' in table.index[1]


@shared
def test_ee559_arrays_and_their_area():
    path = sorted((SHARED / 'data/ee559_results').glob('*.csv.gz'))[0]
    results = an.read_ee559_results(path)
    assert len(results) == 50 and results.groupby('seed').epoch.nunique().eq(5).all()
    for row in results.itertuples():
        assert len(row.test_fpr) == len(row.test_tpr) == len(row.test_thresholds)
        assert np.trapezoid(row.test_tpr, row.test_fpr) == pytest.approx(row.test_roc_auc, abs=1e-6)
    ax = an.plot_ee559_roc([path])
    assert 'tested normal' in ax.get_legend().get_texts()[0].get_text()
    assert len(figures.plot_learning_curves(results, ['train_accuracy', 'test_accuracy']).lines) >= 2


def test_code_in_a_result_file_is_refused(tmp_path):
    path = tmp_path / 'BinaryClassifier-20250101_000000_20250101_000001_shuffled_text_test_normal.csv'
    evil = f'__import__("pathlib").Path("{tmp_path}/pwned").touch()'
    pd.DataFrame([dict(seed=1, epoch=0, test_accuracy=.5, test_roc_auc=.5, test_fpr=evil, test_tpr='[0 1]')]).to_csv(path, index=False)
    with pytest.raises(InputError, match='something else than numbers'): an.read_ee559_results(path)
    assert not (tmp_path / 'pwned').exists()


def test_metrics_json_is_the_report_table(tmp_path):
    predictions = simulate_predictions(40, seeds=2)
    metrics = an.write_metrics(predictions, tmp_path / 'deep/metrics.json')
    assert json.loads((tmp_path / 'deep/metrics.json').read_text()) == metrics
    assert {'macro_f1', 'accuracy', 'auroc'} <= metrics['BinaryClassifier:text'].keys()
    row = metrics['BinaryClassifier:text']['auroc']
    assert metric_table(predictions).loc['BinaryClassifier:text', 'auroc'] == \
        f"{row['mean']:.3f} ± {row['sd_seeds']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    legend = [t.get_text() for t in figures.plot_roc(predictions).get_legend().get_texts()]
    assert f"BinaryClassifier:text: {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in legend
    assert not list((tmp_path / 'deep').glob('.*'))  # no half-written file is left


def test_report_is_self_contained_and_closes_its_figures(tmp_path):
    before = plt.get_fignums()
    page = an.write_report(simulate_predictions(30, seeds=2), tmp_path / 'r.html', notes='<script>alert(1)</script>').read_text()
    assert plt.get_fignums() == before
    assert '<script' not in page and 'Demonstration' not in page
    assert all(src.startswith('data:image/png;base64,') for src in re.findall(r'src="([^"]*)"', page)) and 'http' not in page


def test_runs_on_other_clips_are_reported_as_such(tmp_path):
    predictions = simulate_predictions(30, seeds=1)
    page = an.write_report(predictions.drop(index=predictions.index[-1]), tmp_path / 'r.html').read_text()
    assert 'not on the same clips' in page


def test_model_card_says_what_it_is_not_for(tmp_path):
    predictions = simulate_predictions(30, seeds=1, runs={'BinaryClassifier:text': 2.})
    card = an.write_model_card(predictions, tmp_path / 'MODEL_CARD.md', config=dict(encoder='a|b')).read_text()
    assert 'No automatic removal' in card and r'a\|b' in card and 'Demonstration' not in card


def test_shapley_is_efficient_for_four_modalities():
    rng = np.random.default_rng(0)
    names = ('image', 'text', 'audio', 'motion')
    table = {}
    value = lambda s: table.setdefault(s, rng.random())
    shares = shapley_values(value, names)
    assert sum(shares.values()) == pytest.approx(value(frozenset(names)) - value(frozenset()))


def test_modality_values_from_a_dict():
    predictions = simulate_predictions(40, seeds=1)
    tables = {frozenset(run.split(':')[1].split('+')): rows for run, rows in predictions.groupby('run')}
    assert figures.modality_values(tables) == figures.modality_values(predictions)


def test_umap_has_one_layout_per_seed():
    pytest.importorskip('umap', reason='umap-learn is optional')
    features = np.random.default_rng(0).normal(size=(40, 8))
    points = figures.embed_map(features, 'umap')
    assert points.shape == (40, 2) and np.array_equal(points, figures.embed_map(features, 'umap'))


def test_umap_absent_is_told(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'umap', None)
    with pytest.raises(InputError, match='pip install umap-learn'): figures.embed_map(np.eye(10), 'umap')


def test_legends_move_out_of_the_way():
    runs = {f'Head{i}:text': 1. + i / 5 for i in range(6)}
    ax = figures.plot_roc(simulate_predictions(30, seeds=1, runs=runs), n=20)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def stage_notebook(path):
    "The notebook's exported cells, parameters and stage, without the lessons that its own test runs."
    nbformat = pytest.importorskip('nbformat')
    notebook = nbformat.read(ROOT / 'nbs/60_analysis.ipynb', 4)
    start = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith('## The stage'))
    parameters = [cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', [])]
    exported = [cell for cell in notebook.cells if cell.source.startswith('#| export')]
    notebook.cells = parameters + exported + notebook.cells[start:]
    nbformat.write(notebook, path)
    return str(path)


@pytest.mark.parametrize('whole', [True, False])
def test_notebook_as_a_stage(tmp_path, whole):
    "papermill runs it on a folder of tables; one without predictions stops it in one line."
    papermill = pytest.importorskip('papermill')
    if whole: write_table(simulate_predictions(30, seeds=2), tmp_path / 'predictions.parquet', PREDICTIONS)
    splits = pd.DataFrame(dict(protocol='by_group', fold=[0, 1], video_id=['v0000', 'v0001'], group=['v0000', 'v0001'], part='test'))
    write_table(splits, tmp_path / 'splits.parquet', SPLITS)
    call = lambda: papermill.execute_notebook(stage_notebook(tmp_path / 'stage.ipynb'), str(tmp_path / 'out.ipynb'), cwd=str(ROOT / 'nbs'),
                                              parameters=dict(run_dir=str(tmp_path), title='A run'), progress_bar=False, kernel_name='python3')
    if not whole:
        with pytest.raises(papermill.PapermillExecutionError, match='no such table'): call()
        return
    call()
    assert 'A run' in (tmp_path / 'report.html').read_text() and 'by_group, 2 folds' in (tmp_path / 'report.html').read_text()
    assert set(json.loads((tmp_path / 'metrics.json').read_text())) == {'BinaryClassifier:image+text', 'BinaryClassifier:text', 'BinaryClassifier:image'}


def test_a_run_is_reported_whole(tmp_path):
    "`hatemm report`: page, card and metrics of a run with a robustness matrix and a bundle."
    predictions = simulate_predictions(30, seeds=2)
    write_table(predictions, tmp_path / 'predictions.parquet', PREDICTIONS)
    swapped = predictions[predictions.run == 'BinaryClassifier:text']
    cells = [dict(train=train, test=test, **{k: .6 for k in ('auroc', 'auroc_low', 'auroc_high')},
                  **{f'delta_auroc_vs_control{k}': None if train == 'control' else .1 for k in ('', '_low', '_high')})
             for train in ('normal', 'control', 'swap_text') for test in ('normal', 'swap_text')]
    (tmp_path / 'robust.json').write_text(json.dumps(dict(cells=cells)))
    (tmp_path / 'bundle').mkdir()
    (tmp_path / 'bundle/config.json').write_text(json.dumps(dict(head='BinaryClassifier', modalities=dict(text=8))))
    written = an.report_run(tmp_path, 'A run')
    assert [f.relative_to(tmp_path).as_posix() for f in written] == ['metrics.json', 'report.html', 'MODEL_CARD.md', 'bundle/metrics.json', 'bundle/MODEL_CARD.md']
    page = written[1].read_text()
    assert 'What adversarial training gives back' in page and 'Demonstration' not in page and 'http' not in page and not plt.get_fignums()
    assert set(json.loads(written[3].read_text())) == set(swapped.run)
    (tmp_path / 'bundle/config.json').write_text(json.dumps(dict(head='KNNHead', modalities=dict(text=8))))
    with pytest.raises(InputError, match='a bundle of KNNHead'): an.report_run(tmp_path)


def test_misjudged_clips_are_shown_blurred(tmp_path, monkeypatch):
    import hatemm_clip.data as data
    shown = {}
    def show(clips, n, blur, width):
        shown.update(clips=list(clips.clip_id), blur=blur)
        return plt.subplots(1, n, squeeze=False)[1][0]
    monkeypatch.setattr(data, 'show_clips', show)
    predictions = simulate_predictions(30, seeds=2)
    errors = figures.error_list(predictions[predictions.run == 'BinaryClassifier:image'])
    axes = figures.plot_errors(errors, predictions[['clip_id']].drop_duplicates(), n=3)
    assert shown == dict(clips=list(errors.clip_id.unique()[:3]), blur=True)
    assert axes[0].get_title().startswith(errors.clip_id[0][:6])


def test_the_report_says_what_was_left_out_of_the_matrix(tmp_path):
    write_table(simulate_predictions(30, seeds=2), tmp_path / 'predictions.parquet', PREDICTIONS)
    (tmp_path / 'robust.json').write_text(json.dumps(dict(cells=[], left_out={'swap_text': 'fold 0, val: no donor'})))
    page = an.report_run(tmp_path, 'A run')[1].read_text()
    assert 'Left out of the robustness matrix' in page and '<td>swap_text</td><td>fold 0, val: no donor</td>' in page


def test_a_leak_is_marked_in_the_report(tmp_path):
    write_table(simulate_predictions(30, seeds=2).assign(leak=.25), tmp_path / 'predictions.parquet', PREDICTIONS)
    metrics, report, _ = an.report_run(tmp_path, 'A run')
    assert all(name.endswith(' (leaks)') for name in json.loads(metrics.read_text())) and '(leaks)' in report.read_text()
