"Which seconds are hateful: the protocol by hand, moments, methods, spans of files, and the command."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from demo import copy_run, first_clips

from hatemm_clip.base import InputError, PREDICTIONS, read_table, Run, SPANS, SPLITS, table_hash, TIMELINE, write_json, write_table
from hatemm_clip.check import span_coverage
from hatemm_clip.features import export_features, make_features
from hatemm_clip.localise import CUT, localise, localise_table, METHODS, summarise
from hatemm_clip.protocol import (
    all_spans, broadcast_scores, choose_cut, cut_spans, grid_times, make_gold, mark_frames, random_scores, score_metrics, span_metrics)
from hatemm_clip.seconds import align_tokens, gold_of, on_grid, read_moments, read_spans, story_moments
from hatemm_clip.spans import localise_files, name_modality, read_cut
from hatemm_clip.stories import make_stories, plan_stories
from hatemm_clip.timeline import Film, write_timeline


def videos(*spans, duration=4.):
    "Videos a, b, … of equal length with the given spans; label 1 where there are any."
    ids = [chr(97 + i) for i in range(len(spans))]
    each = [[dict(start=a, end=b) for a, b in s] for s in spans]
    return pd.DataFrame(dict(video_id=ids, label=[int(bool(s)) for s in spans], spans=each, duration=duration))


@pytest.fixture(scope='module')
def gold(): return make_gold(videos([(0., 2.)], [(3., 4.)], []))


@pytest.mark.parametrize('duration, points', [(0., 0), (.24, 0), (.25, 1), (2.3, 9), (30., 120)])
def test_the_grid_has_floor_of_four_d_points(duration, points): assert len(grid_times(duration)) == points


def test_spans_are_half_open_turned_round_and_joined():
    marked = lambda *spans: np.flatnonzero(mark_frames([dict(start=a, end=b) for a, b in spans], 3.)).tolist()
    assert marked((1., 2.)) == marked((2., 1.)) == [4, 5, 6, 7]
    assert marked((0., 1.), (.5, 1.5), (1.5, 2.)) == list(range(8))
    assert marked((3., 9.)) == []


def test_a_span_past_the_end_is_counted_clipped_or_leaves_no_frame():
    found = make_gold(videos([(3., 9.)], [(5., 6.)], []))
    assert found.positive.tolist() == [True, True, False]
    assert found.counts == dict(videos=3, positive=2, without_frames=1, left_out=0, past_the_end=2)
    assert found.spans[['start', 'end']].values.tolist() == [[3., 4.]]


def test_a_hateful_video_without_spans_is_left_out():
    found = make_gold(videos([(0., 1.)], []).assign(label=[1, 1]))
    assert found.video_ids == ['a'] and found.counts['left_out'] == 1


def test_floors_and_ceiling_by_hand(gold):
    ceiling, perfect = score_metrics(gold, broadcast_scores(gold)), score_metrics(gold, gold.frames)
    assert ceiling['random_ap'][0] == 12/48 and ceiling['broadcast_ap'][0] == ceiling['frame_ap'][0] == 12/32
    assert ceiling['within_roc'][0] == .5 and ceiling['normalised_ap'][0] == 1
    assert perfect['frame_ap'][0] == perfect['frame_roc'][0] == perfect['within_roc'][0] == perfect['within_ap'][0] == 1
    assert perfect['normalised_ap'][0] == pytest.approx(6) and perfect['evidence'][0] == 1
    worst = score_metrics(gold, [1. - f for f in gold.frames])
    assert worst['within_roc'][0] == 0 and worst['evidence'][0] == 0


def test_random_scores_are_worth_nothing():
    long = make_gold(videos([(0., 150.)], [(100., 400.)], [], duration=400.))
    found = [score_metrics(long, random_scores(long, s)) for s in range(12)]
    assert abs(np.mean([f['normalised_ap'][0] for f in found])) < .03
    assert abs(np.mean([f['within_roc'][0] for f in found]) - .5) < .02


def test_weights_are_copies_of_videos(gold):
    scores = random_scores(gold, 3)
    one = score_metrics(gold, scores, np.array([[0., 2., 1.]]))
    other = score_metrics(make_gold(videos([(3., 4.)], [(3., 4.)], [])), [scores[1], scores[1], scores[2]])
    for name in one: assert one[name][0] == pytest.approx(other[name][0])


