"""A Moshi layer with TTT: names, devices, checkpointing, cross-attention, patching errors."""

import copy
import warnings
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from moshi.modules.transformer import StreamingTransformerLayer

from conftest import make_codes, make_tiny_lm
from finetune.args import LoraArgs, TTTArgs
from finetune.errors import ConfigError
from finetune.ttt_integration import apply_ttt_to_model, attention_windows
from finetune.wrapped_model import add_lora
from moshi_ttt import HybridStreamingTransformerLayer, TTTConfig
from moshi_ttt.hybrid_model import ttt_layers
from ttt_inputs import assert_close

OPEN_GATE = {
    "enable": True,
    "layers": "1,3",
    "mini_batch_size": 4,
    "initial_gating_alpha": 0.5,
    "base_lr": 5.0,
}


def test_the_chosen_layers_become_hybrid_and_are_returned(tiny_lm):
    assert apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="3,1")) == [1, 3]
    kinds = [type(layer) for layer in tiny_lm.transformer.layers]
    stock, hybrid = StreamingTransformerLayer, HybridStreamingTransformerLayer
    assert kinds == [stock, hybrid, stock, hybrid]
    assert all(type(layer) is stock for layer in tiny_lm.depformer.layers)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("none", []), ("all", [0, 1, 2, 3]), ("middle", [1, 2]), (2, [2]), ([0, 3], [0, 3])],
)
def test_layer_choices(tiny_lm, layers, expected):
    assert apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers=layers)) == expected


def test_disabled_ttt_changes_nothing(tiny_lm):
    before = dict(tiny_lm.named_parameters())
    assert apply_ttt_to_model(tiny_lm, TTTArgs(layers="all", ttt_layer_context=3)) == []
    assert dict(tiny_lm.named_parameters()) == before
    assert attention_windows(tiny_lm) == [40] * 4


def test_stock_names_stay_and_new_ones_are_recognisable(tiny_lm):
    stock = [name for name, _ in tiny_lm.named_parameters()]
    identities = {name: id(p) for name, p in tiny_lm.named_parameters()}
    apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="1"))
    patched = dict(tiny_lm.named_parameters())
    assert all(id(patched[name]) == identities[name] for name in stock)
    new = set(patched) - set(stock)
    assert "transformer.layers.1.forward_ssm_gating.gating_alpha" in new
    assert all(".ttt." in name or name.endswith("gating_alpha") for name in new)


