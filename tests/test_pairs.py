"Emotion beside a text tower, and training on pairs of texts and videos."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from hatemm_clip.base import InputError
from hatemm_clip.emotion import EMOTIONS
from hatemm_clip.emotion_embedding import emotion_agreement, emotion_mask, EmotionText, fit_emotions, GatedResidual, rerank
from hatemm_clip.encoders import load_encoder
from hatemm_clip.features import deal_folds
from hatemm_clip.moods import encode_clips, make_moods
from hatemm_clip.pairing import make_pairs, pair_vectors, PairConfig, PairModel, plan_batches, POOLS, train_pairs, VideoPool
from hatemm_clip.ranking import mean_ranks, rank_items
from hatemm_clip.rivals import choose_weight, compare_rivals, crossval_pairs, fold_blocks, neutral_verdict, OUTSIDE, query_groups, rerank_folds
from hatemm_clip.tiny_clip import NAME, register_tiny
from hatemm_clip.tuning import FinetuneConfig

TEXTS = ['a furious crowd', 'two of the carrots', 'a glad and frightened cook under a heart']
FAST = FinetuneConfig(mode='full', batch_size=10, epochs=2, lr=1e-3, head_lr=5e-3)


@pytest.fixture(scope='module')
def base(): return load_encoder('hatemm-tiny', 'demo', 'cpu')


@pytest.fixture(scope='module')
def world(base):
    clips, captions = make_moods(base, 5)
    pairs = make_pairs(encode_clips(clips, base), captions)
    return pairs, deal_folds(clips.labels, np.array([name[:4] for name in pairs.ids]), 5, 0), clips, captions


@pytest.fixture(scope='module')
def crossed(world): return crossval_pairs(*world[:2], PairConfig('embedding', tuning=FAST))


@pytest.mark.parametrize('custom', [False, True])
def test_an_embedding_of_zeros_is_the_plain_tower(custom):
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model(register_tiny(), load_weights=False, force_custom_text=custom).eval()
    tokens, present = open_clip.get_tokenizer(NAME)(TEXTS), torch.from_numpy(emotion_mask(TEXTS))
    with torch.inference_mode():
        plain = model.encode_text(tokens, normalize=True)
        assert torch.equal(EmotionText(model)(tokens, present), plain)
        moved = EmotionText(model, 1.)(tokens, present)
        assert torch.equal(moved[1], plain[1]) and not torch.allclose(moved[0], plain[0], atol=1e-3)
        assert torch.equal(model.encode_text(tokens, normalize=True), plain)


def test_an_embedding_is_that_of_the_course_project(base):
    "The project's own lines, and open_clip's tower around them."
    model, tokens, present = base.model, base.tokenizer(TEXTS), torch.from_numpy(emotion_mask(TEXTS))
    torch.manual_seed(1)
    felt = EmotionText(model, .5)
    with torch.inference_mode():
        mask = present.long().unsqueeze(-1).float()
        mean = (felt.emotions.weight.unsqueeze(0).repeat(len(TEXTS), 1, 1)*mask).sum(1)/(mask.sum(1) + 1e-8)
        x = model.token_embedding(tokens) + model.positional_embedding + mean.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))[torch.arange(len(TEXTS)), tokens.argmax(1)]
        assert torch.allclose(felt(tokens, present), F.normalize(x @ model.text_projection, dim=1), atol=1e-5)


def test_a_failed_encoding_leaves_no_hook(base):
    felt = EmotionText(base.model, 1.)
    with pytest.raises(IndexError): felt(torch.full((1, 32), 10**6), torch.ones(1, 8, dtype=torch.bool))
    assert not base.model.token_embedding._forward_hooks


def test_a_gate_never_moves_what_has_no_emotion():
    torch.manual_seed(0)
    gate, text = GatedResidual(16), F.normalize(torch.randn(4, 16), dim=1)
    torch.nn.init.normal_(gate.emotions.weight)
    present = torch.zeros(4, 8, dtype=torch.bool)
    present[0, EMOTIONS.index('fear')] = True
    moved = gate(text, present)
    assert torch.equal(moved[1:], text[1:]) and not torch.allclose(moved[0], text[0], atol=1e-3)


@pytest.mark.parametrize('kind', POOLS)
def test_pooling_does_not_see_what_is_absent(kind):
    torch.manual_seed(0)
    pool = VideoPool(8, kind).eval()
    for p in pool.parameters(): torch.nn.init.normal_(p, std=.5)
    frames, mask = torch.randn(2, 4, 8), torch.tensor([[True]*4, [True, True, False, False]])
    assert torch.allclose(pool(frames, mask)[1:], pool(frames[1:, :2], mask[1:, :2]), atol=1e-5)


@pytest.mark.parametrize('seed', range(20))
def test_batches_hold_every_video_once(seed):
    rng = np.random.default_rng(seed)
    n, size, hard = int(rng.integers(2, 60)), int(rng.integers(2, 12)), float(rng.choice([0, .3, .9]))
    rows = rng.permutation(100)[:n]
    batches = plan_batches(rows, size, rng, rng.normal(size=(100, 4)), hard)
    assert sorted(np.concatenate(batches)) == sorted(rows) and min(map(len, batches)) > 1


