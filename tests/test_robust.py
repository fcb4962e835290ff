"Robustness: donors, corruptions, the matrix and its cells; on synthetic features, and on HateMM's where they are."
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from hatemm_clip import attacks as at
from hatemm_clip import corruption as co
from hatemm_clip import robust as ro
from hatemm_clip.base import InputError, read_table
from hatemm_clip.data import LeakError
from hatemm_clip.features import read_features
from hatemm_clip.features import make_features
from hatemm_clip.compare import paired_difference, summarise_runs

KEYS = {'train', 'test', 'auroc', 'auroc_low', 'auroc_high', 'macro_f1_clean_threshold', 'macro_f1_tuned', 'recall', 'delta_auroc_vs_normal', 'delta_auroc_vs_control', 'p'}


@pytest.fixture(scope='module')
def data():
    "160 clips; neighbours in pairs are one group, and stay in one part."
    features = make_features(160, folds=3)
    dealt, groups = np.array([''.join(parts) for parts in features.split.T]), np.empty(160, dtype='<U24')
    for parts in np.unique(dealt):
        for n, i in enumerate(np.flatnonzero(dealt == parts)): groups[i] = f'{parts}{n // 2}'
    return dataclasses.replace(features, video_ids=groups, groups=groups)


def all_tokens(features, rows):
    return [[features.arrays[m][i][features.masks[m][i]].tobytes() for i in np.flatnonzero(rows)] for m in features.arrays]


@pytest.mark.parametrize('donor', co.DONORS)
def test_a_donor_keeps_the_rules(data, donor):
    donors = co.draw_donors(data, 'text', donor, seed=3)
    assert np.array_equal(donors, co.draw_donors(data, 'text', donor, seed=3))
    assert not np.array_equal(donors, co.draw_donors(data, 'text', donor, seed=4))
    for parts, row in zip(data.split, donors):
        touched = row != np.arange(len(data))
        assert np.array_equal(touched, data.labels == 1)
        assert np.array_equal(parts[row], parts)
        assert (data.groups[row] != data.groups)[touched].all()
        given = data.labels[row[touched]]
        assert {'opposite': (given == 0).all(), 'benign': (given == 0).all(), 'same': (given == 1).all(), 'any': 0 < given.mean() < 1}[donor]


def test_a_donor_has_the_modality_and_brings_something_new(data):
    mask = data.masks['text'].copy()
    mask[::3] = False
    array = data.arrays['text'].copy()
    array[1::3] = array[1]
    features = dataclasses.replace(data, masks={**data.masks, 'text': mask | (np.arange(160) % 3 == 1)[:, None]}, arrays={**data.arrays, 'text': array})
    donors = co.draw_donors(features, 'text')
    present = features.masks['text'].any(1)
    for row in donors:
        touched = row != np.arange(160)
        assert present[row[touched]].all() and not touched[~present].any()
        same = [np.array_equal(features.arrays['text'][i], features.arrays['text'][j]) for i, j in zip(np.flatnonzero(touched), row[touched])]
        assert not any(same)


@pytest.mark.parametrize('kind', co.KINDS)
def test_benign_clips_are_byte_identical_and_severity_0_is_the_identity(data, kind):
    donors, benign = co.draw_donors(data, 'image')[0], data.labels == 0
    everyone, before = np.ones(len(data), bool), all_tokens(data, np.ones(len(data), bool))
    changed = np.zeros(len(data), int)
    for severity in range(6):
        spoilt = co.corrupt(data, co.Corruption(kind, 'image', severity), donors)
        assert all_tokens(spoilt, benign) == all_tokens(data, benign)
        assert spoilt.arrays['text'] is data.arrays['text'] and np.array_equal(spoilt.labels, data.labels)
        assert (all_tokens(spoilt, everyone) == before) == (severity == 0)
        now = np.array([a != b for a, b in zip(all_tokens(spoilt, everyone)[0], before[0])])
        assert (now | ~(changed > 0)).all()  # what a lower severity touches, a higher one touches, too
        changed += now
        again = co.corrupt(data, co.Corruption(kind, 'image', severity), donors)
        assert all_tokens(again, everyone) == all_tokens(spoilt, everyone)
    assert all_tokens(data, everyone) == before  # the given features are left alone
    assert np.array_equal(changed > 0, data.labels == 1)


