"""Moshi's streaming with TTT layers: equal to one pass, per-row masks, start-stop-start, LMGen."""

import pytest
import torch
from moshi.models.lm import LMGen

from conftest import make_codes, make_tiny_lm
from finetune.args import TTTArgs
from finetune.ttt_integration import apply_ttt_to_model
from moshi_ttt.hybrid_model import non_finite_resets, set_ttt_mode
from ttt_inputs import assert_close

ARGS = TTTArgs(enable=True, layers="1,3", mini_batch_size=4, initial_gating_alpha=0.5, base_lr=5.0)


@pytest.fixture
def lm():
    lm = make_tiny_lm().eval()
    apply_ttt_to_model(lm, ARGS)
    return lm


@torch.no_grad()
def stream(lm, codes, sizes=None):
    parts = codes.split(sizes or 1, 2)
    return torch.cat([lm.forward_text(part)[0] for part in parts], 1)


@pytest.mark.parametrize("sizes", [None, [5, 1, 7, 10]], ids=["single frames", "chunks"])
def test_streaming_equals_one_pass(lm, sizes):
    codes = make_codes(lm, 2, 23)
    with torch.no_grad():
        whole, _ = lm.forward_text(codes)
    with lm.streaming(2):
        assert_close(stream(lm, codes, sizes), whole, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rope": True},
        {"key_shift": 0},
        {"key_shift": 2},
        {"state_decay": 0.3, "inner_grad_clip": 0.5},
        {"ttt_mlp_layers": 1},
        {"ttt_mlp_layers": 3},
    ],
    ids=str,
)
def test_streaming_equals_one_pass_for_every_setting(settings):
    lm = make_tiny_lm().eval()
    apply_ttt_to_model(
        lm, TTTArgs(enable=True, layers="1", mini_batch_size=4, initial_gating_alpha=0.5, **settings)
    )
    codes = make_codes(lm, 2, 23)
    with torch.no_grad():
        whole, _ = lm.forward_text(codes)
    with lm.streaming(2):
        assert_close(stream(lm, codes), whole, 1e-9)


def test_start_stop_reset_and_start_again(lm):
    codes = make_codes(lm, 2, 10)
    with lm.streaming(2):
        first = stream(lm, codes)
        lm.reset_streaming()
        assert torch.equal(stream(lm, codes), first)
    with lm.streaming(2):
        assert torch.equal(stream(lm, codes), first)


def test_a_reset_row_starts_anew_and_the_other_goes_on(lm):
    codes, more = make_codes(lm, 2, 6), make_codes(lm, 2, 9, seed=1)
    with lm.streaming(2):
        stream(lm, codes)
        lm.reset_streaming(torch.tensor([True, False]))
        mixed = stream(lm, more)
    with torch.no_grad():
        fresh, _ = lm.forward_text(more)
        whole, _ = lm.forward_text(torch.cat([codes, more], 2))
    assert_close(mixed[0], fresh[0], 1e-9)
    assert_close(mixed[1], whole[1, 6:], 1e-9)


def test_rows_that_do_not_execute_keep_their_memory(lm):
    codes = make_codes(lm, 2, 12)
    with torch.no_grad():
        whole, _ = lm.forward_text(codes)
    with lm.streaming(2):
        outputs = []
        for t in range(12):
            # Row 1 is offered a wrong frame first, which it must not learn from.
            lm.set_exec_mask(torch.tensor([True, False]))
            out = stream(lm, torch.stack([codes[0, :, t], codes[1, :, 0]])[:, :, None])
            lm.set_exec_mask(torch.tensor([False, True]))
            late = stream(lm, torch.stack([codes[0, :, 0], codes[1, :, t]])[:, :, None])
            outputs.append(torch.stack([out[0], late[1]]))
    assert_close(torch.cat(outputs, 1), whole, 1e-9)


def test_a_reset_forgets_nan(lm):
    codes = make_codes(lm, 2, 6)
    with lm.streaming(2):
        reference = stream(lm, codes)
        buffers = lm.transformer.layers[1].ttt._streaming_state.buffers
        for buffer in (buffers.start_weights[0], buffers.pending_gradients[1]):
            buffer.fill_(torch.nan)
        lm.reset_streaming()
        assert torch.equal(stream(lm, codes), reference)


