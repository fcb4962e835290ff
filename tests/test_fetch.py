"""Fetching against a local server that misbehaves in every way we know of."""
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from hatemm_clip import fetch
from hatemm_clip.base import InputError

HERE = Path(__file__).resolve()
SHARED = HERE.parents[2] / 'shared'
VIDEO = bytes(i * i * 2654435761 >> 24 & 255 for i in range(400_000))


def zipped(members, **info):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)
            for k, v in info.items(): setattr(member, k, v)
            z.writestr(member, data)
    return f.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    "Serves `server.files`; `server.faults[name]` is a list of faults, one used up by each request."

    def do_GET(self):
        s, name = self.server, self.path.split('?')[0].strip('/')
        s.log.append((name, self.headers.get('Range')))
        body = s.files.get(name)
        fault = s.faults[name].pop(0) if s.faults.get(name) else {}
        if body is None: return self.send_error(404)
        if 'status' in fault:
            self.send_response(fault['status'])
            for k, v in fault.get('headers', {}).items(): self.send_header(k, v)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        tag, start = f'"{hashlib.md5(body).hexdigest()}"', 0
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if wanted and s.ranges and self.headers.get('If-Range', tag) == tag: start = int(wanted[1])
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        shown = fault.get('range_start', start)
        self.send_response(206 if start else 200)
        if s.etag: self.send_header('ETag', tag)
        if start: self.send_header('Content-Range', f'bytes {shown}-{len(body) - 1}/{len(body)}')
        if 'type' in fault: self.send_header('Content-Type', fault['type'])
        if not fault.get('no_length'): self.send_header('Content-Length', str(fault.get('length', len(body) - start)))
        self.end_headers()
        end = fault.get('cut', len(body))
        for i in range(start, min(start + end, len(body)), 2**15):
            try: self.wfile.write(body[i:min(i + 2**15, start + end)])
            except OSError: return
            if s.pause: time.sleep(s.pause)

    def log_message(self, *args): "Quiet."


def record(files):
    entries = [dict(key=k, size=len(v), checksum='md5:' + hashlib.md5(v).hexdigest()) for k, v in files.items()]
    return json.dumps(dict(files=entries, metadata=dict(license=dict(id='cc-by-4.0')))).encode()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.daemon_threads = True
    s.files = {
        'readme.txt': b'hello',
        'HateMM_annotation.csv': b'video_file_name,label\nhate_video_1.mp4,Hate\nhate_video_2.mp4,Hate\nnon_hate_video_1.mp4,Non Hate\n',
        'hate_videos.zip': zipped({'hate_videos/hate_video_1.mp4': VIDEO, 'hate_videos/hate_video_2.mp4': VIDEO[:9]}),
        'non_hate_videos.zip': zipped({'non_hate_video_1.mp4': VIDEO[:200_000]})}
    s.files['record.json'] = record(s.files)
    s.faults, s.log, s.ranges, s.etag, s.pause = {}, [], True, True, 0
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def get(server, out, **kw):
    return fetch.fetch_dataset('hatemm', out, **{**dict(accept_licence=True, base_url=server.url, backoff=0, progress=False), **kw})


def tree(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in Path(out).rglob('*') if p.is_file() and p.name not in ('.fetch.lock', 'manifest.json')}


WHOLE = {'readme.txt', 'HateMM_annotation.csv', 'hate_videos/hate_video_1.mp4', 'hate_videos/hate_video_2.mp4', 'non_hate_videos/non_hate_video_1.mp4'}


def assert_whole(out):
    t = tree(out)
    assert set(t) == WHOLE
    assert t['hate_videos/hate_video_1.mp4'] == VIDEO and t['non_hate_videos/non_hate_video_1.mp4'] == VIDEO[:200_000]


