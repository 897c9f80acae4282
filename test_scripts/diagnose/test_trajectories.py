"""Inner-loop trajectories: the same however a recording is cut, and what is made of them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from conftest import make_codes, make_tiny_lm
from finetune.args import TTTArgs
from finetune.monitoring.trajectories import StreamTrajectories, summarise
from finetune.monitoring.ttt_metrics import InnerLoopRecorder
from finetune.ttt_integration import apply_ttt_to_model
from moshi_ttt.carry import empty_carry, stack_carries
from moshi_ttt.hybrid_model import set_ttt_mode, ttt_layers
from moshi_ttt.inner_loop import InnerLoop
from moshi_ttt.ops import inner_losses, ttt_mlp_with_states
from ttt_inputs import assert_close, make_inputs

C = 4


ARGS = TTTArgs(enable=True, layers="1,3", mini_batch_size=C, initial_gating_alpha=0.5, base_lr=5.0)


def patched(args=ARGS, **overrides):
    lm = make_tiny_lm(**overrides).eval()
    apply_ttt_to_model(lm, args)
    return lm


@pytest.fixture
def lm():
    return patched()


@torch.no_grad()
def one_pass(lm, codes):
    """Losses of one row in one pass outside streaming, by layer, `[3, T]`."""
    recorder = InnerLoopRecorder(lm)
    with recorder.recording():
        lm.forward_text(codes)
    return recorder.trajectories()


@torch.no_grad()
def streamed(lm, codes, size):
    trajectories = StreamTrajectories(lm)
    with lm.streaming(len(codes)), trajectories.recording():
        for part in codes.split(size, 2):
            lm.forward_text(part)
    return trajectories


def assert_same(actual, expected, *, starts=(0,)):
    """Equal losses, and none where a recording starts: its first frame has no earlier key to learn."""
    assert actual.keys() == expected.keys() and actual
    for index, losses in expected.items():
        silent = losses.isnan().all(0)
        assert silent.nonzero().flatten().tolist() == list(starts)
        assert actual[index][:, silent].isnan().all()
        assert_close(actual[index][:, ~silent], losses[:, ~silent], 1e-9)


# The recorder.


@pytest.mark.parametrize("size", [1, C - 1, C, C + 1, 3 * C + 2, 50])
@pytest.mark.parametrize(
    "settings",
    [{}, {"state_decay": 0.2, "use_rope": True}, {"ttt_mlp_layers": 3, "inner_grad_clip": 0.5}],
    ids=str,
)
def test_chunks_of_any_size_give_the_losses_of_one_pass(size, settings):
    lm = patched(TTTArgs(enable=True, layers="1,3", mini_batch_size=C, base_lr=5.0, **settings))
    codes = make_codes(lm, 2, 23)
    trajectories = streamed(lm, codes, size)
    for row in range(2):
        assert_same(trajectories.losses(row), one_pass(lm, codes[row : row + 1]))


@pytest.mark.parametrize("size", [C - 1, 2 * C, 9])
def test_streaming_gives_the_losses_of_carried_training_chunks(size):
    # Attention starts anew in each training chunk: without its output both see the same frames.
    lm = patched(
        TTTArgs(enable=True, layers="0", mini_batch_size=C, base_lr=5.0), positional_embedding="rope"
    )
    lm.transformer.layers[0].self_attn.out_projs[0].weight.data.zero_()
    codes = make_codes(lm, 1, 30)
    layer = ttt_layers(lm)[0]
    carries, parts = [empty_carry(layer.config, batch_size=1, dtype=torch.float64)], []
    for part in codes.split(size, 2):
        with layer.passing(carry=carries[-1], keep_carry=carries.append):
            parts.append(one_pass(lm, part)[0])
    carried = torch.cat(parts, 1)
    assert_same(streamed(lm, codes, 7).losses(), {0: carried})
    assert (carried[0, size:] > carried[1, size:]).double().mean() > 0.5  # W0 is not where the chunk starts


def test_padding_of_a_carried_chunk_has_no_losses_and_its_frames_are_those_of_the_recording():
    # Rows at different places of their mini-batch; only frames that are padding in both are left out.
    lm = patched(
        TTTArgs(enable=True, layers="0", mini_batch_size=C, base_lr=5.0), positional_embedding="rope"
    )
    lm.transformer.layers[0].self_attn.out_projs[0].weight.data.zero_()
    codes, layer = make_codes(lm, 2, 16), ttt_layers(lm)[0]
    codes[0, :, 13:] = codes[1, :, 11:] = lm.zero_token_id
    carries = []
    for row, num_heard in enumerate((6, 3)):
        start = empty_carry(layer.config, batch_size=1, dtype=torch.float64)
        with layer.passing(carry=start, keep_carry=carries.append):
            one_pass(lm, codes[row : row + 1, :, :num_heard])
    with layer.passing(carry=stack_carries(carries)):
        losses = one_pass(lm, torch.stack([codes[0, :, 6:16], codes[1, :, 3:13]]))[0]
    alone = [one_pass(lm, codes[row : row + 1])[0] for row in range(2)]
    assert_close(losses[:, :7], (alone[0][:, 6:13] + alone[1][:, 3:10]) / 2, 1e-9)
    assert_close(losses[:, 7], alone[1][:, 10], 1e-9)
    assert losses[:, 8:].isnan().all()


def test_losses_may_start_anywhere_in_a_mini_batch():
    inputs = make_inputs(num_tokens=14, requires_grad=False)
    whole = torch.stack(inner_losses(*inputs[1:], mini_batch_size=C))
    for cut in (1, 3, 4, 5, 10):
        _, state = ttt_mlp_with_states(*inputs.cut(0, cut), mini_batch_size=C)
        rest = inner_losses(*inputs.cut(cut, 14)[1:], mini_batch_size=C, start=state)
        assert_close(torch.stack(rest), whole[..., cut:], 1e-12)


def test_rows_may_stand_at_different_places(lm):
    codes = make_codes(lm, 2, 12)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(2), trajectories.recording():
        lm.set_exec_mask(torch.tensor([True, False]))
        for t in range(3):
            lm.forward_text(codes[:, :, t : t + 1])  # row 1 does not hear these
        lm.set_exec_mask(torch.tensor([True, True]))
        lm.forward_text(torch.stack([codes[0, :, 3:], codes[1, :, :9]]))
    assert_same(trajectories.losses(0), one_pass(lm, codes[:1]))
    assert_same(trajectories.losses(1), one_pass(lm, codes[1:, :, :9]))


def test_a_row_that_is_reset_starts_a_new_recording(lm):
    codes = make_codes(lm, 1, 16)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(1), trajectories.recording():
        lm.forward_text(codes[:, :, :6])
        lm.reset_streaming()
        lm.forward_text(codes[:, :, 6:])
    first, second = one_pass(lm, codes[:, :, :6]), one_pass(lm, codes[:, :, 6:])
    both = {index: torch.cat([first[index], second[index]], 1) for index in first}
    assert_same(trajectories.losses(), both, starts=(0, 6))


def test_memory_that_is_no_longer_finite_is_seen_and_only_where_it_was(lm):
    codes = make_codes(lm, 2, 20)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(2), trajectories.recording():
        lm.forward_text(codes[:, :, :6])
        ttt_layers(lm)[1]._streaming_state.buffers.start_weights[0][1, 0, 0, 1] = torch.nan
        lm.forward_text(codes[:, :, 6:])
    broken = trajectories.losses(1)[1]
    assert broken[1:, 6 : 6 + C].isnan().all() and broken[:, 6 + C :].isfinite().all()
    assert broken[0, 1:].isfinite().all()  # W0 is not what broke
    assert broken[0, 6 + C] == broken[1, 6 + C]  # learns from W0 again
    assert trajectories.losses(0)[1][:, 1:].isfinite().all()


def test_padding_has_no_losses(lm):
    codes = make_codes(lm, 1, 15)
    codes[:, :, 7:10] = lm.zero_token_id
    trajectories = streamed(lm, codes, 6)
    losses = trajectories.losses()[3]
    silent = losses.isnan()
    assert torch.equal(silent.all(0), silent.any(0)) and silent[0].nonzero().flatten().tolist() == [
        0,
        7,
        8,
        9,
    ]
    assert summarise(losses).num_excluded == 4


@pytest.mark.parametrize("key_shift", [0, 1, 3])
def test_frames_without_an_earlier_key_have_no_losses(key_shift):
    lm = patched(replace(ARGS, key_shift=key_shift))
    codes = make_codes(lm, 1, 9)
    for losses in (streamed(lm, codes, 2).losses()[1], one_pass(lm, codes)[1]):
        assert losses[:, :key_shift].isnan().all() and losses[:, key_shift:].isfinite().all()
        assert losses[0, key_shift] == losses[1, key_shift]  # nothing was learned before
        assert losses[0, key_shift + 1] != losses[1, key_shift + 1]


def test_nothing_is_computed_when_nothing_records(lm, monkeypatch):
    codes = make_codes(lm, 1, 10)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(1):
        silent, _ = lm.forward_text(codes)
        lm.reset_streaming()
        with trajectories.recording():
            recorded, _ = lm.forward_text(codes)
        assert torch.equal(recorded, silent)
        lm.reset_streaming()

        def fail(*_, **__):
            raise AssertionError("inner losses were computed")

        monkeypatch.setattr(InnerLoop, "losses", fail)
        lm.forward_text(codes)
        with pytest.raises(AssertionError, match="were computed"), trajectories.recording():
            lm.forward_text(codes)
        lm.forward_text(codes)
    assert trajectories.losses()[1].shape == (3, 10)


def test_recordings_follow_one_another_in_a_recorder(lm):
    codes = make_codes(lm, 1, 400)  # longer than the first buffers
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(1):
        for part in codes.split(37, 2):
            with trajectories.recording():
                lm.forward_text(part)
    assert_same(trajectories.losses(), one_pass(lm, codes))


@pytest.mark.parametrize("size", [1, C - 1, C, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_fast_weights_gain_nothing_not_even_by_rounding(size, dtype):
    lm = patched(dtype=dtype)
    set_ttt_mode(lm, "frozen")
    for losses in (
        streamed(lm, make_codes(lm, 2, 23), size).losses(1)[1],
        one_pass(lm, make_codes(lm, 1, 23))[1],
    ):
        at_w0, before, after = losses[:, 1:]
        assert losses[:, 0].isnan().all() and at_w0.isfinite().all()
        assert torch.equal(before, at_w0) and torch.equal(after, at_w0)


def test_closed_gates_hear_nothing(lm):
    codes = make_codes(lm, 1, 10)
    set_ttt_mode(lm, "off")
    assert streamed(lm, codes, 4).losses()[1].shape == (3, 0)


def test_each_step_helps_when_it_is_small(lm):
    summary = summarise(streamed(lm, make_codes(lm, 1, 200), 50).losses()[1])
    assert summary.share_ordered > 0.9 and summary.gain_over_w0 > 5 * summary.gain_per_step > 0


# Summaries.


def test_a_summary_counts_strictly_and_leaves_out_what_is_not_finite():
    nan, inf = math.nan, math.inf
    losses = torch.tensor([[4.0, 4, 4, 4, nan, 4], [4, 3, 3, 5, 3, 3], [3, 2, 3, 4, 2, inf]])
    summary = summarise(losses)
    assert (summary.num_frames, summary.num_excluded) == (4, 2)
    assert summary.share_ordered == 0.25  # the second; the first has before == W0, the third after == before
    assert summary.share_below_w0 == 0.5 and summary.share_step_helps == 0.75
    assert (summary.loss_w0, summary.loss_before, summary.loss_after) == (4, 3.75, 3)
    assert (summary.gain_over_w0, summary.gain_per_step) == (0.25, 0.75)


def test_trends_are_per_1000_frames_and_know_the_frames_left_out():
    frames = torch.arange(5000.0)
    losses = torch.stack([50 + 0 * frames, 40 - 0.002 * frames, 30 - 0.002 * frames])
    losses[:, 1000:2000] = math.nan
    summary = summarise(losses)
    assert summary.trend_before == pytest.approx(-2, rel=1e-4)
    assert summary.trend_gain == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_where_there_is_nothing_to_say_a_summary_has_null(num_frames):
    losses = torch.full((3, num_frames), math.nan)
    if num_frames == 1:
        losses = torch.tensor([[3.0], [2], [1]])
    values = summarise(losses).to_json()
    assert values["trend_before"] is None
    assert values["share_ordered"] == (1.0 if num_frames == 1 else None)
    json.dumps(values, allow_nan=False)
