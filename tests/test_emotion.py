"Emotions of texts: by word lists, as a published table has them, and by descriptions."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED

from hatemm_clip.emotion import DESCRIPTIONS, EMOTIONS, clip_emotions, compound, count_words, describe_emotions, emotion_of, is_emotional, mean_emotions
from hatemm_clip.encoders import load_encoder

CAPTIONS = SHARED/'data/retrieval/msrvtt_test68_e.json'


@pytest.mark.skipif(not CAPTIONS.is_file(), reason='needs ../shared/data/retrieval')
def test_published_columns_are_reproduced():
    for row in json.loads(CAPTIONS.read_text()):
        found = emotion_of(row['caption'])
        assert all(found[name] == row[name] for name in found)


@pytest.mark.parametrize('text, wanted', [
    ('HAPPY', dict(joy=1, positive=1)), ('happy happy', dict(joy=2)), ("my friend's dog", dict(joy=1)), ('well-loved', dict(neutral=1, positive=0)),
    ('', dict(neutral=1, joy=0)), ('冬の朝', dict(neutral=1)), ('war, war; war!', dict(fear=3, negative=3))])
def test_words_are_counted(text, wanted):
    counts = count_words(text)
    assert {name: counts[name] for name in wanted} == wanted


def test_the_flag_has_two_reasons():
    assert compound('what a wonderful, lovely day') > .6 and is_emotional('what a wonderful, lovely day')
    assert abs(compound('the scarecrow stands there')) < .6 and not is_emotional('a box of tools') and is_emotional('a scary box of tools')


def test_the_flag_and_the_columns_are_numbers_that_json_takes():
    assert json.loads(json.dumps(emotion_of('a sad day'))) == emotion_of('a sad day')


def test_descriptions_give_shares_whatever_the_batch():
    encoder, texts = load_encoder(), ['we are glad', '', 'the train leaves']
    shares = describe_emotions(texts, encoder)
    assert list(shares) == list(DESCRIPTIONS) and shares.loc[1].isna().all() and np.allclose(shares.drop(1).sum(axis=1), 1)
    assert np.allclose(describe_emotions(texts[:1], encoder), shares.loc[[0]], atol=1e-5)
    assert len(describe_emotions([], encoder)) == 0


def test_a_clip_that_says_nothing_has_no_emotion():
    table = pd.DataFrame(dict(clip_id=['a', 'b'], segments=[[], [dict(start=0., end=0., text='joy')]]))
    found = mean_emotions(clip_emotions(table, 'written'))
    assert found.index.tolist() == ['b'] and found.joy['b'] == 1 and set(EMOTIONS) <= set(found)
    assert clip_emotions(table[:1]).empty


def test_without_the_extra_the_way_to_it_is_named():
    code = "import sys; sys.modules['nrclex'] = None; from hatemm_clip.emotion import count_words; count_words('a')"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'hatemm_clip[emotion]'" in done.stderr.strip().splitlines()[-1]