def test_stock_weights_load_into_the_patched_model_and_gate_zero_equals_stock(tiny_lm):
    codes = make_codes(tiny_lm, 2, 21)
    patched = make_tiny_lm(seed=1).eval()
    apply_ttt_to_model(patched, TTTArgs(enable=True, layers="all", initial_gating_alpha=0.0))
    report = patched.load_state_dict(tiny_lm.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(".ttt." in key or key.endswith("gating_alpha") for key in report.missing_keys)
    ours, stock = patched(codes), tiny_lm(codes)
    assert torch.equal(ours.text_logits, stock.text_logits)
    assert torch.equal(ours.logits[ours.mask], stock.logits[stock.mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_new_parameters_follow_the_dtype_of_their_layer(dtype):
    lm = make_tiny_lm(dtype=dtype)
    apply_ttt_to_model(lm, TTTArgs(enable=True, layers="all"))
    assert {p.dtype for p in lm.transformer.layers.parameters()} == {dtype}
    assert lm(make_codes(lm, 1, 5)).text_logits.dtype == dtype


def test_new_parameters_follow_the_meta_device():
    lm = make_tiny_lm().to("meta")
    apply_ttt_to_model(lm, TTTArgs(enable=True, layers="all"))
    assert all(p.is_meta for p in lm.parameters())


def test_nothing_after_a_frame_changes_it_through_the_whole_model(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(**OPEN_GATE))
    codes = make_codes(tiny_lm, 2, 23)
    with torch.no_grad():
        hidden, text = tiny_lm.forward_text(codes)
        for t in (0, 3, 4, 11, 21):
            changed = codes.clone()
            changed[:, :, t + 1 :] = make_codes(tiny_lm, 2, 22 - t, seed=t + 1)
            other_hidden, other_text = tiny_lm.forward_text(changed)
            assert torch.equal(other_hidden[:, : t + 1], hidden[:, : t + 1])
            assert torch.equal(other_text[:, :, : t + 1], text[:, :, : t + 1])
            assert not torch.equal(other_hidden[:, t + 1 :], hidden[:, t + 1 :])


def test_logits_do_not_see_the_future_given_moshis_delays(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(**OPEN_GATE))
    codes, t = make_codes(tiny_lm, 2, 23), 12
    changed = codes.clone()
    changed[:, :, t:] = make_codes(tiny_lm, 2, 23 - t, seed=5)
    with torch.no_grad():
        output, other = tiny_lm(codes), tiny_lm(changed)
    assert torch.equal(output.text_logits[:, :, : t + 1], other.text_logits[:, :, : t + 1])
    for codebook in range(tiny_lm.dep_q):
        stop = t - tiny_lm.delays[1 + codebook]
        assert torch.equal(output.logits[:, codebook, :stop], other.logits[:, codebook, :stop])


def _keep_weights(kept, record):
    kept.append(record.state.weights)


def _loss_and_gradients(lm, codes):
    lm.zero_grad()
    output = lm(codes)
    loss = output.text_logits.square().mean() + output.logits[output.mask].square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_neither_loss_nor_gradients_nor_final_state(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(**OPEN_GATE))
    codes = make_codes(tiny_lm, 2, 23)
    codes[1, :, 17:] = -1  # padding, so that the mask must survive recomputation too
    results, states = [], []
    for checkpointing in (False, True):
        lm = copy.deepcopy(tiny_lm).train()
        lm.transformer.checkpointing = lm.depformer.checkpointing = checkpointing
        seen = []
        with ttt_layers(lm)[1].passing(recorder=partial(_keep_weights, seen)):
            results.append(_loss_and_gradients(lm, codes))
        states.append(seen[-1])
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_recomputation_finds_the_mask_of_its_own_pass(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(**OPEN_GATE))
    batches = [make_codes(tiny_lm, 1, 16, seed=seed) for seed in (0, 1)]
    batches[0][:, :, 9:] = -1
    batches[1][:, :, 3:] = -1
    gradients = []
    for checkpointing in (False, True):
        lm = copy.deepcopy(tiny_lm).train()
        lm.transformer.checkpointing = checkpointing
        # Both passes come before the backward, so the masks of the second are the model's last.
        sum(lm.forward_text(codes)[0].square().mean() for codes in batches).backward()
        gradients.append([p.grad for p in lm.transformer.parameters()])
        assert all(layer.current.token_mask is None for layer in ttt_layers(lm).values())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_padding_teaches_nothing_and_changes_nothing_before_it(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(**OPEN_GATE))
    states = []
    codes = make_codes(tiny_lm, 1, 24)
    padded = codes.clone()
    padded[:, :, 10:] = -1
    with torch.no_grad(), ExitStack() as stack:
        for layer in ttt_layers(tiny_lm).values():
            stack.enter_context(layer.passing(recorder=partial(_keep_weights, states)))
        tiny_lm.forward_text(codes[:, :, :10])
        alone = states.copy()
        states.clear()
        out, _ = tiny_lm.forward_text(padded)
        reference, _ = tiny_lm.forward_text(codes)
    for ours, expected in zip(states[:2], alone, strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, 1e-12)
    assert torch.equal(out[:, :10], reference[:, :10])
    assert all(layer.current.token_mask is None for layer in ttt_layers(tiny_lm).values())


def test_a_forward_pass_changes_no_parameter_and_remembers_nothing(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(**OPEN_GATE))
    before = {name: p.clone() for name, p in tiny_lm.named_parameters()}
    codes = make_codes(tiny_lm, 2, 23)
    with torch.no_grad():
        first, second = tiny_lm(codes), tiny_lm(codes)
    assert torch.equal(first.text_logits, second.text_logits)
    assert all(torch.equal(p, before[name]) for name, p in tiny_lm.named_parameters())


def test_ttt_runs_after_cross_attention_and_before_the_feed_forward():
    torch.manual_seed(0)
    layer = StreamingTransformerLayer(
        32, 4, 64, causal=True, norm="rms_norm", cross_attention=True, dtype=torch.float64
    )
    x, source = torch.randn(2, 2, 7, 32, dtype=torch.float64)
    config = TTTConfig(model_dim=32, num_heads=4, gating_alpha_init=0.5)
    hybrid = HybridStreamingTransformerLayer.from_layer(copy.deepcopy(layer), config)
    attended = layer._cross_attention_block(layer._sa_block(x), source)
    gated = hybrid.forward_ssm_gating(hybrid.ttt(attended))
    expected = layer._ff_block(hybrid.forward_ssm_gating.add_gated(attended, gated))
    assert torch.equal(hybrid(x, cross_attention_src=source), expected)


@pytest.mark.parametrize("gating", ["residual", "blend"])
def test_a_streamed_frame_is_gated_once_and_its_activity_is_the_size_of_the_gated_update(gating):
    torch.manual_seed(0)
    layer = StreamingTransformerLayer(32, 4, 64, causal=True, norm="rms_norm", context=9, dtype=torch.float64)
    config = TTTConfig(model_dim=32, num_heads=4, gating_alpha_init=0.5, gating=gating)
    hybrid = HybridStreamingTransformerLayer.from_layer(layer, config).requires_grad_(False)
    gates, residuals = [], []
    hybrid.forward_ssm_gating.register_forward_hook(lambda gate, args, out: gates.append(out))
    hybrid.ttt.register_forward_hook(lambda ttt, args, out: residuals.append(args[0]))
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    whole = hybrid(x)
    with hybrid.streaming(2):
        for t in range(6):
            gates.clear()
            assert_close(hybrid(x[:, t : t + 1]), whole[:, t : t + 1], 1e-12)
            assert len(gates) == 1 + (gating == "blend")  # the blend gates the residual stream as well
            expected = gates[0].flatten(1).norm(dim=1) / (residuals[-1].flatten(1).norm(dim=1) + 1e-6)
            assert_close(hybrid.ttt._streaming_state.activity, expected, 1e-12)


def test_lora_leaves_cross_attention_alone():
    lm = make_tiny_lm(dtype=torch.float32, cross_attention=True).eval()
    codes = make_codes(lm, 1, 5)
    source = torch.randn(1, 3, 32)
    before, _ = lm.forward_text(codes, cross_attention_src=source)
    add_lora(lm, LoraArgs(enable=True, rank=2), dtype=torch.float32)
    apply_ttt_to_model(lm, TTTArgs(enable=True, layers="1", initial_gating_alpha=0.0))
    after, _ = lm.forward_text(codes, cross_attention_src=source)
    assert torch.equal(before, after)
    names = [name for name, _ in lm.named_parameters() if "lora_" in name]
    assert names and not any("cross_attention" in name for name in names)


def test_patching_after_streaming_is_an_error_instead_of_being_ignored(tiny_lm):
    with tiny_lm.streaming(1):
        pass
    with pytest.raises(ValueError, match="has streamed before"):
        apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="1"))


def test_patching_twice_is_an_error(tiny_lm):
    apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="1"))
    with pytest.raises(ValueError, match="has TTT layers already"):
        apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="2"))


