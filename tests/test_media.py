"Odd but playable files: what a correct reader says of each, by every way to ask, and random damage."
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import warm
from conftest import SHARED
from films import sounding

from hatemm_clip.base import InputError
from hatemm_clip.check import check_dataset
from hatemm_clip.data import prepare_data
from hatemm_clip.examine import decode_all, examine, probe_files
from hatemm_clip.frames import DECODERS, frames_at, read_frames, straight_frames
from hatemm_clip.media import Damage, MediaError, probe, read_contents, read_still, write_video
from hatemm_clip.sound import SR, loud_from, quiet_reason, read_audio

ODD = SHARED/'data/odd_files'
needs_shared = pytest.mark.skipif(not ODD.is_dir(), reason='needs real data: no folder shared beside the checkout')
FILES = sorted(p.name for p in ODD.iterdir() if p.suffix != '.md') if ODD.is_dir() else []
FILMS = [name for name in FILES if name not in ('song.mp3', 'cut.jpg')]


@pytest.fixture(scope='module')
def rows(): return {name: row for name, row in zip(FILES, probe_files([ODD/name for name in FILES]))}


def noted(row, words): return any(words in note for note in row['notes'])


RIGHT = {
    'vfr.mp4': lambda r: abs(r['picture_duration'] - 9.1) < .1 and r['num_frames'] == 8 and noted(r, 'the header says 0.8 s'),
    'audio_late.mkv': lambda r: abs(r['loud_from'] - 3) < .01 and abs(r['sound_offset'] - 2.98) < .05 and noted(r, 'the sound begins 2.98 s after the picture'),
    'antiphase.mkv': lambda r: r['loud_from'] is not None and noted(r, 'cancel each other'),
    'latin1.avi': lambda r: abs(r['picture_duration'] - 6) < .1 and r['has_audio'] and r['loud_from'] < .1,
    'flipped.mp4': lambda r: abs(r['picture_duration'] - 6) < .05 and r['damaged_packets'] >= 2 and noted(r, 'damaged packets'),
    'trunc.mp4': lambda r: abs(r['picture_duration'] - 3) < .05 and r['num_frames'] == 75 and noted(r, 'the header says 6.0 s, the file holds 3.0 s'),
    'reschange.ts': lambda r: abs(r['picture_duration'] - 4) < .05 and (r['width'], r['height']) == (160, 120) and noted(r, '160 × 120 and 320 × 240'),
    'cover_first.mp4': lambda r: (r['width'], r['height'], r['num_frames']) == (160, 120, 150) and noted(r, 'cover'),
    'bframes.avi': lambda r: len(set(r['frame_times'])) == 6 == len(r['frame_hashes']) and r['num_frames'] == 100,
    'audio_long.mp4': lambda r: abs(r['picture_duration'] - 3) < .05 and abs(r['sound_duration'] - 30) < .1 and max(r['frame_times']) < 3 and noted(r, '3.0 s of picture, 30.0 s of sound'),
    'twoaudio.mp4': lambda r: r['loud_from'] is not None and noted(r, 'track 2 is taken'),
    'editlist.mp4': lambda r: r['num_frames'] == 167 and abs(r['picture_duration'] - 6.68) < .05,
    'late_clock.ts': lambda r: abs(r['picture_duration'] - 6) < .05 and r['loud_from'] < .1 and not r['notes'],
    'noduration.webm': lambda r: abs(r['picture_duration'] - 6) < .05 and not r['notes'],
    'rot90.mp4': lambda r: (r['width'], r['height']) == (120, 160) and not r['notes'],
    'delays.gif': lambda r: abs(r['duration'] - 5.2) < .01 and not r['has_audio'] and len(set(r['frame_hashes'])) == 1,
    'rgba.png': lambda r: (r['width'], r['height'], r['num_frames']) == (96, 64, 1), 'palette_trns.png': lambda r: r['num_frames'] == 1,
    'exif6.jpg': lambda r: (r['width'], r['height']) == (64, 96), 'cmyk.jpg': lambda r: r['width'] == 96, 'i16.png': lambda r: r['width'] == 96,
    'blip.mp4': lambda r: abs(r['sound_duration'] - .05) < .01 and r['has_audio'], 'silent.mp4': lambda r: not r['has_audio'] and r['loud_from'] is None}