def test_scores_that_do_not_fit_are_refused(gold):
    with pytest.raises(InputError, match='of 1 videos'): score_metrics(gold, [np.zeros(16)])
    with pytest.raises(InputError, match='^a: scores hold NaN'): score_metrics(gold, [np.full(16, np.nan)]*3)


def test_spans_match_once_and_best_first(gold):
    said = pd.DataFrame([('a', 0., 2., .9), ('a', 0., 1.9, .8), ('b', 3., 3.5, .7), ('c', 0., 1., .95)], columns=['video_id', 'start', 'end', 'score'])
    found = span_metrics(gold, said)
    assert found['f1_at']['0.3'][0] == pytest.approx(2*2/(4 + 2)) and found['f1_at']['0.7'][0] == pytest.approx(2*1/(4 + 2))
    assert found['map_at']['0.3'][0] == pytest.approx((1/2 + 1/2)/2)  # hits at the second and the fourth place


def test_a_gap_is_closed_and_a_cut_chosen(gold):
    line = np.array([0, .9, 0, .9, 0, 0, 0, 0])
    assert [s[:2] for s in cut_spans(line, .5)] == [(.25, .5), (.75, 1.)] and [s[:2] for s in cut_spans(line, .5, .5)] == [(.25, 1.)]
    noisy = [np.where(f, .7, .2) + .1*np.random.default_rng(i).random(len(f)) for i, f in enumerate(gold.frames)]
    assert span_metrics(gold, all_spans(gold, noisy, *choose_cut(gold, noisy)))['f1_at']['0.7'][0] == 1


def test_a_moment_takes_what_covers_most_of_it():
    aligned, there = align_tokens(np.eye(2, dtype=np.float32), np.array([0., 1.4]), np.array([1.4, 2.]), 3.)
    assert aligned.argmax(1)[:2].tolist() == [0, 1] and there.tolist() == [True, True, False]
    assert align_tokens(np.zeros((0, 5)), np.zeros(0), np.zeros(0), 2.)[0].shape == (2, 5)


def test_stories_are_what_they_say():
    plans = plan_stories(60, 4)
    assert all(20 <= s.duration <= 40 for s in plans) and sum(s.label for s in plans) == 30
    hateful = [[i for i, a in enumerate(s.acts) if a.label] for s in plans if s.label]
    assert all(1 <= len(h) <= 3 and (np.diff(h) > 1).all() for h in hateful)
    assert plan_stories(60, 4) == plans


@pytest.fixture(scope='module')
def stories(): return story_moments(32, seed=1, folds=3)


@pytest.fixture(scope='module')
def folds(stories):
    "The same stories with two of their folds."
    return replace(stories, features=replace(stories.features, split=stories.features.split[:2]))


@pytest.fixture(scope='module')
def found(folds): return localise(folds, seeds=1, seed=0)


def test_every_method_stands_beside_floors_with_intervals(found):
    result = summarise(found, n=50)
    json.dumps(result, allow_nan=False)
    assert [m['method'] for m in result['methods']] == list(METHODS)
    for m in result['methods']: assert m['within_roc']['low'] <= m['within_roc']['mean'] <= m['within_roc']['high'] and {'0.3', '0.5', '0.7'} == set(m['f1_at'])
    roc = {m['method']: m['within_roc']['mean'] for m in result['methods']}
    assert roc['supervised'] > .75 and roc['supervised'] > max(v for k, v in roc.items() if k != 'supervised') > .5
    assert result['floors']['broadcast']['within_roc'] == dict(mean=.5, low=.5, high=.5)
    assert result['floors']['random_ap'] < result['floors']['broadcast_ap']
    assert list(localise_table(result).index) == [*METHODS, 'random', 'position', 'broadcast']


def test_each_second_of_each_test_video_is_scored_once(found, folds):
    rows = found.timeline[found.timeline.run == 'strongest']
    tested = (folds.features.split == 'test').any(0)
    points = {i: len(s) for i, s, t in zip(folds.features.ids, on_grid(folds, np.zeros(folds.there.shape)), tested) if t}
    assert 0 < len(points) == tested.sum() < len(folds)
    assert rows.groupby('clip_id').size().to_dict() == points and rows.prob.between(0, 1).all()
    assert found.spans.start.ge(0).all() and (found.spans.end > found.spans.start).all()


