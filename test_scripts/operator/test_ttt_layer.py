"""The TTT layer alone: normalisation, initialisation, dtypes, devices, rotary positions, gate."""

import pytest
import torch
from pydantic import ValidationError

from moshi_ttt import SSMGating, TTTConfig
from moshi_ttt.inputs.rope import apply_rope
from moshi_ttt.ttt_layer import TTTLayer, TTTPass
from ttt_inputs import assert_close


def make_config(**overrides) -> TTTConfig:
    return TTTConfig(**({"model_dim": 32, "num_heads": 4, "mini_batch_size": 4} | overrides))


def make_layer(dtype: torch.dtype = torch.float64, **overrides) -> TTTLayer:
    torch.manual_seed(0)
    return TTTLayer(make_config(**overrides), dtype=dtype)


def inner_inputs(layer: TTTLayer, x: torch.Tensor, token_mask: torch.Tensor | None = None):
    positions = torch.arange(x.shape[1])[None] % layer.config.mini_batch_size
    return layer.prepare(x, positions, token_mask).tokens


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("use_rope", [True, False])
def test_keys_and_queries_have_unit_norm_per_head_whatever_the_input_scale(pre_norm, use_rope):
    layer = make_layer(pre_norm=pre_norm, use_rope=use_rope, key_shift=0)
    for scale in (0.01, 1.0, 1000.0):
        inputs = inner_inputs(layer, scale * torch.randn(2, 9, 32, dtype=torch.float64))
        for part in (inputs.q, inputs.k):
            assert (part.norm(dim=-1) - 1).abs().max() < 1e-6
            assert part.abs().max() <= 1


def test_reconstruction_targets_are_normalised():
    layer = make_layer()
    inputs = inner_inputs(layer, torch.randn(2, 9, 32, dtype=torch.float64))
    target = inputs.v - inputs.k  # LN(v - k) * w + b with w = 1 and b = 0
    assert target.mean(-1).abs().max() < 1e-6
    assert (target.std(-1, unbiased=False) - 1).abs().max() < 1e-4
    assert (target.std(-1) > 0).all()