@needs_shared
@pytest.mark.parametrize('name', RIGHT)
def test_probe_says_what_is_right(name, rows):
    row = rows[name]
    assert row['error'] is None and RIGHT[name](row), {k: v for k, v in row.items() if k != 'frame_hashes'}


@needs_shared
def test_what_is_no_video_is_refused_with_its_reason(rows):
    assert 'holds no video, only audio' in rows['song.mp3']['error'] and rows['song.mp3']['has_audio'] and not rows['song.mp3']['has_video']
    assert 'Truncated' in rows['cut.jpg']['error']


@needs_shared
def test_every_file_has_a_right_answer(): assert set(FILES) == {*RIGHT, 'song.mp3', 'cut.jpg'}


@needs_shared
@pytest.mark.parametrize('name', FILMS)
def test_both_decoders_and_both_ways_show_the_same(name):
    found = {decoder: read_frames(ODD/name, sampling='uniform', n=6, decoder=decoder) for decoder in DECODERS}
    assert all(np.array_equal(a, b) for a, b in zip(found['av'], found['decord']))
    if read_contents(ODD/name).is_still: return
    frames, times = found['av']
    straight = list(straight_frames(ODD/name, times, Damage()))
    assert np.array_equal([t for _, t in straight], times) and np.array_equal([f for f, _ in straight], frames)