def test_deletion_by_a_good_curve_beats_chance(found):
    areas = found.areas[found.areas.run == 'contributions'][['deletion', 'deletion_random', 'insertion', 'insertion_random']].mean()
    assert areas.deletion < areas.deletion_random and areas.insertion > areas.insertion_random


def test_without_spans_nothing_is_invented(stories):
    bare = replace(stories, videos=stories.videos.assign(spans=[[]]*len(stories)))
    with pytest.raises(InputError, match='none of its 32 videos has an annotated span'): localise(bare, 1, where='RUN')


def test_spans_of_some_videos_only_are_counted(stories):
    few = stories.videos.copy()
    hateful = np.flatnonzero(few.label == 1)
    few.loc[hateful[:4], 'spans'] = pd.Series([[]]*4, index=hateful[:4])
    found = gold_of(replace(stories, videos=few))
    assert found.counts['left_out'] == 4 and found.positive.sum() == len(hateful) - 4


def test_coverage_of_spans():
    table = videos([(0., 2.)], [(1., 6.)], [])
    found = span_coverage(table, dict(a=4., b=4.))
    assert (found['at_zero'], found['past_end'], found['known']) == (1, 1, 2) and found['share'][1] == pytest.approx(.625)
    assert span_coverage(table[2:], {})['spans'] == 0


@pytest.fixture(scope='module')
def run(demo, tmp_path_factory):
    "Half of the demo's run as if it had two folds, one seed and the predictions of its bundle alone."
    half = first_clips(copy_run(demo, tmp_path_factory.mktemp('runs')/'demo'), 48)
    splits, predictions, config = read_table(half.splits), read_table(half.predictions), json.loads((half.bundle/'config.json').read_text())
    write_table(splits[splits.fold < 2], half.splits, SPLITS, splits.attrs['inputs'])
    inputs, of_bundle = table_hash(read_table(half.splits)), f"{config['head']}:{'+'.join(sorted(config['modalities']))}"
    kept = (predictions.fold < 2) & (predictions.seed == 0) & (predictions.run == of_bundle)
    write_table(predictions[kept], half.predictions, PREDICTIONS, inputs)
    write_json(half.bundle/'config.json', dict(config, splits=inputs))
    return half


@pytest.fixture(scope='module')
def measured(run, tmp_path_factory, hatemm):
    "The result of the command on the demo's run."
    file = tmp_path_factory.mktemp('json')/'localise.json'
    done = hatemm('localise', run.folder, '--seeds', '1', '--json', file)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_the_command_measures_a_run(run, measured):
    result, said = measured
    for m in result['methods']: assert {'method', 'supervision', 'within_roc', 'frame_ap', 'normalised_ap', 'f1_at'} <= set(m) and '0.3' in m['f1_at']
    assert max(m['within_roc']['mean'] for m in result['methods']) > .7
    assert 'hateful throughout' in said and 'strongest' in said and 'timeline.html' in said
    assert set(TIMELINE.names) == set(read_table(run.timeline)) and set(SPANS.names) == set(read_table(run.spans))
    assert read_table(run.timeline).attrs['params']['protocol'] == result['protocol']['hash']
    page = (run.folder/'timeline.html').read_text()
    assert page.count('<section ') == 12 and 'Demonstration' in page and '<script' not in page


def test_the_report_shows_when(run, measured, hatemm):
    assert hatemm('report', run.folder).returncode == 0
    assert 'When is it hateful' in run.report.read_text()


def test_the_bundle_cuts_as_the_run_chose(run, measured):
    cut = json.loads((run.bundle/CUT).read_text())
    assert read_cut(run.bundle) == (cut['threshold'], cut['gap']) and read_cut(run.bundle, .8)[0] == .8


@pytest.fixture(scope='module')
def films(tmp_path_factory): return sorted(make_stories(tmp_path_factory.mktemp('stories')/'corpus', 2, 14).rglob('*.mp4'))


