"Fine-tuning: what trains, resuming, processes, audits, bad input."
import dataclasses
import json
import os
import shutil
import signal
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import warm
from torch.distributed.elastic.utils.distributed import get_free_port

from hatemm_clip.base import CLIPS, TRANSCRIPTS, InputError, read_table, write_table
from hatemm_clip.data import LeakError, prepare_data
from hatemm_clip.demo import read_truth
from hatemm_clip.encoders import load_encoder, merge_adapter
from hatemm_clip.features import read_features
from hatemm_clip import training as module
from hatemm_clip.tuning import (
    MODES, ClipClassifier, ClipData, ClipHead, FinetuneConfig, make_batch, projection_names, read_clip_data, set_trainable, tower_of, trainable_parameters)
from hatemm_clip.checkpoints import audit_checkpoint, find_checkpoint, load_checkpoint, read_checkpoint
from hatemm_clip.training import check_gradients, finetune, tensorboard_log
from hatemm_clip.finetune import chosen_folds, embed_folds, read_folds, run_finetune
from demo import small_corpus

PARTS = np.where(np.arange(20) < 12, 'train', np.where(np.arange(20) < 16, 'val', 'test'))
CONFIG = FinetuneConfig(epochs=2, batch_size=4, num_frames=2, rank=4, dropout=0., patience=9, head_lr=3e-3)
MODELS = ['ViT-B-32', 'convnext_base', 'ViT-B-16-SigLIP', 'EVA02-B-16', 'coca_ViT-B-32']


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_toy(n=20, size=96, seed=0):
    "Label 1 is reddish, label 0 greenish; clip 2 has no frames, clip 3 no text."
    rng, labels = np.random.default_rng(seed), np.arange(n) % 2
    frames = rng.integers(0, 120, (n, 3, 3, size, size), np.uint8)
    frames[np.arange(n), :, labels] += 30
    said = ['the soup is ready', 'we baked an apple cake', 'bread costs less today']
    windows = [[said[i] for i in rng.integers(0, 3, 2)] for _ in range(n)]
    windows[3], ids = [], np.array([f'v{i:02d}' for i in range(n)])
    return ClipData(ids, ids, labels, frames, np.where(np.arange(n) == 2, 0, 3), windows, ['Non Hate', 'Hate'], np.array([f'hash{i}' for i in range(n)]))


@pytest.fixture(scope='module')
def toy(): return make_toy()


@pytest.fixture(scope='module')
def adapted(toy, tmp_path_factory):
    "A finished fine-tuning of adapters."
    return finetune(toy, PARTS, tmp_path_factory.mktemp('adapted')/'lora', CONFIG, 'cpu')


def losses(done): return done.history[['train_loss', 'val_loss']].values


def changed(before, after): return [n for n, t in before.items() if not torch.equal(t, after[n])]


def without_weights(name):
    "A model's names and shapes; drawing its first weights would take seconds."
    with torch.device('meta'): return open_clip.create_model(name, load_weights=False, device='meta')


@pytest.mark.parametrize('name', [*MODELS, 'RN50'])
def test_what_trains(name):
    "Each mode trains its parameters, in both towers, and nothing else."
    whole = without_weights(name)
    for mode in MODES:
        model = deepcopy(whole)
        every = [n for n, _ in model.named_parameters()]
        if name == 'RN50' and mode == 'lora':
            with pytest.raises(InputError, match='image tower'): set_trainable(model, FinetuneConfig(mode=mode))
            continue
        set_trainable(model, FinetuneConfig(mode=mode))
        names = trainable_parameters(model)
        expected = dict(head=dict(image=[], text=[]), projection=projection_names(model) if mode == 'projection' else None, full={t: [n for n in every if tower_of(n) == t] for t in ('image', 'text')}).get(mode)
        if mode == 'lora':
            assert all('.lora_A.' in n or '.lora_B.' in n for found in names.values() for n in found) and len(names['image']) > 20 and len(names['text']) > 20
            assert not any('out_proj.lora' in n and 'base_layer' not in n and 'resblocks' in n for n in names['image'])
        else: assert names == expected
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for found in names.values() for n in found}


def test_projection_is_the_last_layer():
    model = without_weights('ViT-B-32')
    assert projection_names(model) == dict(image=['visual.proj'], text=['text_projection'])
    assert (model.visual.proj.shape, model.text_projection.shape) == ((768, 512), (512, 512))


