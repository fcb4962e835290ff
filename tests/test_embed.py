"Features: real frames, the store under stress, killed and resumed runs, foreign files."
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from hatemm_clip.base import InputError
from hatemm_clip.frames import read_frames
from hatemm_clip.media import write_video
from hatemm_clip import batching, encoders, frames as frames_module
from hatemm_clip.encoders import CHUNK, encode_frames, encode_texts, load_encoder, preprocess_frames, read_inputs, text_windows, with_precision
from hatemm_clip.features import pack_rows, export_features, features_info, format_info, open_store, read_features
from hatemm_clip.frames import planned_frames, frame_plan
from hatemm_clip.bench import bench_embed, bench_memory
from hatemm_clip.embed import demo_run, embed_clips, embed_stores
from hatemm_clip.batching import embed_images, embed_items
from hatemm_clip.base import store_lock
from demo import copy_run


@pytest.fixture(scope='module')
def enc(): return load_encoder()


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    "Six short videos and their table."
    folder, rng = tmp_path_factory.mktemp('embed'), np.random.default_rng(0)
    rows = []
    for i in range(6):
        colours = rng.integers(0, 255, (4 + i, 3), np.uint8)
        path = write_video(folder/f'{i}.mp4', (np.full((64, 96, 3), colours[j//5], np.uint8) for j in range(5*(4 + i))), 5)
        rows.append(dict(clip_id=f'c{i}', video_id=f'v{i}', path=str(path), start=0., end=4. + i, label=i % 2, label_name='ab'[i % 2], dataset='toy'))
    return pd.DataFrame(rows)


@pytest.fixture(scope='module')
def transcripts():
    text = 'the choir meets in the village every day and the soup is nearly ready '
    rows = [dict(clip_id=f'c{i}', text=text*i, segments=[dict(start=0., end=4., text=text*i)] if i else [], backend='toy', model='toy') for i in range(6)]
    return pd.DataFrame(rows)


def real_videos(shared): return sorted((shared/'data/videos').iterdir())


def test_features_of_real_frames_agree_with_open_clip(enc, shared):
    import open_clip
    for file in real_videos(shared):
        frames, _ = read_frames(file, fps=.2)
        preprocess = dict(enc.preprocess)
        for mode in ('squash', 'shortest'):
            preprocess['resize_mode'] = mode
            transform = open_clip.image_transform(preprocess['size'], is_train=False, mean=preprocess['mean'], std=preprocess['std'], resize_mode=mode, interpolation='bicubic')
            with torch.inference_mode(): expected = enc.model.encode_image(torch.stack([transform(Image.fromarray(f)) for f in frames]), normalize=True)
            for encoder in (enc, with_precision(enc, 'bfloat16')):
                assert (encode_frames(encoder, preprocess_frames(frames, preprocess))*expected).sum(1).min() >= .999, (file.name, mode, encoder.precision)


@pytest.mark.parametrize('mode', ['squash', 'shortest', 'longest'])
@pytest.mark.parametrize('shape', [(90, 160), (160, 90), (64, 64), (37, 211)])
def test_preprocessing_equals_the_transform_bit_by_bit(shape, mode):
    import open_clip
    frames = np.random.default_rng(0).integers(0, 255, (2, *shape, 3), dtype=np.uint8)
    preprocess = dict(size=48, resize_mode=mode, interpolation='bicubic', mean=(0, 0, 0), std=(1, 1, 1))
    transform = open_clip.image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation='bicubic', fill_color=0)
    ours, expected = preprocess_frames(frames, preprocess).float()/255, torch.stack([transform(Image.fromarray(f)) for f in frames])
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize('fps', [.2, 1.5])
def test_the_plan_shows_the_same_frames(fps, shared):
    for file in real_videos(shared):
        expected, times = read_frames(file, fps=fps)
        got = np.stack(list(planned_frames(str(file), times)))
        assert np.array_equal(got, expected), file.name


@pytest.mark.parametrize('window', [(0., 3.), (7.3, 11.9), (39., 42.)])
def test_the_plan_keeps_to_the_window(window, shared):
    file = shared/'data/videos/autoeditor_example.mp4'
    expected, times = read_frames(file, fps=2, start=window[0], end=window[1])
    assert np.array_equal(np.stack(list(planned_frames(str(file), times))), expected)


@pytest.mark.parametrize('options', [dict(bf='3', g='30'), dict(bf='0'), {'bf': '4', 'g': '12', 'x264-params': 'open-gop=1:b-pyramid=normal'}])
def test_the_plan_holds_for_other_ways_to_encode(options, tmp_path, monkeypatch):
    import av
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 80, 3), dtype=np.uint8)
    for container, codec in (('mp4', 'libx264'), ('mkv', 'libx264'), ('ts', 'libx264'), ('avi', 'mpeg4')):
        path = tmp_path/f'a.{container}'
        with av.open(str(path), 'w') as out:
            stream = out.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.options = 80, 40, 'yuv420p', options if codec == 'libx264' else {}
            for i in range(90): out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 3*i, 1), format='rgb24')))
            out.mux(stream.encode(None))
        for fps in (.7, 2.):
            expected, times = read_frames(path, fps=fps)
            preprocess = dict(size=40, resize_mode='squash', interpolation='bicubic')
            got = list(read_inputs(path, preprocess, fps))
            assert np.allclose(np.concatenate([t for _, t in got]), times)
            assert torch.equal(torch.cat([x for x, _ in got]), preprocess_frames(expected, preprocess)), (container, fps)
        monkeypatch.setattr(frames_module, 'SEEK_FROM', 1.)  # later windows are jumped to
        for window in ((2., 4.), (5.5, 8.), (8.5, 9.)):
            expected, times = read_frames(path, fps=5, start=window[0], end=window[1])
            got = torch.cat([x for x, _ in read_inputs(path, preprocess, 5, *window)])
            assert torch.equal(got, preprocess_frames(expected, preprocess)), (container, window)
            if container in ('mp4', 'mkv'): assert np.array_equal(np.stack(list(planned_frames(str(path), times))), expected), (container, window)
        monkeypatch.undo()


