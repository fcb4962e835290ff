"Transcripts: real clips, both backends, killed and resumed runs."
import copy
import os
import signal
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm

from hatemm_clip import asr as module
from hatemm_clip import rows, speech
from hatemm_clip.engines import read_ahead
from hatemm_clip.speech import Asr, asr_of, compression_ratio, cut_windows, find_ct2_model, find_openai_model, load_asr, missed_speech, padded_seconds, speech_spans, split_segments, window_flags
from hatemm_clip.wer import _normalizer, word_error_interval, word_error_rate, word_errors
from hatemm_clip.bench import bench_asr
from hatemm_clip.rows import read_journal
from hatemm_clip.asr import make_groups, read_transcripts, transcribe_clips, write_srt, write_subtitles, write_vtt
from hatemm_clip.sound import SR, read_audio
from hatemm_clip.base import CLIPS, InputError, read_table, store_lock, write_table
from hatemm_clip.demo import demo_clips, demo_words, random_sentence, read_truth, speak
from films import sounding

LONG = 'autoeditor_example'  # 42 s
GRID = {'bbaf2n': 'bin blue at f 2 now', 'lbax4n': 'lay blue at x 4 now', 'sbwe5n': 'set blue with e 5 now', 'swiz3n': 'set white in z 3 now'}


@pytest.fixture(scope='module')
def fast(): return load_asr('faster-whisper', 'tiny.en', 'cpu', threads=1)


@pytest.fixture(scope='module')
def corpus(demo, tmp_path_factory):
    "Six clips of the demo as a table, the truth of all, and a folder that has the table."
    folder = tmp_path_factory.mktemp('asr')
    clips = read_table(demo/'runs/notebook/clips.parquet')[:6]
    write_table(clips, folder/'clips.parquet', CLIPS)
    return clips, read_truth(demo/'demo_data'), folder


@pytest.fixture(scope='module')
def sounds(corpus): return [read_audio(p) for p in corpus[0].path]


@pytest.fixture(scope='module')
def together(fast, sounds):
    "What is heard in all of the corpus at once."
    return fast.transcribe(sounds)


@lru_cache
def one_by_one(threads=1): return load_asr('faster-whisper', 'tiny.en', 'cpu', threads=threads, batch_size=1)


@pytest.fixture(scope='module')
def undisturbed(corpus):
    "The folder of transcripts of the corpus, made one clip at a time."
    transcribe_clips(corpus[0], corpus[2]/'undisturbed', one_by_one())
    return corpus[2]/'undisturbed'


def other(asr, **settings):
    "The same model with other settings."
    asr = copy.copy(asr)
    vars(asr).update(settings)
    return asr


@pytest.fixture(scope='module')
def openai_whisper(shared):
    "The other backend, which writes up to 80 tokens a window, not 224: a loop has no other end."
    asr = load_asr('openai-whisper', str(shared/'models/whisper-tiny.en.pt'), 'cpu', threads=1)
    asr.net.dims.n_text_ctx = 160
    return asr


@pytest.fixture
def openai(openai_whisper):
    "The same with another beam."
    return lambda beam_size: other(openai_whisper, beam_size=beam_size)


@pytest.fixture(scope='module')
def videos(shared):
    "Real clips by file name."
    return {f.stem: read_audio(f) for f in sorted((shared/'data/videos').iterdir())}


def grid_words(answers):
    "Of the 24 words in the GRID clips, those understood; letters and digits count apart."
    apart = lambda text: set(''.join(f' {c} ' if c.isdigit() else c for c in _normalizer()(text)).split())
    return sum(len(apart(said) & apart(answers[f'grid_{name}']['text'])) for name, said in GRID.items())