@pytest.mark.parametrize('mode', MODES)
def test_gradients_reach_both_towers(toy, mode):
    encoder = load_encoder(device='cpu')
    set_trainable(encoder.model, FinetuneConfig(mode=mode))
    model = ClipClassifier(encoder, ClipHead(encoder.dims))
    batch = make_batch(toy, np.arange(8), np.ones(8), CONFIG, encoder.tokenizer, epoch=1)
    model(batch)[0].square().sum().backward()
    check_gradients(model)
    for tower, names in trainable_parameters(model.clip).items():
        if mode == 'lora': names = [n for n in names if 'lora_B' in n]  # A waits for B, which starts at 0
        parameters = dict(model.clip.named_parameters())
        assert all(parameters[n].grad.abs().sum() > 0 for n in names), tower


def test_a_tower_without_gradient_is_an_error():
    encoder = load_encoder(device='cpu')
    set_trainable(encoder.model, FinetuneConfig(mode='projection'))
    model, parameters = ClipClassifier(encoder, ClipHead(encoder.dims)), (encoder.model.visual.proj, encoder.model.text_projection)
    parameters[1].grad = torch.ones_like(parameters[1])
    for parameters[0].grad in (None, torch.zeros_like(parameters[0])):
        with pytest.raises(InputError, match='image tower are to train, such as visual.proj, and none gets a gradient'): check_gradients(model)
    check_gradients(model, ['text'])


@pytest.mark.parametrize('mode', MODES)
def test_a_tower_without_data_stays_as_it_was(toy, tmp_path, mode):
    "Without text, bit by bit; and the result says so."
    silent, config = dataclasses.replace(toy, windows=[[] for _ in range(20)]), dataclasses.replace(CONFIG, mode=mode)
    done = finetune(silent, PARTS, tmp_path/'run', config, 'cpu')
    assert (done.parameters['text'], done.untrained) == (0, ['text']) and (done.parameters['image'] > 0) == (mode != 'head')
    moved = changed(load_encoder(device='cpu').model.state_dict(), load_checkpoint(done.folder, 'cpu').model.state_dict())
    assert all(n.startswith('visual.') for n in moved) and bool(moved) == (mode != 'head')
    assert read_checkpoint(done.folder)[1]['untrained'] == ['text']


def test_a_tower_may_wait_for_its_first_data(toy, tmp_path):
    "One clip of the training part has text: steps without it are no error."
    late = dataclasses.replace(toy, windows=[toy.windows[i] if i == 7 else [] for i in range(20)])
    done = finetune(late, PARTS, tmp_path/'run', dataclasses.replace(CONFIG, mode='projection', batch_size=2, epochs=1), 'cpu')
    assert done.untrained == [] and done.parameters['text'] > 0


def test_nothing_to_learn_from(toy, tmp_path):
    empty = dataclasses.replace(toy, windows=[[] for _ in range(20)], counts=np.zeros(20, int))
    with pytest.raises(InputError, match='no clip of the train part has frames or text'): finetune(empty, PARTS, tmp_path/'run', CONFIG, 'cpu')


def test_random_weights_of_an_untrained_tower_are_kept(toy, tmp_path):
    "Nothing else could give them back."
    silent = dataclasses.replace(toy, windows=[[] for _ in range(20)])
    config = dataclasses.replace(CONFIG, mode='full', pretrained='', epochs=1)
    done = finetune(silent, PARTS, tmp_path/'run', config, 'cpu')
    torch.manual_seed(config.seed)
    base = load_encoder('hatemm-tiny', '', 'cpu').model.state_dict()
    torch.manual_seed(99)
    assert all(n.startswith('visual.') for n in changed(base, load_checkpoint(done.folder, 'cpu').model.state_dict()))


@pytest.mark.parametrize('mode', MODES)
def test_frozen_is_bit_identical_and_loss_falls(toy, tmp_path, mode):
    before = load_encoder(device='cpu').model.state_dict()
    done = finetune(toy, PARTS, tmp_path/mode, dataclasses.replace(CONFIG, mode=mode, epochs=3, head_lr=0.), 'cpu')
    assert done.history.train_loss.iloc[-1] < .7*done.history.train_loss.iloc[0]
    after = load_checkpoint(done.folder, 'cpu').model.state_dict()
    if mode == 'head': assert not changed(before, after)
    elif mode == 'projection': assert changed(before, after) == ['text_projection', 'visual.proj']
    elif mode == 'lora': assert changed(before, after) and all(n.endswith(('in_proj_weight', 'out_proj.weight', 'c_fc.weight', 'c_proj.weight')) for n in changed(before, after))
    else: assert set(before) - set(changed(before, after)) <= {'logit_scale', 'attn_mask'}