def test_fewer_packets_than_frames():
    pts = np.arange(100)
    send, shown = frame_plan(pts, pts % 10 == 0, np.array([3., 57.2, 57.9]))
    assert np.flatnonzero(send).tolist() == [0, 1, 2, 3, *range(50, 58)] and shown.tolist() == [3, 57, 57]


def test_a_frame_before_its_key_frame_needs_the_one_before():
    pts, keys = np.array([0, 1, 5, 3, 4]), np.array([1, 0, 1, 0, 0], bool)
    assert frame_plan(pts, keys, np.array([3.5]))[0].tolist() == [True]*4 + [False]
    assert frame_plan(pts, keys, np.array([6.]))[0].tolist() == [False, False, True, False, False]


def test_any_number_of_workers_gives_the_same_bytes(enc, videos, transcripts):
    segments = {t.clip_id: t.segments for t in transcripts.itertuples()}
    runs = [{r['clip_id']: r for r in embed_items(videos, segments, enc, batch_size=8, workers=workers)} for workers in (1, 2, 5)]
    runs.append({r['clip_id']: r for i in range(6) for r in embed_items(videos[i:i+1], segments, enc, batch_size=8)})
    for other in runs[1:]:
        for clip_id, row in runs[0].items():
            for m in ('image', 'text'): assert row[m].tobytes() == other[clip_id][m].tobytes(), (clip_id, m)
    assert runs[0]['c0']['text'].shape == (0, enc.dims['text']) and runs[0]['c5']['text'].shape[0] > 1
    assert [len(runs[0][f'c{i}']['image']) for i in range(6)] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize('text', ['7 19 23 42 '*60, '🎬🔥👩\u200d👩\u200d👧 '*40, 'a'*3000, 'Ärger über Öl — 100 %! '*50, '漢字'*400, '=' * 900 + ' 1,5 ' * 40])
def test_any_text_is_windowed_by_tokens_and_nothing_is_dropped(text, enc):
    import open_clip
    for tokenizer, context in ((enc.tokenizer, enc.context_length), (open_clip.get_tokenizer('ViT-B-32'), 77)):
        windows = encoders.text_windows([dict(start=1., end=9., text=text)], tokenizer, context)
        assert ''.join(w['text'] for w in windows).replace(' ', '') == text.replace(' ', '')
        assert max(len(tokenizer.encode(w['text'])) for w in windows) <= context - 2
        assert all(1 <= w['start'] < w['end'] <= 9.001 for w in windows) and [w['start'] for w in windows] == sorted(w['start'] for w in windows)


def test_text_equals_one_window_at_a_time(enc, videos, transcripts):
    row = next(r for r in embed_items(videos[5:], {'c5': transcripts.segments[5]}, enc) if r['clip_id'] == 'c5')
    windows = text_windows(transcripts.segments[5], enc.tokenizer, enc.context_length)
    alone = torch.cat([encode_texts(enc, [w['text']]) for w in windows]).numpy()
    assert np.abs(alone - row['text']).max() < 1e-5
    assert ' '.join(w['text'] for w in windows) == transcripts.text[5].strip()


def test_a_reader_that_stops_early_leaves_no_thread(enc, videos):
    before = threading.active_count()
    rows = embed_images(videos, enc, fps=5.)
    next(rows)
    rows.close()
    assert threading.active_count() == before