def test_first_call_fetches_and_second_only_verifies(server, tmp_path, capsys):
    out = tmp_path / 'a' / 'b'
    s = get(server, out)
    assert_whole(out)
    assert (s['files'], s['videos'], s['verified'], s['missing_videos'], len(s['fetched'])) == (5, 3, 0, 0, 4)
    shown = capsys.readouterr().out
    assert 'CC BY 4.0' in shown and 'hateful' in shown and shown.splitlines()[-1].startswith('hatemm: 3 videos')
    manifest = json.loads((out / 'manifest.json').read_text())
    assert manifest['files']['readme.txt']['sha256'] == hashlib.sha256(b'hello').hexdigest()
    assert manifest['accepted'] and manifest['sources']['hate_videos.zip']['checked'] == 'md5'
    server.log.clear()
    before = (out / 'manifest.json').stat().st_mtime_ns
    again = get(server, out, accept_licence=False)
    assert server.log == [] and again['verified'] == 5 and again['fetched'] == []
    assert (out / 'manifest.json').stat().st_mtime_ns == before
    assert capsys.readouterr().out.count('\n') == 1


def test_licence_is_needed_before_any_request(server, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='--accept-licence'): get(server, tmp_path, accept_licence=False)
    monkeypatch.setattr(sys, 'stdin', type('Tty', (io.StringIO,), dict(isatty=lambda self: True))('no\n'))
    with pytest.raises(InputError, match='not accepted'): get(server, tmp_path, accept_licence=False)
    monkeypatch.setattr(sys, 'stdin', type('Tty', (io.StringIO,), dict(isatty=lambda self: True))(''))
    with pytest.raises(InputError, match='not accepted'): get(server, tmp_path, accept_licence=False)
    assert server.log == [] and tree(tmp_path) == {}
    monkeypatch.setattr(sys, 'stdin', type('Tty', (io.StringIO,), dict(isatty=lambda self: True))('yes\n'))
    get(server, tmp_path, accept_licence=False)
    assert_whole(tmp_path)


def test_cut_connections_resume(server, tmp_path):
    server.faults = {'hate_videos.zip': [dict(cut=100_000), dict(cut=150_000)]}
    get(server, tmp_path)
    assert_whole(tmp_path)
    ranges = [r for n, r in server.log if n == 'hate_videos.zip']
    assert len(ranges) == 3 and ranges[0] is None
    starts = [int(r[6:-1]) for r in ranges[1:]]
    assert 100_000 - fetch.CHUNK < starts[0] <= 100_000 and starts[0] < starts[1]


@pytest.mark.parametrize('ranges, etag', [(False, True), (False, False), (True, False)])
def test_servers_without_ranges_or_etags(server, tmp_path, ranges, etag):
    server.ranges, server.etag = ranges, etag
    server.faults = {'hate_videos.zip': [dict(cut=100_000), dict(cut=150_000)]}
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_nothing_to_tell_whether_the_halves_fit_means_starting_again(server, tmp_path):
    server.etag = False
    del server.files['record.json']
    server.faults = {'hate_videos.zip': [dict(cut=100_000)]}
    s = get(server, tmp_path)
    assert_whole(tmp_path)
    assert 'could not be read' in s['note']
    assert [r for n, r in server.log if n == 'hate_videos.zip'] == [None, None]


def test_gives_up_keeps_the_bytes_and_goes_on_later(server, tmp_path):
    server.faults = {'hate_videos.zip': [dict(cut=150_000), dict(cut=0), dict(cut=0)]}
    with pytest.raises(InputError, match='3 times in a row.*run again') as e: get(server, tmp_path, tries=3)
    assert '\n' not in str(e.value) and not (tmp_path / 'hate_videos').exists()
    server.log.clear()
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert [n for n, _ in server.log] == ['record.json', 'hate_videos.zip', 'non_hate_videos.zip']
    assert int(server.log[1][1][6:-1]) > 150_000 - fetch.CHUNK


def test_a_file_that_changes_between_the_halves_is_not_spliced(server, tmp_path):
    del server.files['record.json']
    server.faults = {'hate_videos.zip': [dict(cut=200_000)]}
    with pytest.raises(InputError): get(server, tmp_path, tries=1)
    server.files['hate_videos.zip'] = zipped({'hate_video_1.mp4': VIDEO[::-1]})
    get(server, tmp_path)
    assert tree(tmp_path)['hate_videos/hate_video_1.mp4'] == VIDEO[::-1]


