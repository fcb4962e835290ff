"The server answers or says why not, whatever it is sent; it loses nothing that it took, and keeps nothing that it answered."
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import wave
import zlib
from http.client import HTTPConnection, HTTPException

import httpx
import numpy as np
import pytest
import warm
from PIL import Image, features
from serving import load_toy, Running
from starlette.testclient import TestClient

import hatemm_clip
from hatemm_clip.base import InputError
from hatemm_clip.media import read_still, write_video
from hatemm_clip.serve import make_app, serve, ServeSettings

SMALL = dict(max_bytes=2 << 20, job_bytes=4 << 20, max_pixels=4_000_000, max_seconds=5., job_seconds=20., upload=1., timeout=3., max_files=4)
LEAK = re.compile(rb'Traceback|File "|/tmp/|/work/|/srv/|/etc/|\.py\b|hatemm-serve')


def encode(picture, kind='PNG', **more):
    picture.save(file := io.BytesIO(), kind, **more)
    return file.getvalue()


def paint(mode='RGB', size=(12, 8)):
    "A picture of some shades."
    values = np.arange(size[0]*size[1]*3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(values).convert(mode)


def png_of(width, height):
    "The beginning of a PNG that says it is that large."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = zlib.compress(bytes(1000))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def bundle_in(folder, name='demo'):
    (folder/name/'bundle').mkdir(parents=True)
    (folder/name/'bundle/config.json').write_text('{}')
    return folder/name/'bundle'


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve')
    running = Running([bundle_in(folder)], folder/'tmp', jobs_dir=str(folder/'jobs'), **SMALL)
    running.folder = folder
    yield running
    running.stop()


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "Half a second of video."
    path = tmp_path_factory.mktemp('film')/'film.mp4'
    return write_video(path, [np.full((32, 48, 3), 20*i, np.uint8) for i in range(5)], 10).read_bytes()


def check_answer(answer, statuses):
    "It is one of these; a refusal is JSON with a code, and nothing of the inside is in it."
    assert answer.status_code in statuses, (answer.status_code, answer.content[:300])
    assert not LEAK.search(answer.content), answer.content[:300]
    if answer.status_code < 400 or answer.request.method == 'HEAD': return
    error = answer.json()['error']
    assert set(error) == {'code', 'message'} and re.fullmatch(r'[a-z_]+', error['code']) and 0 < len(error['message']) < 300
    assert '\n' not in error['message']


def post_picture(server, data, name='x.png', **form): return server.client.post('/predict', files=dict(image=(name, data)), data=form)


# Pictures that are right, however odd

def exif_of(turn):
    exif = Image.Exif()
    exif[274] = turn
    return exif.tobytes()


def hidden():
    values = np.zeros((8, 8, 4), np.uint8)
    values[:, 4:] = 255, 0, 0, 255
    return Image.fromarray(values)


GOOD = {
    **{f'png {mode}': lambda mode=mode: encode(paint(mode)) for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA')},
    'png RGBA with hidden pixels': lambda: encode(hidden()),
    'png P with a transparent colour': lambda: encode(paint('P'), transparency=0),
    'png 16 bits': lambda: encode(Image.fromarray(np.full((8, 8), 30_000, np.uint16))),
    'png interlaced size 1': lambda: encode(paint(size=(1, 1))),
    'png of a row': lambda: encode(paint(size=(3000, 1))),
    'png of a column': lambda: encode(paint(size=(1, 3000))),
    'png with a comment': lambda: encode(paint(), pnginfo=_comment()),
    'apng': lambda: encode(paint(), save_all=True, append_images=[paint('L').convert('RGB')]),
    'jpeg': lambda: encode(paint(), 'JPEG'), 'jpeg grey': lambda: encode(paint('L'), 'JPEG'),
    'jpeg CMYK': lambda: encode(paint('CMYK'), 'JPEG'), 'jpeg progressive': lambda: encode(paint(), 'JPEG', progressive=True),
    **{f'jpeg turned {turn}': lambda turn=turn: encode(paint(), 'JPEG', exif=exif_of(turn)) for turn in range(1, 9)},
    'jpeg with an odd turn': lambda: encode(paint(), 'JPEG', exif=exif_of(99)),
    'jpeg with bytes after its end': lambda: encode(paint(), 'JPEG') + bytes(500),
    'jpeg as png': lambda: encode(paint(), 'JPEG'),
    'mpo': lambda: encode(paint(), 'MPO', save_all=True, append_images=[paint()]),
    'webp': lambda: encode(paint(), 'WEBP'), 'webp RGBA': lambda: encode(hidden(), 'WEBP', lossless=True),
    'webp that moves': lambda: encode(paint(), 'WEBP', save_all=True, append_images=[hidden().convert('RGB').resize((12, 8))]),
    'bmp': lambda: encode(paint(), 'BMP'), 'ppm': lambda: encode(paint(), 'PPM'), 'gif': lambda: encode(paint(), 'GIF'),
    'gif with a transparent colour': lambda: encode(paint('P'), 'GIF', transparency=0),
    **{f'tiff {mode}': lambda mode=mode: encode(paint('L').convert(mode), 'TIFF') for mode in ('L', 'I', 'F', 'RGB', 'CMYK', 'RGBA')},
    'tiff 16 bits': lambda: encode(Image.fromarray(np.full((8, 8), 30_000, np.uint16)), 'TIFF'),
    'tiff of two pages': lambda: encode(paint(), 'TIFF', save_all=True, append_images=[paint()]),
    'largest': lambda: encode(Image.new('1', (2000, 2000))),
}
if features.check('jpg_2000'): GOOD['jpeg 2000'] = lambda: encode(paint(), 'JPEG2000')
if features.check('avif'): GOOD['avif'] = lambda: encode(paint(), 'AVIF')


def _comment():
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text('comment', 'x'*1000)
    return info


@pytest.mark.parametrize('name', GOOD)
def test_a_picture_is_seen_as_everywhere_in_the_package(name, server, tmp_path):
    data = GOOD[name]()
    (tmp_path/'x').write_bytes(data)
    answer = post_picture(server, data)
    check_answer(answer, [200])
    assert answer.json()['probability'] == pytest.approx(read_still(tmp_path/'x').mean()/255)
    assert (read_still(data) == read_still(tmp_path/'x')).all()


# Pictures that are none, or not whole

JPEG, PNG = encode(paint(size=(64, 64)), 'JPEG'), encode(paint(size=(64, 64)))
BAD = {
    'empty': (b'', 422), 'text': (b'just some words', 415), 'zeros': (bytes(100), 415), 'noise': (np.random.default_rng(0).bytes(5000), 415),
    'svg': (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>', 415),
    'svg with a declaration': (b'<?xml version="1.0"?><!DOCTYPE svg SYSTEM "http://127.0.0.1/x.dtd"><svg/>', 415),
    'html': (b'<!doctype html><img src="file:///etc/passwd">', 415), 'pdf': (b'%PDF-1.7\n1 0 obj', 415),
    'eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 415), 'zip': (b'PK\3\4' + bytes(60), 415), 'gzip': (b'\x1f\x8b\x08' + bytes(60), 415),
    'elf': (b'\x7fELF' + bytes(60), 415), 'json': (b'{"a": 1}', 415), 'a playlist': (b'#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n', 415),
    'an address': (b'http://127.0.0.1:1/x.png', 415), 'ico': (encode(paint(size=(16, 16)), 'ICO'), 415), 'tga': (encode(paint(), 'TGA'), 415),
    'psd': (b'8BPS\0\1' + bytes(60), 415), 'utf-16 text': ('words'.encode('utf-16'), 415), 'one byte': (b'\x89', 415),
    'a gif that moves': (encode(paint('P'), 'GIF', save_all=True, append_images=[paint('L').convert('P')]), 415),
    'png bomb': (png_of(20_000, 20_000), 413), 'png bomb of one row': (png_of(2**31 - 1, 1), 413), 'png of no width': (png_of(0, 5), 415),
    'a little too large': (encode(Image.new('1', (2001, 2000))), 413),
    'jpeg bomb': (re.sub(rb'(\xff\xc0\0\x11\x08)....', lambda m: m[1] + b'N N ', JPEG, flags=re.S), 413),
    'gif bomb': (b'GIF89a' + struct.pack('<HH', 20_000, 20_000) + encode(paint('P'), 'GIF')[10:], 413), 'bmp bomb': (b'BM' + bytes(12) + struct.pack('<IiiHH', 40, 20_000, 20_000, 1, 24) + bytes(24), 413),
    **{f'jpeg cut at {n}': (JPEG[:n], (415, 422)) for n in (2, 3, 20, 150, 400, len(JPEG)//2)},
    **{f'png cut at {n}': (PNG[:n], (415, 422)) for n in (7, 8, 20, 33, 40, len(PNG)//2)},
    'png with a wrong sum': (PNG[:29] + b'\0\0\0\0' + PNG[33:], 415), 'png with wrong data': (PNG[:60] + bytes(40) + PNG[100:], (415, 422)),
    'webp header alone': (b'RIFF\xff\0\0\0WEBPVP8 ' + bytes(20), 415), 'tiff that points to itself': (b'II*\0\x08\0\0\0\1\0' + bytes(12) + b'\x08\0\0\0', 415),
    'ppm of words': (b'P6 a b 255\n', 415), 'jpeg without a picture': (b'\xff\xd8\xff\xd9', 415),
}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_picture_is_refused_with_a_reason(name, server):
    data, status = BAD[name]
    check_answer(post_picture(server, data), np.atleast_1d(status).tolist())


# Forms

def part(name, data=b'', filename=None, more=b''):
    file = b'' if filename is None else b'; filename="' + filename + b'"'
    return b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + file + b'\r\n' + more + b'\r\n' + data + b'\r\n'


IMAGE, END = part(b'image', PNG, b'x.png'), b'--B--\r\n'
FORMS = { # body, status
    'nothing': (b'', 422), 'the end alone': (END, 422), 'no end': (IMAGE, (200, 400, 422)), 'cut': (IMAGE[:100], (400, 415, 422)),
    'text alone': (part(b'text', b'words') + END, 422), 'wrong field': (part(b'picture', PNG, b'x.png') + END, 422),
    'one field too many': (IMAGE + part(b'mode', b'1') + END, (400, 422)), 'two pictures': (IMAGE + IMAGE + END, 400),
    'text twice': (IMAGE + part(b'text', b'a')*2 + END, 400), 'a word as picture': (part(b'image', b'http://127.0.0.1/x.png') + END, 422),
    'a file as text': (part(b'text', b'words', b'x.txt') + IMAGE + END, 400), 'no name': (IMAGE.replace(b'; name="image"', b'') + END, 400),
    'an empty name': (IMAGE.replace(b'name="image"', b'name=""') + END, 422), 'another boundary': ((IMAGE + END).replace(b'--B', b'--C'), (400, 422)),
    'header without end': (b'--B\r\nContent-Disposition: ' + b'x'*50_000, 400), 'many headers': (part(b'image', PNG, b'x', b'X-A: b\r\n'*1000) + END, (200, 400)),
    'many fields': (b''.join(part(b'f%d' % i, b'') for i in range(500)) + END, 400), 'an empty file': (part(b'image', b'', b'x.png') + END, 422),
    'an empty file name': (part(b'image', PNG, b'') + END, (200, 422)), 'megabyte of text': (part(b'text', b'a'*2**20) + IMAGE + END, 413),
    'text a little too long': (part(b'text', b'a'*50_001) + IMAGE + END, 413), 'longest text': (part(b'text', b'a'*50_000) + IMAGE + END, 200),
    'emoji': (part(b'text', '👩‍👩‍👧‍👦🏳️‍🌈'.encode()) + IMAGE + END, 200), 'NUL': (part(b'text', b'a\0b') + IMAGE + END, 200), 'right to left': (part(b'text', 'שלום\u202e'.encode()) + IMAGE + END, 200),
    'text that is no UTF-8': (part(b'text', b'\xff\xfe\x80') + IMAGE + END, 200), 'empty text': (part(b'text') + IMAGE + END, 200), 'no text': (IMAGE + END, 200),
    'markup': (part(b'text', b'<script>alert(1)</script>{{7*7}}%s%n') + IMAGE + END, 200), 'what a query would be': (part(b'text', b"'; DROP TABLE jobs; --") + IMAGE + END, 200),
    'other line ends': ((IMAGE + END).replace(b'\r\n', b'\n'), (200, 400)), 'words before it': (b'hello\r\n' + IMAGE + END, (200, 400)), 'words after it': (IMAGE + END + b'hello', (200, 400)),
    'a transfer encoding': (part(b'image', b'aGVsbG8=', b'x.png', b'Content-Transfer-Encoding: base64\r\n') + END, 415),
}


@pytest.mark.parametrize('name', FORMS)
def test_forms(name, server):
    body, status = FORMS[name]
    answer = server.client.post('/predict', content=body, headers={'content-type': 'multipart/form-data; boundary=B'})
    check_answer(answer, np.atleast_1d(status).tolist())


TYPES = ['', 'text/plain', 'application/json', 'application/x-www-form-urlencoded', 'image/png', 'multipart/form-data', 'multipart/form-data; boundary=',
         'multipart/mixed; boundary=B', 'multipart/form-data; boundary=' + 'x'*300, 'multipart/form-data; boundary="B', 'multipart/form-data; boundary=B; charset=undefined',
         'multipart/form-data; boundary=B; charset=hex', 'multipart/form-data; boundary=B; charset=utf-16', 'multipart/form-data; boundary=B; charset=unicode_escape',
         'multipart/form-data; boundary=B; charset=nonsense', 'MULTIPART/FORM-DATA; boundary=B', '\xff', 'multipart/form-data; boundary=\x01']


@pytest.mark.parametrize('kind', TYPES)
def test_content_types(kind, server):
    body = part(b'text', b'\\ud800 words') + IMAGE + END
    check_answer(server.client.post('/predict', content=body, headers={'content-type': kind.encode('latin-1')}), [200, 400, 415, 422])


NAMES = ['../../etc/passwd', '/etc/passwd', 'C:\\windows\\x.png', 'x\0.png', '..', '', 'a'*5000, 'x.png\r\nX-Bad: 1', '%2e%2e%2fx', 'ф🙂.png', '"; rm -rf /', '~/x', 'con', '-rf', 'x.svg', '<b>x</b>']


@pytest.mark.parametrize('name', NAMES)
def test_a_file_name_is_a_name_and_no_path(name, server):
    files = [('files', (name or None, PNG)), ('files', (name or 'x', b'no picture'))]
    answer = server.client.post('/batch', files=files)
    check_answer(answer, [200, 400, 422])  # 400: a header of a part that is too long
    for row in answer.json().get('results', []): assert not re.search(r'[\\/\0\n]', row['name']) and len(row['name']) <= 100
    check_answer(post_picture(server, PNG, name), [200, 400, 422])


# Methods, paths and queries

PATHS = ['/predict', '/predict/video', '/predict/text', '/batch', '/jobs', '/healthz', '/model', '/', '/nowhere']


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('method', ['HEAD', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'BREW'])
def test_methods(method, path, server):
    answer = server.client.request(method, path, content=b'x')
    check_answer(answer, [404, 405])
    if path != '/nowhere': assert answer.status_code == 405 and answer.headers['allow'] in ('POST', 'GET')


@pytest.mark.parametrize('path', ['/predict/', '//predict', '/predict/../model', '/..%2f..%2fetc/passwd', '/%00', '/jobs/', '/jobs/..', '/jobs/%00', '/jobs/' + 'x'*5000, '/jobs/%F0%9F%99%82',
                                  "/jobs/'%20OR%20'1'='1", '/model?model=nothing', '/model?model=', '/model?model=../demo', '/model?model=demo&model=nothing', '/assets/try.html',
                                  '/redoc', '/' + 'x'*20_000, '/.git/config', '/openapi.json/'])
def test_paths_that_lead_nowhere(path, server):
    with socket.create_connection(('127.0.0.1', server.port), 5) as link:  # httpx would tidy the path
        link.sendall(f'GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'.encode())
        head, body = read_raw(link)
    assert int(head.split()[1]) in (404, 422) and not LEAK.search(body) and set(json.loads(body)['error']) == {'code', 'message'}


# Words alone

@pytest.mark.parametrize('body, status', [
    (b'{"text": "words"}', 200), (b'{"text": ""}', 200), (b'{"text": "\\ud83d\\ude42"}', 200), (b'{"text": "\\u0000"}', 200), (b'{"text": "\\ud800"}', 422), (b'{"text": 1}', 422), (b'{"text": null}', 422),
    (b'{"text": ["a"]}', 422), (b'{}', 422), (b'[]', 422), (b'"words"', 422), (b'{"text": "a", "b": 1}', 422), (b'', 400), (b'{', 400), (b'{"text": NaN}', 422), (b'['*100_000, 400),
    (b'\xff\xfe{', 400), (b'{"text": "' + b'a'*50_001 + b'"}', 413), (b'{"text": "' + b'a'*(3 << 20) + b'"}', 413)])
def test_words_alone_as_json(body, status, server):
    check_answer(server.client.post('/predict/text', content=body, headers={'content-type': 'application/json'}), [status])


def test_words_alone_as_a_form(server):
    answer = server.client.post('/predict/text', files=dict(text=(None, 'words')))
    check_answer(answer, [200])
    assert answer.json()['probability'] == .5
    check_answer(server.client.post('/predict/text', content=END, headers={'content-type': 'multipart/form-data; boundary=B'}), [422])
    check_answer(server.client.post('/predict/text', data=dict(text='words')), [415])


# Below HTTP

def read_raw(link):
    data = b''
    while block := link.recv(65_536): data += block
    head, _, body = data.partition(b'\r\n\r\n')
    return head.decode('latin-1'), body


FORM = b'Content-Type: multipart/form-data; boundary=B\r\n'
BODY = IMAGE + END
CHUNKED = b'%x\r\n%b\r\n0\r\n\r\n' % (len(BODY), BODY)
RAW = { # request, status
    'chunked, without a length': (b'POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n' + FORM + b'\r\n' + CHUNKED, 200),
    'chunked by bytes': (b'POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n' + FORM + b'\r\n' + b''.join(b'1\r\n%c\r\n' % c for c in BODY) + b'0\r\n\r\n', 200),
    'chunks that are none': (b'POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n' + FORM + b'\r\nzz\r\nabc\r\n', 400),
    'too large by its length': (b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n' + FORM + b'\r\n', 413),
    'too large, asks first': (b'POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n' + FORM + b'\r\n', 413),
    'too large, chunked': (b'POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n' + FORM + b'\r\n%x\r\n%b\r\n' % (len(IMAGE) - 2, IMAGE[:-2]) + (b'10000\r\n' + bytes(65_536) + b'\r\n')*33, 413),
    'a length of words': (b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n', 400),
    'a length below zero': (b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n', 400),
    'two lengths': (b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n', 400),
    'no length': (b'POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n' + FORM + b'\r\n', (400, 422)),
    'a length that is not kept': (b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n' + FORM + b'\r\n' + BODY[:100], 408),
    'a header bomb': (b'GET / HTTP/1.1\r\nHost: x\r\nX-A: ' + b'a'*200_000 + b'\r\n\r\n', 400),
    'many headers': (b'GET / HTTP/1.1\r\nHost: x\r\n' + b'X-A: b\r\n'*20_000 + b'\r\n', 400),
    'header without end': (b'GET / HTTP/1.1\r\nHost: x\r\n' + b'a'*40_000, 400),
    'no host': (b'GET /healthz HTTP/1.1\r\n\r\n', 400), 'garbage': (b'\0\1\2\3\r\n\r\n', 400), 'TLS': (b'\x16\x03\x01\x02\0\1\0\1\xfc\3\3' + bytes(100) + b'\r\n\r\n', 400),
    'HTTP/0.9': (b'GET /\r\n\r\n', 400), 'HTTP/1.0': (b'GET /healthz HTTP/1.0\r\n\r\n', 200), 'HTTP/9.9': (b'GET /healthz HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n', (200, 400, 505)),
    'a space in the path': (b'GET /a b HTTP/1.1\r\nHost: x\r\n\r\n', 400), 'a bad header name': (b'GET / HTTP/1.1\r\nHost: x\r\nX A: b\r\n\r\n', 400),
    'an upgrade': (b'GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\n\r\n', 200),
    'the address of another': (b'GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n', (200, 400, 404)),
    'a tunnel': (b'CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n', (400, 404, 405)),
}


@pytest.mark.parametrize('name', RAW)
def test_below_http(name, server):
    request, status = RAW[name]
    with socket.create_connection(('127.0.0.1', server.port), 5) as link:
        try: link.sendall(request)
        except ConnectionError: pass  # it has its answer
        head, body = read_raw(link)
    assert int(head.split()[1]) in np.atleast_1d(status).tolist(), (head, body)
    assert not LEAK.search(body)
    if int(head.split()[1]) >= 400: assert set(json.loads(body)['error']) == {'code', 'message'}


def test_a_connection_that_asks_nothing_is_closed(server):
    with socket.create_connection(('127.0.0.1', server.port), 5) as link:
        link.sendall(b'GET /healthz HTT')
        begun = time.monotonic()
        assert link.recv(100) == b'' and time.monotonic() - begun < 3


def test_a_slow_body_is_ended(server):
    with socket.create_connection(('127.0.0.1', server.port), 5) as link:
        link.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n' + FORM + b'\r\n')
        link.settimeout(.2)
        data = b''
        for i in range(20):
            try: data = link.recv(1000)
            except TimeoutError: link.sendall(BODY[i:i + 1])
            if data: break
    assert b' 408 ' in data


# Videos, several files, jobs

def wav(seconds):
    with wave.open(file := io.BytesIO(), 'wb') as out:
        out.setparams((1, 2, 8000, 0, 'NONE', ''))
        out.writeframes(bytes(int(16_000*seconds)))
    return file.getvalue()


MOVES = encode(paint('P'), 'GIF', save_all=True, append_images=[paint('L').convert('P')], duration=200)


def test_a_video(server, film):
    answer = server.client.post('/predict/video', files=dict(video=('film.mp4', film)), data=dict(text='what is said'))
    check_answer(answer, [200])
    found = answer.json()
    assert found['transcript'] == 'what is said' and found['timeline'] and found['windows'] and found['frames'] and found['modalities'] and found['rule']
    for data in (wav(1.), MOVES): check_answer(server.client.post('/predict/video', files=dict(video=('x', data))), [200])


def test_a_video_may_be_called_a_file(server, film):
    called = [server.client.post('/predict/video', files={name: ('film.mp4', film)}, data=dict(text='what is said')).json() for name in ('video', 'file')]
    assert called[0] == called[1] and 'probability' in called[0]
    both = server.client.post('/predict/video', files=dict(video=film, file=film))
    check_answer(both, [400, 413, 422])


@pytest.mark.parametrize('name, data, status', [
    ('picture', PNG, 415), ('words', b'words', 415), ('too long', wav(6.), 413), ('playlist', b'#EXTM3U\n/etc/passwd\n', 415), ('dash', b'<MPD type="static"></MPD>', 415),
    ('concat', b"ffconcat version 1.0\nfile '/etc/passwd'\n", 415), ('sdp', b'v=0\no=- 0 0 IN IP4 127.0.0.1\n', 415), ('box alone', b'\0\0\0 ftypisom' + bytes(50), 422), ('matroska head', b'\x1aE\xdf\xa3' + bytes(50), 422),
    ('avi head', b'RIFF\0\1\0\0AVI ' + bytes(50), 422), ('empty', b'', 422), ('mpeg noise', b'\0\0\1\xba' + bytes(1000), 422), ('ogg head', b'OggS' + bytes(100), 422), ('mp3 head', b'ID3\4\0\0\0\0\0\0' + bytes(100), 422)])
def test_what_is_no_video_is_refused(name, data, status, server): check_answer(server.client.post('/predict/video', files=dict(video=('film.mp4', data))), [status])


def test_a_cut_video_is_scored_or_refused(server, film):
    for n in range(40, len(film), max(len(film)//6, 1)): check_answer(server.client.post('/predict/video', files=dict(video=('film.mp4', film[:n]))), [200, 422])


def test_what_goes_wrong_inside_says_nothing_of_it(server, film):
    answer = server.client.post('/predict/video', files=dict(video=('film.mp4', film)), data=dict(text='fail'))
    check_answer(answer, [422])
    assert answer.json()['error']['message'] == 'film.mp4: cannot be scored'
    answer = post_picture(server, PNG, text='boom')
    assert answer.status_code == 500 and answer.json()['error']['code'] == 'internal' and not LEAK.search(answer.content) and b'boom' not in answer.content
    check_answer(post_picture(server, PNG, text='sleep 3.5'), [504])
    assert 'boom' not in server.told() and 'film.mp4' not in server.told() and '"error": "RuntimeError"' in server.told()


def test_several_files_have_an_error_each(server, film):
    files = [('files', (name, data)) for name, data in (('a.png', PNG), ('b.txt', b'words'), ('c.mp4', film), ('d.gif', MOVES))]
    answer = server.client.post('/batch', files=files, data=dict(texts=['one', 'two', 'three', 'boom']))
    check_answer(answer, [200])
    rows = answer.json()['results']
    assert [row['name'] for row in rows] == ['a.png', 'b.txt', 'c.mp4', 'd.gif']
    assert [row['error'] and row['error']['code'] for row in rows] == [None, 'not_a_picture', None, 'internal']
    assert rows[2]['result']['timeline'] and 'timeline' not in rows[0]['result']
    check_answer(server.client.post('/batch', files=files[:2], data=dict(texts=['one'])), [422])
    check_answer(server.client.post('/batch', files=files + files), [400])
    check_answer(server.client.post('/batch', data=dict(a='b')), [415])


def wait_for(server, id, *states):
    for _ in range(1200):
        job = server.client.get(f'/jobs/{id}').json()
        if job['state'] in states: return job
        time.sleep(.05)
    raise AssertionError(job)


def test_a_job(server, film):
    answer = server.client.post('/jobs', files=dict(video=('../film.mp4', film)), data=dict(text='words'))
    check_answer(answer, [202])
    assert answer.headers['location'] == f"/jobs/{answer.json()['id']}" and answer.json()['name'] == 'film.mp4'
    job = wait_for(server, answer.json()['id'], 'done')
    assert job['result']['transcript'] == 'words' and job['error'] is None
    failed = wait_for(server, server.client.post('/jobs', files=dict(video=('film.mp4', film)), data=dict(text='fail')).json()['id'], 'failed')
    assert failed['error'] == 'film.mp4: cannot be scored' and failed['result'] is None
    slow = server.client.post('/jobs', files=dict(video=('film.mp4', film)), data=dict(text='sleep 1')).json()['id']
    assert server.client.delete(f'/jobs/{slow}').json()['state'] == 'cancelled' and server.client.get(f'/jobs/{slow}').json()['state'] == 'cancelled'
    check_answer(server.client.delete(f'/jobs/{slow}'), [200])
    for method in ('GET', 'DELETE'): check_answer(server.client.request(method, f'/jobs/{slow}'), [404])
    check_answer(server.client.post('/jobs', files=dict(video=('x.png', PNG))), [415])
    check_answer(server.client.post('/jobs', files=dict(video=('x.wav', wav(30.)))), [413])


def test_pages_and_answers_about_itself(server):
    for path in ('/', '/docs'):
        answer = server.client.get(path)
        policy = answer.headers['content-security-policy']
        assert answer.status_code == 200 and "default-src 'none'" in policy and 'unsafe' not in policy and policy.count('sha256-') == 2
        assert not re.search(r'(src|href)="(https?:)?//', answer.text) and ' on' + 'click' not in answer.text
    assert server.client.get('/healthz').json() == dict(ok=True) and server.client.get('/readyz').json() == dict(ready=True, models=['demo'])
    assert server.client.get('/model').json() == dict(card='a toy', bundle='demo')
    assert 'hatemm_requests_total{route="/predict",status="200"}' in server.client.get('/metrics').text
    schema = server.client.get('/openapi.json').json()
    assert {'400', '401', '413', '415', '422', '429', '503', '504'} <= schema['paths']['/predict']['post']['responses'].keys()
    assert schema['paths']['/predict']['post']['requestBody']['content']['multipart/form-data']['schema']['required'] == ['image']
    for answer in (server.client.get('/nowhere'), server.client.get('/healthz')):
        assert answer.headers['x-content-type-options'] == 'nosniff' and answer.headers['cache-control'] == 'no-store' and 'server' not in answer.headers


def test_at_the_end_nothing_is_left_and_the_log_tells_no_content(server):
    left = [p for p in (server.folder/'tmp').rglob('*') if p.is_file() and p.name != 'lock']
    assert left == [] and not [p for p in (server.folder/'jobs/uploads').iterdir()]
    lines = [json.loads(line) for line in server.told().splitlines()]
    assert {'request', 'loaded', 'listening', 'failed'} <= {line.get('event') for line in lines}
    assert not re.search(r'passwd|words|\.png|\.mp4|127\.0\.0\.1(?!:\d+", "workers)', server.told())
    assert server.client.get('/healthz').status_code == 200


# Who may ask, and how often

@pytest.fixture
def app_of(tmp_path):
    "A client of a server in this process; its settings are given."
    clients = []

    def make(name='demo', wait=True, **settings):
        client = TestClient(make_app([bundle_in(tmp_path, name)], ServeSettings(**settings), load_toy))
        clients.append(client.__enter__())
        while wait and client.get('/readyz').status_code != 200: time.sleep(.01)
        return client
    yield make
    for client in clients: client.__exit__(None, None, None)


@pytest.mark.parametrize('header', [None, '', 'Bearer', 'Bearer ', 'Bearer wrong', 'Bearer righT', 'Basic right', 'right', 'Bearer right right', 'Bearer \xff', 'Bearer rightx', 'Bearer righ'])
def test_a_wrong_token(header, app_of):
    client = app_of(token='right')
    answer = client.post('/predict', files=dict(image=PNG), headers={} if header is None else dict(authorization=header.encode('latin-1')))
    check_answer(answer, [401])
    assert answer.headers['www-authenticate'] == 'Bearer'


def test_the_right_token(app_of):
    client = app_of(token='right')
    assert client.post('/predict', files=dict(image=PNG), headers=dict(authorization='Bearer right')).status_code == 200
    assert client.get('/nowhere').status_code == 401 and client.get('/').status_code == 200
    schema = client.get('/openapi.json').json()
    assert schema['paths']['/predict']['post']['security'] and 'security' not in schema['paths']['/healthz']['get']


def test_too_often(app_of):
    client = app_of(rate=3)
    codes = [client.post('/predict', files=dict(image=PNG)).status_code for _ in range(4)]
    answer = client.get('/model')
    assert codes == [200]*3 + [429] and answer.json()['error']['code'] == 'too_often' and 0 < int(answer.headers['retry-after']) <= 21
    assert client.get('/healthz').status_code == 200


def test_all_places_taken(app_of):
    client = app_of(queue=1)
    ask = lambda text='': client.post('/predict', files=dict(image=PNG), data=dict(text=text))

    def take_the_place():
        while ask('sleep 1').status_code != 200: pass
    slow = threading.Thread(target=take_the_place)
    slow.start()
    while (answer := ask()).status_code == 200 and slow.is_alive(): pass
    slow.join()
    check_answer(answer, [429])
    assert answer.headers['retry-after'] == '1' and ask().status_code == 200


def test_it_answers_while_it_loads(app_of):
    client = app_of('slow', wait=False)
    assert client.get('/healthz').status_code == 200 and client.get('/readyz').status_code == 503
    answer = client.post('/predict', files=dict(image=PNG))
    assert answer.status_code == 503 and answer.json()['error']['code'] == 'loading' and answer.headers['retry-after']


def test_several_bundles(tmp_path):
    bundles = [bundle_in(tmp_path, name) for name in ('one', 'two')]
    with TestClient(make_app(bundles, load=load_toy)) as client:
        while client.get('/readyz').status_code != 200: time.sleep(.01)
        asked = {'': 'one', '?model=one': 'one', '?model=two': 'two'}
        for query, name in asked.items(): assert client.post(f'/predict{query}', files=dict(image=PNG)).json()['model'] == name
        answer = client.post('/predict?model=three', files=dict(image=PNG))
        check_answer(answer, [404])
        assert 'one, two' in answer.json()['error']['message']


# How it ends

@pytest.mark.parametrize('kept', [False, True], ids=['a connection each', 'connections that are kept'])
def test_term_under_load_loses_no_request(kept, tmp_path):
    server, answers, lost = Running([bundle_in(tmp_path)], tmp_path/'tmp'), [], []
    body, headers = part(b'text', b'sleep .02') + BODY, {'content-type': 'multipart/form-data; boundary=B'} | ({} if kept else {'connection': 'close'})

    def ask():
        link = HTTPConnection('127.0.0.1', server.port, timeout=20)
        while True:
            try:
                link.request('POST', '/predict', body, headers)
                answer = link.getresponse()
                answer.read()
            except ConnectionRefusedError: return
            except (OSError, HTTPException) as e: return lost.append(e)
            if answer.status != 200: return lost.append(answer.status)
            answers.append(answer.status)
    askers = [threading.Thread(target=ask) for _ in range(8)]
    for asker in askers: asker.start()
    while len(answers) <= 8 and any(asker.is_alive() for asker in askers): time.sleep(.05)
    assert server.stop() == 0
    for asker in askers: asker.join()
    assert len(answers) > 8 and lost == [] and [p for p in (tmp_path/'tmp').rglob('*')] == []


def test_jobs_survive_a_kill(tmp_path, film):
    bundle, settings = bundle_in(tmp_path), dict(jobs_dir=str(tmp_path/'jobs'))
    server = Running([bundle], tmp_path/'tmp', **settings)
    texts = ['sleep 20', *['sleep .1']*3]
    ids = [server.client.post('/jobs', files=dict(video=(f'{i}.mp4', film)), data=dict(text=text)).json()['id'] for i, text in enumerate(texts)]
    wait_for(server, ids[0], 'running')
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    assert len(list((tmp_path/'jobs/uploads').iterdir())) == 4
    server = Running([bundle], tmp_path/'tmp', **settings)
    for id in ids[1:]: assert wait_for(server, id, 'done')['result']['transcript'] == 'sleep .1'
    assert server.client.get(f'/jobs/{ids[0]}').json()['state'] == 'running'  # its lease must run out first
    assert len([p for p in (tmp_path/'tmp').glob('hatemm-serve-*')]) == 1  # what the killed one left is gone
    assert server.stop() == 0


def test_two_servers_cannot_have_one_port(server, tmp_path):
    with pytest.raises(RuntimeError) as told: Running([bundle_in(tmp_path)], tmp_path/'tmp', port=server.port)
    assert str(told.value).count('\n') == 1 and f'127.0.0.1:{server.port}: cannot listen there' in str(told.value)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_bundle_that_cannot_be_loaded_ends_it(workers, tmp_path):
    server = Running([bundle_in(tmp_path, 'broken')], tmp_path/'tmp', wait=False, workers=workers)
    assert server.process.wait(30) == 2
    errors = [line for line in server.told().splitlines() if line.startswith('error: ')]
    assert errors and 'not the weights that config.json describes' in errors[-1] and 'Traceback' not in server.told()


def test_workers_share_nothing_but_the_disk(tmp_path, film):
    server = Running([bundle_in(tmp_path)], tmp_path/'tmp', workers=2)
    ids = [server.client.post('/jobs', files=dict(video=('x.mp4', film))).json()['id'] for _ in range(4)]
    for id in ids: wait_for(server, id, 'done')
    answers = []
    for _ in range(20):  # a connection each, so that both get some
        with socket.create_connection(('127.0.0.1', server.port), 10) as link:
            link.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n' % len(BODY) + FORM + b'\r\n' + BODY)
            answers.append(read_raw(link)[0].split()[1])
    assert answers == ['200']*20
    assert 'hatemm_requests_total{route="/predict",status="200"} 20.0' in server.client.get('/metrics').text
    assert server.stop() == 0


# The command, and a real bundle

def test_what_can_be_said_without_a_model_is_said_first(hatemm, tmp_path):
    bundle = bundle_in(tmp_path)
    for bundles, settings, told in ((['nowhere'], {}, 'nowhere: no bundle there'), ([bundle], dict(port=70_000), 'port 70000'), ([bundle], dict(queue=0), 'queue is 0'),
                                    ([bundle, bundle], {}, 'both are called'), ([], {}, 'no bundle to serve'), ([bundle], dict(token='two words'), 'printable ASCII')):
        with pytest.raises(InputError, match=told) as error: serve(bundles, ServeSettings(**settings))
        assert '\n' not in str(error.value)
    (tmp_path/'empty').touch()
    for args, told in (([bundle, '--token-file', tmp_path/'empty'], 'is empty'), ([bundle, '--host', '203.0.113.7'], '203.0.113.7:5000: cannot listen there')):
        done = hatemm('serve', *args)
        errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
        assert done.returncode == 2 and len(errors) == 1 and told in errors[0] and 'Traceback' not in done.stderr
    assert 'warning: whoever reaches 203.0.113.7 can use this server' in done.stderr


def test_without_the_extra(monkeypatch):
    from hatemm_clip.cli import _server
    monkeypatch.setitem(sys.modules, 'fastapi', None)
    monkeypatch.delitem(sys.modules, 'hatemm_clip.serve')
    monkeypatch.delattr(hatemm_clip, 'serve')
    with pytest.raises(InputError, match=r"a server needs fastapi, .* pip install 'hatemm_clip\[serve\]'"): _server()


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "One that looks and reads, with the shipped encoder."
    from test_score import write_bundle
    return write_bundle(tmp_path_factory.mktemp('real')/'tiny')


def port_free(port):
    try: socket.create_server(('127.0.0.1', port)).close()
    except OSError: return False
    return True


@pytest.fixture(scope='module')
def real(bundle):
    "The command, serving it; gives the port."
    port = next(p for p in (5000, 5001, 5002, 5003) if port_free(p))
    process = warm.Fork([sys.executable, '-m', 'hatemm_clip', 'serve', str(bundle), '--port', str(port), '--device', 'cpu'])
    while process.poll() is None:
        try:
            if httpx.get(f'http://127.0.0.1:{port}/readyz').status_code == 200: break
        except httpx.ConnectError: pass
        time.sleep(.1)
    yield port
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.skipif(not shutil.which('curl'), reason='needs curl')
def test_the_line_of_the_seed(real, bundle, tmp_path):
    from hatemm_clip.scorer import Scorer
    paint(size=(64, 48)).save(tmp_path/'image.png')
    line = f"""curl -X POST -F "image=@{tmp_path}/image.png" -F "text=meme's associated sentence/text here" localhost:{real}/predict"""
    answer = json.loads(subprocess.run(line, shell=True, capture_output=True, check=True).stdout)
    row = Scorer(bundle, 'cpu').score(tmp_path/'image.png', "meme's associated sentence/text here")
    assert list(answer)[:2] == ['prediction', 'probability'] and answer['model'] == 'tiny' and answer['probability_of'] == 'Hate'
    assert answer['prediction'] == row['label'] and answer['probability'] == pytest.approx(row['prob'], abs=1e-5)
    assert answer['threshold'] == pytest.approx(row['threshold']) and sum(answer['probabilities'].values()) == pytest.approx(1., abs=1e-5)


def test_a_real_bundle_answers_everywhere(real, bundle, film):
    client = httpx.Client(base_url=f'http://127.0.0.1:{real}', timeout=60.)
    words = client.post('/predict/text', json=dict(text='bread costs less')).json()
    assert any('no picture' in note for note in words['notes']) and words['needs_review']
    found = client.post('/predict/video', files=dict(video=('film.mp4', film)), data=dict(text='bread costs less')).json()
    assert found['transcript'] == 'bread costs less' and found['timeline'] and found['frames'] and set(found['modalities']) == {'image', 'text'}
    assert client.post('/predict/video', files=dict(video=('film.mp4', film))).json()['transcript'] == ''
    about = client.get('/model')
    assert about.json()['modalities'] and about.json()['sha256'] and str(bundle) not in about.text and not LEAK.search(about.content)
    for name in ('png RGBA', 'jpeg CMYK', 'png 16 bits', 'png of a row', 'png interlaced size 1', 'jpeg turned 6'):
        check_answer(client.post('/predict', files=dict(image=GOOD[name]()), data=dict(text='👍\0')), [200])
    check_answer(client.post('/predict/text', json=dict(text='')), [422])
    check_answer(client.post('/predict', files=dict(image=PNG)), [200])


def test_a_bundle_that_changes_on_the_disk_changes_nothing_and_is_not_loaded(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path/'copy')
    with TestClient(make_app([copy], ServeSettings(device='cpu'))) as client:
        while client.get('/readyz').status_code != 200: time.sleep(.05)
        ask = lambda: client.post('/predict', files=dict(image=PNG), data=dict(text='words')).json()
        before, about = ask(), client.get('/model').json()
        (copy/'model.safetensors').write_bytes(os.urandom(2000))
        (copy/'config.json').write_text('{}')
        assert ask() == before and client.get('/model').json() == about
    shutil.copy(bundle/'config.json', copy)
    failed = []
    with TestClient(make_app([copy], ServeSettings(device='cpu'), failed=failed.append)) as client:
        while not failed: time.sleep(.05)
        assert 'sha256 differs' in str(failed[0]) and client.get('/readyz').status_code == 503
        assert client.post('/predict', files=dict(image=PNG)).json()['error']['code'] == 'broken'