def test_a_broken_file_is_a_row_with_its_reason(enc, videos, transcripts, tmp_path):
    bad = videos.copy()
    (tmp_path/'torn.mp4').write_bytes(Path(videos.path[2]).read_bytes()[:300])
    bad.loc[2, 'path'] = str(tmp_path/'torn.mp4')
    with pytest.raises(InputError, match='1 of 6 items failed'): embed_clips(bad, transcripts, tmp_path/'a.lance', enc)
    store = embed_clips(bad, transcripts, tmp_path/'a.lance', enc, max_failed=.5)
    errors = dict(zip(store.column('clip_id'), store.column('error')))
    assert 'torn.mp4' in errors['c2'] and sum(map(bool, errors.values())) == 1
    store = embed_clips(videos, transcripts, tmp_path/'a.lance', enc)  # mended in between: tried again
    assert not any(store.column('error')) and len(store) == 6


def test_the_store_tells_its_precision_and_auto_follows_it(enc, videos, transcripts, tmp_path):
    store = embed_clips(videos[:3], transcripts[:3], tmp_path/'a.lance', enc, precision='bfloat16')
    assert store.provenance['precision'] == 'bfloat16'
    assert len(embed_clips(videos[:3], transcripts[:3], tmp_path/'a.lance', enc)) == 3
    with pytest.raises(InputError, match="precision 'bfloat16' there, 'float32' asked for"): embed_clips(videos[:3], transcripts[:3], tmp_path/'a.lance', enc, precision='float32')


def test_two_writers_one_is_refused_readers_are_not(enc, videos, transcripts, tmp_path):
    embed_clips(videos[:2], transcripts[:2], tmp_path/'a.lance', enc)
    with store_lock(tmp_path/'a.lance'):
        code = f"from hatemm_clip.base import store_lock\nfrom hatemm_clip.features import open_store\nprint(len(open_store({str(tmp_path/'a.lance')!r})))\nwith store_lock({str(tmp_path/'a.lance')!r}): pass"
        done = warm.run([sys.executable, '-c', code])
    assert done.stdout.strip() == '2' and 'another run is writing to it' in done.stderr.splitlines()[-1]
    with store_lock(tmp_path/'a.lance'): pass


@pytest.mark.parametrize('left', ['a.lance', 'a.lance/_versions', 'a.lance/data'])
def test_a_half_made_store_is_begun_again(left, enc, videos, transcripts, tmp_path):
    (tmp_path/left).mkdir(parents=True)
    with pytest.raises(InputError, match='no such feature store'): open_store(tmp_path/'a.lance')
    assert len(embed_clips(videos[:2], transcripts[:2], tmp_path/'a.lance', enc)) == 2


def test_a_damaged_store_is_refused_and_not_overwritten(enc, videos, transcripts, tmp_path):
    embed_clips(videos[:2], transcripts[:2], tmp_path/'a.lance', enc)
    for file in (tmp_path/'a.lance/_versions').glob('*.manifest'): file.write_bytes(b'torn')
    before = sorted((tmp_path/'a.lance').rglob('*'))
    with pytest.raises(InputError, match='not a readable feature store'): embed_clips(videos[:2], transcripts[:2], tmp_path/'a.lance', enc)
    assert sorted((tmp_path/'a.lance').rglob('*')) == before