def test_a_layer_that_does_not_exist_is_named(tiny_lm):
    with pytest.raises(
        ConfigError, match=r"ttt.layers: index 99 does not exist, the model has 4 layers \(0 to 3\)"
    ):
        apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="1,99"))
    assert type(tiny_lm.transformer.layers[1]) is StreamingTransformerLayer


def test_attention_windows_are_set_on_the_attention_modules():
    lm = make_tiny_lm()
    apply_ttt_to_model(lm, TTTArgs(enable=True, layers="1,3", ttt_layer_context=5, non_ttt_layer_context=10))
    assert attention_windows(lm) == [10, 5, 10, 5]
    assert [layer.self_attn.context for layer in lm.depformer.layers] == [None, None]


def test_attention_windows_limit_what_a_frame_sees():
    lm = make_tiny_lm().eval()
    apply_ttt_to_model(lm, TTTArgs(enable=True, layers="none", non_ttt_layer_context=3))
    codes = make_codes(lm, 1, 20)
    changed = codes.clone()
    changed[:, :, 0] = 7
    with torch.no_grad():
        difference = (lm.forward_text(codes)[0] - lm.forward_text(changed)[0]).abs().amax((0, 2))
    reach = 4 * (3 - 1)  # layers times window
    assert (difference[: reach + 1] > 0).all() and (difference[reach + 1 :] == 0).all()


def test_a_window_that_applies_to_no_layer_is_an_error(tiny_lm):
    with pytest.raises(ConfigError, match=r"ttt.non_ttt_layer_context: 5 would apply to no layer"):
        apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="all", non_ttt_layer_context=5))


def test_the_baseline_without_ttt_may_keep_the_windows_of_its_twin(tiny_lm):
    args = TTTArgs(enable=True, layers="none", ttt_layer_context=5, non_ttt_layer_context=7)
    assert apply_ttt_to_model(tiny_lm, args) == []
    assert set(attention_windows(tiny_lm)) == {7}


def test_non_causal_warns_and_refuses_to_stream(tiny_lm):
    with pytest.warns(UserWarning, match="see the future"):
        apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="1", causal=False))
    with pytest.raises(ValueError, match="cannot stream"), tiny_lm.streaming(1):
        pass


def test_causal_does_not_warn(tiny_lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_ttt_to_model(tiny_lm, TTTArgs(enable=True, layers="1"))
