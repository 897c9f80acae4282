"""Streaming through the whole patched model equals one pass, for text and audio logits, in every dtype."""

import pytest
import torch
from moshi.models.lm import LMGen, _delay_sequence

from conftest import make_codes, make_tiny_lm
from finetune.args import TTTArgs
from finetune.base_model.streams import make_trainable
from finetune.ttt_integration import apply_ttt_to_model
from ttt_inputs import assert_close

C = 4
WINDOW = 10
MOSHI = {"norm": "rms_norm_f32", "positional_embedding": "rope"}


def make_model(*, dtype=torch.float64, with_ttt=True, **overrides):
    lm = make_tiny_lm(dtype=dtype, context=WINDOW, **overrides).eval()
    if with_ttt:
        args = TTTArgs(
            enable=True,
            layers="1,3",
            mini_batch_size=C,
            initial_gating_alpha=0.5,
            base_lr=5.0,
            non_ttt_layer_context=7,
        )
        apply_ttt_to_model(lm, args)
    return lm


@torch.no_grad()
def one_pass(lm, codes):
    """Text logits [B, S, card] and audio logits [B, K, S, card] of delayed steps, in one pass."""
    inputs, targets = _inputs_and_targets(lm, codes)
    hidden, text_logits = lm.forward_text(inputs)
    return text_logits[:, 0], lm.forward_depformer_training(targets, hidden)


@torch.no_grad()
def streamed(lm, codes, sizes=1):
    """The same, streamed in parts, the depth transformer codebook by codebook."""
    inputs, targets = _inputs_and_targets(lm, codes)
    text, audio = [], []
    with lm.streaming(len(codes)):
        for part in inputs.split(sizes, 2):
            hidden, text_logits = lm.forward_text(part)
            text.append(text_logits[:, 0])
            for frame in hidden.split(1, 1):
                audio.append(depth_step(lm, frame, targets[:, :, len(audio)]))
    return torch.cat(text, 1), torch.stack(audio, 2)


def depth_step(lm, hidden, target):
    """Audio logits [B, K, card] of one frame, given its true tokens."""
    if lm.depformer is None:
        return hidden.new_empty(len(hidden), 0, lm.card)
    with lm.depformer.streaming(len(hidden)):
        steps = [
            lm.forward_depformer(cb, target[:, cb, None, None], hidden)[:, 0, 0] for cb in range(lm.dep_q)
        ]
    return torch.stack(steps, 1)


# What the other members of the family have otherwise than Moshi.
FAMILY = {
    "both voices predicted": {"dep_q": 16, "depformer_context": 16},
    "grouped-query attention": {"kv_repeat": 2, "delays": [0, *[0, *[2] * 7] * 2]},
    "speech to text": {"n_q": 8, "dep_q": 0, "delays": [0] * 9, "extra_heads_num_heads": 2},
}


def _inputs_and_targets(lm, codes):
    initial = lm._get_initial_token().expand(len(codes), -1, -1)
    delayed = torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], 2)
    return delayed[:, :, :-1], delayed[:, :, 1:]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_single_frames_equal_one_pass_in_float64(batch_size):
    lm = make_model()
    codes = make_codes(lm, batch_size, 41)
    for actual, expected in zip(streamed(lm, codes), one_pass(lm, codes), strict=True):
        assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("kind", FAMILY)
def test_single_frames_equal_one_pass_in_every_kind_of_model(kind):
    lm = make_trainable(make_model(**FAMILY[kind]))
    codes = make_codes(lm, 2, 33)
    for actual, expected in zip(streamed(lm, codes), one_pass(lm, codes), strict=True):
        assert actual.shape == expected.shape
        if actual.numel():  # speech to text has no audio logits
            assert_close(actual, expected, 1e-9)


def test_single_frames_equal_one_pass_in_float32():
    lm = make_model(dtype=torch.float32, **MOSHI)
    codes = make_codes(lm, 2, 41)
    for actual, expected in zip(streamed(lm, codes), one_pass(lm, codes), strict=True):
        assert_close(actual, expected, 1e-4)


def test_in_bfloat16_the_tokens_agree_as_often_as_those_of_stock_moshi():
    agreement = {}
    for with_ttt in (False, True):
        lm = make_model(dtype=torch.bfloat16, with_ttt=with_ttt, **MOSHI)
        codes = make_codes(lm, 4, 100)
        pairs = zip(streamed(lm, codes), one_pass(lm, codes), strict=True)
        same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
        agreement[with_ttt] = same.double().mean().item()
    assert agreement[False] > 0.9
    assert agreement[True] >= agreement[False] - 0.02, agreement