def test_only_new_and_changed_clips_are_embedded(enc, videos, transcripts, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(batching, 'read_inputs', lambda path, *rest: (opened.append(Path(path).stem), read_inputs(path, *rest))[1])
    run = lambda *tables: embed_clips(*tables, tmp_path/'a.lance', enc)
    run(videos[:3], transcripts[:3])
    run(videos[:5], transcripts[:5])
    assert sorted(opened[:3]) == ['0', '1', '2'] and sorted(opened[3:]) == ['3', '4']
    mended = transcripts.assign(segments=[[dict(start=0., end=1., text='another text')] if i == 1 else s for i, s in enumerate(transcripts.segments)])
    store = run(videos[:5], mended[:5])
    assert opened[5:] == ['1'] and len(store) == 5 and not any(store.column('error'))
    fresh = embed_clips(videos[:5], mended[:5], tmp_path/'b.lance', enc)
    assert columns(store) == columns(fresh)
    run(videos[:5].assign(sha256=['new' if i == 4 else '' for i in range(5)]), mended[:5])
    assert opened[-1] == '4'


def test_a_store_of_old_is_read_and_made_anew(enc, videos, transcripts, tmp_path):
    import lancedb
    from hatemm_clip.base import CLIPS, write_table
    write_table(videos.assign(targets=[[]]*6, spans=[[]]*6, duration=videos.end, fps=5., width=96, height=64, has_audio=False, sha256=''), tmp_path/'clips.parquet', CLIPS)
    new = embed_clips(videos, transcripts, tmp_path/'new.lance', enc)
    made = dict(new.provenance, clips='0123', transcripts='4567', asr=dict(backend='toy', model='toy'))
    rows = new.read().drop_columns(['inputs'])
    rows = rows.replace_schema_metadata({b'hatemm': json.dumps(made).encode()})
    lancedb.connect(str(tmp_path)).create_table('features', rows)
    old = read_features(tmp_path)
    assert len(old) == 6 and features_info(tmp_path)['clips'] == 6
    store = embed_clips(videos, transcripts, tmp_path/'features.lance', enc)
    assert columns(store) == columns(new) and len(read_features(tmp_path)) == 6 and all(store.column('inputs'))


def test_clips_without_a_transcript_are_counted(enc, videos, transcripts, tmp_path, capsys):
    with pytest.raises(InputError, match='1 of 6 items failed.*no transcript; run 10_asr again'): embed_clips(videos, transcripts[1:], tmp_path/'a.lance', enc)
    embed_clips(videos, transcripts[1:], tmp_path/'a.lance', enc, max_failed=.2)
    assert '6 new, 0 failed, 1 without a transcript' in capsys.readouterr().out
    embed_clips(videos, transcripts, tmp_path/'a.lance', enc)
    assert '1 new, 0 failed, 0 without a transcript' in capsys.readouterr().out
    assert len(embed_clips(videos, transcripts[:0], tmp_path/'b.lance', enc)) == 6  # frames alone are no failure


def test_features_of_a_fine_tuned_encoder_hide_folds_that_it_saw(enc, tables, tmp_path):
    from hatemm_clip.base import SPLITS, write_table
    folder, clips, said = tables
    rows = [dict(protocol='grouped', fold=k, video_id=v, group=v, part=['train', 'val', 'test'][(i + k) % 3]) for k in range(3) for i, v in enumerate(sorted(set(clips.video_id)))]
    (tmp_path/'clips.parquet').write_bytes((folder/'clips.parquet').read_bytes())
    write_table(pd.DataFrame(rows), tmp_path/'splits.parquet', SPLITS)
    embed_clips(clips, said, tmp_path/'features.lance', enc)
    whole = read_features(tmp_path)
    assert whole.split.shape == (3, 30)
    for name, checkpoint, expected in (('fold', dict(protocol='fold', fold=1), whole.split[[1]]), ('single', dict(protocol='single'), None)):
        store = open_store(tmp_path/f'{name}.lance', enc.dims, dict(enc.provenance(), checkpoint=checkpoint))
        store.add(pack_rows([dict(clip_id=c, image=np.ones((1, enc.dims['image'])), image_times=[0.]) for c in clips.clip_id], store.table.schema))
        split, info = read_features(tmp_path/f'{name}.lance').split, features_info(tmp_path/f'{name}.lance')
        assert (split is None) if expected is None else np.array_equal(split, expected)
        assert info['folds'] == (0 if expected is None else 1)
        assert read_features(tmp_path/f'{name}.lance', all_folds=True).split.shape == (3, 30)


def test_a_fine_tuned_encoder_keeps_to_its_fold_in_any_store(enc, tables, tmp_path):
    from hatemm_clip.base import SPLITS, write_table
    folder, clips, said = tables
    own = load_encoder(tuned(tmp_path/'tuned', dict(text_projection=enc.model.text_projection.detach()*-1), protocol='fold', fold=1, seen=dict(train=['v0'])))
    rows = [dict(protocol='grouped', fold=k, video_id=v, group='pair' if v in ('v2', 'v4') else v, part=['train', 'val', 'test'][(i + k) % 3]) for k in range(3) for i, v in enumerate(sorted(set(clips.video_id)))]
    (tmp_path/'clips.parquet').write_bytes((folder/'clips.parquet').read_bytes())
    write_table(pd.DataFrame(rows), tmp_path/'splits.parquet', SPLITS)
    both = embed_stores(clips, said, {tmp_path/'enc.lance': enc, tmp_path/'own.lance': own})
    for encoder, store in zip((enc, own), both): assert columns(store) == columns(embed_clips(clips, said, tmp_path/'alone'/store.path.name, encoder))
    frozen, features = read_features(tmp_path/'enc.lance'), read_features(tmp_path/'own.lance')
    assert features.provenance['checkpoint'] == dict(protocol='fold', fold=1, seen=dict(train=['v0']))
    assert frozen.split.shape == (3, 30) and np.array_equal(features.split, frozen.split[[1]])
    assert dict(zip(features.video_ids, features.groups)) == dict(v0='v0', v1='v1', v2='v2', v3='v3', v4='v2', v5='v5')


def test_clips_of_several_stores_are_made_for_all(enc, videos, transcripts, tmp_path, monkeypatch):
    other = load_encoder(tuned(tmp_path/'tuned', dict(text_projection=enc.model.text_projection.detach()*-1)))
    stores, opened = {tmp_path/'a.lance': enc, tmp_path/'b.lance': other}, []
    monkeypatch.setattr(batching, 'read_inputs', lambda path, *rest: (opened.append(Path(path).stem), read_inputs(path, *rest))[1])
    embed_stores(videos[:3], transcripts, stores)
    assert sorted(opened) == ['0', '1', '2']
    open_store(tmp_path/'b.lance').table.delete("clip_id = 'c1'")  # killed between two stores
    a, b = embed_stores(videos[:4], transcripts, stores)
    assert sorted(opened[3:]) == ['1', '3'] and sorted(a.clip_ids()) == sorted(b.clip_ids()) == ['c0', 'c1', 'c2', 'c3']


def test_groups_of_a_file_of_ones_own(tmp_path):
    rows, ids = dict(labels=np.array([0, 1]), voice=np.ones((2, 3))), np.array(['a', 'b'])
    for words, videos, groups in ((dict(), 'ab', 'ab'), (dict(groups=['g', 'g']), 'gg', 'gg'), (dict(video_ids=['v', 'w']), 'vw', 'vw'), (dict(groups=['g', 'g'], video_ids=['v', 'w']), 'vw', 'gg')):
        np.savez(tmp_path/'a.npz', ids=ids, **rows, **words)
        for path in (tmp_path/'a.npz', export_features(tmp_path/'a.npz', tmp_path/'b.npz')):
            features = read_features(path)
            assert (''.join(features.video_ids), ''.join(features.groups)) == (videos, groups) and list(features.arrays) == ['voice']


def test_info_counts_what_reading_gives(enc, tables, tmp_path):
    folder, clips, said = tables
    (tmp_path/'clips.parquet').write_bytes((folder/'clips.parquet').read_bytes())
    embed_clips(clips, said, tmp_path/'features.lance', enc)
    info, features = features_info(tmp_path), read_features(tmp_path)
    for m, told in info['modalities'].items():
        mask = features.masks[m]
        assert told == dict(dim=enc.dims[m], present=mask.any(1).sum(), vectors=mask.sum(), longest=mask.sum(1).max(), unit=True, padded_bytes=features.arrays[m].nbytes)
    assert info['clips'] == 30 and info['labels'] == dict(a=15, b=15) and info['videos'] == 6


def test_tasks_of_ray_hold_a_chunk_at_a_time(enc, videos, transcripts, tmp_path):
    (tmp_path/'torn.mp4').write_bytes(Path(videos.path[5]).read_bytes()[:300])
    table = videos.assign(texts=[json.dumps(dict(text=s)) for s in transcripts.segments])[['clip_id', 'path', 'start', 'end', 'texts']]
    torn = table[5:].assign(path=str(tmp_path/'torn.mp4'))
    for batch, error in ((table[5:], ''), (torn, 'torn.mp4')):
        chunks = list(batching._ray_inputs(batch.to_dict('list'), enc, 5., 0, ''))
        assert max(len(c['at']) for c in chunks) <= CHUNK and chunks[-1]['modality'] == ['']
        assert chunks[-1]['at'] == [sum(len(c['at']) for c in chunks[:-1])] and error in chunks[-1]['error'][0]


def test_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    for supported, expected in ((True, 'bfloat16'), (False, 'float16')):
        encoders.faster_precision.cache_clear()
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: supported)
        assert encoders.faster_precision(768, 'cuda') == expected
    encoders.faster_precision.cache_clear()