@pytest.mark.parametrize("sizes", [1, 3], ids=["single frames", "chunks"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("buffer", ["start_weights", "start_biases", "pending_gradients"])
def test_a_row_that_is_not_finite_is_reset_and_counted_and_the_others_go_on(lm, sizes, value, buffer):
    codes, more = make_codes(lm, 3, 6), make_codes(lm, 3, 12, seed=1)
    with torch.no_grad():
        whole, _ = lm.forward_text(torch.cat([codes, more], 2))
    states = [lm.transformer.layers[index].ttt for index in (1, 3)]
    with lm.streaming(3):
        stream(lm, codes)
        getattr(states[0]._streaming_state.buffers, buffer)[0][1, 0, 0, 1] = value
        out = stream(lm, more, sizes)
        assert non_finite_resets(lm) == {1: [0, 1, 0], 3: [0, 0, 0]}
        # At most the chunk in which it was found is lost; the row learns anew from the next one.
        assert states[0]._streaming_state.num_tokens.tolist() == [18, 12 - sizes, 18]
        lm.reset_streaming()
        assert non_finite_resets(lm) == {1: [0, 0, 0], 3: [0, 0, 0]}
    assert out.isfinite().all()
    assert_close(out[::2], whole[::2, 6:], 1e-9)
    assert not torch.allclose(out[1], whole[1, 6:])


def test_frozen_memory_stays_at_w0_and_off_leaves_the_layer_out(lm):
    codes = make_codes(lm, 2, 12)
    outputs = {}
    for mode in ("on", "frozen", "off"):
        set_ttt_mode(lm, mode)
        with torch.no_grad():
            outputs[mode], _ = lm.forward_text(codes)
        with lm.streaming(2):
            assert_close(stream(lm, codes), outputs[mode], 1e-9)
            layer = lm.transformer.layers[1].ttt
            fast = layer._streaming_state.buffers.start_weights[0]
            assert torch.equal(fast, layer.weights[0].expand_as(fast)) == (mode != "on")
    set_ttt_mode(lm, "on")
    with torch.no_grad():
        assert torch.equal(lm.forward_text(codes)[0], outputs["on"])
        for index in (1, 3):
            lm.transformer.layers[index].forward_ssm_gating.gating_alpha.zero_()
        assert torch.equal(lm.forward_text(codes)[0], outputs["off"])
    assert not torch.allclose(outputs["on"], outputs["frozen"])
    assert not torch.allclose(outputs["frozen"], outputs["off"])


def test_modes_are_checked(lm, tiny_lm):
    with pytest.raises(ValueError, match="no TTT mode 'asleep', choose from on, frozen, off"):
        set_ttt_mode(lm, "asleep")
    with pytest.raises(ValueError, match="has no TTT layers"):
        set_ttt_mode(tiny_lm, "off")


def test_the_streaming_state_can_be_taken_out_and_put_back(lm):
    codes = make_codes(lm, 1, 9)
    with torch.no_grad():
        whole, _ = lm.forward_text(codes)
    with lm.streaming(1):
        stream(lm, codes[:, :, :5])
        kept = lm.get_streaming_state()
    with lm.streaming(1):
        lm.set_streaming_state(kept)
        assert_close(stream(lm, codes[:, :, 5:]), whole[:, 5:], 1e-9)


def test_parameters_are_not_written_while_streaming(lm):
    before = {name: p.clone() for name, p in lm.named_parameters()}
    with lm.streaming(2):
        stream(lm, make_codes(lm, 2, 12))
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_lmgen_generates_and_ttt_matters(lm):
    user = make_codes(lm, 1, 12)[:, 1 + lm.dep_q :]

    def generate():
        generator = LMGen(lm, use_sampling=False)
        with generator.streaming(1):
            steps = [generator.step(user[:, :, t : t + 1]) for t in range(12)]
        return torch.cat([step for step in steps if step is not None], 2)

    tokens = generate()
    assert tokens.shape == (1, 1 + lm.dep_q, 12 - max(lm.delays))
    assert (tokens >= 0).all()
    for layer in (1, 3):
        lm.transformer.layers[layer].forward_ssm_gating.gating_alpha.data.zero_()
    assert not torch.equal(generate(), tokens)
