"Names of other packages that this one uses although they are not promised: each must still be there, or the message says what to mend."
import configparser
import inspect

import pytest
from conftest import ROOT


def need(there, name, where, version):
    "Fail with what to do where an upstream name is gone."
    assert there, f'{name} is gone from this version ({version}): mend nbs/{where}.ipynb, or lower the upper bound in settings.ini'


def has(thing, *names): return all(hasattr(thing, n) for n in names)


def takes(function, *names): return set(names) <= set(inspect.signature(function).parameters)


def test_open_clip_registry_takes_a_model():
    "15_tiny_clip enters a model, its tokenizer and its weights."
    import open_clip
    from open_clip import factory, pretrained
    where = '15_tiny_clip', open_clip.__version__
    need(has(factory, '_MODEL_CONFIGS') and isinstance(factory._MODEL_CONFIGS, dict), 'open_clip.factory._MODEL_CONFIGS', *where)
    need('text_cfg' in factory._MODEL_CONFIGS['ViT-B-32'], "text_cfg in open_clip's _MODEL_CONFIGS", *where)
    need(has(pretrained, '_PRETRAINED') and isinstance(pretrained._PRETRAINED, dict), 'open_clip.pretrained._PRETRAINED', *where)
    from hatemm_clip.tiny_clip import NAME, TAG, register_tiny
    register_tiny()
    need(TAG in open_clip.list_pretrained_tags_by_model(NAME), 'the effect of an entry in _PRETRAINED', *where)
    sizes = len(open_clip.get_tokenizer(NAME).encoder), len(open_clip.get_tokenizer('ViT-B-32').encoder)
    need(sizes[0] < sizes[1], 'the effect of tokenizer_kwargs in _MODEL_CONFIGS', *where)


def test_whisper_names_its_checkpoints():
    "08_speech reads the address of a checkpoint, whose last folder but one is its sha256."
    whisper = pytest.importorskip('whisper')
    where = '08_speech', whisper.__version__
    need(has(whisper, '_MODELS', '_download'), 'whisper._MODELS or whisper._download', *where)
    address = whisper._MODELS.get('tiny.en', '/')
    need(len(address.split('/')[-2]) == 64 and address.endswith('/tiny.en.pt'), 'the sha256 in whisper._MODELS', *where)
    need(takes(whisper._download, 'url', 'root', 'in_memory'), 'a parameter of whisper._download', *where)


def test_accelerate_takes_a_model_without_its_optimizer():
    "28_training wraps the model alone, moves it itself and reduces the loss itself."
    import accelerate
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, gather_object
    where = '28_training', accelerate.__version__
    need(takes(Accelerator.prepare_model, 'device_placement'), 'device_placement of Accelerator.prepare_model', *where)
    need(takes(Accelerator.__init__, 'kwargs_handlers', 'mixed_precision'), 'kwargs_handlers of Accelerator', *where)
    need(takes(DistributedDataParallelKwargs, 'find_unused_parameters'), 'DistributedDataParallelKwargs', *where)
    need(has(Accelerator, 'no_sync', 'reduce', 'wait_for_everyone'), 'a method of Accelerator', *where)
    need(has(PartialState, 'main_process_first') and callable(gather_object), 'PartialState.main_process_first', *where)


def test_packed_attention_is_known_by_public_names():
    "26_tuning tells by three widths what torch keeps in a private flag: one matrix for query, key and value."
    import torch
    for kdim in (None, 4):
        layer = torch.nn.MultiheadAttention(8, 2, kdim=kdim)
        packed = layer.embed_dim == layer.kdim == layer.vdim
        need(packed == (layer.in_proj_weight is not None), 'the meaning of kdim and vdim', '26_tuning', torch.__version__)


def test_peft_adds_to_a_packed_attention_and_takes_it_away():
    "26_tuning puts W back in place after every pass: it must find peft's layer, and in it torch's."
    import peft
    import torch
    from peft.tuners.lora import layer
    where = '26_tuning', peft.__version__
    need(has(layer, 'MultiheadAttention'), 'peft.tuners.lora.layer.MultiheadAttention', *where)
    net = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules='0')).base_model.model[0]
    need(isinstance(adapted, layer.MultiheadAttention), "peft's layer for torch.nn.MultiheadAttention", *where)
    attention = adapted.get_base_layer()
    need(has(attention, 'in_proj_weight') and has(attention.out_proj, 'get_base_layer'), "peft's way into the attention", *where)


@pytest.mark.parametrize('package', ['open_clip_torch', 'openai-whisper', 'accelerate', 'peft'])
def test_upper_bound(package):
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini')
    line = next(r for r in settings['DEFAULT']['requirements'].split('\n') if r.startswith(f'{package}>'))
    assert '<' in line, f'settings.ini: {package} needs an upper bound, because private names of it are used'