@needs_shared
def test_six_frames_of_b_frames_without_times_are_in_their_order():
    "The picture runs on by a step a frame; frames in the order of decoding would jump back."
    frames, _ = read_frames(ODD/'bframes.avi', fps=25)
    steps = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))
    jumbled = np.abs(np.diff(frames[np.argsort(np.arange(len(frames))//3*3 + (np.arange(len(frames)) + 1) % 3)].astype(int), axis=0)).mean()
    assert len({f.tobytes() for f in frames}) == len(frames) == 100 and steps.mean() < .8*jumbled


@needs_shared
def test_the_held_frame_is_on_screen():
    frames = [frame for frame, _ in frames_at(ODD/'vfr.mp4', np.array([.05, 2., 5., 8.]))]
    assert np.array_equal(frames[1], frames[2]) and np.array_equal(frames[2], frames[3]) and not np.array_equal(frames[0], frames[2])
    gif = [frame for frame, _ in frames_at(ODD/'delays.gif', np.array([.05, 1., 5., 5.15]))]
    assert np.array_equal(gif[1], gif[2]) and len({f.tobytes() for f in gif}) == 3


@needs_shared
def test_hidden_colours_are_never_seen():
    for name in ('rgba.png', 'palette_trns.png'):
        from PIL import Image
        with Image.open(ODD/name) as image: pixels = np.asarray(image.convert('RGBA'))
        hidden = pixels[..., 3] == 0
        assert hidden.any() and (read_still(ODD/name)[hidden] == 255).all()


@needs_shared
def test_nothing_is_filled_up():
    damage = Damage()
    frames, times = read_frames(ODD/'trunc.mp4', fps=5, damage=damage)
    assert len(times) == 15 and times.max() < 3 and len({f.tobytes() for f in frames}) == 15
    damage = Damage()
    frames, _ = read_frames(ODD/'flipped.mp4', fps=25, damage=damage)
    assert damage.packets == 2 and len(frames) == 150 and len({f.tobytes() for f in frames}) == 148  # two are held for .04 s


@needs_shared
def test_a_stretch_without_picture_or_sound_is_empty():
    with pytest.raises(MediaError, match='no frame lies in the clip'): read_frames(ODD/'audio_long.mp4', start=10, end=20)
    assert len(read_audio(ODD/'audio_long.mp4', 10, 20)) == 10*SR
    assert not np.abs(read_audio(ODD/'audio_late.mkv', 0, 2.9)).any()
    assert loud_from(read_audio(ODD/'audio_late.mkv', 2.5)) == pytest.approx(.5, abs=.01)


@pytest.mark.parametrize('suffix', ['mkv', 'mp4', 'ts'])
@pytest.mark.parametrize('offset', [-1.5, .4, 1.5])
def test_sound_is_put_on_the_clock_of_the_picture(tmp_path, suffix, offset):
    path = sounding(tmp_path/f'a.{suffix}', offset=offset)
    info, audio = probe(path), read_audio(path)
    assert info['sound_offset'] == pytest.approx(offset, abs=.06) and any('the sound begins' in n for n in info['notes'])
    assert loud_from(audio) == pytest.approx(max(offset, 0), abs=.06)
    assert len(audio)/SR == pytest.approx(3 + offset, abs=.1)
    frames, times = read_frames(path, fps=1)
    assert len(times) == 3 and np.allclose(times, [.5, 1.5, 2.5])


def test_layouts_and_channels(tmp_path):
    wave = (.5*np.sin(2*np.pi*440*np.arange(96_000)/48_000)).astype(np.float32)
    for name, samples, loud in (('opposite', [wave, -wave], .5), ('one side', [wave, 0*wave], .25), ('surround', [wave]*6, None)):
        heard = read_audio(sounding(tmp_path/f'{name}.mkv', seconds=2., tracks=[np.stack(samples)]))
        assert abs(np.abs(np.fft.rfft(heard[8_000:24_000])).argmax() - 440) <= 1, name
        if loud: assert np.abs(heard[8_000:24_000]).max() == pytest.approx(loud, abs=.05), name
    quiet = np.zeros((2, 96_000), np.float32)
    path = sounding(tmp_path/'tracks.mkv', seconds=2., tracks=[quiet, quiet, np.stack([wave, wave])])
    assert np.abs(read_audio(path)).max() > .3 and any('track 3 is taken' in n for n in examine(path)['notes'])
    none = sounding(tmp_path/'none.mkv', seconds=2., tracks=[quiet, quiet])
    assert quiet_reason(read_audio(none)) == 'silence'


NAMES = ['12:30 rally.mp4', 'http: a talk.mp4', 'a%03d[1] ü 🎬.mp4', 'two  blanks .mp4', '-dash.mp4', 'pipe:0.mp4', 'a#b?c&d=e.mp4', "quote's \".mp4", 'concat:x|y.mp4', '~home.mp4']


@pytest.mark.parametrize('name', NAMES)
def test_names_are_files(tmp_path, name, monkeypatch):
    good = write_video(tmp_path/'good.mp4', [np.full((64, 96, 3), 10*i, np.uint8) for i in range(20)], fps=10, audio=np.sin(np.arange(44_100)/8).astype(np.float32)/2)
    (tmp_path/name).write_bytes(good.read_bytes())
    (tmp_path/'link.mp4').symlink_to(tmp_path/name)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path/name, name, 'link.mp4'):
        for decoder in DECODERS: assert len(read_frames(path, fps=2, decoder=decoder)[1]) == 4
        assert len(read_audio(path)) > 30_000
        row = examine(path)
        assert row['error'] is None and row['file'] == str(path)


@pytest.mark.parametrize('name', ['a%03d.png', '12:30.jpg', 'http: x.gif', '*.webp'])
def test_names_of_stills_are_files(tmp_path, name):
    from PIL import Image
    red = Image.new('RGB', (40, 30), (250, 0, 0))
    (red.convert('P') if name.endswith('gif') else red).save(tmp_path/name)
    row = examine(tmp_path/name)
    assert row['error'] is None and (row['width'], row['height'], row['num_frames']) == (40, 30, 1)
    assert abs(read_frames(tmp_path/name, fps=1)[0].astype(int)[0, 5, 5] - [250, 0, 0]).max() < 12


def test_a_dash_is_explained(tmp_path):
    (tmp_path/'-a.mp4').touch()
    call = lambda *args: warm.run([sys.executable, '-m', 'hatemm_clip', *args], cwd=tmp_path)
    refused = call('probe', '-a.mp4')
    assert refused.returncode == 2 and 'write -- before names that begin with a dash' in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert 'the file is empty' in call('probe', '--', '-a.mp4').stdout


def test_two_recordings_put_behind_each_other(tmp_path):
    "Transport streams can simply be joined; the second starts its clock again."
    for i in (1, 2): sounding(tmp_path/f'{i}.ts', seconds=2. + i, first=3*i)
    joined = tmp_path/'joined.ts'
    joined.write_bytes((tmp_path/'1.ts').read_bytes() + (tmp_path/'2.ts').read_bytes())
    info = probe(joined)
    assert info['picture_duration'] == pytest.approx(7, abs=.3)
    frames, times = read_frames(joined, fps=1)
    assert len(times) == 7 and len({f.tobytes() for f in frames}) == 7


def test_wide_pixels_are_shown_wide(tmp_path):
    with av.open(str(tmp_path/'wide.mp4'), 'w') as out:
        stream = out.add_stream('libx264', rate=10, width=96, height=64, pix_fmt='yuv420p')
        stream.codec_context.sample_aspect_ratio = 2
        for i in range(10): out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20*i, np.uint8), format='rgb24')))
        out.mux(stream.encode(None))
    row = examine(tmp_path/'wide.mp4')
    assert (row['width'], row['height']) == (192, 64) and read_frames(tmp_path/'wide.mp4')[0].shape == (1, 64, 192, 3) and not row['notes']