def check_real_clips(answers):
    assert grid_words(answers) >= 17
    for name, said in GRID.items(): assert said.split()[4] in answers[f'grid_{name}']['text'], name
    nasa = answers['nasa_13013']
    assert 'telescope' in nasa['text'].lower() and 'web' in nasa['text'].lower() and not nasa['flags']
    assert answers['mdn_rabbit']['text'] == '' and answers['mdn_rabbit']['flags'] == ['no_speech'] and answers['mdn_rabbit']['segments'] == []
    for answer in answers.values():
        times = [t for s in answer['segments'] for t in (s['start'], s['end'])]
        assert times == sorted(times) and all(0 <= t <= 60 for t in times)


def check_long_clip(answer):
    last = answer['segments'][-1]
    assert 'banana' in last['text'].lower() and last['start'] > 38


def transcribe_all(asr, videos): return dict(zip(videos, asr.transcribe(list(videos.values()))))


def test_real_clips_with_faster_whisper(fast, videos):
    answers = transcribe_all(fast, videos)
    check_real_clips(answers)
    check_long_clip(answers[LONG])


def test_real_clips_with_openai_whisper(videos, openai):
    asr = openai(beam_size=1)
    answers = transcribe_all(asr, videos)
    check_real_clips(answers)
    check_long_clip(answers[LONG])
    assert {(a['backend'], a['model']) for a in answers.values()} == {('openai-whisper', 'whisper-tiny.en')}
    assert asr.net.encoder.positional_embedding.shape[0] == 1500


def test_short_real_clips_with_a_beam_of_openai_whisper(videos, openai):
    asr = openai(beam_size=2)
    check_real_clips(transcribe_all(asr, {name: audio for name, audio in videos.items() if name != LONG}))
    assert asr.net.encoder.positional_embedding.shape[0] == 1500


def test_auto_takes_the_backend_that_has_the_weights(shared):
    assert load_asr('auto', 'tiny.en', 'cpu').backend == 'faster-whisper'
    assert load_asr('auto', str(shared/'models/whisper-tiny.en.pt'), 'cpu').backend == 'openai-whisper'


def test_an_answer_does_not_depend_on_the_batch(fast, sounds, together):
    assert [fast.transcribe([a])[0] for a in sounds[:2]] == together[:2]
    assert fast.transcribe(sounds[:1:-1])[::-1] == together[2:]
    assert other(fast, batch_size=2).transcribe(sounds[:3]) == together[:3]


def test_demo_sentences_are_understood_and_timed(corpus, together):
    clips, truth, _ = corpus
    videos = {v['video_file_name']: v for v in truth}
    known = [videos[Path(p).name] for p in clips.path]
    assert word_error_rate([demo_words(v) for v in known], [a['text'] for a in together]) < .3
    late = [abs(a['segments'][0]['start'] - min(s['start'] for s in v['sentences'])) for a, v in zip(together, known)]
    assert np.median(late) < .2


def in_order(segments, length):
    "Whether segments have a length, follow each other and stay within the sound."
    times = [t for s in segments for t in (s['start'], s['end'])]
    return all(s['start'] < s['end'] for s in segments) and times == sorted(times) and all(0 <= t <= length for t in times)


@pytest.mark.parametrize('backend, late', [('faster-whisper', 0.), ('faster-whisper', 2.5), ('openai-whisper', 2.5)])
def test_words_are_at_their_seconds_on_the_clock_of_the_picture(backend, late, fast, openai, tmp_path):
    rng, begins = np.random.default_rng(3), [1., 7., 14.]
    said, wave = [random_sentence(kind, rng, 'pumpkins') for kind in ('friendly', 'hostile', 'counter')], np.zeros(48_000*20, np.float32)
    for begin, sentence in zip(begins, said):
        spoken = speak(sentence)
        spoken = np.interp(np.arange(0, len(spoken), 22_050/48_000), np.arange(len(spoken)), spoken)
        at = int(48_000*begin)
        wave[at:at + len(spoken)] = spoken[:len(wave) - at]
    film = sounding(tmp_path/'late.mkv', seconds=20., offset=late, tracks=[wave[None]])
    asr = fast if backend == 'faster-whisper' else openai(beam_size=5)
    audio = read_audio(film)
    segments = asr.transcribe([audio])[0]['segments']
    assert in_order(segments, len(audio)/SR)
    for begin in begins: assert min(abs(s['start'] - begin - late) for s in segments) < .3, [round(s['start'], 2) for s in segments]