def test_the_demo_is_finished_and_nothing_else_is_touched(demo, tmp_path, capsys):
    run = copy_run(demo, tmp_path/'run', 'run.json').folder
    store = open_store(run/'features.lance')
    store.table.delete(f"clip_id = '{store.clip_ids()[0]}'")
    demo_run(run)  # a store that a kill left half full
    assert len(open_store(run/'features.lance')) == 160 and '1 new' in capsys.readouterr().out
    demo_run(run)
    assert capsys.readouterr().out == ''
    (run/'run.json').write_text('{}')
    shutil.rmtree(run/'features.lance')
    with pytest.raises(InputError, match='has no features.lance; run the stage 20_embed first'): demo_run(run)
    assert demo_run(run, embed=False) == run


def test_bench_in_small(monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: warm.run(command))
    told = bench_embed('hatemm-tiny', videos=1, copies=1, seconds=2, repeats=1, store_clips=50, long=0)
    assert told['ratios'].keys() == {'embed_vs_seed', 'encode_vs_seed', 'embed_vs_floor'}
    units = [row['unit'] for row in told['rows']]
    assert units.count('CPU s a frame') == 3 and units.count('CPU s a text window') == 1
    memory = bench_memory((10, 30))
    assert [row['what'] for row in memory[:2]] == ['memory: video of 10 s, 10 frames', 'memory: video of 30 s, 30 frames']