def test_a_wrong_range_is_refused_and_started_again(server, tmp_path):
    server.faults = {'hate_videos.zip': [dict(cut=200_000), dict(range_start=7)]}
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert [r is None for n, r in server.log if n == 'hate_videos.zip'] == [True, False, True]


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    work = tmp_path / '.fetch'
    work.mkdir()
    (work / 'hate_videos.zip.part').write_bytes(bytes(10**6))
    (work / 'hate_videos.zip.part.json').write_text(json.dumps(dict(url=f'{server.url}/hate_videos.zip?download=1', total=None, validator=None)))
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_wrong_lengths(server, tmp_path):
    server.faults = {'readme.txt': [dict(length=3)] * 2, 'HateMM_annotation.csv': [dict(length=1000)] * 9}
    with pytest.raises(InputError, match='HateMM_annotation.csv.*announces 1,000 bytes where the record says 96'): get(server, tmp_path)
    assert set(tree(tmp_path)) == {'readme.txt'}
    server.faults = {'HateMM_annotation.csv': [dict(no_length=True, cut=50)]}
    get(server, tmp_path)
    assert_whole(tmp_path)
    del server.files['record.json']
    server.faults = {'hate_videos.zip': [dict(length=10**6)] * 9}
    with pytest.raises(InputError, match='6 times in a row'): get(server, tmp_path / 'other')


def test_busy_servers_are_asked_again_and_404_is_not(server, tmp_path, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(fetch.time, 'sleep', waits.append)
    server.faults = {'readme.txt': [dict(status=429, headers={'Retry-After': '7'}), dict(status=503), dict(status=500)]}
    get(server, tmp_path, backoff=1)
    assert_whole(tmp_path)
    assert waits == [7, 2, 4] and capsys.readouterr().err.count('next try in') == 3
    del server.files['non_hate_videos.zip']
    server.log.clear()
    with pytest.raises(InputError, match='non_hate_videos.zip.*404') as e: get(server, tmp_path / 'b')
    assert '\n' not in str(e.value) and [n for n, _ in server.log].count('non_hate_videos.zip') == 1


def test_nobody_there(tmp_path):
    with pytest.raises(InputError, match='connection error, 2 times in a row') as e:
        fetch.fetch_dataset('hatemm', tmp_path, True, 'http://127.0.0.1:9', tries=2, backoff=0, progress=False)
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='not an http'): fetch.fetch_dataset('hatemm', tmp_path, True, 'ftp://x', backoff=0, progress=False)


def test_a_login_page_is_not_a_data_set(server, tmp_path):
    server.faults = {'readme.txt': [dict(type='text/html')]}
    with pytest.raises(InputError, match='a web page came'): get(server, tmp_path)
    assert not set(tree(tmp_path)) & WHOLE


def test_an_md5_that_is_not_the_records(server, tmp_path):
    server.files['readme.txt'] = b'jello'
    with pytest.raises(InputError, match='readme.txt has the md5'): get(server, tmp_path)
    assert not set(tree(tmp_path)) & WHOLE


def evil(server, data):
    server.files['hate_videos.zip'] = data
    server.files['record.json'] = record({k: v for k, v in server.files.items() if k != 'record.json'})


LINK = dict(create_system=3, external_attr=(stat.S_IFLNK | 0o777) << 16)
BAD = {
    'parent': zipped({'../../pwned': b'x'}), 'absolute': zipped({'/tmp/pwned': b'x'}), 'drive': zipped({'C:/pwned': b'x'}),
    'backslash': zipped({'a\\..\\..\\pwned': b'x'}), 'dots within': zipped({'hate_videos/../../pwned': b'x'}),
    'link': zipped({'a.mp4': b'/etc/passwd'}, **LINK), 'twice': zipped({'a/x.mp4': b'1', 'b/X.mp4': b'2'}), 'empty': zipped({}),
    'no zip': b'<html>', 'cut': zipped({'a.mp4': VIDEO})[:-30], 'flipped': zipped({'a.mp4': VIDEO}).replace(VIDEO[100:120], bytes(20))}


@pytest.mark.parametrize('how', BAD)
def test_bad_zips_leave_nothing(server, tmp_path, how):
    good = server.files['hate_videos.zip']
    evil(server, BAD[how])
    with pytest.raises(InputError, match='hate_videos.zip') as e: get(server, tmp_path / 'in' / 'out')
    assert '\n' not in str(e.value)
    assert set(tree(tmp_path / 'in' / 'out')) == {'readme.txt', 'HateMM_annotation.csv'}
    assert not list(tmp_path.rglob('*pwned*')) and not Path('/tmp/pwned').exists()
    evil(server, good)
    get(server, tmp_path / 'in' / 'out')
    assert_whole(tmp_path / 'in' / 'out')