def mutate(data, rng, kind):
    "Bytes of a file, spoilt in one of five ways."
    at, size = int(rng.integers(0, len(data))), int(rng.integers(1, max(2, len(data)//20)))
    part = data[at:at + size]
    return {'inverted': data[:at] + bytes(255 - b for b in part) + data[at + size:], 'dropped': data[:at] + data[at + size:],
            'repeated': data[:at] + part*2 + data[at + size:], 'zeroed': data[:at] + bytes(len(part)) + data[at + size:], 'cut': data[:at]}[kind]


def remux(source, target):
    "The same packets in another container."
    with av.open(str(source)) as have, av.open(str(target), 'w') as out:
        streams = {s.index: out.add_stream_from_template(s) for s in have.streams if s.type in ('video', 'audio')}
        for packet in have.demux():
            if packet.dts is None or packet.stream.index not in streams: continue
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
    return target


@needs_shared
def test_sixty_mutations_of_real_files(tmp_path):
    "No crash, no hang, nothing filled up, and a result or a reason for each."
    rng, files = np.random.default_rng(0), []
    sources = [SHARED/'data/videos'/n for n in ('mdn_rabbit.mp4', 'grid_bbaf2n.mpg')] + [ODD/n for n in ('late_clock.ts', 'noduration.webm', 'latin1.avi')]
    sources.append(remux(ODD/'rot90.mp4', tmp_path/'remuxed.mkv'))
    for i in range(60):
        source = sources[i % len(sources)]
        files.append(tmp_path/f'{i}{source.suffix}')
        files[-1].write_bytes(mutate(source.read_bytes(), rng, ('inverted', 'dropped', 'repeated', 'zeroed', 'cut')[i // len(sources) % 5]))
    rows = decode_all(files, timeout=60, n=4)
    assert len(rows) == 60 and all(row['ok'] != bool(row['error']) for row in rows)
    assert not [row['error'] for row in rows if row['error'] and ('crashed' in row['error'] or 'not decoded after' in row['error'])]
    assert sum(row['ok'] for row in rows) > 44
    for row in rows:
        if row['ok']: assert 1 <= row['frames'] <= 4 and row['picture_duration'] < 200 and max(row['frame_times']) <= row['picture_duration']


@needs_shared
def test_times_that_are_lost_are_counted(tmp_path):
    "Four seconds in the middle cannot be decoded: their samples are left out, not filled up."
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 96, 3), np.uint8)
    data = bytearray(write_video(tmp_path/'noise.mp4', noise, fps=10, gop=10).read_bytes())
    begin, end = data.index(b'mdat') + 4, data.index(b'moov') - 4
    third = (end - begin)//10
    data[begin + 3*third:begin + 7*third] = bytes(4*third)
    (tmp_path/'hole.mp4').write_bytes(data)
    damage = Damage()
    frames, times = read_frames(tmp_path/'hole.mp4', fps=2, damage=damage)
    assert damage.times == 20 - len(times) > 2 and damage.packets > 20 and len(damage.notes()) == 2
    assert len({f.tobytes() for f in frames}) >= len(frames) - 4  # a frame stands in for a second at most


@pytest.fixture(scope='module')
def odd_set(tmp_path_factory):
    "The odd videos as a data set of somebody's own."
    folder = tmp_path_factory.mktemp('odd')/'set'
    folder.mkdir()
    names = [name for name in FILES if (ODD/name).suffix not in ('.jpg', '.png')]
    for name in names: (folder/name).write_bytes((ODD/name).read_bytes())
    (folder/'labels.csv').write_text('\n'.join(['file,label', *(f"{n},{('fine', 'toxic')[i % 2]}" for i, n in enumerate(names))]))
    return folder, names


@needs_shared
def test_check_names_what_is_odd(odd_set):
    report = check_dataset(odd_set[0])
    found = {(kind, row['id']) for kind, problem in report['problems'].items() for row in problem['rows']}
    assert ('no_video', 'song') in found and report['errors'] == 1 and report['media']['decoded'] == len(odd_set[1]) - 1
    expected = {('wrong_length', 'vfr'), ('sound_offset', 'audio_late'), ('odd', 'antiphase'), ('wrong_length', 'trunc'), ('uneven', 'audio_long'),
                ('odd', 'twoaudio'), ('odd', 'cover_first'), ('damaged', 'flipped'), ('no_audio', 'silent'), ('no_audio', 'bframes')}
    assert expected <= found, expected - found
    media = {'wrong_length', 'sound_offset', 'uneven', 'damaged', 'odd', 'unreadable', 'bad_audio'}
    assert not {i for kind, i in found if kind in media} & {'rot90', 'late_clock', 'noduration', 'editlist', 'latin1'}


@needs_shared
def test_stages_go_on_past_bad_files(odd_set, tmp_path, capsys):
    from hatemm_clip.asr import transcribe_clips
    from hatemm_clip.embed import embed_clips
    from hatemm_clip.encoders import load_encoder
    from hatemm_clip.speech import load_asr
    folder, names = odd_set
    with pytest.raises(InputError, match='holds no video, only audio'): prepare_data('folder', folder, tmp_path/'strict', folds=3)
    clips, _ = prepare_data('folder', folder, tmp_path, folds=3, max_failed=.1)
    assert set(clips.video_id) == {Path(n).stem for n in names} - {'song'}
    assert 'song' in (tmp_path/'failed_videos.csv').read_text() and 'cancel' not in (tmp_path/'failed_videos.csv').read_text()
    odd = (tmp_path/'odd_videos.csv').read_text()
    assert all(words in odd for words in ('audio_late', 'the sound begins 2.98 s after', 'trunc', 'the header says 6.0 s'))
    length = clips.set_index('video_id').end
    assert length['vfr'] > 9 and length['audio_long'] == pytest.approx(30, abs=.1) and length['trunc'] == pytest.approx(3, abs=.1)
    texts = transcribe_clips(clips, tmp_path, load_asr(device='cpu', threads=1, beam_size=1))
    store = embed_clips(clips, texts, tmp_path/'features.lance', load_encoder(), fps=2.)
    frames = dict(zip(store.column('clip_id'), map(len, store.column('image_times'))))
    frames = {v: frames[c] for v, c in zip(clips.video_id, clips.clip_id)}
    assert (frames['audio_long'], frames['trunc'], frames['vfr'], frames['reschange']) == (6, 6, 18, 8)
    assert 'are used as far as they can be decoded' in capsys.readouterr().out


def test_a_read_only_folder_and_a_loop_of_links(tmp_path):
    "Nothing is written among the videos, and a link to the folder itself is not followed for ever."
    folder = tmp_path/'set'
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = np.kron(rng.integers(0, 255, (4, 6, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
        write_video(folder/f'{i}.mp4', [picture]*4, fps=4)
    (folder/'labels.csv').write_text('file,label\n' + '\n'.join(f"{i}.mp4,{('fine', 'toxic')[i % 2]}" for i in range(8)))
    (folder/'again').symlink_to(folder)
    (folder/'round.mp4').symlink_to(folder/'round.mp4')
    folder.chmod(0o555)
    before = sorted(p.name for p in folder.iterdir())
    try:
        report = check_dataset(folder)
        clips, _ = prepare_data('folder', folder, tmp_path/'run', folds=3)
    finally: folder.chmod(0o755)
    assert len(clips) == 8 and report['errors'] == 0 and sorted(p.name for p in folder.iterdir()) == before
    assert 'Too many levels' in examine(folder/'round.mp4')['error'] or 'no such file' in examine(folder/'round.mp4')['error']


def test_five_thousand_rows_are_checked(tmp_path):
    rows = [f"{i}.mp4,{('fine', 'toxic')[i % 2]}" for i in range(5000)]
    (tmp_path/'labels.csv').write_text('file,label\n' + '\n'.join(rows))
    for i in range(5000): (tmp_path/f'{i}.mp4').touch()
    report = check_dataset(tmp_path, media=False)
    assert report['rows'] == 5000 and report['errors'] == 0