RUN = """
import sys, time
import pydantic, pyarrow.dataset, torchvision.transforms.v2
from hatemm_clip import batching
from hatemm_clip.base import read_table
from hatemm_clip.embed import embed_clips
from hatemm_clip.encoders import load_encoder
sys.path.append(sys.argv[3])
from killing import kill_runs
encoder, encode = load_encoder(), batching.encode_frames
clips, transcripts = (read_table(f'{sys.argv[1]}/{name}.parquet') for name in ('clips', 'transcripts'))

def slowly(*args):
    time.sleep(.05)
    return encode(*args)

def run(ready):
    import lancedb  # its threads would not live through a fork
    batching.encode_frames = slowly
    ready()
    embed_clips(clips, transcripts, sys.argv[2], encoder, batch_size=4, commit_every=3)
print(kill_runs(run))
"""


def columns(store): return {name: store.read()[name].to_pylist() for name in ('clip_id', 'image', 'image_times', 'text', 'text_times', 'error')}


@pytest.fixture(scope='module')
def tables(videos, transcripts, tmp_path_factory):
    "Thirty clips of the six videos, as a stage finds them."
    from hatemm_clip.base import CLIPS, TRANSCRIPTS, write_table
    folder = tmp_path_factory.mktemp('tables')
    clips = pd.concat([videos.assign(clip_id=videos.clip_id + f'-{i}', end=videos.end - .3*i) for i in range(5)], ignore_index=True)
    clips = clips.assign(targets=[[]]*30, spans=[[]]*30, duration=clips.end, fps=5., width=96, height=64, has_audio=False, sha256='')
    write_table(clips, folder/'clips.parquet', CLIPS)
    said = pd.concat([transcripts.assign(clip_id=transcripts.clip_id + f'-{i}', language='en', no_speech_prob=0.) for i in range(5)], ignore_index=True)
    write_table(said, folder/'transcripts.parquet', TRANSCRIPTS)
    return folder, clips, said


def test_killed_at_ten_moments_and_resumed_equals_undisturbed(enc, tables, tmp_path):
    folder, clips, said = tables
    expected = columns(embed_clips(clips, said, tmp_path/'calm.lance', enc, batch_size=4))
    target = tmp_path/'killed.lance'
    done = warm.run([sys.executable, '-c', RUN, folder, target, Path(__file__).parent], timeout=300)
    killed = int(done.stdout.split()[-1])
    ids = open_store(target).clip_ids()  # what is there is whole, and once
    assert len(ids) == len(set(ids)) and set(ids) <= set(clips.clip_id)
    assert killed >= 3
    assert columns(embed_clips(clips, said, target, enc, batch_size=4)) == expected


def test_a_full_disk_is_told_and_the_store_stays_readable(enc, videos, transcripts, tmp_path):
    embed_clips(videos[:3], transcripts[:3], tmp_path/'a.lance', enc, fps=2.)
    code = f"""
import resource, signal
import numpy as np
from hatemm_clip.features import pack_rows, open_store
store = open_store({str(tmp_path/'a.lance')!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store.add(pack_rows([dict(clip_id=f'n{{i}}', image=np.ones((600, 128)), image_times=[0.]*600) for i in range(9)], store.table.schema))
"""
    done = warm.run([sys.executable, '-c', code])
    told = done.stderr.strip().splitlines()[-1]
    assert 'InputError' in told and 'cannot be written' in told and 'make room and run again' in told and 'src/' not in told
    assert sorted(open_store(tmp_path/'a.lance').clip_ids()) == ['c0', 'c1', 'c2'] and len(open_store(tmp_path/'a.lance').read()) == 3


@pytest.mark.parametrize('audio,width', [('mfcc', 40), ('whisper', 384)])
def test_sound_is_a_third_modality(audio, width, enc, tmp_path):
    rate, rng = 22_050, np.random.default_rng(0)
    clips = pd.DataFrame([dict(clip_id=n, path=str(write_video(tmp_path/f'{n}.mp4', (np.full((32, 32, 3), 9, np.uint8) for _ in range(5*s)), 5, sound, rate)), start=0., end=float(s))
                          for n, s, sound in (('a', 12, rng.normal(0, .1, 12*rate).astype(np.float32)), ('b', 3, None))])
    said = pd.DataFrame([dict(clip_id=n, text='', segments=[], backend='', model='') for n in 'ab'])
    store = embed_clips(clips, said, tmp_path/'a.lance', enc, audio=audio)
    rows = {r['clip_id']: r for r in store.read().to_pylist()}
    assert np.array(rows['a']['audio']).shape[1] == width and rows['b']['audio'] == [] and rows['b']['audio_times'] == []
    assert audio in store.provenance['audio'] and store.modalities == ['image', 'text', 'audio']
    if audio == 'whisper': assert np.allclose(np.linalg.norm(rows['a']['audio'], axis=1), 1, atol=.01) and rows['a']['audio_times'] == [0., 10.]