@pytest.mark.parametrize("inner_init", ["unit_variance", "published"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_output_scale_does_not_depend_on_the_input_scale(inner_init, pre_norm):
    layer = make_layer(inner_init=inner_init, pre_norm=pre_norm)
    layer.learnable_ttt_lr_weight.data.zero_()  # the inner rate may depend on it, the normalisation may not
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    reference = layer(x)
    assert 0 < reference.std() < 10
    for scale in (0.1, 20.0, 6000.0):
        ratio = layer(scale * x).std() / reference.std()
        assert 0.5 < ratio < 2


def test_unit_variance_keeps_pre_activations_at_one():
    layer = make_layer(model_dim=256, num_heads=4)
    keys = torch.nn.functional.normalize(torch.randn(1, 4, 500, 64, dtype=torch.float64), dim=-1)
    first = keys @ layer.weights[0]
    assert 0.9 < first.std() < 1.1
    second = torch.nn.functional.gelu(first, approximate="tanh") @ layer.weights[1]
    assert 0.4 < second.std() < 1.0
    published = make_layer(model_dim=256, num_heads=4, inner_init="published")
    assert 0.019 < (keys @ published.weights[0]).std() < 0.021
    assert all((bias == 0).all() for bias in layer.biases)


def test_inner_rate_is_the_published_formula_where_a_rate_is_given_without_its_scale():
    layer = make_layer(ttt_base_lr=0.3, pre_norm=False, key_shift=0)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    eta = inner_inputs(layer, x).eta
    logit = (x[1, 4] * layer.learnable_ttt_lr_weight[2]).sum() + layer.learnable_ttt_lr_bias[2]
    assert_close(eta[1, 2, 4], 0.3 * torch.sigmoid(logit) / 8 / 4, 1e-12)


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("mini_batch_size", [4, 16])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_rate_of_one_corrects_the_whole_error_of_a_token_at_every_size(num_heads, mini_batch_size, layers):
    layer = make_layer(
        model_dim=128,
        num_heads=num_heads,
        mini_batch_size=mini_batch_size,
        ttt_mlp_layers=layers,
        key_shift=0,
    )
    layer.learnable_ttt_lr_bias.data.fill_(40.0)  # the sigmoid is 1
    inputs = inner_inputs(layer, torch.randn(1, 200, 128, dtype=torch.float64))
    x, inner = inputs.k, layer.inner_loop()
    for number, (weight, bias) in enumerate(zip(inner.weights, inner.biases, strict=True)):
        x = torch.nn.functional.gelu(x, approximate="tanh") if number else x
        last, x = x, x @ weight + bias
    corrected = inputs.eta * (last.square().sum(-1) + 1)
    assert 0.9 < corrected.mean() < 1.1


def test_keys_start_as_queries_and_need_not():
    tied, free = make_layer(), make_layer(tied_start=False)
    assert torch.equal(tied.wk.weight, tied.wq.weight) and not torch.equal(free.wk.weight, free.wq.weight)
    tied.wk.weight.data.add_(1)
    assert not torch.equal(tied.wk.weight, tied.wq.weight)  # only their start is shared


def test_padded_frames_have_inner_rate_zero():
    layer = make_layer(key_shift=0)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    eta = inner_inputs(layer, torch.randn(2, 9, 32, dtype=torch.float64), mask).eta
    assert (eta[1, :, 5:] == 0).all()
    assert (eta[0] > 0).all() and (eta[1, :, :5] > 0).all()


def test_projections_keep_the_scale_of_their_input_unless_published():
    layer = make_layer(model_dim=256, num_heads=4)
    x = torch.randn(500, 256, dtype=torch.float64)
    for linear in (layer.wq, layer.wk, layer.wv, layer.wo):
        assert 0.95 < linear(x).std() < 1.05
    published = make_layer(model_dim=256, num_heads=4, inner_init="published")
    assert 0.31 < published.wo(x).std() < 0.33  # 0.02 * sqrt(256)


def test_inner_mlp_depth_and_widths_follow_the_configuration():
    layer = make_layer(ttt_mlp_layers=3, ttt_mlp_hidden_dims=[5, 7])
    assert [tuple(w.shape) for w in layer.weights] == [(4, 8, 5), (4, 5, 7), (4, 7, 8)]
    assert [tuple(w.shape) for w in make_layer(ttt_mlp_layers=1).weights] == [(4, 8, 8)]
    assert make_layer(ttt_mlp_expansion_factor=1.5).weights[0].shape == (4, 8, 12)
    with pytest.raises(ValidationError, match="has 1 hidden widths"):
        make_config(ttt_mlp_hidden_dims=[5, 7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype):
    layer = make_layer(dtype)
    assert layer(torch.randn(1, 5, 32, dtype=dtype)).dtype == dtype


def test_float32_weights_work_under_bfloat16_autocast():
    layer = make_layer(torch.float32)
    x = torch.randn(1, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), layer(x), 0.05)


def test_parameters_follow_the_device_meta_included():
    layer = TTTLayer(make_config(), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("use_rope", [True, False])
def test_the_layer_is_causal(use_rope):
    layer = make_layer(use_rope=use_rope, ttt_base_lr=10.0)
    x = torch.randn(1, 11, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] = torch.randn(1, 5, 32, dtype=torch.float64)
    assert torch.equal(layer(x)[:, :6], layer(changed)[:, :6])
    assert not torch.equal(layer(x)[:, 6:], layer(changed)[:, 6:])


def test_every_parameter_gets_a_gradient():
    layer = make_layer()
    layer(torch.randn(2, 9, 32, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_rope_angles_are_float32_whatever_the_input():
    x = torch.randn(1, 2, 300, 16)
    positions = torch.arange(300)[None]
    exact = apply_rope(x.double(), positions, theta=10000.0)
    rounded = apply_rope(x.bfloat16(), positions, theta=10000.0)
    assert rounded.dtype == torch.bfloat16
    # Angles in bfloat16 would be off by up to one radian at position 299.
    assert (rounded.double() - exact).abs().max() < 0.05


def test_rope_encodes_relative_positions():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(a: int, b: int) -> torch.Tensor:
        rotated = [apply_rope(x, torch.tensor([[p]]), theta=100.0) for x, p in ((q, a), (k, b))]
        return (rotated[0] * rotated[1]).sum()

    assert_close(product(7, 3), product(14, 10), 1e-5)
    assert (product(7, 3) - product(7, 5)).abs() > 1e-3


def test_gate_scales_the_update_by_tanh_alpha():
    gate = SSMGating(make_config(gating_alpha_init=0.3))
    update = torch.randn(2, 3, 32)
    assert_close(gate(update), torch.tanh(torch.tensor(0.3)) * update, 1e-6)
    x = torch.randn(2, 3, 32)
    assert_close(gate.add_gated(x, gate(update)), x + gate(update), 1e-6)


def test_blend_gate_weighs_residual_and_update():
    gate = SSMGating(make_config(gating="blend", gating_alpha_init=0.5))
    x, update = torch.randn(2, 2, 3, 32)
    share = torch.tanh(torch.tensor(0.5))
    assert 0.46 < share < 0.47
    assert_close(gate.add_gated(x, gate(update)), (1 - share) * x + share * update, 1e-6)


def test_closed_residual_gate_returns_the_residual_stream_itself():
    gate = SSMGating(make_config(gating_alpha_init=0.0), dtype=torch.bfloat16)
    x, update = torch.randn(2, 2, 3, 32, dtype=torch.bfloat16)
    assert torch.equal(gate.add_gated(x, gate(update)), x)


def test_fixed_gate_does_not_train():
    gate = SSMGating(make_config(gating_trainable=False, gating_alpha_init=0.3))
    assert not gate.gating_alpha.requires_grad
    assert (gate.gating_alpha == 0.3).all()


def test_what_passes_are_given_nests_and_ends_with_its_context():
    layer = TTTLayer(make_config())
    mask, seen = torch.ones(1, 5, dtype=torch.bool), []
    with pytest.raises(RuntimeError, match="in the middle"), layer.passing(recorder=seen.append):
        with layer.passing(token_mask=mask):
            layer(torch.randn(1, 5, 32))
            assert layer.current.token_mask is mask and layer.current.recorder is not None
        assert layer.current.token_mask is None and layer.current.recorder is not None
        raise RuntimeError("in the middle")
    assert layer.current == TTTPass()
    assert [record.token_mask.tolist() for record in seen] == [[[False, True, True, True, True]]]
    with pytest.raises(TypeError, match="token_masks"), layer.passing(token_masks=mask):
        pass
