"Files are scored from their sound and pictures; a bundle that cannot score them is refused."
import dataclasses
import json
import wave
from functools import cache

import numpy as np
import pytest

from hatemm_clip.base import InputError
from hatemm_clip.encoders import FINETUNED, load_encoder, with_precision
from hatemm_clip.fusion import fit_bundle
from hatemm_clip.features import make_features
from hatemm_clip.score import format_scores
from hatemm_clip.scorer import Scorer

provenance = cache(lambda: load_encoder(device='cpu').provenance())


def write_bundle(folder, more=(), modalities='image+text', **made):
    "A bundle on features of the width that the shipped encoder gives; what it learns is of no account here."
    features = make_features(40, dim=128)
    for name, dim in dict(more).items():
        features.arrays[name] = np.random.default_rng(0).normal(size=(40, 2, dim)).astype(np.float32)
        features.masks[name] = np.ones((40, 2), bool)
    features = dataclasses.replace(features, provenance={})
    encoder = dict(provenance(), asr=dict(backend='faster-whisper', model='tiny.en'), fps=1., overlap=0) | made
    fit_bundle(features, 'BinaryClassifier', folder, modalities, grid={}, encoder=encoder, demo=True, epochs=2)
    return folder


@pytest.fixture(scope='module')
def scorer(tmp_path_factory): return Scorer(write_bundle(tmp_path_factory.mktemp('bundle')), 'cpu')


@pytest.fixture
def videos(shared):
    if not (shared/'data/videos').is_dir(): pytest.skip('needs real data: no shared/data/videos')
    return shared/'data/videos'


def check_scored(row):
    assert row['error'] is None and 0 <= row['prob'] <= 1 and row['label'] in ('Hate', 'Non Hate') and row['demo']
    assert len(row['frames']) > 0 and np.isfinite([f['contribution'] for f in row['frames']]).all()
    assert np.isfinite([w['contribution'] for w in row['windows']]).all()
    json.dumps(row, allow_nan=False)


def test_speech_is_heard(scorer, videos):
    row = scorer.score(videos/'nasa_13013.mp4')
    check_scored(row)
    assert 'telescope' in row['transcript'].lower() or 'webb' in row['transcript'].lower()
    assert ' '.join(w['text'] for w in row['windows']).split() == row['transcript'].split()
    assert all(0 <= w['start'] < w['end'] for w in row['windows'])


def test_no_speech_is_no_text(scorer, videos):
    row = scorer.score(videos/'mdn_rabbit.mp4')
    check_scored(row)
    assert row['transcript'] == '' and row['windows'] == [] and row['modalities']['text'] == 0
    assert 'nothing was said' in format_scores([row])


@pytest.mark.parametrize('name, notes', [
    ('vfr.mp4', ['the header says 0.8 s, the file holds 9.1 s', 'nothing was said: no sound track']),
    ('audio_late.mkv', ['the sound begins 2.98 s after the picture']), ('antiphase.mkv', ['its two channels cancel each other; the louder is taken']),
    ('latin1.avi', []), ('flipped.mp4', ['damaged packets']), ('trunc.mp4', ['the header says 6.0 s, the file holds 3.0 s']),
    ('reschange.ts', ['frames of 160 × 120 and 320 × 240']), ('cover_first.mp4', ['its cover picture is no video']), ('bframes.avi', []),
    ('audio_long.mp4', ['3.0 s of picture, 30.0 s of sound']), ('twoaudio.mp4', ['track 2 is taken']), ('delays.gif', ['nothing was said: no sound track']),
    ('rot90.mp4', []), ('blip.mp4', ['nothing was said: only 0.0']), ('silent.mp4', ['nothing was said: no sound track']), ('rgba.png', ['nothing was said'])])
def test_odd_files_are_scored_and_the_notes_say_what_was_odd(name, notes, scorer, shared):
    row = scorer.score(shared/'data/odd_files'/name)
    check_scored(row)
    for words in notes: assert any(words in note for note in row['notes']), row['notes']
    assert name != 'rot90.mp4' or row['notes'] == [] or row['notes'] == ['nothing was said: no words in the sound']


