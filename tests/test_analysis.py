"""Analysis: the seed project's published figures, files that are written, and the notebook as a stage."""
import json
import re
import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from demo import execute
from papermill import PapermillExecutionError

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

from hatemm_clip import analysis as an, figures  # noqa: E402
from hatemm_clip.base import CLIPS, PREDICTIONS, SPANS, SPLITS, TIMELINE, InputError, read_table, write_table  # noqa: E402
from hatemm_clip.compare import metric_table  # noqa: E402
from hatemm_clip.metrics import shapley_values, simulate_predictions  # noqa: E402
from hatemm_clip.report import Beside  # noqa: E402
from hatemm_clip.results import begin  # noqa: E402

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
    assert all(src.startswith('data:image/png;base64,') for src in re.findall(r'src="([^"]*)"', page))
    assert not re.search(r'https?:|@import|url\(', page)  # base64 has no colon


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


def test_umap_has_one_layout_per_seed(monkeypatch):
    if find_spec('umap') is None: pytest.skip('umap-learn is optional')
    import numba
    monkeypatch.setattr(numba.config, 'DISABLE_JIT', True)  # compiling takes far longer than twenty points as they are
    features = np.random.default_rng(0).normal(size=(20, 8))
    points = figures.embed_map(features, 'umap')
    assert points.shape == (20, 2) and np.array_equal(points, figures.embed_map(features, 'umap'))


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
    imports = [cell for cell in notebook.cells if cell.source.startswith('#| hide\nimport')]
    notebook.cells = parameters + imports + exported + notebook.cells[start:]
    nbformat.write(notebook, path)
    return str(path)


@pytest.mark.parametrize('whole', [True, False])
def test_notebook_as_a_stage(tmp_path, whole):
    "papermill runs it on a folder of tables; one without predictions stops it in one line."
    if whole: write_table(simulate_predictions(30, seeds=2), tmp_path / 'predictions.parquet', PREDICTIONS)
    splits = pd.DataFrame(dict(protocol='by_group', fold=[0, 1], video_id=['v0000', 'v0001'], group=['v0000', 'v0001'], part='test'))
    write_table(splits, tmp_path / 'splits.parquet', SPLITS)
    call = lambda: execute(stage_notebook(tmp_path / 'stage.ipynb'), ROOT / 'nbs', run_dir=str(tmp_path), title='A run')
    if not whole:
        with pytest.raises(PapermillExecutionError, match='no such table'): call()
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
    assert [f.relative_to(tmp_path).as_posix() for f in written] == ['metrics.json', 'report.html', 'MODEL_CARD.md', 'MODEL_CARD.html', 'bundle/metrics.json', 'bundle/MODEL_CARD.md']
    page = written[1].read_text()
    assert 'What adversarial training gives back' in page and 'Demonstration' not in page and 'http:' not in page and 'https:' not in page and not plt.get_fignums()
    assert set(json.loads(written[4].read_text())) == set(swapped.run)
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
    assert 'Left out of the robustness matrix' in page and '<th scope="row">swap_text</th><td>fold 0, val: no donor</td>' in page


def test_a_leak_is_marked_in_the_report(tmp_path):
    write_table(simulate_predictions(30, seeds=2).assign(leak=.25), tmp_path / 'predictions.parquet', PREDICTIONS)
    metrics, report, *_ = an.report_run(tmp_path, 'A run')
    assert all(name.endswith(' (leaks)') for name in json.loads(metrics.read_text())) and '(leaks)' in report.read_text()


class Outline(HTMLParser):
    "Headings, ids, what is loaded, what is linked, and what lacks words for those who cannot see it."

    def __init__(self, page):
        super().__init__()
        self.headings, self.ids, self.loaded, self.links, self.mute, self.inside = [], [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        has = dict(attrs)
        if 'id' in has: self.ids.append(has['id'])
        if re.fullmatch('h[1-6]', tag): self.headings.append(int(tag[1]))
        if tag in ('img', 'script', 'iframe', 'video', 'source') or tag == 'link': self.loaded.append(has.get('src') or has.get('href'))
        if tag == 'a': self.links.append(has['href'])
        if tag == 'img' and not has.get('alt') or tag == 'svg' and not (has.get('aria-label') or has.get('aria-hidden')): self.mute.append(tag)
        if tag == 'th' and has.get('scope') not in ('row', 'col') or 'scroll' in (has.get('class') or '') and has.get('tabindex') != '0': self.mute.append(tag)


def assert_readable(path):
    "Headings in order, nothing loaded, links that lead somewhere, tables with captions, a way past the navigation."
    page = path.read_text()
    outline = Outline(page)
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(outline.headings, outline.headings[1:])), outline.headings
    assert all(address.startswith('data:') for address in outline.loaded) and not outline.mute
    for link in outline.links:
        if link.startswith('#'): assert link[1:] in outline.ids, link
        else: assert (path.parent/link).exists(), link
    assert page.count('<caption>') == page.count('<table') and '<html lang="en">' in page and 'class="skip"' in page
    assert len(outline.ids) == len(set(outline.ids))
    return outline


