"Odd media decode or are told apart, splits hold, tables are the same on every run and machine."
import json
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import warm
from conftest import ROOT

from hatemm_clip.base import SPLITS, InputError, read_table, write_table
from hatemm_clip.readers import read_dataset
from hatemm_clip.data import (
    LeakError, find_groups, leak_audit, make_windows, near_duplicate_texts, prepare_data, probe_clips,
    published_splits, purge_leaks, read_splits)
from hatemm_clip.frames import iter_frames, read_frames
from hatemm_clip.media import MediaError, probe
from hatemm_clip.demo import make_corpus
from hatemm_clip.media import write_video
from hatemm_clip.sound import read_audio

SHARED = ROOT.parent/'shared/data'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='../shared is not there')


def encode(path, codec, pix_fmt, size=(96, 64), frames=20, rate=10, pts=None, rotation=0, **options):
    "A video whose frame i has brightness 20 + 10*i on its left half and is black on its right."
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if rotation: stream.set_display_rotation(rotation)
        for i in range(frames):
            picture = np.zeros((size[1], size[0], 3), np.uint8)
            picture[:, :size[0]//2] = 10*(i % 20) + 20
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24').reformat(format=pix_fmt)
            if pts is not None: frame.pts = pts[i]
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def brightness(frames): return (frames[:, :, :frames.shape[2]//2].mean((1, 2, 3)) - 20)/10


@pytest.mark.parametrize('name,codec,pix_fmt,size', [
    ('odd.mkv', 'ffv1', 'yuv444p', (97, 63)), ('grey.mkv', 'ffv1', 'gray', (96, 64)), ('ten_bit.mkv', 'ffv1', 'yuv420p10le', (96, 64)), ('alpha.mkv', 'ffv1', 'yuva420p', (96, 64)),
    ('ten_bit.mp4', 'libx264', 'yuv420p10le', (96, 64)), ('vp9.webm', 'libvpx-vp9', 'yuv420p', (96, 64)), ('old.avi', 'mpeg4', 'yuv420p', (96, 64)), ('stream.ts', 'mpeg2video', 'yuv420p', (96, 64))])
def test_pixel_formats(tmp_path, name, codec, pix_fmt, size):
    rate = 25 if codec == 'mpeg2video' else 10
    frames, times = read_frames(encode(tmp_path/name, codec, pix_fmt, size, rate=rate), fps=rate/5)
    assert frames.shape[1:] == (size[1], size[0], 3) and frames.dtype == np.uint8
    assert np.allclose(times, (np.arange(4)*5 + 2.5)/rate)
    assert np.abs(brightness(frames) - [2, 7, 12, 17]).max() < 1


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_rotation(tmp_path, degrees):
    plain = read_frames(encode(tmp_path/'plain.mp4', 'libx264', 'yuv420p', qp='0'))[0]
    turned = read_frames(encode(tmp_path/'turned.mp4', 'libx264', 'yuv420p', qp='0', rotation=degrees))[0]
    assert np.abs(turned.astype(int) - np.rot90(plain, degrees//90, axes=(1, 2))).max() <= 2


def test_variable_frame_rate(tmp_path):
    "Frame 0 stays for a second, the rest come every 0.1 s."
    frames, times = read_frames(encode(tmp_path/'vfr.mp4', 'libx264', 'yuv420p', pts=[0, *range(10, 29)]), fps=2)
    assert np.allclose(times, [.25, .75, 1.25, 1.75, 2.25])
    assert np.abs(brightness(frames) - [0, 0, 3, 8, 13]).max() < 1


def test_one_frame(tmp_path):
    frames, times = read_frames(encode(tmp_path/'one.mp4', 'libx264', 'yuv420p', frames=1), sampling='uniform', n=3)
    assert len(frames) == 3 and (frames == frames[0]).all()


@pytest.mark.parametrize('codec,layout,rate,suffix', [('aac', 'stereo', 44_100, 'mp4'), ('aac', '5.1', 48_000, 'mp4'), ('mp2', 'mono', 32_000, 'mpg'), ('libopus', 'stereo', 48_000, 'webm'), ('pcm_s16le', 'mono', 8_000, 'wav')])
def test_audio_layouts(tmp_path, codec, layout, rate, suffix):
    path = tmp_path/f'sound.{suffix}'
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        planar = stream.codec_context.format.name
        tone = .5*np.sin(2*np.pi*440*np.arange(2*rate)/rate).astype(np.float32)
        source = av.AudioFrame.from_ndarray(np.tile(tone, (stream.codec_context.channels, 1)), format='fltp', layout=layout)
        source.sample_rate = rate
        for frame in av.AudioResampler(format=planar, layout=layout, rate=rate).resample(source): out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    heard = read_audio(path)
    assert heard.dtype == np.float32 and abs(len(heard) - 32_000) < 3_000 and np.abs(heard).max() <= 1
    assert abs(np.abs(np.fft.rfft(heard[8_000:24_000])).argmax() - 440) <= 1
    part = read_audio(path, .5, 1.)
    assert len(part) == 8_000 and np.abs(part - heard[8_000:16_000]).max() < 1e-6


def test_duration_that_cannot_be_true(tmp_path):
    path = encode(tmp_path/'long.mp4', 'libx264', 'yuv420p', frames=30)
    data = bytearray(path.read_bytes())
    for box, at in ((b'mvhd', 16), (b'mdhd', 16), (b'tkhd', 20)): data[data.index(box) + 4 + at:data.index(box) + 8 + at] = struct.pack('>I', 0x7fffffff)
    path.write_bytes(data)
    assert abs(probe(path)['duration'] - 3) < .01
    assert abs(probe_clips(pd.DataFrame(dict(path=[str(path)]))).duration[0] - 3) < .01
    assert len(read_frames(path)[1]) == 3


def test_unreadable_is_a_row_with_its_reason(tmp_path):
    good = encode(tmp_path/'good.mp4', 'libx264', 'yuv420p')
    (tmp_path/'cut.mp4').write_bytes(good.read_bytes()[:300])
    (tmp_path/'text.mp4').write_text('hello')
    rows = probe_clips(pd.DataFrame(dict(path=[str(tmp_path/n) for n in ('good.mp4', 'cut.mp4', 'text.mp4', 'none.mp4')])))
    assert rows.error.astype(bool).tolist() == [False, True, True, True] and rows.error[3].endswith('no such file')
    assert rows.hashes[0].shape == (5, 64) and rows.sha256[0]


def test_memory_does_not_grow_with_the_video(tmp_path):
    "Frames of a video ten times as long take no more memory, because they come in chunks."
    code = """if True:
        import resource, sys
        from hatemm_clip.frames import iter_frames
        shapes = [f.shape for f, _ in iter_frames(sys.argv[1], fps=1)]
        print(sum(s[0] for s in shapes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    def peak(seconds):
        path = write_video(tmp_path/f'{seconds}.mp4', (np.full((360, 640, 3), i % 250, np.uint8) for i in range(seconds)), fps=1)
        count, kib = warm.run([sys.executable, '-c', code, path]).stdout.split()
        assert int(count) == seconds
        return int(kib)/1024
    assert peak(600) < peak(60) + 60  # MiB; all 600 frames would be 400


@pytest.fixture(scope='module')
def corpus(tmp_path_factory): return make_corpus(tmp_path_factory.mktemp('corpus')/'demo', 12, 3)


def test_same_bytes_twice_and_same_ids_elsewhere(corpus, tmp_path, capsys):
    for name in 'ab': prepare_data('demo', corpus, tmp_path/name, folds=3, seed=1)
    for table in ('clips.parquet', 'splits.parquet'): assert (tmp_path/'a'/table).read_bytes() == (tmp_path/'b'/table).read_bytes()
    moved = Path(str(corpus) + '_moved')
    corpus.rename(moved)
    try: prepare_data('demo', moved, tmp_path/'c', folds=3, seed=1)
    finally: moved.rename(corpus)
    here, there = (read_table(tmp_path/n/'clips.parquet') for n in 'ac')
    assert here.drop(columns='path').equals(there.drop(columns='path')) and not here.path.equals(there.path)
    assert (tmp_path/'a/splits.parquet').read_bytes() == (tmp_path/'c/splits.parquet').read_bytes()


def test_ids_do_not_tell_the_label(corpus, tmp_path, capsys):
    clips, _ = prepare_data('demo', corpus, tmp_path, folds=3)
    assert not clips.clip_id.str.contains('hate').any()
    assert clips.clip_id.is_monotonic_increasing and 0 < clips.label[:12].sum() < 12


def test_copies_stay_together(corpus, tmp_path, capsys):
    "The same video twice under two names: one group, never on two sides."
    import shutil
    shutil.copytree(corpus, tmp_path/'data')
    shutil.copy(tmp_path/'data/hate_videos/hate_video_1.mp4', tmp_path/'data/hate_videos/hate_video_99.mp4')
    with open(tmp_path/'data/HateMM_annotation.csv', 'a') as f: f.write('hate_video_99.mp4,Hate,,\n')
    _, splits = prepare_data('hatemm', tmp_path/'data', tmp_path/'run', folds=3)
    group = splits.drop_duplicates('video_id').set_index('video_id').group
    assert group['hate_video_1'] == group['hate_video_99'] and leak_audit(splits)['largest_group'] >= 2


@pytest.fixture
def groups(): return pd.Series([f'g{i//2}' for i in range(12)], index=[f'v{i:02d}' for i in range(12)])


def test_published_split_from_a_file(tmp_path, groups):
    parts = ['train']*6 + ['dev']*3 + ['test']*3
    (tmp_path/'s.csv').write_text('video_id,part\n' + ''.join(f'{v},{p}\n' for v, p in zip(groups.index, parts)))
    splits = read_splits(tmp_path/'s.csv', groups, 'paper')
    assert set(SPLITS.names) == set(splits.columns) and splits.part.value_counts().to_dict() == {'train': 6, 'val': 3, 'test': 3}
    with pytest.raises(LeakError, match='v08 in val and v09 in test'): leak_audit(splits)
    kept, gone = purge_leaks(splits)
    assert gone == 1 and leak_audit(kept)['videos'] == 11
    np.savez(tmp_path/'s.npz', ids=np.array(groups.index, str), split=np.array([parts, parts[::-1]]))
    assert read_splits(tmp_path/'s.npz', groups, 'paper_5fold').groupby('fold').size().tolist() == [12, 12]
    (tmp_path/'bad.csv').write_text('video_id,part\nv00,trian\n')
    with pytest.raises(InputError, match="part is 'trian'"): read_splits(tmp_path/'bad.csv', groups)
    (tmp_path/'few.csv').write_text('video_id,part\nv00,train\n')
    with pytest.raises(InputError, match='says nothing of v01'): read_splits(tmp_path/'few.csv', groups)


@needs_shared
def test_oracle_snippets_of_the_real_file():
    clips = make_windows(read_dataset('hatemm', SHARED/'hatemm').assign(duration=0.), 'oracle_snippets')
    assert (clips.label == 1).sum() == 669


@needs_shared
def test_boilerplate_glues_nothing_together():
    texts = json.loads((SHARED/'hatemm/hatemm_vosk_transcripts.json').read_text())
    pairs = near_duplicate_texts(texts)
    sizes = find_groups(pd.DataFrame(dict(video_id=sorted(texts))), pairs=pairs).value_counts()
    assert pairs and sizes.iloc[0] <= 10


@needs_shared
def test_multihateclip_has_three_classes_and_a_published_split():
    videos = read_dataset('mhc_en', SHARED/'mhc_en')
    assert set(videos.label_name) == {'Normal', 'Offensive', 'Hateful'} and set(videos.part) == {'train', 'val', 'test'}
    groups = find_groups(videos)
    assert leak_audit(published_splits(videos, groups))['videos'] == len(videos)


@needs_shared
@pytest.mark.parametrize('name', ['nasa_13013.mp4', 'mdn_rabbit.mp4', 'grid_bbaf2n.mpg', 'autoeditor_example.mp4'])
def test_real_videos(name):
    frames = [f for f, _ in iter_frames(SHARED/'videos'/name, fps=1)]
    info = probe(SHARED/'videos'/name)
    assert sum(map(len, frames)) == max(1, int(info['duration'] + 1e-6)) and abs(info['claimed'] - info['duration']) < .2


def test_python_in_the_annotation_runs_nothing(tmp_path):
    bait = tmp_path/'touched'
    (tmp_path/'HateMM_annotation.csv').write_text(f'video_file_name,label,hate_snippet,target\nok.mp4,Hate,"[[\'00:00:01\', \'00:00:02\']]",\nx.mp4,Hate,"open(\'{bait}\', \'w\')",\n')
    with pytest.raises(InputError, match='line 3'): read_dataset('hatemm', tmp_path)
    assert not bait.exists()


def test_a_table_that_lacks_columns_is_not_written(tmp_path):
    with pytest.raises(InputError, match='lacks the columns'): write_table(pd.DataFrame(dict(fold=[1])), tmp_path/'s.parquet', SPLITS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(MediaError, match='no such file'): probe(tmp_path/'none.mp4')
