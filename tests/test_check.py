"The check of annotations and media, with real annotations and with files broken on purpose."
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from hatemm_clip import examine as module
from hatemm_clip.check import check_dataset, detect_dataset, format_report, leak_shares, sibling_share, span_faults
from hatemm_clip.examine import call_guarded, decode_all, decode_safely, write_broken
from hatemm_clip.base import TRANSCRIPTS, InputError, write_table
from hatemm_clip.readers import read_dataset
from hatemm_clip.data import leaky_snippet, make_windows, part_of_clips
from hatemm_clip.media import write_video


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "Three tiny videos with sound, all different."
    folder, rng = tmp_path_factory.mktemp('sources'), np.random.default_rng(0)
    videos = []
    for i, (width, fps) in enumerate([(96, 10), (128, 12), (160, 8)]):
        picture = np.kron(rng.integers(0, 255, (12, 60, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        tone = .3*np.sin(.05*np.arange(2*22_050)).astype(np.float32)
        videos.append(write_video(folder/f'{i}.mp4', (picture[:, x:x + width] for x in range(2*fps)), fps, tone))
    return videos


@pytest.fixture(scope='module', autouse=True)
def orphans(tmp_path_factory):
    "Workers whose caller was killed while they slept. What ends them takes 15 s, in which the other tests run."
    begun = tmp_path_factory.mktemp('orphans')/'begun'
    work = f"open({str(begun)!r}, 'w').close() or __import__('time').sleep(600)"
    code = f'from hatemm_clip.examine import call_guarded; call_guarded(eval, [{work!r}], timeout=5)'
    script = subprocess.Popen([sys.executable, '-c', code])
    while not begun.exists() and script.poll() is None: time.sleep(.05)
    left = psutil.Process(script.pid).children(recursive=True)
    script.kill()
    assert left and script.wait(60) == -9
    return left


def annotate(folder, names, label='Non Hate'):
    (folder/'non_hate_videos').mkdir(parents=True, exist_ok=True)
    rows = [f'{name},{label},,Others' for name in names]
    (folder/'HateMM_annotation.csv').write_text('\n'.join(['video_file_name,label,hate_snippet,target', *rows]) + '\n')
    return folder


def test_two_hundred_broken_files(tmp_path, sources):
    "Each ends as a decoded clip or as a row with its reason; nothing hangs, nothing crashes."
    folder = tmp_path/'set'
    broken = pd.DataFrame(write_broken(sources, folder/'non_hate_videos', n=200))
    annotate(folder, [p.name for p in broken.path])
    report = check_dataset(folder, timeout=20, workers=2)
    reasons = {row['id']: row['reason'] for kind in ('unreadable', 'no_video') for row in report['problems'][kind]['rows']}
    assert report['media']['files'] == 200 == report['media']['decoded'] + len(reasons)
    assert all(reasons.values())
    fate = broken.kind.groupby([p.stem in reasons for p in broken.path]).agg(set)
    assert {'truncated', 'header only', 'empty', 'zero bytes', 'noise', 'text', 'audio only'} <= fate[True]
    assert {'wrong extension', 'video only', 'absurd duration', 'huge resolution'} <= fate[False]
    assert not {'wrong extension', 'video only', 'huge resolution'} & fate[True]
    json.dumps(report), format_report(report)


def test_broken_files_decoded_frame_by_frame(tmp_path, sources):
    broken = pd.DataFrame(write_broken(sources, tmp_path, n=45, seed=1))
    results = pd.DataFrame(decode_all(broken.path, timeout=20, fps=2))
    assert (results.ok == (results.frames > 0)).all() and (results.ok | results.reason.astype(bool)).all()


def test_worker_that_dies(sources):
    "Each way to die has its reason, and the file after it is decoded as if nothing had been."
    deaths = {"__import__('ctypes').string_at(0)": 'SIGSEGV', "__import__('os').abort()": 'SIGABRT', "__import__('os')._exit(7)": 'exit code 7'}
    look = f"__import__('hatemm_clip.examine').examine.examine({str(sources[0])!r})"
    calls = [look, *(call for deed in deaths for call in (deed, look))]
    outcomes = call_guarded(eval, calls, timeout=60, workers=1)
    assert [reason for _, reason in outcomes[1::2]] == [f'crashed the decoder ({how})' for how in deaths.values()]
    assert all(look == outcomes[0] for look in outcomes[::2]) and outcomes[0][0]['ok'] and not outcomes[0][1]


def test_worker_that_hangs():
    begin = time.monotonic()
    assert call_guarded(time.sleep, [600, 0], timeout=2, workers=1) == [(None, 'not decoded after 2 s'), (None, '')]
    assert time.monotonic() - begin < 60


def test_worker_killed_at_work(sources):
    killed, stop = [], threading.Event()
    def kill():
        while not stop.wait(.05) and not killed:
            for child in psutil.Process().children(recursive=True):
                if 'popen_loky' in ' '.join(child.cmdline()) and child.cpu_times().user > 2:
                    child.kill()
                    killed.append(child.pid)
                    return
    thread = threading.Thread(target=kill)
    thread.start()
    try: results = decode_all([sources[0]]*300, timeout=60, workers=1)
    finally:
        stop.set()
        thread.join()
    assert sum(not r['ok'] for r in results) <= 1 and results[-1]['ok']


def test_worker_that_cannot_start(sources, monkeypatch):
    monkeypatch.setattr(module, '_start_worker', ord)  # which takes no float
    with pytest.raises(RuntimeError, match='did not start'): decode_safely(sources[0])


def test_results_keep_the_order_of_items():
    calls = [f"__import__('time').sleep({wait}) or {wait}" for wait in (1., 0., .2, .1)]
    assert call_guarded(eval, calls) == [(wait, '') for wait in (1., 0., .2, .1)]


def test_works_from_a_script_without_a_main_guard(tmp_path, sources):
    script = tmp_path/'script.py'
    script.write_text(f'from hatemm_clip.examine import decode_all\nprint([r["ok"] for r in decode_all([{str(sources[0])!r}, "none.mp4"])])\n')
    assert subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True).stdout == '[True, False]\n'


def test_matroska_with_an_absurd_duration(tmp_path):
    "Three thousand years, says the header; what a decoder sets aside for that must not take the machine down."
    import struct

    import av
    with av.open(str(tmp_path/'x.mkv'), 'w') as out:
        video = out.add_stream('libx264', rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, 'yuv420p'
        for i in range(20): out.mux(video.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10*i, np.uint8), format='rgb24').reformat(format='yuv420p')))
        out.mux(video.encode(None))
    data = bytearray((tmp_path/'x.mkv').read_bytes())
    struct.pack_into('>d', data, data.find(b'\x44\x89') + 3, 1e14)
    (tmp_path/'x.mkv').write_bytes(data)
    for look in (decode_safely(tmp_path/'x.mkv', timeout=10), decode_safely(tmp_path/'x.mkv', timeout=10, fps=1)): assert look['ok'] or look['reason']