def test_blocks_of_sound_make_no_difference():
    sound = np.random.default_rng(0).normal(0, .1, 20_000).astype(np.float32)
    frames, filters, window = np.lib.stride_tricks.sliding_window_view(sound, 2048)[::512], encoders.mel_filters(), np.hanning(2048).astype(np.float32)
    whole, blocks = (encoders._mel_power(frames, filters, window, block) for block in (1000, 7))
    assert np.allclose(whole, blocks, rtol=1e-4)


def test_mfcc_equals_librosa():
    librosa = pytest.importorskip('librosa', reason='librosa is the reference; it is not needed otherwise')
    from hatemm_clip.encoders import mfcc
    sound = np.random.default_rng(0).normal(0, .1, 700_000).astype(np.float32)*np.linspace(0, 1, 700_000, dtype=np.float32)  # more than a block
    assert np.abs(librosa.feature.mfcc(y=sound, sr=16_000, n_mfcc=40).T - mfcc(sound)).max() < .05


def test_a_store_round_trips_through_a_file(enc, tables, tmp_path):
    folder, clips, said = tables
    (tmp_path/'clips.parquet').write_bytes((folder/'clips.parquet').read_bytes())
    embed_clips(clips, said, tmp_path/'features.lance', enc)
    store, copy = read_features(tmp_path), read_features(export_features(tmp_path, tmp_path/'copy.npz'))
    assert copy.label_names == store.label_names == ['a', 'b'] and copy.provenance == store.provenance
    assert copy.video_ids.tolist() == store.video_ids.tolist() and copy.groups.tolist() == store.groups.tolist() and copy.labels.tolist() == store.labels.tolist()
    for m in store.arrays:
        for kind in ('arrays', 'masks', 'times'): assert np.array_equal(getattr(copy, kind)[m], getattr(store, kind)[m])


def test_moved_weights_are_the_same_and_other_weights_are_not(enc, videos, transcripts, tmp_path):
    weights = {k: v.clone().contiguous() for k, v in enc.model.state_dict().items()}
    for name in ('here', 'there'): save_file(weights, tmp_path/f'{name}.safetensors')
    save_file(dict(weights, text_projection=weights['text_projection']*-1), tmp_path/'other.safetensors')
    here, there, other = (load_encoder('hatemm-tiny', str(tmp_path/f'{name}.safetensors'), 'cpu') for name in ('here', 'there', 'other'))
    embed_clips(videos[:2], transcripts[:2], tmp_path/'a.lance', here)
    assert len(embed_clips(videos[:3], transcripts[:3], tmp_path/'a.lance', there)) == 3
    with pytest.raises(InputError, match='do not mix'): embed_clips(videos[:3], transcripts[:3], tmp_path/'a.lance', other)


def test_a_jump_that_goes_too_far_is_noticed(tmp_path, monkeypatch):
    import av
    with av.open(str(tmp_path/'a.mp4'), 'w') as out:
        stream = out.add_stream('libx264', rate=10, width=64, height=48, pix_fmt='yuv420p', options=dict(g='20', bf='0'))
        for i in range(120): out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2*i, np.uint8), format='rgb24')))
        out.mux(stream.encode(None))
    opened = av.open

    class Far:
        "A file that lands at nine seconds wherever it is sent to."
        def __init__(self, path, **options): self.container = opened(path, **options)
        def __enter__(self): return self
        def __exit__(self, *_): self.container.close()
        def __getattr__(self, name): return getattr(self.container, name)
        def seek(self, at, stream): self.container.seek(int(9/stream.time_base), stream=stream)
    monkeypatch.setattr(frames_module, 'SEEK_FROM', 1.)
    expected = list(planned_frames(str(tmp_path/'a.mp4'), np.array([4.7])))
    assert abs(expected[0].mean() - 2*47) < 3
    monkeypatch.setattr(av, 'open', Far)
    with pytest.raises(ValueError, match='the jump went too far'): list(planned_frames(str(tmp_path/'a.mp4'), np.array([4.7])))


@pytest.mark.parametrize('arrays, told', [
    (dict(label_names=np.array(['fine', 'bad'])), None), (dict(label_names=np.array(['fine'])), 'has 1 names'),
    (dict(label_names=np.zeros((2, 3))), 'not a list'), (dict(provenance=np.array('made by hand')), 'not a dict'), (dict(provenance=np.array('{"file": "x"}')), None)])