def test_a_member_longer_than_declared(tmp_path):
    data = zipped({'a.mp4': b'A' * 1000})
    size = (1000).to_bytes(4, 'little')
    (tmp_path / 'x.zip').write_bytes(data.replace(size + size, size + (10).to_bytes(4, 'little')))
    with pytest.raises(fetch.BadZip, match='corrupt'): fetch.unpack_zip(tmp_path / 'x.zip', tmp_path / 'out', progress=False)
    assert not (tmp_path / 'out').exists()


def test_a_bomb(tmp_path):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.mp4', bytes(80 * 2**20))
    (tmp_path / 'bomb.zip').write_bytes(f.getvalue())
    with pytest.raises(fetch.BadZip, match='83,886,080 bytes'): fetch.unpack_zip(tmp_path / 'bomb.zip', tmp_path / 'out', progress=False)


def test_encrypted(tmp_path):
    data = bytearray(zipped({'a.mp4': b'x'}))
    data[data.index(b'PK\1\2') + 8] |= 1
    (tmp_path / 'x.zip').write_bytes(data)
    with pytest.raises(fetch.BadZip, match='encrypted'): fetch.unpack_zip(tmp_path / 'x.zip', tmp_path / 'out', progress=False)


def test_no_room_keeps_the_zip(server, tmp_path, monkeypatch):
    unpack, usage = fetch.unpack_zip, shutil.disk_usage
    full = lambda p: usage(p)._replace(free=10)
    with monkeypatch.context() as m:
        m.setattr(fetch.shutil, 'disk_usage', full)
        with pytest.raises(InputError, match='make room'): get(server, tmp_path)
    def late(*a, **k):
        with monkeypatch.context() as m:
            m.setattr(fetch.shutil, 'disk_usage', full)
            return unpack(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(fetch, 'unpack_zip', late)
        with pytest.raises(InputError, match='make room'): get(server, tmp_path)
    server.log.clear()
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert 'hate_videos.zip' not in [n for n, _ in server.log]


def test_verification_names_what_changed_and_the_way_out_works(server, tmp_path):
    get(server, tmp_path)
    for change in (lambda p: p.write_bytes(b'123456789'), lambda p: p.write_bytes(b'x'), lambda p: p.unlink()):
        change(tmp_path / 'hate_videos' / 'hate_video_2.mp4')
        with pytest.raises(InputError, match=r'hate_video_2.mp4: it (has changed|is gone) since manifest.json.*move .*hate_videos away') as e: get(server, tmp_path)
        assert '\n' not in str(e.value)
        shutil.rmtree(tmp_path / 'hate_videos')
        server.log.clear()
        s = get(server, tmp_path)
        assert s['fetched'] == ['hate_videos.zip'] and [n for n, _ in server.log] == ['record.json', 'hate_videos.zip']
        assert_whole(tmp_path)
    (tmp_path / 'readme.txt').write_text('HELLO')
    with pytest.raises(InputError, match='readme.txt: it has changed'): get(server, tmp_path)


def test_manifest_troubles(server, tmp_path):
    get(server, tmp_path)
    manifest = tmp_path / 'manifest.json'
    text = manifest.read_text()
    for bad, words in (('{', 'not JSON'), ('[]', 'not a JSON object'), (text.replace('"dataset": "hatemm"', '"dataset": "other"'), "holds the data set 'other'"),
                       (text.replace('"schema": 1', '"schema": 2'), 'schema 2')):
        manifest.write_text(bad)
        with pytest.raises(InputError, match=words): get(server, tmp_path)
    manifest.unlink()
    with pytest.raises(InputError, match='it is there but not in manifest.json'): get(server, tmp_path)
    shutil.rmtree(tmp_path / 'hate_videos')
    shutil.rmtree(tmp_path / 'non_hate_videos')
    assert get(server, tmp_path)['fetched'] == ['hate_videos.zip', 'non_hate_videos.zip']  # the two others were taken as they were
    assert_whole(tmp_path)


def test_files_put_there_by_hand_are_taken_and_kept(server, tmp_path):
    (tmp_path / 'hate_videos.zip').write_bytes(server.files['hate_videos.zip'])
    (tmp_path / 'readme.txt').write_bytes(b'hello')
    get(server, tmp_path)
    assert sorted({n for n, _ in server.log}) == ['HateMM_annotation.csv', 'non_hate_videos.zip', 'record.json']
    assert set(tree(tmp_path)) == WHOLE | {'hate_videos.zip'}
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'hate_videos.zip').write_bytes(b'half')
    with pytest.raises(InputError, match='4 bytes where the record says.*move it away'): get(server, tmp_path / 'b')
    assert (tmp_path / 'b' / 'hate_videos.zip').read_bytes() == b'half'