def test_a_fifo_does_not_block(tmp_path, sources):
    import os
    folder = annotate(tmp_path, ['a.mp4', 'b.mp4'])
    os.mkfifo(folder/'non_hate_videos/a.mp4')
    (folder/'non_hate_videos/b.mp4').write_bytes(sources[0].read_bytes())
    assert check_dataset(folder)['media']['missing'] == 1


def test_duplicates_and_their_labels(tmp_path, sources):
    folder = annotate(tmp_path, ['a.mp4', 'b.mp4', 'c.mp4'])
    for name, source in zip('abc', (0, 0, 1)): (folder/f'non_hate_videos/{name}.mp4').write_bytes(sources[source].read_bytes())
    report = check_dataset(folder)
    assert report['problems']['duplicate']['count'] == 1 and report['errors'] == 0
    text = (folder/'HateMM_annotation.csv').read_text().replace('b.mp4,Non Hate', 'b.mp4,Hate')
    (folder/'HateMM_annotation.csv').write_text(text)
    (folder/'hate_videos').mkdir()
    (folder/'non_hate_videos/b.mp4').rename(folder/'hate_videos/b.mp4')
    problem = check_dataset(folder)['problems']['conflicting']
    assert (problem['severity'], problem['count']) == ('error', 1)


def test_transcripts_given_and_found(tmp_path):
    folder = annotate(tmp_path, ['a.mp4', 'b.mp4'])
    assert check_dataset(folder, media=False)['transcripts'] is None
    table = pd.DataFrame(dict(clip_id=['x', 'y'], text=['hello', ' '], segments=[[], []], language='en', no_speech_prob=0., backend='none', model='none'))
    path = write_table(table, folder/'transcripts.parquet', TRANSCRIPTS)
    for report in (check_dataset(folder, media=False), check_dataset(folder, media=False, transcripts=path)):
        assert report['transcripts'] == dict(rows=2, empty=1) and report['problems']['empty_transcript']['rows'] == [dict(id='y', reason='no words')]
    with pytest.raises(InputError, match='no such table'): check_dataset(folder, media=False, transcripts=folder/'none.parquet')