def test_the_command_finds_spans_in_files(run, films, hatemm, tmp_path):
    page, file = tmp_path/'page.html', tmp_path/'spans.json'
    done = hatemm('localise', run.bundle, *films, tmp_path/'none.mp4', '--threshold', .2, '--page', page, '--json', file)
    assert done.returncode == 1 and done.stderr.count('error:') == 1 and 'none.mp4' in done.stderr and 'Traceback' not in done.stderr
    spans = json.loads(file.read_text())
    assert spans and all(set(s) == {'file', 'start', 'end', 'score', 'modality'} and 0 <= s['start'] < s['end'] <= 41 for s in spans)
    assert {s['modality'] for s in spans} <= {'image', 'text', 'image+text'} and page.read_text().count('<section ') == 2


def test_score_draws_the_page_and_keeps_its_numbers(run, films, hatemm, tmp_path):
    plain, drawn = (hatemm('score', run.bundle, films[0], '--json', '-', *more) for more in ((), ('--timeline', tmp_path/'page.html')))
    assert drawn.returncode == 0, drawn.stderr
    one, other = json.loads(plain.stdout)[0], json.loads(drawn.stdout)[0]
    assert one['prob'] == other['prob'] and 'moments' not in one and other['moments'] and (tmp_path/'page.html').exists()


@pytest.mark.parametrize('args, line', [
    (('BUNDLE',), 'a bundle; name the files'), (('nowhere',), 'no such features'), (('nowhere', 'FILM'), 'no bundle there'),
    (('BUNDLE', 'FILM', '--threshold', 2), 'expected a probability'), (('BUNDLE', 'FILM', '--page', 'x.pdf'), 'ends in .html'),
    (('PLAIN',), 'has times'), (('RUN', '--spans', 'nowhere.csv'), 'no such file'), (('RUN', '--seeds', 0), 'expected 1 or more'), (('STILLS', 'FILM'), 'nothing has a time')])
def test_bad_input_is_one_line(args, line, run, films, hatemm, tmp_path):
    (tmp_path/'stills').mkdir()
    config = json.loads((run.bundle/'config.json').read_text())
    write_json(tmp_path/'stills/config.json', dict(config, encoder=dict(config['encoder'], clips=dict(stills=1.))))
    bits = make_features(30)
    np.savez(tmp_path/'plain.npz', ids=bits.ids, labels=bits.labels, image=bits.arrays['image'], split=bits.split)
    named = dict(BUNDLE=run.bundle, FILM=films[0], RUN=run.folder, PLAIN=tmp_path/'plain.npz', STILLS=tmp_path/'stills')
    done = hatemm('localise', *(named.get(a, a) for a in args))
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_silent_video_and_sound_alone_have_timelines(run, shared):
    rows = list(localise_files(run.bundle, [shared/'data/odd_files/silent.mp4', shared/'data/odd_files/song.mp3', shared/'data/odd_files/exif6.jpg'], device='cpu'))
    assert rows[0]['error'] is None and rows[0]['moments']
    assert all('Traceback' not in (r['error'] or '') for r in rows) and 'nothing has a time' in rows[2]['error']
    assert all(r['error'] or r['moments'] for r in rows)


def test_features_in_a_file_localise_by_a_table_of_spans(run, tmp_path, hatemm):
    features, clips = export_features(run.folder, tmp_path/'own.npz'), read_table(run.clips)
    spans = [(c.video_id, s['start'], s['end']) for c in clips.itertuples() for s in c.spans]
    pd.DataFrame(spans, columns=['video_id', 'start', 'end']).to_csv(tmp_path/'spans.csv', index=False)
    done = hatemm('localise', features)
    assert done.returncode == 2 and 'has an annotated span' in done.stderr
    moments = read_moments(features, read_spans(tmp_path/'spans.csv'))
    assert moments.targets().any() and (moments.videos.spans.map(len) > 0).sum() == (clips.label == 1).sum()


def test_a_page_escapes_what_is_said(tmp_path):
    film = Film('<i>x</i>', 2., np.arange(2.), np.array([.1, .9]), [dict(start=1., end=2., score=.9, modality='text')], [dict(start=1., end=2., text='<script>$a')])
    page = write_timeline([film], tmp_path/'page.html').read_text()
    assert '<script>' not in page and '<i>x' not in page and '&lt;script&gt;$a' in page


def test_modalities_of_a_span():
    assert name_modality(dict(image=3., text=1.)) == 'image' and name_modality(dict(image=1., text=1.)) == 'image+text'