def test_words_in_a_foreign_file(arrays, told, tmp_path):
    np.savez(tmp_path/'a.npz', ids=np.array(['a', 'b']), labels=np.array([0, 1]), voice=np.ones((2, 3)), **arrays)
    if told is None: assert len(read_features(tmp_path/'a.npz').label_names) == 2
    else:
        with pytest.raises(InputError, match=told): read_features(tmp_path/'a.npz')


def test_plots_of_one_video_are_empty_and_no_error(enc, videos, transcripts, tmp_path):
    from hatemm_clip.features import Features
    from hatemm_clip.explore import plot_similarity, plot_similarity_map
    one = Features(np.array(['a', 'b']), np.array([0, 1]), dict(face=np.ones((2, 1, 2), np.float32)), dict(face=np.ones((2, 1), bool)), np.array(['v', 'v']))
    assert 'no two videos' in plot_similarity(one, 'face').get_title()
    none = Features(one.ids, one.labels, one.arrays, dict(face=np.zeros((2, 1), bool)), one.video_ids)
    assert 'in no clip' in plot_similarity_map(none, 'face').get_title()


def test_ray_refuses_weights_that_it_cannot_load_again(videos, transcripts, tmp_path):
    random = load_encoder('hatemm-tiny', '', 'cpu')
    with pytest.raises(InputError, match='random weights differ'): embed_clips(videos, transcripts, tmp_path/'a.lance', random, engine='ray')
    named = batching._RayEncoder
    with pytest.raises(InputError, match='has other weights on'): named('hatemm-tiny', 'demo', 'cpu', 'float32', 4, '', '0'*64)


def test_own_arrays_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = dict(ids=np.array(['a', 'b', 'c']), labels=np.array([0, 1, 0]), split=np.array([['train', 'val', 'test']]), voice=rng.normal(size=(3, 5)), face=rng.normal(size=(3, 2, 4)))
    arrays['face'][1] = 0
    np.savez(tmp_path/'own.npz', **arrays)
    first = read_features(tmp_path/'own.npz')
    assert first.masks['face'].tolist() == [[True]*2, [False]*2, [True]*2]
    again = read_features(export_features(tmp_path/'own.npz', tmp_path/'copy.npz'))
    assert again.ids.tolist() == first.ids.tolist() and again.split.tolist() == first.split.tolist()
    for m in first.arrays: assert np.array_equal(first.arrays[m], again.arrays[m]) and np.array_equal(first.masks[m], again.masks[m])
    export_features(tmp_path/'own.npz', tmp_path/'copy.safetensors')
    with safe_open(tmp_path/'copy.safetensors', 'np') as file:
        assert json.loads(file.metadata()['ids']) == ['a', 'b', 'c'] and file.get_tensor('face').shape == (3, 2, 4)
    assert 'voice' in format_info(features_info(tmp_path/'copy.npz')) and features_info(tmp_path/'own.npz')['modalities']['face']['present'] == 2


def test_real_features_have_no_mask_and_get_one(shared):
    info = features_info(shared/'data/hatemm/hatemm_bert_mfcc.npz')
    assert info['clips'] == 1083 and info['folds'] == 5 and info['modalities']['mfcc']['dim'] == 40


def tuned(folder, weights, **config):
    folder.mkdir()
    save_file(weights, folder/'encoder.safetensors')
    (folder/'config.json').write_text(json.dumps(dict(dict(kind='hatemm_clip.finetune', encoder='hatemm-tiny', pretrained='demo'), **config)))
    return str(folder)


def test_finetuned_weights_are_used_and_named(enc, tmp_path):
    whole = {k: v.clone().contiguous() for k, v in enc.model.state_dict().items()}
    assert load_encoder(tuned(tmp_path/'same', whole)).weights_sha256 == enc.weights_sha256
    other = load_encoder(tuned(tmp_path/'part', dict(text_projection=whole['text_projection']*-1)))
    assert other.weights_sha256 != enc.weights_sha256 and other.provenance()['encoder'] == str(tmp_path/'part')
    assert torch.allclose(encode_texts(other, ['a cake']), -encode_texts(enc, ['a cake']), atol=1e-6)


@pytest.mark.parametrize('weights,config,told', [
    (dict(nowhere=torch.ones(2)), {}, 'nowhere does not fit hatemm-tiny'), (dict(text_projection=torch.ones(2, 2)), {}, 'text_projection does not fit'),
    (dict(logit_scale=torch.ones(())), dict(kind='bundle'), "not of kind 'hatemm_clip.finetune'"), (dict(logit_scale=torch.ones(())), dict(encoder='ViT-Z'), 'unknown to open_clip')])
def test_weights_that_do_not_fit_are_one_line(weights, config, told, tmp_path):
    with pytest.raises(InputError, match=told) as e: load_encoder(tuned(tmp_path/'a', weights, **config))
    assert '\n' not in str(e.value)