def localised_run(folder, targets):
    "A run of invented predictions with clips and a timeline."
    predictions = simulate_predictions(30, seeds=2)
    write_table(predictions, folder / 'predictions.parquet', PREDICTIONS)
    labels = predictions.drop_duplicates('clip_id')
    same = dict(dataset='demo', path='none.mp4', start=0., end=4., spans=[], duration=4., fps=10., width=320, height=240, has_audio=True, sha256='')
    clips = [dict(same, clip_id=c, video_id=v, label=y, label_name='Hate' if y else 'Non Hate', targets=targets)
             for c, v, y in zip(labels.clip_id, labels.video_id, labels.label)]
    write_table(pd.DataFrame(clips), folder / 'clips.parquet', CLIPS)
    key = dict(run='strongest', fold=0, seed=0, clip_id=labels.clip_id.iloc[0])
    write_table(pd.DataFrame(dict(key, t=np.arange(4.), prob=[.1, .9, .9, .1])), folder / 'timeline.parquet', TIMELINE)
    write_table(pd.DataFrame([dict(key, start=1., end=3., score=.9)]), folder / 'spans.parquet', SPANS)
    return predictions


def test_pages_of_a_run_link_to_each_other_and_can_be_read(tmp_path):
    localised_run(tmp_path, ['the Zorps'])
    an.report_run(tmp_path, 'A run')
    outlines = {name: assert_readable(tmp_path / name) for name in ('report.html', 'timeline.html', 'MODEL_CARD.html')}
    for name, outline in outlines.items(): assert set(outlines) - {name} <= set(outline.links), name
    page = (tmp_path / 'report.html').read_text()
    assert 'the Zorps' in page and 'Errors of BinaryClassifier:image+text' in page
    assert 'none.mp4' not in page and str(tmp_path) not in page


def test_a_timeline_of_other_clips_is_not_shown(tmp_path):
    localised_run(tmp_path, [])
    timeline = read_table(tmp_path / 'timeline.parquet').assign(clip_id='gone')
    write_table(timeline, tmp_path / 'timeline.parquet', TIMELINE)
    assert [f.name for f in an.report_run(tmp_path)] == ['metrics.json', 'report.html', 'MODEL_CARD.md', 'MODEL_CARD.html']
    page = (tmp_path / 'report.html').read_text()
    assert 'timeline.html' not in page and 'Left out: this data set names no target group' in page


def test_the_stage_sees_what_was_localised(tmp_path):
    (tmp_path / 'timeline.parquet').touch()
    folders = {stage: begin(stage, tmp_path, dict(key='k', rows=None), dict(stages={})) for stage in ('50_robust', '60_analysis')}
    assert (folders['60_analysis'] / 'timeline.parquet').is_symlink() and not (folders['50_robust'] / 'timeline.parquet').exists()


@pytest.fixture(scope='module')
def browser():
    "Chromium, where the machine has it."
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright and Chromium')
    with playwright.sync_playwright() as p:
        try: browser = p.chromium.launch(executable_path=shutil.which('chromium') or None)
        except playwright.Error: pytest.skip('no Chromium')
        yield browser
        browser.close()


@pytest.mark.parametrize('width', [400, 1300])
def test_no_page_is_wider_than_the_screen(tmp_path, browser, width):
    trains, tests = [f'swap_modality_{i}' for i in range(9)], [f'blur@{i}' for i in range(25)]
    values = {k: .6 for k in ('auroc', 'auroc_low', 'auroc_high')}
    cells = [dict(train=train, test=test, **values) for train in trains for test in tests]
    path = an.write_report(simulate_predictions(30, seeds=1), tmp_path / 'r.html', beside=Beside(cells=cells))
    page = browser.new_page(viewport=dict(width=width, height=900))
    asked = []
    page.on('request', lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate("Math.min(...[...document.querySelectorAll('td, th')].map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
    assert [url for url in asked if not url.startswith(('data:', path.as_uri()))] == []
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    page.close()