@pytest.mark.parametrize('backend', ['faster-whisper', 'openai-whisper'])
def test_a_loop_over_noise_is_flagged_or_left_out(backend, fast, openai, openai_whisper, monkeypatch):
    "One phrase, again and again over noise, gives no endless text: no more words than are said."
    monkeypatch.setattr(openai_whisper.net.dims, 'n_text_ctx', 112)
    phrase = speak('thank you for watching')
    phrase = np.interp(np.arange(0, len(phrase), 22_050/SR), np.arange(len(phrase)), phrase)
    audio = np.tile(phrase, 6).astype(np.float32)
    audio += np.random.default_rng(0).normal(0, .05, len(audio)).astype(np.float32)
    asr = fast if backend == 'faster-whisper' else openai(beam_size=1)
    answer = asr.transcribe([audio])[0]
    assert in_order(answer['segments'], len(audio)/SR) and len(answer['text'].split()) <= 4*6
    assert 'repetition' in answer['flags']


def test_a_long_clip_is_cut_and_put_together(fast):
    rng, sounds, said = np.random.default_rng(0), [], []
    for kind in ('friendly', 'neutral', 'hostile', 'counter')*3:
        said.append(random_sentence(kind, rng, 'pumpkins'))
        wave = speak(said[-1])
        sounds += [np.interp(np.arange(0, len(wave), 22_050/SR), np.arange(len(wave)), wave), np.zeros(SR//2)]
    audio = np.concatenate(sounds).astype(np.float32)
    answer = fast.transcribe([audio])[0]
    assert len(audio)/SR > 35 and word_error_rate(' '.join(said), answer['text']) < .35
    assert answer['segments'][-1]['end'] > len(audio)/SR - 3


@pytest.mark.parametrize('audio, flag', [(np.zeros(0), 'no_audio'), (np.zeros(5*SR), 'no_audio'), (np.zeros(10), 'no_audio'), (np.random.default_rng(0).normal(0, .02, 3*SR), 'no_speech')])
def test_silence_is_an_empty_flagged_transcript(fast, audio, flag):
    answer = fast.transcribe([audio])[0]
    assert (answer['text'], answer['segments'], answer['flags']) == ('', [], [flag])


def test_nothing_in_nothing_out(fast): assert fast.transcribe([]) == []


@pytest.mark.parametrize('seed', range(20))
def test_windows_hold_every_span_and_stay_short(seed):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(rng.choice([1., 6.]), 2*rng.integers(1, 60)).clip(.05, 27))
    spans, duration = list(zip(times[::2].tolist(), times[1::2].tolist())), float(times[-1] + rng.uniform(0, 50))
    windows = cut_windows(spans, duration)
    assert all(0 <= a < b <= duration and b - a <= 30.001 for a, b in windows)
    assert all(x[1] <= y[0] + 1e-9 for x, y in zip(windows[:-1], windows[1:]))
    for a, b in spans: assert any(low <= a and b <= high for low, high in windows)


def test_segments_stay_in_their_window():
    segments = split_segments([1000, 5, 1500, 1600, 6, 1700], 1000, lambda t: 'x', 10., 12.)
    assert all(10 <= s['start'] <= s['end'] <= 12 for s in segments) and len(segments) == 2


class Failing(Asr):
    "A recogniser that repeats itself unless it is given the full window."
    backend, first_time, workers = 'failing', 10_000, 1

    def __init__(self): self.model, self.beam_size, self.batch_size, self.calls = 'none', 1, 4, []

    @staticmethod
    def to_text(tokens): return ' '.join('the harbour' if t == 1 else 'bread costs less' for t in tokens)

    def decode(self, waves, seconds, beam_size):
        self.calls.append((len(waves), seconds))
        tokens = [10_000, 2, 10_000 + 1500] if seconds == 30 else [10_000, *[1]*60, 10_000 + 1500]
        return [dict(tokens=tokens, avg_logprob=-.2, no_speech_prob=.01, language='en') for _ in waves]


def test_a_repetition_is_decoded_again_at_full_length(corpus):
    asr = Failing()
    answer = asr.transcribe([read_audio(corpus[0].path[0])])[0]
    assert asr.calls[0][1] < 30 and asr.calls[1] == (1, 30)
    assert answer['text'] == 'bread costs less' and 'repetition' not in answer['flags']


def test_a_wrong_hash_is_refused(monkeypatch):
    monkeypatch.setattr(speech, 'TINY_EN_SHA256', 'f'*64)
    with pytest.raises(InputError, match='sha256 is 1a5afae06a4d'): find_ct2_model('tiny.en')


@pytest.mark.parametrize('kwargs, told', [
    (dict(model='base'), "use model 'tiny.en'"), (dict(backend='openai-whisper', model='base'), "use model 'tiny.en'"), (dict(model='gigantic'), 'neither a folder nor a size'),
    (dict(backend='kaldi'), 'expected auto'), (dict(device='tpu'), 'expected auto, cpu or cuda'), (dict(beam_size=0), 'expected 1 or more')])
def test_bad_settings_are_one_line(kwargs, told, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr('whisper._download', lambda *_: (_ for _ in ()).throw(OSError('no way out')))
    begun = time.monotonic()
    with pytest.raises(InputError, match=told) as e: load_asr(**kwargs)
    assert '\n' not in str(e.value) and time.monotonic() - begun < 60


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match='lacks model.bin, tokenizer.json'): load_asr('faster-whisper', str(tmp_path))


@pytest.mark.parametrize('backend, name', [('faster-whisper', ''), ('openai-whisper', 'torn.pt')])
def test_broken_weights_are_one_line(backend, name, tmp_path):
    for file in ('model.bin', 'tokenizer.json', 'torn.pt'): (tmp_path/file).write_bytes(b'torn')
    with pytest.raises(InputError, match='cannot load it') as e: load_asr(backend, str(tmp_path/name), 'cpu')
    assert '\n' not in str(e.value)


def test_a_torn_download_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path/'whisper').mkdir()
    (tmp_path/'whisper/tiny.en.pt').write_bytes(b'torn')
    with pytest.raises(InputError, match='not on this machine'): find_openai_model('tiny.en', download=False)