def test_bad_folder_and_annotations(tmp_path):
    with pytest.raises(InputError, match='no such folder'): detect_dataset(tmp_path/'none')
    with pytest.raises(InputError, match='no annotation file'): check_dataset(tmp_path)
    annotate(tmp_path, ['a.mp4'], label='Perhaps')
    with pytest.raises(InputError, match='line 2'): check_dataset(tmp_path)


def test_touching_spans_do_not_overlap():
    assert span_faults([dict(start=0, end=4), dict(start=4, end=8)]) == []
    assert [k for k, _ in span_faults([dict(start=0, end=9), dict(start=1, end=2), dict(start=3, end=4)])] == ['overlapping', 'overlapping']


def test_real_annotations(shared):
    report = check_dataset(shared/'data/hatemm', media=False)
    wanted = dict(rows=1083, hate=431, non_hate=652, spans=786, reversed=2, overlapping=5, no_target=12, empty_target_list=31, short_spans=0, errors=0)
    assert {k: report[k] for k in wanted} == wanted
    assert report['problems']['no_target']['count'] == 12 and report['media'] is None
    assert report['targets']['Blacks'] == 490 and report['targets']['LGBTQ'] == 15
    assert '2 reversed, 5 overlapping' in format_report(report)


def test_real_annotations_of_multihateclip(shared):
    report = check_dataset(shared/'data/mhc_en', media=False)
    assert report['hate'] is None and set(report['labels']) == {'Normal', 'Offensive', 'Hateful'}


def test_siblings_of_real_snippets_leak(shared):
    "Nearly half of the hateful test snippets have a sibling in train when snippets are split."
    clips = make_windows(read_dataset('hatemm', shared/'data/hatemm').assign(duration=0.), 'oracle_snippets')
    several = clips[clips.label == 1].video_id.value_counts().loc[lambda n: n > 1]
    assert (clips.label.sum(), len(several), several.sum()) == (669, 101, 339)
    assert .43 <= leak_shares(clips, n=200).mean() <= .51
    splits = leaky_snippet(clips)
    assert .35 <= np.mean([sibling_share(clips, part_of_clips(clips, splits, k)) for k in range(5)]) <= .5


def test_real_videos(shared):
    looks = decode_all(sorted((shared/'data/videos').iterdir()), timeout=120)
    assert all(look['ok'] and look['frames'] == 5 for look in looks)
    assert all(abs(look['duration'] - look['claimed']) < 1 for look in looks)


def test_workers_end_with_their_caller(orphans): assert not psutil.wait_procs(orphans, timeout=60)[1]