def test_more_than_two_classes_are_answered_by_the_bundles_own_rule(tmp_path, videos):
    features = make_features(60, dim=128)
    labels = np.arange(60) % 3
    features = dataclasses.replace(features, labels=labels, label_names=['Normal', 'Offensive', 'Hateful'], provenance={})
    encoder = dict(provenance(), asr=dict(backend='faster-whisper', model='tiny.en'), fps=1., overlap=0)
    fit_bundle(features, 'BinaryClassifier', tmp_path, 'image+text', grid={}, encoder=encoder, demo=True, epochs=2)
    scorer = Scorer(tmp_path, 'cpu')
    row = scorer.score(videos/'nasa_13013.mp4')
    assert set(row['probabilities']) == {'Normal', 'Offensive', 'Hateful'} and abs(sum(row['probabilities'].values()) - 1) < 1e-5
    assert row['label'] == row['prob_of'] == max(row['probabilities'], key=row['probabilities'].get) and row['threshold'] is None
    assert 'probability of' in format_scores([row])


def test_sound_alone_is_scored_by_a_bundle_of_words_alone(tmp_path, shared, scorer):
    song = shared/'data/odd_files/song.mp3'
    assert 'holds no video, only audio' in scorer.score(song)['error']
    row = Scorer(write_bundle(tmp_path, modalities='text'), 'cpu').score(song)
    assert row['error'] is None and 0 <= row['prob'] <= 1 and row['frames'] == []


def test_mpeg_files(scorer, videos):
    for file in sorted(videos.glob('grid_*.mpg'))[:1]: check_scored(scorer.score(file))


def test_files_without_video(scorer, tmp_path):
    with wave.open(str(tmp_path/'sound.wav'), 'wb') as file:
        file.setparams((1, 2, 16000, 0, 'NONE', ''))
        file.writeframes(bytes(32000))
    (tmp_path/'broken.mp4').write_bytes(bytes(range(256))*40)
    told = {'sound.wav': 'holds no video, only audio', 'broken.mp4': 'not a readable media file', 'none.mp4': 'no such file'}
    for name, reason in told.items():
        row = scorer.score(tmp_path/name)
        assert reason in row['error'] and name in row['error'] and '\n' not in row['error']
        assert row['prob'] is None and row['label'] is None and not row['frames']
    assert format_scores([scorer.score(tmp_path/'none.mp4')]).count('not scored') == 1


def test_a_bundle_of_given_words_hears_none(tmp_path, videos):
    scorer = Scorer(write_bundle(tmp_path, asr={}), 'cpu')
    assert 'give the words with the file' in scorer.score(videos/'nasa_13013.mp4')['error']
    check_scored(scorer.score(videos/'nasa_13013.mp4', text='good morning'))


@pytest.mark.parametrize('made,told', [
    (dict(weights_sha256='0'*64), 'other weights of hatemm-tiny/demo'),
    (dict(pretrained=''), r'of unknown make \(pretrained not recorded\)'),
    (dict(encoder='ViT-Z'), 'unknown to open_clip')])
def test_bundle_of_other_make(tmp_path, made, told):
    with pytest.raises(InputError, match=told): Scorer(write_bundle(tmp_path, **made), 'cpu')


def test_bundle_of_other_modalities(tmp_path):
    with pytest.raises(InputError, match='was trained on smell; a file can be scored by image, text, audio'):
        Scorer(write_bundle(tmp_path, dict(smell=8), 'image+smell'), 'cpu')


def test_bundle_with_sound(tmp_path, videos):
    bundle = write_bundle(tmp_path, dict(audio=40), 'audio+image+text', audio='mfcc')
    row = Scorer(bundle, 'cpu').score(videos/'nasa_13013.mp4')
    check_scored(row)
    assert set(row['modalities']) == {'audio', 'image', 'text'}


def test_precision_is_that_of_the_features(tmp_path):
    made = with_precision(load_encoder(device='cpu'), 'bfloat16').provenance()
    assert Scorer(write_bundle(tmp_path, **made), 'cpu').encoder.precision == 'bfloat16'


def test_fine_tuned_encoder_in_the_bundle(tmp_path, monkeypatch):
    bundle = write_bundle(tmp_path/'bundle', encoder='encoder', pretrained=FINETUNED)
    (bundle/'encoder').mkdir()
    (bundle/'encoder/config.json').write_text(json.dumps(dict(kind=FINETUNED, mode='head', encoder='hatemm-tiny', pretrained='demo')))
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path/'elsewhere')
    assert Scorer('../bundle', 'cpu').encoder.name.endswith('bundle/encoder')