def test_base_under_adapters_is_bit_identical(toy, tmp_path):
    "Also while they train, not only where they are merged."
    before, session = load_encoder(device='cpu').model.state_dict(), {}
    original = module._fit
    module._fit = lambda s, *args: session.update(s=s) or original(s, *args)
    try: finetune(toy, PARTS, tmp_path/'lora', dataclasses.replace(CONFIG, epochs=1), 'cpu')
    finally: module._fit = original
    now = {n.replace('.base_layer', ''): t for n, t in session['s'].model.clip.state_dict().items() if 'lora_' not in n}
    assert set(now) == set(before) and not changed(before, now)


def test_contrastive_loss_and_augmentation(toy, tmp_path):
    config = dataclasses.replace(CONFIG, mode='full', contrastive=.2, augment='crop+flip+color+rotate', mask_rate=.3, accumulate=2)
    done = finetune(toy, PARTS, tmp_path/'full', config, 'cpu')
    assert done.history.val_loss.iloc[-1] < done.history.val_loss.iloc[0]
    again = finetune(toy, PARTS, tmp_path/'again', config, 'cpu')
    np.testing.assert_array_equal(losses(again), losses(done))


def test_merged_is_applied(adapted):
    from peft import PeftModel
    applied = PeftModel.from_pretrained(load_encoder(device='cpu').model, str(adapted.folder)).eval()
    merged, images = load_checkpoint(adapted.folder, 'cpu'), torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    texts = merged.tokenizer(['the soup is ready', 'bread'])
    with torch.no_grad():
        assert (merged.model.encode_image(images, normalize=True) - applied.encode_image(images, normalize=True)).abs().max() <= 1e-4
        assert (merged.model.encode_text(texts, normalize=True) - applied.encode_text(texts, normalize=True)).abs().max() <= 1e-4
        assert (merged.model.encode_image(images, normalize=True) - load_encoder(device='cpu').model.encode_image(images, normalize=True)).abs().max() > 1e-4
    assert not (adapted.folder/'encoder.safetensors').exists() and not (adapted.folder/'epoch_001/encoder.safetensors').exists()


def test_several_kept_best_by_val(toy, tmp_path):
    done = finetune(toy, PARTS, tmp_path/'kept', dataclasses.replace(CONFIG, mode='head', head_lr=1e-4, epochs=5, keep=2), 'cpu')
    order = done.history.sort_values('val_loss').epoch.tolist()
    assert sorted(p.name for p in done.folder.glob('epoch_*')) == sorted(f'epoch_{e:03d}' for e in order[:2])
    assert read_checkpoint(done.folder)[1]['epoch'] == order[0] == done.summary()['best_epoch']
    (done.folder/'config.json').unlink()
    assert find_checkpoint(done.folder).name == f'epoch_{order[0]:03d}'


def test_early_stopping(toy, tmp_path):
    config = dataclasses.replace(CONFIG, mode='full', lr=.01, head_lr=.1, epochs=12, patience=2)
    done = finetune(toy, PARTS, tmp_path/'early', config, 'cpu')
    best = int(done.history.val_loss.idxmin())
    assert len(done.history) == min(best + 3, 12) and len(done.history) < 12


WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import dataclasses
import torch
from accelerate import PartialState
torch.set_num_threads(1)
from test_finetune import CONFIG, PARTS, make_toy
from hatemm_clip.finetune import run_finetune
from hatemm_clip.training import finetune
kill = lambda row: os.kill(os.getpid(), signal.SIGKILL) if row['epoch'] == {kill} else None
for folder, changes in {jobs!r}.items(): finetune(make_toy(), PARTS, folder, dataclasses.replace(CONFIG, **changes), 'cpu', on_epoch=kill)
if {run!r}: run_finetune({run!r}, dataclasses.replace(CONFIG, mode='projection', epochs=1), '0', 'two', 'cpu')
print('process', PartialState().process_index, 'of', PartialState().num_processes)
"""


def run_worker(jobs, kill=0, processes=1, run=''):
    "Fine-tune in a process of its own, or in several that speak through gloo; jobs: folder → changes of CONFIG."
    code = WORKER.format(tests=str(Path(__file__).parent), jobs=jobs, kill=kill, run=str(run))
    envs = [{**os.environ, 'ACCELERATE_USE_CPU': 'true'}]
    if processes > 1:
        group = dict(WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(get_free_port()))
        envs = [envs[0] | group | dict(RANK=str(k), LOCAL_RANK=str(k)) for k in range(processes)]
    workers = [warm.Fork([sys.executable, '-c', code], env=env) for env in envs]
    said = [w.communicate(timeout=600) for w in workers]
    return [w.returncode for w in workers], ''.join(out for out, _ in said), ''.join(err for _, err in said)


def test_killed_run_resumes_exactly(toy, adapted, tmp_path):
    "SIGKILL after the first epoch; the losses are those of the run that was left alone, digit by digit."
    assert run_worker({str(tmp_path/'killed'): {}}, kill=1)[0] == [-signal.SIGKILL]
    assert (tmp_path/'killed/state.safetensors').exists() and not (tmp_path/'killed/history.json').exists()
    (tmp_path/'killed/.epoch_002.1.part').mkdir()
    resumed = finetune(toy, PARTS, tmp_path/'killed', CONFIG, 'cpu')
    np.testing.assert_array_equal(losses(resumed), losses(adapted))
    assert not list((tmp_path/'killed').glob('.*')) and not (tmp_path/'killed/state.safetensors').exists()
    assert read_checkpoint(resumed.folder)[1]['files'] == read_checkpoint(adapted.folder)[1]['files']


def test_micro_batches_are_the_whole(toy, adapted, tmp_path):
    four = finetune(toy, PARTS, tmp_path/'four', dataclasses.replace(CONFIG, accumulate=4), 'cpu')
    np.testing.assert_allclose(losses(four), losses(adapted), atol=1e-4)


def test_another_configuration_is_refused(toy, adapted):
    with pytest.raises(InputError, match="rank 4 there, 2 asked for"): finetune(toy, PARTS, adapted.folder, dataclasses.replace(CONFIG, rank=2), 'cpu')
    with pytest.raises(InputError, match='clips'): finetune(toy, np.roll(PARTS, 2), adapted.folder, CONFIG, 'cpu')


@pytest.mark.parametrize('change, names', [
    (dict(windows=[['other words']]*20), ['texts']), (dict(hashes=np.array([f'other{i}' for i in range(20)])), ['frames']),
    (dict(times=np.ones((20, 2))), ['frames']), (dict(counts=np.full(20, 2)), ['frames']), (dict(hashes=None), ['frames']),
    (dict(labels=(np.arange(20) + 1) % 2), ['clips'])])
def test_other_inputs_are_refused(toy, adapted, change, names):
    "A finished fine-tuning is reused only for what it was made from."
    with pytest.raises(InputError) as e: finetune(dataclasses.replace(toy, **change), PARTS, adapted.folder, CONFIG, 'cpu')
    for name in ('texts', 'frames', 'clips'): assert (f"{name} '" in str(e.value)) == (name in names)


def test_pixels_count_where_there_are_no_hashes(toy, tmp_path):
    config, other = dataclasses.replace(CONFIG, mode='head', epochs=1), toy.frames.copy()
    other[0, 0, 0, 0, 0] ^= 1
    finetune(dataclasses.replace(toy, hashes=None), PARTS, tmp_path/'run', config, 'cpu')
    assert finetune(dataclasses.replace(toy, hashes=None), PARTS, tmp_path/'run', config, 'cpu').found
    with pytest.raises(InputError, match="frames '"): finetune(dataclasses.replace(toy, hashes=None, frames=other), PARTS, tmp_path/'run', config, 'cpu')


def test_other_weights_to_start_from_are_refused(toy, tmp_path):
    config = dataclasses.replace(CONFIG, mode='full', pretrained=str(tmp_path/'base.pt'), epochs=1)
    model = load_encoder(device='cpu').model
    torch.save(model.state_dict(), tmp_path/'base.pt')
    assert not finetune(toy, PARTS, tmp_path/'run', config, 'cpu').found
    with torch.no_grad(): model.text_projection.mul_(1.1)
    torch.save(model.state_dict(), tmp_path/'base.pt')
    with pytest.raises(InputError, match="base_sha256 '"): finetune(toy, PARTS, tmp_path/'run', config, 'cpu')


def test_advice_about_memory_can_be_followed(toy, adapted, tmp_path):
    "A run goes on, or is reused, with other micro-batches, checkpointing and number of checkpoints; not with a contrastive loss."
    thrifty = dict(accumulate=2, checkpointing=True, keep=1)
    assert finetune(toy, PARTS, adapted.folder, dataclasses.replace(CONFIG, **thrifty), 'cpu').found
    stop = lambda row: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt): finetune(toy, PARTS, tmp_path/'run', CONFIG, 'cpu', on_epoch=stop)
    resumed = finetune(toy, PARTS, tmp_path/'run', dataclasses.replace(CONFIG, **thrifty), 'cpu')
    np.testing.assert_allclose(losses(resumed), losses(adapted), atol=1e-4)
    with pytest.raises(KeyboardInterrupt): finetune(toy, PARTS, tmp_path/'both', dataclasses.replace(CONFIG, contrastive=.1), 'cpu', on_epoch=stop)
    with pytest.raises(InputError, match='accumulate 1 there, 2 asked for'):
        finetune(toy, PARTS, tmp_path/'both', dataclasses.replace(CONFIG, contrastive=.1, **thrifty), 'cpu')


def test_bad_checkpoints(adapted, tmp_path):
    copy = lambda name: Path(shutil.copytree(adapted.folder, tmp_path/name))
    cut = copy('cut')
    (cut/'head.safetensors').write_bytes((cut/'head.safetensors').read_bytes()[:50])
    with pytest.raises(InputError, match='head.safetensors: damaged'): load_checkpoint(cut)
    gone = copy('gone')
    (gone/'adapter_model.safetensors').unlink()
    with pytest.raises(InputError, match='adapter_model.safetensors: missing'): load_checkpoint(gone)
    text = copy('text')
    (text/'config.json').write_text('{"kind"')
    with pytest.raises(InputError, match='not JSON'): load_checkpoint(text)
    other = copy('other')
    config = json.loads((other/'config.json').read_text())
    with pytest.raises(InputError, match='adapters do not fit'): merge_adapter(dataclasses.replace(load_encoder(device='cpu'), model=without_weights('ViT-B-32')), other)
    (other/'config.json').write_text(json.dumps(dict(config, base_sha256='0'*64)))
    with pytest.raises(InputError, match='other weights'): load_checkpoint(other)
    with pytest.raises(InputError, match='no fine-tuned checkpoint'): load_checkpoint(tmp_path/'nowhere')


def test_damaged_state(toy, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run/state.safetensors').write_bytes(b'no tensors')
    with pytest.raises(InputError, match='delete it to start again'): finetune(toy, PARTS, tmp_path/'run', CONFIG, 'cpu')


def test_out_of_memory(toy, tmp_path, monkeypatch):
    def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setattr(module, '_step', full)
    with pytest.raises(InputError, match='batch_size 4 in 1 micro-batches.*accumulate=2 needs half.*checkpointing=True'): finetune(toy, PARTS, tmp_path/'run', CONFIG, 'cpu')


def test_bad_folds(toy, tmp_path):
    only = np.where(PARTS == 'val', np.where(toy.labels == 0, 'val', 'test'), PARTS)
    with pytest.raises(InputError, match='fold 3: no clip of the val part is labelled Hate'): finetune(toy, only, tmp_path/'run', CONFIG, 'cpu', info=dict(fold=3))
    with pytest.raises(InputError, match='random weights, which only mode full stores'): FinetuneConfig(pretrained='')


def test_missing_modalities_are_counted_and_masked(toy, adapted):
    assert adapted.data == dict(clips=20, frames=57, windows=38, without_frames=1, without_text=1, without_both=0)
    encoder = load_encoder(device='cpu')
    classifier = ClipClassifier(encoder, ClipHead(encoder.dims)).eval()
    logits = lambda data, rows: classifier(make_batch(data, np.array(rows), np.ones(len(rows)), CONFIG, encoder.tokenizer))[0]
    bare = dataclasses.replace(toy, windows=[[] for _ in range(20)], counts=np.zeros(20, int))
    with torch.no_grad():
        torch.testing.assert_close(logits(toy, [2, 3]), logits(toy, range(20))[[2, 3]], atol=1e-5, rtol=0)
        assert logits(toy, range(20)).isfinite().all() and np.ptp(logits(bare, range(20))[:, 1].numpy()) < 1e-6


def test_loader_processes_change_nothing(toy, adapted, tmp_path):
    np.testing.assert_array_equal(losses(finetune(toy, PARTS, tmp_path/'run', CONFIG, 'cpu', workers=2)), losses(adapted))


def test_float16_scales_its_loss(tmp_path, monkeypatch):
    "On a CPU, where only tests may: it learns, an overflow skips a step and halves the scale, and the scale is resumed."
    monkeypatch.setattr(module, '_activations', lambda precision, device: torch.float16)
    small, parts, config = make_toy(10), PARTS[::2], dataclasses.replace(CONFIG, num_frames=1, num_windows=1, batch_size=2, epochs=3, head_lr=0.)
    done = finetune(small, parts, tmp_path/'whole', config, 'cpu')
    assert losses(done)[-1, 1] < .9*losses(done)[0, 1]  # how many first steps overflow is the machine's matter
    stop = lambda row: (_ for _ in ()).throw(KeyboardInterrupt) if row['epoch'] == 2 else None
    with pytest.raises(KeyboardInterrupt): finetune(small, parts, tmp_path/'killed', config, 'cpu', on_epoch=stop)
    np.testing.assert_array_equal(losses(finetune(small, parts, tmp_path/'killed', config, 'cpu')), losses(done))
    encoder = module.load_base(config)
    rows = module.check_parts(small, parts)
    session = module.open_session(encoder, small, rows, config, 'cpu')
    head, scale = session.model.head.out.weight.detach().clone(), session.scaler.get_scale()
    assert session.scaler.is_enabled() and scale > 1
    batch = make_batch(small, rows[0][:4], np.full(4, 1e38, np.float32), config, encoder.tokenizer)
    module._step(session, iter([batch]))
    assert torch.equal(session.model.head.out.weight, head) and session.scaler.get_scale() == scale/2


def test_tensorboard_is_missing(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(InputError, match='pip install tensorboard'), tensorboard_log(tmp_path/'log'): pass


def test_tensorboard_gets_every_row(toy, tmp_path, monkeypatch):
    "With a stand-in for its writer, which need not be installed."
    rows, made = [], []
    class SummaryWriter:
        def __init__(self, folder): made.append(folder)
        def __enter__(self): return self
        def __exit__(self, *_): made.append('closed')
        def add_scalar(self, name, value, step): rows.append((name, value, step))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=SummaryWriter))
    config = dataclasses.replace(CONFIG, mode='head')
    with tensorboard_log(tmp_path/'log') as log: done = finetune(toy, PARTS, tmp_path/'run', config, 'cpu', on_epoch=log)
    assert made == [str(tmp_path/'log'), 'closed']
    assert [v for n, v, _ in rows if n == 'val_loss'] == done.history.val_loss.tolist() and {s for *_, s in rows} == {1, 2}
    with tensorboard_log(tmp_path/'none') as log: assert finetune(toy, PARTS, tmp_path/'run', config, 'cpu', on_epoch=log).found
    assert made == [str(tmp_path/'log'), 'closed']


def test_tensorboard_itself(toy, tmp_path):
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed; its writer is tested with a stand-in')
    config = dataclasses.replace(CONFIG, mode='head', epochs=1)
    with tensorboard_log(tmp_path/'log') as log: finetune(toy, PARTS, tmp_path/'run', config, 'cpu', on_epoch=log)
    assert list((tmp_path/'log').glob('events.*'))


@pytest.fixture(scope='module')
def run(demo, tmp_path_factory):
    "A run on a small corpus; the transcripts are what was spoken."
    folder = tmp_path_factory.mktemp('finetune_run')
    corpus = small_corpus(demo, folder/'corpus', 20)
    prepare_data('demo', corpus, folder/'run', folds=3)
    clips, spoken = read_table(folder/'run/clips.parquet'), {Path(v['video_file_name']).stem: v['sentences'] for v in read_truth(corpus)}
    rows = [dict(clip_id=c.clip_id, segments=[{k: s[k] for k in ('start', 'end', 'text')} for s in spoken[c.video_id]]) for c in clips.itertuples()]
    rows = [dict(r, text=' '.join(s['text'] for s in r['segments']), language='en', no_speech_prob=0., backend='truth', model='truth') for r in rows]
    rows[0] = dict(rows[0], text='', segments=[])
    write_table(pd.DataFrame(rows), folder/'run/transcripts.parquet', TRANSCRIPTS)
    config = dataclasses.replace(CONFIG, epochs=1, mode='projection')
    run_finetune(folder/'run', config, 'all,single', device='cpu')
    return folder/'run'


def test_folds_that_are_asked_for(run):
    splits = read_table(run/'splits.parquet')
    asked = {'all': ['0', '1', '2'], 'single': ['single'], '1, 2': ['1', '2'], 'all,single': ['0', '1', '2', 'single'], 0: ['0'], '2,all': ['2', '0', '1']}
    for folds, found in asked.items(): assert chosen_folds(folds, splits) == found
    for folds in ('7', 'every', '', '0-2'):
        with pytest.raises(InputError, match='expected all, single or 0, 1, 2, or several of these'): chosen_folds(folds, splits)


def test_two_processes_are_one(toy, run, tmp_path):
    "accelerate with gloo on a CPU: the same losses as one process; the stage caches, embeds and audits once."
    jobs = dict(lora=dict(epochs=1), full=dict(mode='full', epochs=1), contrastive=dict(contrastive=.5, epochs=1))
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    shutil.rmtree(copy/'finetune')
    codes, out, err = run_worker({str(tmp_path/name): changes for name, changes in jobs.items()}, processes=2, run=copy)
    assert codes == [0, 0], err[-2000:]
    assert 'process 0 of 2' in out and 'process 1 of 2' in out
    for name, changes in jobs.items():
        if name == 'contrastive': changes = dict(changes, accumulate=2)  # its negatives come from a micro-batch
        one = finetune(toy, PARTS, tmp_path/f'one-{name}', dataclasses.replace(CONFIG, **changes), 'cpu')
        two = pd.DataFrame(json.loads((tmp_path/name/'history.json').read_text())['history'])
        np.testing.assert_allclose(two[['train_loss', 'val_loss']].values, losses(one), atol=1e-4)
    assert out.count('two: 1 encoder (0 found finished), 20 clips') == 1 and '1 folds audited' in out
    assert len(read_folds(copy, 'two')) == 1 and not list((copy/'finetune').glob('.*'))


def test_summary_tells_what_was_found_finished(run, capsys):
    config = dataclasses.replace(CONFIG, epochs=1, mode='projection')
    done = run_finetune(run, config, device='cpu')
    said = capsys.readouterr().out
    assert '3 encoders (3 found finished)' in said and '3 folds audited' in said
    assert f"trained 3 epochs in {sum(d.history.seconds.sum() for d in done.values()):.0f} s" in said


def test_one_row_a_sampled_frame(run):
    clips = read_table(run/'clips.parquet').set_index('clip_id')
    for k, features in enumerate(read_folds(run, 'projection')):
        sampled = np.maximum(1, np.floor((clips.loc[features.ids].end - clips.loc[features.ids].start).values + 1e-6))
        np.testing.assert_array_equal(features.masks['image'].sum(1), sampled)
        assert features.split.shape == (1, len(clips)) and features.provenance['checkpoint']['fold'] == k
        np.testing.assert_allclose(np.linalg.norm(features.arrays['image'][features.masks['image']], axis=1), 1, atol=2e-3)
    assert (~features.masks['text'].any(1)).sum() == 1


def test_features_come_from_the_folds_own_encoder(run):
    found = read_folds(run, 'projection')
    assert len({f.provenance['weights_sha256'] for f in found}) == 3
    assert not np.allclose(found[0].arrays['image'], found[1].arrays['image'], atol=1e-3)
    frozen = load_encoder(device='cpu').weights_sha256
    assert all(f.provenance['weights_sha256'] == load_checkpoint(run/f.provenance['encoder'], 'cpu').weights_sha256 != frozen for f in found)


def test_audit_names_the_videos(run, tmp_path):
    splits = read_table(run/'splits.parquet')
    test = set(splits[(splits.fold == 0) & (splits.part == 'test')].video_id)
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    shutil.rmtree(copy/'features-projection-fold0.lance')
    shutil.copytree(copy/'features-projection-fold1.lance', copy/'features-projection-fold0.lance')
    with pytest.raises(LeakError, match='fold 0: the encoder was fine-tuned on') as e: read_folds(copy, 'projection')
    assert any(v in str(e.value) for v in test)
    shutil.rmtree(copy/'features-projection-fold0.lance')
    shutil.copytree(run/'features-projection-fold0.lance', copy/'features-projection-fold0.lance')
    shutil.rmtree(copy/'finetune/projection/fold0')
    shutil.copytree(run/'finetune/projection/fold1', copy/'finetune/projection/fold0')
    with pytest.raises(InputError, match='hashes of its files differ'): read_folds(copy, 'projection')
    seen = read_features(run/'features-projection-single.lance').provenance['checkpoint']
    with pytest.raises(LeakError): audit_checkpoint(seen, splits, 0)
    for k in (1, 2):  # the validation part of fold 0 is the test part of fold 1: seen as well, to stop early
        with pytest.raises(LeakError): audit_checkpoint(seen, splits, k)
    assert read_checkpoint(run/'finetune/projection/fold2')[1]['fold'] == 2


def test_finished_stage_is_left_alone(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.suffix != '.lock'}
    run_finetune(run, dataclasses.replace(CONFIG, epochs=1, mode='projection'), device='cpu')
    assert {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.suffix != '.lock'} == before


def test_killed_embedding_goes_on(run, tmp_path):
    "Rows that a killed run lacks are made; the others stay."
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    whole = read_features(copy/'features-projection-fold1.lance')
    from hatemm_clip.features import open_store
    open_store(copy/'features-projection-fold1.lance').table.delete(f"clip_id = '{whole.ids[4]}'")
    embed_folds(copy, 'projection', device='cpu')
    again = read_features(copy/'features-projection-fold1.lance')
    np.testing.assert_array_equal(again.ids, whole.ids)
    np.testing.assert_allclose(again.arrays['image'], whole.arrays['image'], atol=1e-3)


def test_a_clip_that_cannot_be_decoded(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    clips = read_table(copy/'clips.parquet')
    (tmp_path/'broken.mp4').write_bytes(b'no video')
    clips.loc[0, ['path', 'sha256']] = [str(tmp_path/'broken.mp4'), 'x']
    write_table(clips, copy/'clips.parquet', CLIPS)
    encoder = load_encoder(device='cpu')
    with pytest.raises(InputError, match='1 of 20 items failed'): read_clip_data(copy, encoder)
    assert read_clip_data(copy, encoder, max_failed=.1).summary()['without_frames'] == 1


def test_random_vit_takes_steps():
    "A model of the usual kind, three steps of two clips: both towers get gradients and the loss falls."
    config, data = FinetuneConfig('full', 'ViT-S-32', '', num_frames=1, batch_size=2, dropout=0., warmup=0., epochs=50, lr=1e-7, head_lr=1e-4), make_toy(4, size=224)
    session = module.open_session(module.load_base(config), data, (np.arange(2), np.arange(2)), config, 'cpu')
    found = [module.train_epoch(session, epoch) for epoch in (1, 2, 3)]
    assert session.reached == {'image', 'text'} and found[-1] < found[0]


def test_real_memes(shared, tmp_path):
    "A few steps on real images: runs, and the loss falls."
    import tarfile

    from PIL import Image

    from hatemm_clip.encoders import preprocess_frames
    encoder, images, labels = load_encoder(device='cpu'), [], []
    with tarfile.open(shared/'data/memes/sg_memes_256px.tar') as tar:
        rows = [json.loads(line) for line in tar.extractfile('labels.jsonl').read().splitlines()][:48]
        for row in rows:
            images.append(preprocess_frames(np.asarray(Image.open(tar.extractfile(row['img'])).convert('RGB'))[None], encoder.preprocess).numpy())
            labels.append(row['label'])
    ids = np.array([r['id'] for r in rows])
    data = ClipData(ids, ids, np.array(labels), np.stack(images), np.ones(48, int), [[] for _ in rows], ['0', '1'])
    done = finetune(data, np.where(np.arange(48) < 32, 'train', 'val'), tmp_path/'memes', dataclasses.replace(CONFIG, mode='full', batch_size=8), 'cpu')
    assert done.data['without_text'] == 48 and done.history.train_loss.iloc[-1] < done.history.train_loss.iloc[0]


@pytest.mark.parametrize('mode', MODES)
def test_load_encoder_takes_the_folder(toy, tmp_path, mode):
    "What 20_embed loads by path is what was fine-tuned, with the same hash."
    done = finetune(toy, PARTS, tmp_path/mode, dataclasses.replace(CONFIG, mode=mode, epochs=1), 'cpu')
    by_path, checked = load_encoder(str(done.folder), device='cpu'), load_checkpoint(done.folder, 'cpu')
    assert by_path.weights_sha256 == checked.weights_sha256 and (by_path.weights_sha256 == load_encoder(device='cpu').weights_sha256) == (mode == 'head')
    assert not changed(by_path.model.state_dict(), checked.model.state_dict())


def test_heads_train_on_each_folds_own_features(run, tmp_path):
    "The fine-tuned encoders reach the predictions, and a bundle that scores wherever it is moved."
    from hatemm_clip.fusion import crossval, run_fusion
    from hatemm_clip.scorer import Scorer
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    predictions = run_fusion(copy, 'MeanLinear', 'image+text', seeds=1, finetuned='projection', epochs=3, grid={})
    assert sorted(predictions.fold.unique()) == [0, 1, 2]
    second = crossval(read_folds(copy, 'projection')[1], 'MeanLinear', ['image'], 1, grid={}, epochs=3)
    np.testing.assert_allclose(predictions.query("fold == 1 and run == 'MeanLinear:image'").prob, second.prob)
    bundle = Path(shutil.move(copy/'bundle', tmp_path/'elsewhere'))
    shutil.rmtree(copy)
    config = json.loads((bundle/'config.json').read_text())
    config['encoder']['asr'] = dict(backend='faster-whisper', model='tiny.en')  # the run has true sentences for transcripts
    (bundle/'config.json').write_text(json.dumps(config))
    frozen, scorer = load_encoder(device='cpu').weights_sha256, Scorer(bundle, device='cpu')
    assert scorer.encoder.weights_sha256 != frozen
    video = next((run.parent/'corpus').glob('hate_videos/*.mp4'))
    row = scorer.score(video)
    assert row['error'] is None and 0 <= row['prob'] <= 1


def test_a_bundle_needs_an_encoder_of_all_videos(run, tmp_path):
    from hatemm_clip.fusion import run_fusion
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    shutil.rmtree(copy/'features-projection-single.lance')
    with pytest.raises(InputError, match="fold 'all,single'"): run_fusion(copy, 'MeanLinear', finetuned='projection', seeds=1)
    assert not (copy/'predictions.parquet').exists()