@pytest.mark.parametrize("first", range(1, 2 * C + 1))
def test_chunks_split_anywhere_equal_one_pass_beyond_the_window(first):
    lm = make_model()
    codes = make_codes(lm, 2, 60)
    sizes = [first, 1, 1, 23, 1, first, 2 * C + 1]
    sizes.append(60 - sum(sizes))
    for actual, expected in zip(streamed(lm, codes, sizes), one_pass(lm, codes), strict=True):
        assert_close(actual, expected, 1e-9)


@torch.no_grad()
def test_chunks_with_rows_out_of_step_equal_one_pass():
    lm = make_model()
    codes = make_codes(lm, 3, 64)
    whole, _ = lm.forward_text(codes)
    outputs = [[], [], []]
    heard = [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    with lm.streaming(3):
        while max(heard) < 40:
            size = int(torch.randint(1, 13, (1,), generator=generator))
            mask = torch.rand(3, generator=generator) < 0.6
            lm.set_exec_mask(mask)
            part = torch.stack([codes[b, :, heard[b] : heard[b] + size] for b in range(3)])
            hidden, _ = lm.forward_text(part)
            for b in mask.nonzero().flatten().tolist():
                outputs[b].append(hidden[b])
                heard[b] += size
    assert len(set(heard)) == 3
    for b in range(3):
        assert_close(torch.cat(outputs[b]), whole[b, : heard[b]], 1e-9)


@torch.no_grad()
def test_a_row_that_does_not_execute_is_left_exactly_as_it_was():
    lm = make_model()
    with lm.streaming(2):
        lm.forward_text(make_codes(lm, 2, 13))
        lm.set_exec_mask(torch.tensor([True, False]))
        before = _row_tensors(lm, 1)
        for size in (1, 3, 17):
            lm.forward_text(make_codes(lm, 2, size, seed=size))
        after = _row_tensors(lm, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _row_tensors(lm, row):
    tensors = []
    for index in (1, 3):
        state = lm.transformer.layers[index].ttt._streaming_state
        tensors += [part[row].clone() for parts in state.buffers for part in parts]
        tensors += [state.offsets[row].clone(), state.num_tokens[row].clone()]
    return tensors


@pytest.mark.parametrize("at", [1, 3, 4, 6, 15])
@torch.no_grad()
def test_a_reset_in_the_middle_of_a_mini_batch_starts_a_row_anew(at):
    lm = make_model()
    codes, more = make_codes(lm, 2, at), make_codes(lm, 2, 25, seed=1)
    with lm.streaming(2):
        for part in codes.split(1, 2):
            lm.forward_text(part)
        lm.reset_streaming(torch.tensor([False, True]))
        mixed = torch.cat([lm.forward_text(part)[0] for part in more.split([1, 1, 20, 3], 2)], 1)
    whole, _ = lm.forward_text(torch.cat([codes, more], 2))
    fresh, _ = lm.forward_text(more)
    assert_close(mixed[0], whole[0, at:], 1e-9)
    assert_close(mixed[1], fresh[1], 1e-9)


def _generate(lm, user, masks=None, **settings):
    """Tokens of each row [B, K, T] for user codes [B, K', T], each row at its own pace."""
    generator = LMGen(lm, use_sampling=False, support_out_of_sync=True, **settings)
    batch_size, _, num_frames = user.shape
    heard = torch.zeros(batch_size, dtype=torch.long)
    rows = [[] for _ in range(batch_size)]
    with generator.streaming(batch_size):
        masks = masks if masks is not None else torch.ones(num_frames, batch_size, dtype=torch.bool)
        for mask in masks:
            generator.set_exec_mask(mask)
            tokens = generator.step(user[torch.arange(batch_size), :, heard % num_frames, None])
            for b in mask.nonzero().flatten().tolist():
                rows[b].append(tokens[b, :, 0])
            heard += mask
    return [torch.stack(row, 1) for row in rows]


def test_lmgen_rows_out_of_step_generate_what_each_would_alone():
    lm = make_model()
    user = make_codes(lm, 2, 24)[:, 1 + lm.dep_q :]
    masks = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    mixed = _generate(lm, user, masks)
    assert not torch.equal(masks[:, 0], masks[:, 1])
    for b in range(2):
        alone = _generate(lm, user[b : b + 1])[0]
        assert torch.equal(mixed[b], alone[:, : mixed[b].shape[1]])


def test_lmgen_with_guidance_doubles_the_rows_and_keeps_them_apart():
    lm = make_model()
    user = make_codes(lm, 2, 24)[:, 1 + lm.dep_q :]
    together = _generate(lm, user, cfg_coef=3.0, cfg_is_masked_until=[5, 5])
    for b in range(2):
        alone = _generate(lm, user[b : b + 1], cfg_coef=3.0, cfg_is_masked_until=[5])[0]
        assert torch.equal(together[b], alone)
    assert not torch.equal(together[0], _generate(lm, user)[0])
