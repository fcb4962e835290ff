"MultiHateClip as people have it: three classes, its own split, one id twice, and videos that are gone; from the folder to the report."
import json
import os

import pandas as pd
import pytest

from hatemm_clip.base import InputError, Run, read_table, short_hash
from hatemm_clip.check import check_dataset
from hatemm_clip.data import prepare_data
from hatemm_clip.demo import read_truth
from hatemm_clip.pipeline import run_pipeline

PARTS = dict(train=range(5), valid=range(5, 7), test=range(7, 10))  # of the ten videos of each class
GONE = (4, 9)  # one of train and one of test
PARAMS = """
dataset: mhc_en
data_dir: {folder}
stages: [00_data, 10_asr, 20_embed, 40_fusion, 60_analysis]
00_data: {{split: published, max_failed: .25}}
40_fusion: {{seeds: 1, epochs: 4}}
"""


@pytest.fixture(scope='module')
def folder(demo, tmp_path_factory):
    "Thirty ids of three classes, twenty-four of them with a video of the demo corpus."
    folder, corpus = tmp_path_factory.mktemp('mhc'), demo/'demo_data'
    (folder/'videos').mkdir()
    truth = read_truth(corpus)
    of_class = dict(Normal=[v for v in truth if not v['label']], Offensive=[v for v in truth if v['cause'] == 'image'], Hateful=[v for v in truth if v['cause'] == 'speech'])
    rows = {part: [] for part in PARTS}
    for (name, videos), (part, numbers) in ((c, p) for c in of_class.items() for p in PARTS.items()):
        for i in numbers:
            video_id, source = short_hash(name, i)[:11], videos[i]['video_file_name']
            rows[part].append(f"{video_id}\t{name}\t['Women']\t{'[]' if name == 'Normal' else '[(1, 3)]'}")
            if i not in GONE: os.link(next(corpus.glob(f'*/{source}')), folder/f'videos/{video_id}.mp4')
    rows['test'].append(rows['train'][0])
    for part, lines in rows.items(): (folder/f'{part}.tsv').write_text('\n'.join(['Video_ID\tMajority_Voting\tTarget_Victim\tDuration', *lines]) + '\n')
    return folder


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp('run')/'mhc.yml'
    file.write_text(PARAMS.format(folder=folder))
    return Run(run_pipeline(file, file.parent/'run', echo=lambda line: None))


def test_dead_links_are_too_many_unless_somebody_says_so(folder, tmp_path):
    for name in PARTS: os.link(folder/f'{name}.tsv', tmp_path/f'{name}.tsv')
    with pytest.raises(InputError, match='30 of 30 items failed, more than 99%; the first: .*no such file'): prepare_data('mhc_en', tmp_path, tmp_path/'run', max_failed=.99)
    with pytest.raises(InputError, match='none of 30 files can be used'): prepare_data('mhc_en', tmp_path, tmp_path/'run', max_failed=1.)
    assert not (tmp_path/'run').exists()


def test_check_counts_what_is_gone(folder):
    report = check_dataset(folder, media=False)
    assert report['rows'] == 30 and report['problems']['repeated']['count'] == 1 and report['errors'] == 0


def test_the_published_split_is_kept(run):
    splits, clips = read_table(run.splits), read_table(run.clips)
    assert splits.protocol.unique().tolist() == ['published'] and splits.fold.unique().tolist() == [0]
    assert 20 <= len(splits) <= len(clips) == 24 and clips.attrs['params']['positive'] == ''
    predictions = pd.read_parquet(run.predictions)
    assert predictions.fold.unique().tolist() == [0] and set(predictions.part) == {'val', 'test'} and predictions.prob.map(len).eq(3).all()
    test = predictions[predictions.part == 'test'].clip_id.unique()
    assert set(test) == set(clips.clip_id[clips.video_id.isin(splits.video_id[splits.part == 'test'])])


def test_the_report_counts_them(run):
    failed = pd.read_csv(run.folder/'failed_videos.csv')
    assert len(failed) == 6 and set(failed.error) == {'no such file'} and failed.label_name.value_counts().to_dict() == dict(Normal=2, Offensive=2, Hateful=2)
    for file in (run.report, run.card, run.bundle/'MODEL_CARD.md'):
        text = file.read_text()
        assert '6 of 30 videos could not be used' in text and '2 Offensive' in text and '6 no such file' in text, file
        assert 'protocol published' in text and 'emonstration' not in text, file
    assert 'each of the classes Normal, Offensive, Hateful' in run.card.read_text()
    assert 'BinaryClassifier:image+text' in json.loads(run.metrics.read_text())


def test_the_bundle_has_three_classes(run):
    config = json.loads((run.bundle/'config.json').read_text())
    assert config['label_names'] == ['Normal', 'Offensive', 'Hateful'] and config['positive'] == ''
