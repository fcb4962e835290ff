import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from hatemm_clip.base import InputError
from hatemm_clip.features import make_features
from hatemm_clip.fusion import with_protocol
from hatemm_clip.topics import demo_topics, embed_titles, read_titles, relabel, study_titles, study_topics, topic_differences, topic_table, word_windows

TITLES = Path(__file__).resolve().parents[2]/'shared/data/topics/youtube_6topics_10333.csv'
real = pytest.mark.skipif(not TITLES.is_file(), reason='needs ../shared/data/topics')


@pytest.fixture(scope='module')
def study():
    "The six runs on images of which the topic is one direction."
    topic = np.array(['food', 'history', 'music'])[np.arange(60) % 3]
    features = make_features(60, frames=6, dim=8).only(['image'])
    features.arrays['image'][..., :3] += np.eye(3, dtype=np.float32)[np.arange(60) % 3][:, None]
    return study_topics(with_protocol(relabel(features, topic), 'grouped_5fold'), seeds=2, epochs=4, lr=1e-2)


def test_every_run_scores_every_clip(study):
    predictions, history = study
    test = predictions[predictions.part == 'test']
    assert (test.groupby(['run', 'train_condition', 'seed']).clip_id.nunique() == 60).all()
    assert len(history) == 6 * 5 * 2 * 4 and np.isfinite(history[['val_loss', 'val_accuracy']]).all(axis=None)


def test_f1_micro_is_scikit_learns(study):
    predictions = study[0]
    rows = predictions.query("run == 'transformer' and train_condition == 'mixup' and part == 'test' and seed == 0")
    table = topic_table(predictions[predictions.seed == 0], n=20)
    assert table.f1_micro['mean'].loc['transformer', 'mixup'] == pytest.approx(f1_score(rows.label, np.stack(rows.prob).argmax(1), average='micro'))


def test_differences_are_paired_and_corrected(study):
    table = topic_differences(study[0], n=200)
    assert len(table) == 5 and (table.p_holm >= table.p).all() and (table.low <= table.delta).all() and (table.delta <= table.high).all()


def test_demo_topics(tmp_path):
    videos = [dict(video_file_name=f'v{i}.mp4', topic=['food', 'music'][i % 2]) for i in range(12)]
    (tmp_path/'truth.json').write_text(json.dumps(dict(made_with={}, videos=videos)))
    features = make_features(12, 'xor')
    labelled = demo_topics(features, pd.DataFrame(dict(clip_id=features.ids, path=[f'x/v{i}.mp4' for i in range(12)])), tmp_path)
    assert labelled.label_names == ['food', 'music'] and labelled.labels.tolist() == [0, 1] * 6


def test_titles_of_the_test_part_are_not_fitted():
    titles = pd.DataFrame(dict(video_id=[f'v{i}' for i in range(8)], title=['red tram', 'blue tram', 'red bus', 'blue bus', 'red tram', 'blue bus', 'xyzzy plugh', 'plugh xyzzy'], topic=['a', 'b'] * 4))
    features = embed_titles(titles, np.arange(6), dims=2)
    assert features.masks['text'][:6].all() and not features.masks['text'][6:].any()


def test_bad_input(tmp_path):
    file = tmp_path/'t.csv'
    file.write_text('id,Title\nx,y\n')
    with pytest.raises(InputError, match="lacks the column 'Video Id'; it has id, Title"): read_titles(file)
    with pytest.raises(InputError, match='2 labels for 12 clips'): relabel(make_features(12, 'xor'), ['a', 'b'])
    assert word_windows('one') == ['one'] and len(word_windows('w ' * 50)) == 12


@real
def test_real_titles_beat_the_most_frequent_topic():
    titles = read_titles(TITLES)
    assert len(titles) == 6160 and titles.topic.nunique() == 4
    some = titles.groupby('topic').head(150).reset_index(drop=True)
    predictions, _ = study_titles(some, seeds=1, epochs=3, heads={'mean linear': 'MeanLinear'}, lr=1e-2, dims=32)
    assert (topic_table(predictions, n=20).f1_micro['mean'] > .5).all()


@real
def test_equal_titles_stay_together():
    titles = read_titles(TITLES)
    assert titles.video_id.is_unique and titles.group.nunique() < len(titles)
    features = make_features(len(titles), 'text', frames=1, dim=2)
    features.video_ids = titles.group.to_numpy(str)
    for part in with_protocol(features, 'grouped_5fold').split: assert (pd.Series(part).groupby(features.video_ids).nunique() == 1).all()