def test_swapping_back_restores(data):
    donors = co.draw_donors(data, 'text')[1]
    swapped = co.swap_modality(data, 'text', donors)
    back = co.swap_modality(swapped, 'text', np.arange(len(data)), source=data)
    assert np.array_equal(back.arrays['text'], data.arrays['text']) and np.array_equal(back.masks['text'], data.masks['text'])


def test_a_corruption_does_not_depend_on_the_other_clips(data):
    some = np.arange(20, 60)
    for kind in ('mask', 'drop'):
        whole, part = (co.corrupt(f, co.Corruption(kind, 'image', 3)).masks['image'] for f in (data, data[some]))
        assert np.array_equal(whole[some], part)


def test_unit_vectors_stay_unit_vectors(data):
    unit = dataclasses.replace(data, arrays={m: a / np.maximum(np.linalg.norm(a, axis=2, keepdims=True), 1e-9) for m, a in data.arrays.items()})
    noisy = co.corrupt(unit, co.Corruption('noise', 'image', 4))
    lengths = np.linalg.norm(noisy.arrays['image'][noisy.masks['image']], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


@pytest.mark.parametrize('name', [*at.TEXT_ATTACKS])
def test_attacks_on_words(name):
    said = 'We must drive the blue hats away from the harbour today, they do not belong in our town.'
    attack = lambda severity, seed=0: at.corrupt_text(name, said, severity, seed, keywords=['hats', 'town', 'harbour'])
    assert attack(0) == said and attack(5) != said and attack(5) == attack(5)
    assert at.corrupt_text(name, '', 5) == ''


def test_attacks_on_frames_keep_shape_and_type():
    frames = np.random.default_rng(0).integers(0, 255, (3, 61, 83, 3)).astype(np.uint8)
    for kind in at.IMAGE_ATTACKS:
        for severity in (1, 5):
            spoilt = at.corrupt_frames(kind, frames, severity)
            assert spoilt.shape == frames.shape and spoilt.dtype == np.uint8 and not np.array_equal(spoilt, frames)


def test_silence_stays_silence():
    assert not at.noisy_audio(np.zeros(100, np.float32), 5).any()
    assert at.noisy_audio(np.zeros(0, np.float32), 5).size == 0


def test_equal_budget(data):
    rows = np.flatnonzero(data.split[0] == 'train')
    names = ['normal', 'swap_image', 'swap_text', 'mask_image_both', 'mask_text_both']
    of = lambda name, ratio=.5: ro.recipe_rows(ro.training_recipe(name, ['image', 'text']), rows, data.labels, names, ratio, 1)
    control, swapped, mixed, dropout = map(of, ('control', 'swap_text', 'swap_mixed', 'dropout'))
    hateful = (data.labels[rows] == 1).sum()
    assert len(of('normal')) == len(rows) and len(control) == len(swapped) == len(mixed) == len(dropout) == len(rows) + hateful
    assert np.array_equal(np.sort(control % 160), np.sort(swapped % 160)) and np.array_equal(np.sort(control % 160), np.sort(mixed % 160))
    assert abs(len(of('swap_text', .8)) - len(rows) - hateful / 4) <= .5
    assert set(np.concatenate([control, swapped, mixed, dropout]) % 160) == set(rows)  # nobody from another part


@pytest.fixture(scope='module')
def predictions(data):
    return ro.run_matrix(ro.plan_matrix(dataclasses.replace(data, split=data.split[:2]), ro.MatrixSettings(['swap_text', 'mask_mixed', 'swap_text_warm'], ['swap_text', 'swap_text_both', 'mask_text', 'mask_text_both'], seeds=2, params=dict(epochs=20))))


def test_cells_are_those_of_the_metrics(predictions):
    cells = pd.DataFrame(ro.matrix_cells(predictions, n=300)).set_index(['train', 'test'])
    assert KEYS - {'train', 'test'} <= set(cells.columns) and len(cells) == 6 * 5
    reference = summarise_runs(predictions, ['auroc', 'macro_f1', 'recall'], n=300).set_index(['train_condition', 'test_condition', 'metric'])
    for key, cell in cells.iterrows():
        np.testing.assert_allclose([cell.auroc, cell.auroc_low, cell.auroc_high], reference.loc[(*key, 'auroc'), ['mean', 'low', 'high']].astype(float), atol=1e-5)
        assert cell.macro_f1_clean_threshold == pytest.approx(reference.loc[(*key, 'macro_f1'), 'mean'], abs=1e-9)
        assert cell.recall['hateful'] == pytest.approx(reference.loc[(*key, 'recall'), 'mean'], abs=1e-9)
    warm = cells.loc[('swap_text_warm', 'swap_text')]
    pair = paired_difference(predictions, dict(train_condition='swap_text_warm', test_condition='swap_text'), dict(train_condition='control_warm', test_condition='swap_text'), ['auroc'], n=300)
    assert warm.delta_auroc_vs_control == pytest.approx(pair.delta.item(), abs=1e-6)


def test_a_tuned_threshold_is_chosen_on_validation(predictions):
    rows = predictions[predictions.test_condition == 'normal']
    assert (rows.threshold == rows.threshold_tuned).all()
    assert predictions.groupby(['train_condition', 'test_condition', 'fold', 'seed']).threshold_tuned.nunique().max() == 1
    assert predictions.groupby(['train_condition', 'fold', 'seed']).threshold.nunique().max() == 1
    assert set(predictions.part) == {'val', 'test'}


def test_absence_that_means_hateful_is_found_out(predictions):
    auroc = pd.DataFrame(ro.matrix_cells(predictions, n=1)).set_index(['train', 'test']).auroc
    assert auroc['mask_mixed', 'mask_text'] - auroc['mask_mixed', 'mask_text_both'] > .1


def test_the_worst_case_and_the_choice(predictions):
    table = ro.worst_case(predictions, ['swap_text', 'mask_text_both'], n=50)
    auroc = pd.DataFrame(ro.matrix_cells(predictions, n=1)).set_index(['train', 'test']).auroc
    for train in table.index: assert table.worst[train] == pytest.approx(min(auroc[train, 'swap_text'], auroc[train, 'mask_text_both']))
    assert ro.choose_training(predictions) in set(table.index) - {'control', 'control_warm'}
    altered = predictions.assign(prob=np.where(predictions.part == 'test', 1 - predictions.prob, predictions.prob))
    assert ro.choose_training(altered) == ro.choose_training(predictions)  # the test part has no say


def test_the_stage_writes_what_it_says(data, tmp_path):
    np.savez(tmp_path/'f.npz', ids=data.ids, labels=data.labels, split=data.split, groups=data.groups, text=data.arrays['text'][:, 0], image=data.arrays['image'][:, 0])
    predictions, cells = ro.run_robust(tmp_path/'f.npz', tmp_path/'robust.parquet', ro.MatrixSettings(['swap_mixed'], ['swap_text', 'swap_image_any'], seeds=2, params=dict(epochs=2)))
    assert read_table(tmp_path/'robust.parquet').drop(columns='fold').equals(predictions.drop(columns='fold').astype(read_table(tmp_path/'robust.parquet').drop(columns='fold').dtypes))
    written = json.loads((tmp_path/'robust.json').read_text())
    assert set(written) == {'cells'} and written['cells'] == cells and all(KEYS <= set(c) for c in cells)
    assert {(c['train'], c['test']) for c in cells} == {(a, b) for a in ('normal', 'control', 'swap_mixed') for b in ('normal', 'swap_text', 'swap_image_any')}
    donors = read_table(tmp_path/'robust_donors.parquet')
    part = {(k, i): p for k, row in enumerate(data.split) for i, p in zip(data.ids, row)}
    group = dict(zip(data.ids, data.groups))
    assert all(part[d.fold, d.clip_id] == part[d.fold, d.donor_id] == d.part and group[d.clip_id] != group[d.donor_id] for d in donors.itertuples())
    assert set(zip(donors.modality, donors.donor)) == {('text', 'opposite'), ('image', 'opposite'), ('image', 'any')}
    assert 'swap_mixed' in ro.format_cells(cells)


def test_mistakes_are_told(data):
    with pytest.raises(InputError, match="condition 'swap_smell' is unknown"): ro.plan_matrix(data, ro.MatrixSettings(test=['swap_smell']))
    with pytest.raises(InputError, match='expected one of'): at.parse_attack('melt@2')
    with pytest.raises(InputError, match='severity from @0'): at.parse_attack('blur@9')
    with pytest.raises(InputError, match='no row of part'): ro.matrix_cells(pd.DataFrame(dict(part=['test'], run=['a'])), 'val')


def test_hatemm_worst_case(shared):
    "Training on swapped text gives back .05 or more of the worst case, beyond the control, and its check agrees."
    features = read_features(shared/'data/hatemm/hatemm_bert_mfcc.npz')
    donors = co.draw_donors(features, 'bert')
    for parts, row in zip(features.split, donors):
        assert np.array_equal(parts[row], parts) and np.array_equal(row != np.arange(len(row)), features.labels == 1)
    settings = ro.MatrixSettings(['swap_bert'], ['swap_bert', 'swap_mfcc', 'swap_bert_both'], seeds=1, params=dict(epochs=12))
    predictions = ro.run_matrix(ro.plan_matrix(dataclasses.replace(features, split=features.split[:3]), settings))
    assert ro.choose_training(predictions) == 'swap_bert'
    row = ro.worst_case(predictions).loc['swap_bert']
    assert row.worst_vs_normal > .05 and row.worst_vs_control_low > 0 and row.clean_vs_control > -.02
    auroc = {(c['train'], c['test']): c['auroc'] for c in ro.matrix_cells(predictions)}
    assert abs(auroc['swap_bert', 'swap_bert'] - auroc['swap_bert', 'swap_bert_both']) < .02


def test_what_the_clips_do_not_carry_is_left_out(tmp_path):
    "All benign clips in one group with a hateful clip of each part: nobody can give to a benign clip of another group."
    features = make_features(60, folds=3)
    features = dataclasses.replace(features, groups=np.where(features.labels == 0, 'benign', features.groups))
    np.savez(tmp_path/'f.npz', ids=features.ids, labels=features.labels, split=features.split, groups=features.groups, video_ids=features.ids, text=features.arrays['text'][:, 0], image=features.arrays['image'][:, 0])
    settings = ro.MatrixSettings(['swap_text', 'swap_mixed_both', 'mask_text'], ['swap_text', 'swap_text_both', 'mask_text'], seeds=1, params=dict(epochs=2), allow_leak=True)
    predictions, cells = ro.run_robust(tmp_path/'f.npz', tmp_path/'robust.parquet', settings)
    left_out = json.loads((tmp_path/'robust.json').read_text())['left_out']
    assert set(left_out) == {'swap_text_both', 'swap_image_both', 'swap_mixed_both'} and all('no donor of another group' in why for why in left_out.values())
    assert set(predictions.train_condition) == {'normal', 'control', 'swap_text', 'mask_text'} and set(predictions.test_condition) == {'normal', 'swap_text', 'mask_text'}
    assert all(c['leak'] > 0 for c in cells) and ro.format_cells(cells).startswith('LEAK')
    with pytest.raises(LeakError, match='--allow-leak'): ro.plan_matrix(read_features(tmp_path/'f.npz'))


def test_three_classes_are_no_failure_of_the_stage(data, tmp_path, capsys, monkeypatch):
    three = dataclasses.replace(data, label_names=['a', 'b', 'c'])
    monkeypatch.setattr(ro, 'read_features', lambda run: three)
    assert ro.robust_stage(tmp_path, ['blur']) == (None, [])
    written = json.loads((tmp_path/'robust.json').read_text())
    assert written['cells'] == [] and 'takes two classes' in written['left_out']['everything'] and 'left out' in capsys.readouterr().out