def test_training_reads_captions_for_training_alone(world):
    pairs, split, *_ = world
    changed = [t if use == 'train' or part == 'val' else 'nothing at all'
               for t, use, part in zip(pairs.captions, pairs.uses, split[0][pairs.videos])]
    first, second = (train_pairs(replace(pairs, captions=c), split[0], PairConfig('gate', hard=.5, tuning=FAST)) for c in (pairs.captions, changed))
    assert first.history.equals(second.history) and np.isfinite(first.history.loss[1:]).all()


def test_untrained_counts_too_where_training_harms(world):
    pairs, split, *_ = world
    done = train_pairs(pairs, split[0], PairConfig(tuning=replace(FAST, lr=3., epochs=1)))
    assert done.epoch == int(done.history.val_mrr.idxmax())
    texts, shown = pair_vectors(done.model, pairs, done.tokens, np.arange(3), np.arange(3))
    assert np.isfinite(texts).all() and np.isfinite(shown).all()


def test_both_towers_train_from_pictures(world, base):
    _, split, clips, captions = world
    config = PairConfig('embedding', pool='temporal', tuning=replace(FAST, mode='lora', epochs=1, lr=0.))
    done = train_pairs(make_pairs(clips, captions), split[0], config)
    changed = {name for name, p in done.model.named_parameters() if p.requires_grad}
    assert {'felt.emotions.weight', 'pool.score.weight'} <= changed and any('visual' in n for n in changed)


def test_each_fold_is_asked_alone(world, crossed):
    pairs, split, *_ = world
    whole = mean_ranks(rank_items(crossed.test, pairs.videos))
    for _, asked, videos in fold_blocks(pairs, split):
        alone = mean_ranks(rank_items(crossed.test[np.ix_(asked, videos)], np.searchsorted(videos, pairs.videos[asked])))
        assert np.array_equal(whole[asked], alone)
        assert (crossed.test[np.ix_(asked, np.setdiff1d(np.arange(len(pairs.ids)), videos))] == OUTSIDE).all()


def test_reranking_leaves_queries_without_emotion_alone(world, crossed):
    pairs, split, *_ = world
    scores, weights = rerank_folds(pairs, split, crossed)
    quiet = ~pairs.emotions.any(1)
    assert quiet.any() and np.array_equal(scores[quiet], crossed.test[quiet]) and len(weights) == 5


def test_neutral_queries_veto_a_weight():
    agreement = np.array([[0., 1.], [0., 1.]])
    scores, neutral = np.array([[.5, .4], [.5, .4]]), np.array([False, True])
    assert choose_weight(scores, agreement, np.array([1, 0]), neutral) < .2
    assert choose_weight(scores, agreement, np.array([1, 1]), neutral) >= .2


def test_words_for_choices_ask_nothing(world, crossed):
    pairs = world[0]
    groups = query_groups(pairs)
    assert 'trial' not in groups and groups['all'].sum() == (pairs.uses != 'val').sum()
    compared = compare_rivals(pairs, crossed.test, crossed.test, n=50)
    assert set(neutral_verdict(compared).values()) == {'holds'} and 'mean_rank' in compared.index.unique(2)


@pytest.mark.parametrize('change, message', [
    (lambda t: t.drop(columns='video_id'), 'no column video_id'), (lambda t: t[:0], 'is empty'), (lambda t: t.assign(caption=''), 'is empty'),
    (lambda t: t.assign(video_id='x'), 'x is not among')])
def test_captions_that_cannot_be_used(world, change, message):
    with pytest.raises(InputError, match=message): make_pairs(world[2], change(world[3]))


def test_videos_without_a_frame_and_twice(world, base):
    _, _, clips, captions = world
    bare = replace(clips, counts=np.where(np.arange(len(clips)) == 3, 0, clips.counts))
    with pytest.raises(InputError, match='s000-3 has no frame'): make_pairs(bare, captions)
    with pytest.raises(InputError, match='one clip a video'): make_pairs(replace(clips, videos=np.array(['s000-0']*len(clips))), captions)


@pytest.mark.parametrize('settings, message', [
    (dict(way='both'), "way is 'both'"), (dict(way='gate', std=.1), 'no embedding to start'), (dict(hard=-.1), 'hard is -0.1'),
    (dict(tuning=replace(FAST, batch_size=1)), 'batch_size is 1')])
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(InputError, match=message): PairConfig(**settings)


def test_bad_numbers(base):
    with pytest.raises(InputError, match='pool is'): PairModel(base, PairConfig(pool='median'))
    with pytest.raises(InputError, match='negative numbers or gaps'): emotion_agreement(np.full((1, 8), np.nan), np.ones((1, 8)))
    with pytest.raises(InputError, match='weight is nan'): rerank(np.ones((1, 1)), np.ones((1, 1)), np.nan)
    with pytest.raises(InputError, match='2 or more'): fit_emotions(np.ones((1, 4)), np.ones((1, 8)))


def test_kinds_follow_the_flag_where_none_are_given(world):
    table = pd.DataFrame(dict(video_id=['s000-0', 's000-1'], caption=['a man on a bench', 'a very happy and wonderful party']))
    assert make_pairs(world[2], table).kinds.tolist() == ['neutral', 'emotional']