def test_an_annotation_file_that_is_none(server, tmp_path):
    good = server.files['HateMM_annotation.csv']
    del server.files['record.json']
    server.files['HateMM_annotation.csv'] = b'a,b\n1,2\n'
    with pytest.raises(InputError, match='no column video_file_name'): get(server, tmp_path)
    assert set(tree(tmp_path)) & WHOLE == {'readme.txt'}
    shutil.rmtree(tmp_path / '.fetch')
    server.files['HateMM_annotation.csv'] = good
    get(server, tmp_path)


def test_missing_videos_are_counted(server, tmp_path):
    del server.files['record.json']
    server.files['HateMM_annotation.csv'] += b'hate_video_3.mp4,Hate\n'
    assert get(server, tmp_path)['missing_videos'] == 1


def test_two_at_once(server, tmp_path):
    with fetch._lock_folder(tmp_path), pytest.raises(InputError, match='another fetch is at work'): get(server, tmp_path)


def test_out_dir_that_is_a_file(server, tmp_path):
    (tmp_path / 'f').touch()
    with pytest.raises(InputError, match='cannot be made a folder'): get(server, tmp_path / 'f')


STEPS = {'replace': os.replace, 'unlink': Path.unlink, 'rmtree': shutil.rmtree, 'write_json': fetch.write_json, '_unpack_member': fetch._unpack_member}


class Killed(BaseException):
    "What no handler in the module should swallow."


@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('step', STEPS)
def test_death_at_every_step(server, tmp_path, monkeypatch, step, after):
    "Die before, or right after, the k-th rename, unlink, …, for every k; the next call must make it whole."
    owner = dict(replace=fetch.os, unlink=Path, rmtree=fetch.shutil).get(step, fetch)
    for k in range(100):
        out, calls = tmp_path / str(k), []
        server.faults = {'hate_videos.zip': [dict(cut=100_000)]}
        def dying(*a, **kw):
            calls.append(1)
            if len(calls) <= k: return STEPS[step](*a, **kw)
            if after and len(calls) == k + 1: STEPS[step](*a, **kw)
            raise Killed  # dead processes do not tidy up either
        with monkeypatch.context() as m:
            m.setattr(owner, step, dying)
            try: get(server, out)
            except Killed: pass
        if not (out / 'manifest.json').exists(): assert not set(tree(out)) & WHOLE
        else: assert set(tree(out)) & WHOLE <= set(json.loads((out / 'manifest.json').read_text())['files'])
        get(server, out)
        assert_whole(out)
        if len(calls) <= k: break
    assert k > 1


def test_sigkill(server, tmp_path):
    "A real process, killed again and again on a slow line."
    server.pause = .01
    code = ("import sys; from hatemm_clip.fetch import fetch_dataset\n"
            "fetch_dataset('hatemm', sys.argv[1], True, sys.argv[2], progress=False)")
    for wait in (.02, .06, .1, .14):
        server.log.clear()
        p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'out'), server.url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not server.log and p.poll() is None: time.sleep(.005)
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
        listed = json.loads((tmp_path / 'out' / 'manifest.json').read_text())['files'] if (tmp_path / 'out' / 'manifest.json').exists() else {}
        assert set(tree(tmp_path / 'out')) & WHOLE <= set(listed)
    server.pause = 0
    get(server, tmp_path / 'out')
    assert_whole(tmp_path / 'out')