WORKER = """
import sys, time
from hatemm_clip import asr as module, rows
from hatemm_clip.base import read_table
append = rows._append
lines = []
def slowly(*args):
    append(*args)
    lines.append(1)
    if len(lines) == int(sys.argv[3]): time.sleep(60)
rows._append = slowly
module.transcribe_clips(read_table(sys.argv[1]), sys.argv[2], module.load_asr(device='cpu', batch_size=1, threads=1))
"""


@pytest.mark.parametrize('lines', [1, 3])
def test_killed_and_resumed_equals_undisturbed(corpus, undisturbed, tmp_path, lines):
    clips, _, folder = corpus
    journal = tmp_path/'transcripts.parquet.journal'
    process = warm.Fork([sys.executable, '-c', WORKER, folder/'clips.parquet', tmp_path, lines])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (journal.exists() and journal.read_bytes().count(b'\n') >= lines): time.sleep(.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert journal.exists() and not (tmp_path/'transcripts.parquet').exists()
    with open(journal, 'a') as f: f.write('{"rows": [{"clip')
    resumed = transcribe_clips(clips.sample(frac=1, random_state=0), tmp_path, one_by_one(threads=2))
    assert (undisturbed/'transcripts.parquet').read_bytes() == (tmp_path/'transcripts.parquet').read_bytes()
    assert resumed.clip_id.tolist() == sorted(clips.clip_id) and not journal.exists()


RUN = """
import sys, time
import faster_whisper.vad, filelock, pyarrow.parquet, tqdm
sys.path.append(sys.argv[3])
from hatemm_clip import asr as module, rows
from hatemm_clip.base import read_table
from hatemm_clip.speech import find_ct2_model
from killing import kill_runs
clips, append, weights = read_table(sys.argv[1]), rows._append, find_ct2_model('tiny.en')

def slowly(*args):
    time.sleep(.15)
    append(*args)

def run(ready):
    asr = module.load_asr('faster-whisper', 'tiny.en', 'cpu', threads=1, batch_size=1)
    rows._append = slowly
    ready()
    module.transcribe_clips(clips, sys.argv[2], asr=asr)
print(kill_runs(run, longest=.6))
"""


def test_killed_at_ten_moments_and_resumed_equals_undisturbed(corpus, undisturbed, tmp_path):
    clips, _, folder = corpus
    done = warm.run([sys.executable, '-c', RUN, folder/'clips.parquet', tmp_path/'killed', Path(__file__).parent], timeout=300)
    assert int(done.stdout.split()[-1]) >= 6
    transcribe_clips(clips, tmp_path/'killed', one_by_one())
    read = lambda folder: (folder/'transcripts.parquet').read_bytes()
    assert read(tmp_path/'killed') == read(undisturbed) and not list((tmp_path/'killed').glob('*.journal'))


def test_two_writers_one_is_refused(fast, corpus, tmp_path):
    clips, _, folder = corpus
    with store_lock(tmp_path/'transcripts.parquet'):
        with pytest.raises(InputError, match='another run is writing to it'): transcribe_clips(clips[:2], tmp_path, asr=fast)
        code = "import sys; from hatemm_clip.asr import transcribe_clips; from hatemm_clip.base import read_table; transcribe_clips(read_table(sys.argv[1])[:2], sys.argv[2])"
        done = warm.run([sys.executable, '-c', code, folder/'clips.parquet', tmp_path])
    assert 'InputError' in done.stderr and 'another run is writing to it' in done.stderr.splitlines()[-1]
    first = transcribe_clips(clips[:2], tmp_path, asr=fast)
    with store_lock(tmp_path/'transcripts.parquet'): assert first.equals(transcribe_clips(clips[:2], tmp_path, asr=fast))  # done: only read


def test_a_full_disk_is_told_and_the_journal_goes_on(corpus, undisturbed, tmp_path):
    clips, _, folder = corpus
    code = f"""
import resource, signal, sys
from hatemm_clip.asr import load_asr, transcribe_clips
from hatemm_clip.base import InputError, read_table
asr = load_asr('faster-whisper', 'tiny.en', 'cpu', threads=1, batch_size=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try: transcribe_clips(read_table({str(folder/'clips.parquet')!r}), {str(tmp_path)!r}, asr=asr)
except InputError as e: sys.exit(str(e))  # what is told has to fit into a file, too
"""
    told = warm.run([sys.executable, '-c', code]).stderr.strip().splitlines()[-1]
    assert 'transcripts.parquet.journal: cannot be written (File too large)' in told and 'make room and run again' in told
    assert (tmp_path/'transcripts.parquet.journal').stat().st_size > 0 and not (tmp_path/'transcripts.parquet').exists()
    assert transcribe_clips(clips, tmp_path, asr=one_by_one()).equals(read_transcripts(undisturbed))


@pytest.fixture
def clips_read(monkeypatch):
    "The clips that are read."
    names, read = [], module._read_clip
    monkeypatch.setattr(module, '_read_clip', lambda clip: (names.append(clip.clip_id), read(clip))[1])
    return names


def test_what_failed_is_tried_again_and_nothing_else(fast, corpus, tmp_path, capsys, clips_read):
    clips = corpus[0][:3].assign(path=[str(tmp_path/f'{i}.mp4') if i == 1 else p for i, p in enumerate(corpus[0].path[:3])])
    assert len(transcribe_clips(clips, tmp_path, asr=fast, max_failed=.34)) == 2 and len(clips_read) == 3
    (tmp_path/'1.mp4').write_bytes(Path(corpus[0].path[1]).read_bytes())
    assert len(transcribe_clips(clips, tmp_path, asr=fast)) == 3 and clips_read[3:] == [clips.clip_id[1]]
    assert '1 of 3 clips are new or have changed' in capsys.readouterr().out and not (tmp_path/'failed_transcripts.csv').exists()
    transcribe_clips(clips, tmp_path, asr=fast)
    assert 'there already' in capsys.readouterr().out and len(clips_read) == 4


def test_a_run_that_dies_between_its_files_forgets_no_clip(fast, corpus, tmp_path, monkeypatch):
    clips = corpus[0][:2].assign(path=[str(tmp_path/'late.mp4'), corpus[0].path[1]])
    transcribe_clips(clips, tmp_path, asr=fast, max_failed=.5)
    (tmp_path/'late.mp4').write_bytes(Path(corpus[0].path[0]).read_bytes())
    def dies(*args, **kwargs): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(rows, 'write_table', dies)
        with pytest.raises(InputError, match='No space left on device'): transcribe_clips(clips, tmp_path, asr=fast)
    assert len(transcribe_clips(clips, tmp_path, asr=fast)) == 2


def test_only_new_and_changed_clips_are_transcribed(fast, corpus, tmp_path, clips_read, undisturbed):
    clips = corpus[0].sort_values('clip_id', ignore_index=True)
    transcribe_clips(clips[:2], tmp_path, asr=fast)
    grown = transcribe_clips(clips[:4], tmp_path, asr=fast)
    assert clips_read[2:] == clips.clip_id[2:4].tolist()
    cut = clips[:4].assign(end=[2. if i == 1 else end for i, end in enumerate(clips.end[:4])])
    transcribe_clips(cut, tmp_path, asr=fast)
    assert clips_read[4:] == [clips.clip_id[1]]
    back = transcribe_clips(clips[:4], tmp_path, asr=fast)
    assert back.equals(grown) and clips_read[5:] == [clips.clip_id[1]]
    assert transcribe_clips(clips[:2], tmp_path, asr=fast).clip_id.tolist() == clips.clip_id[:2].tolist() and len(clips_read) == 6
    assert grown.equals(read_transcripts(undisturbed)[:4])


def test_sound_that_is_not_decoded_is_told(fast):
    rng = np.random.default_rng(0)
    wave = speak(random_sentence('friendly', rng, 'pumpkins'))
    speech = np.interp(np.arange(0, len(wave), 22_050/SR), np.arange(len(wave)), wave).astype(np.float32)
    noise = rng.normal(0, np.sqrt(np.mean(speech**2)), 8*SR).astype(np.float32)
    flags = [answer['flags'] for answer in fast.transcribe([np.concatenate([speech, tail]) for tail in (noise, 0*noise, noise[:3*SR], .02*noise)])]
    assert 'not_decoded' in flags[0] and not any('not_decoded' in names for names in flags[1:])


def test_the_threshold_of_speech_is_a_setting(corpus, tmp_path, capsys):
    strict = load_asr('faster-whisper', 'tiny.en', 'cpu', threads=1, vad_threshold=.9)
    assert strict.settings()['vad_threshold'] == .9 and asr_of(strict.settings(), 'cpu').vad_threshold == .9
    noisy = read_audio(corpus[0].path[0]) + np.random.default_rng(0).normal(0, .2, read_audio(corpus[0].path[0]).size).astype(np.float32)
    length = lambda threshold: sum(b - a for a, b in speech_spans(noisy, threshold))
    assert length(.9) < length(.35)
    windows = speech._windows_of(0, noisy, .9)
    assert {s for w in windows for s in w['spans']} == set(speech_spans(noisy, .9))
    with pytest.raises(InputError, match='expected a probability'): load_asr(vad_threshold=0)


def test_text_that_is_left_out_keeps_its_flag():
    window = dict(text='la la la', avg_logprob=-.3, no_speech_prob=.1, missed=0., has_speech=False, seconds=20., segments=[], language='en')
    asr = Failing()
    kept = speech._join(asr, [window, dict(window, text='thank you', no_speech_prob=.9)])
    assert kept['text'] == 'la la la' and kept['flags'] == ['no_speech', 'vad_silent'] and kept['left_out'] == 'thank you'
    assert speech._join(asr, [window, dict(window, text='', no_speech_prob=.9)])['flags'] == ['vad_silent']
    assert speech._join(asr, [dict(window, text='thank you', no_speech_prob=.9)])['flags'] == ['no_speech']


def test_a_model_can_be_loaded_again_by_what_is_recorded(corpus, tmp_path, monkeypatch):
    (tmp_path/'tiny.en').symlink_to(find_ct2_model('tiny.en'))
    monkeypatch.chdir(tmp_path)
    asr = load_asr('faster-whisper', './tiny.en', 'cpu', threads=1)
    monkeypatch.undo()
    table = transcribe_clips(corpus[0][:1], tmp_path/'run', asr=asr)
    made = dict(backend=table.backend[0], model=table.model[0], **{k: v for k, v in table.attrs['params'].items() if k == 'source'})
    assert asr_of(made, 'cpu').settings()['weights_sha256'] == asr.settings()['weights_sha256']
    assert speech._model_name('tiny.en') == 'tiny.en' and speech._model_name(str(Path(__file__))) == 'test_asr.py'
    with pytest.raises(InputError, match='other weights'): asr_of(dict(asr.settings(), source='tiny.en', weights_sha256='0'), 'cpu')


def test_reading_ahead_is_bounded_by_seconds():
    from concurrent.futures import ThreadPoolExecutor
    held, most, lock = [], [], threading.Lock()

    def read(seconds):
        with lock: held.append(seconds); most.append(sum(held))
        return seconds
    items = np.random.default_rng(0).choice([5, 30, 400], 60).tolist()
    with ThreadPoolExecutor(4) as pool:
        for i, seconds in enumerate(read_ahead(pool, read, items, items, 100)):
            assert seconds == items[i]
            with lock: held.remove(seconds)
    assert max(most) <= 500 and len(most) == 60


def test_a_run_that_hatemm_keeps_is_not_filled_with_the_demo(tmp_path):
    (tmp_path/'run.json').write_text('{}')
    with pytest.raises(InputError, match='run the stage 00_data first'): demo_clips(tmp_path, tmp_path/'data')
    assert not (tmp_path/'data').exists()


def test_bench_tells_speed_errors_and_the_long_file(demo, shared):
    told = bench_asr(demo/'demo_data', str(shared/'models/whisper-tiny.en.pt'), n=1, threads=1, repeats=1, long=20)
    assert told['ratios'].keys() == {'asr_vs_openai'} and len(told['rows']) == 16
    assert sum('one file of' in row['what'] for row in told['rows']) == 8 and all(row['value'] >= 0 for row in told['rows'])


def test_a_finished_table_is_kept_and_other_settings_are_not_mixed(fast, corpus, tmp_path, capsys):
    clips = corpus[0].head(1)
    first = transcribe_clips(clips, tmp_path, asr=fast)
    assert '1 clips, 0 failed' in capsys.readouterr().out
    assert first.equals(transcribe_clips(clips, tmp_path, asr=fast)) and 'there already' in capsys.readouterr().out
    transcribe_clips(clips, tmp_path, asr=other(fast, beam_size=1))
    assert 'is of other settings' in capsys.readouterr().out
    assert read_transcripts(tmp_path).attrs['params']['beam_size'] == 1


def test_a_journal_of_other_settings_starts_again(tmp_path, capsys):
    journal = tmp_path/'j'
    journal.write_text('{"model": "base"}\n{"rows": []}\n')
    assert read_journal(journal, dict(model='tiny.en')) == [] and '(model)' in capsys.readouterr().out
    assert read_journal(tmp_path/'none', {}) == []


def test_failures_are_counted_with_a_reason(fast, corpus, tmp_path):
    clips = corpus[0][:3].copy()
    broken = tmp_path/'broken.mp4'
    broken.write_bytes(b'nothing here')
    clips.loc[1, 'path'] = str(broken)
    clips.loc[2, 'path'] = str(tmp_path/'gone.mp4')
    with pytest.raises(InputError, match='2 of 3 items failed'): transcribe_clips(clips, tmp_path, asr=fast)
    table = transcribe_clips(clips, tmp_path, asr=fast, max_failed=.7)
    failed = pd.read_csv(tmp_path/'failed_transcripts.csv')
    assert len(table) == 1 and set(failed.clip_id) == set(clips.clip_id) - set(table.clip_id)
    assert failed.error.str.contains('broken.mp4|gone.mp4').all()


def test_everything_failed_is_still_a_table(fast, tmp_path):
    clips = pd.DataFrame([dict(clip_id='a', path=str(tmp_path/'gone.mp4'), start=0., end=1.)])
    assert len(transcribe_clips(clips, tmp_path, asr=fast, max_failed=1.)) == 0


@pytest.mark.parametrize('clips, told', [(pd.DataFrame(dict(clip_id=['a'])), 'lacks path, start, end'), (pd.DataFrame(columns=['clip_id', 'path', 'start', 'end']), 'is empty')])
def test_bad_tables_are_told(clips, told, tmp_path):
    with pytest.raises(InputError, match=told): transcribe_clips(clips, tmp_path)


def test_groups_depend_on_the_table_alone():
    seconds = np.random.default_rng(0).exponential(40, 200).tolist()
    groups = make_groups(seconds, 4)
    assert [i for g in groups for i in g] == list(range(200))
    assert all(sum(seconds[i] for i in g) <= 80 or len(g) == 1 for g in groups)


def test_flags():
    fine = dict(text='we baked an apple cake', avg_logprob=-.3, no_speech_prob=.1, missed=0., has_speech=True)
    assert window_flags(fine) == []
    assert window_flags(fine | dict(missed=5.)) == ['missed_speech']
    assert window_flags(fine | dict(has_speech=False, no_speech_prob=.7)) == ['no_speech']
    assert window_flags(fine | dict(has_speech=False, text='')) == ['no_speech']
    assert compression_ratio('we should get rid of these '*9) > 2.4 > compression_ratio('we should get rid of these')
    assert missed_speech([], [(1., 3.)], 0., 10.) == pytest.approx(2, abs=.06) and padded_seconds(0) == 2


def test_word_error_rate_by_hand():
    assert word_error_rate('bread costs less in our town', 'bread cast less our town today') == pytest.approx(3/6)
    assert word_error_rate(["it's two colours", 'yes'], ['it is 2 colors', 'yes']) == 0
    with pytest.raises(InputError, match='2 references and 1 hypotheses'): word_error_rate(['a', 'b'], ['a'])
    wrong, words = word_errors(['bread costs less', ''], ['bread cast', 'you'])
    assert wrong.tolist() == [2, 1] and words.tolist() == [3, 0]
    low, high = word_error_interval(['a b c d']*50, ['a b c d']*25 + ['x y z d']*25)
    assert .25 < low < .375 < high < .5


def test_subtitles_read_back(tmp_path):
    segments = [dict(start=.5, end=3661.25, text='an --> arrow'), dict(start=3662., end=3663., text='end')]
    assert '00:00:00,500 --> 01:01:01,250\nan -> arrow\n' in write_srt(segments, tmp_path/'a.srt').read_text()
    folder = write_subtitles(pd.DataFrame([dict(clip_id='a/b', segments=[dict(start=0., end=1., text='1 < 2 & 3')])]), tmp_path/'subtitles', 'vtt')
    assert (folder/'a_b.vtt').read_text().endswith('1 &lt; 2 &amp; 3\n')
    import av
    with av.open(str(write_vtt(segments, tmp_path/'a.vtt'))) as container: assert len([p for p in container.demux() if p.size]) == 2