def test_mhc_lists_ids(tmp_path, capsys):
    with pytest.raises(InputError, match='publishes only video ids.*github.com/Social-AI-Studio/MultiHateClip'): fetch.fetch_dataset('mhc', tmp_path)
    with pytest.raises(InputError, match='train.tsv: no such file'): fetch.fetch_dataset('mhc', tmp_path, ids_from=tmp_path)
    for f in ('train', 'valid', 'test'): (tmp_path / f'{f}.tsv').write_text('Video_ID\tTitle\nabcdefghijk\tsecret\n')
    s = fetch.fetch_dataset('mhc', tmp_path / 'out', ids_from=tmp_path)
    assert (s['ids'], s['in_two_parts']) == (1, 1)
    assert 'secret' not in Path(s['path']).read_text() + capsys.readouterr().out
    (tmp_path / 'test.tsv').write_text('Video_ID\tTitle\n../../etc\tx\n')
    with pytest.raises(InputError, match="test.tsv: line 2 has '../../etc'"): fetch.fetch_dataset('mhc', tmp_path / 'out', ids_from=tmp_path)
    (tmp_path / 'test.tsv').write_text('id\nx\n')
    with pytest.raises(InputError, match='column Video_ID'): fetch.fetch_dataset('mhc', tmp_path / 'out', ids_from=tmp_path)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason='needs the data beside the checkout')
def test_mhc_real_files(tmp_path):
    s = fetch.fetch_dataset('mhc', tmp_path, ids_from=SHARED / 'data' / 'mhc_en')
    assert (s['ids'], s['in_two_parts']) == (1000, 1)
    assert len(fetch.read_video_ids(SHARED / 'data' / 'mhc_en')) == 1001


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason='needs the data beside the checkout')
def test_real_annotation_file(server, tmp_path):
    "All 1,083 names of the real annotation file, over empty videos."
    names = sorted(fetch._annotated_videos(SHARED / 'data' / 'hatemm' / 'HateMM_annotation.csv'))
    server.files['HateMM_annotation.csv'] = (SHARED / 'data' / 'hatemm' / 'HateMM_annotation.csv').read_bytes()
    server.files['hate_videos.zip'] = zipped({f'hate_videos/{n}': n.encode() for n in names if n.startswith('hate')})
    server.files['non_hate_videos.zip'] = zipped({n: n.encode() for n in names if n.startswith('non')})
    del server.files['record.json']
    s = get(server, tmp_path)
    assert (s['videos'], s['missing_videos'], s['files']) == (1083, 0, 1085)


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="'hatemn': no such data set; choose one of hatemm, mhc"): fetch.fetch_dataset('hatemn', tmp_path)
    with pytest.raises(InputError, match='ids_from'): fetch.fetch_dataset('hatemm', tmp_path, ids_from=tmp_path)


def test_data_download_script(tmp_path):
    "The wrapper passes DIR and options on, and says what is missing."
    script = shutil.copy(HERE.parents[1] / 'data_download.sh', tmp_path / 'data_download.sh')
    assert os.access(script, os.X_OK)
    run = lambda *a, path='/usr/bin:/bin': subprocess.run([script, *a], capture_output=True, text=True, cwd=tmp_path, env=dict(PATH=path))
    r = run()
    assert r.returncode == 1 and 'install the package first' in r.stderr and r.stderr.count('\n') == 1
    fake = '#!/bin/sh\nprintf "%s|" WHO "$@"\n'
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'hatemm').write_text(fake.replace('WHO', 'path'))
    (tmp_path / 'bin' / 'hatemm').chmod(0o755)
    path = f'{tmp_path}/bin:/usr/bin:/bin'
    assert run(path=path).stdout == 'path|fetch|hatemm|data/hatemm|'
    assert run('--accept-licence', path=path).stdout == 'path|fetch|hatemm|data/hatemm|--accept-licence|'
    assert run('my dir', '--accept-licence', path=path).stdout == 'path|fetch|hatemm|my dir|--accept-licence|'
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / '.venv' / 'bin' / 'hatemm').write_text(fake.replace('WHO', 'venv'))
    (tmp_path / '.venv' / 'bin' / 'hatemm').chmod(0o755)
    assert run(path=path).stdout == 'venv|fetch|hatemm|data/hatemm|'
