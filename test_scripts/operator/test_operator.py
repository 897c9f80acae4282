"""The identities of the TTT operator: definition, splits, gradients, dtypes, padding."""

import pytest
import torch

from moshi_ttt.ops import inner_losses, ttt_mlp, ttt_mlp_with_states
from moshi_ttt.reference import ttt_mlp_reference
from ttt_inputs import assert_close, make_inputs, values_and_gradients

SETTINGS = [
    {},
    {"causal": False},
    {"inner_grad_clip": 0.5},
    {"state_decay": 0.3},
    {"inner_grad_clip": 0.5, "state_decay": 0.3, "causal": False},
]


def _all_outputs(out, weights, biases):
    return [out, *weights, *biases]


def _gradients(outputs, inputs):
    return values_and_gradients(outputs, inputs)[len(outputs) :]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 4, 11, 23])
@pytest.mark.parametrize("backend", ["autograd", "manual"])
def test_operator_equals_the_token_by_token_definition(settings, num_layers, num_tokens, backend):
    inputs = make_inputs(num_layers=num_layers, num_tokens=num_tokens)
    out, state = ttt_mlp_with_states(*inputs, mini_batch_size=4, backend=backend, **settings)
    ours = _all_outputs(out, state.weights, state.biases)
    reference = _all_outputs(*ttt_mlp_reference(*inputs, mini_batch_size=4, **settings))
    for a, b in zip(ours, reference, strict=True):
        assert_close(a, b, 1e-9)
    for a, b in zip(_gradients(ours, inputs), _gradients(reference, inputs), strict=True):
        assert_close(a, b, 1e-9)


def test_the_settings_change_the_result():
    inputs = make_inputs(requires_grad=False)
    plain = ttt_mlp(*inputs, mini_batch_size=4)
    for settings in SETTINGS[1:]:
        assert (ttt_mlp(*inputs, mini_batch_size=4, **settings) - plain).abs().max() > 1e-6


def test_float32_stays_close_to_float64():
    inputs = make_inputs(num_tokens=40, requires_grad=False)
    single = make_inputs(num_tokens=40, requires_grad=False, dtype=torch.float32)
    assert_close(ttt_mlp(*single, mini_batch_size=4).double(), ttt_mlp(*inputs, mini_batch_size=4), 1e-4)


@pytest.mark.parametrize("settings", [{}, {"state_decay": 0.3, "inner_grad_clip": 0.5}], ids=str)
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 10])  # around mini-batch boundaries
def test_two_chunks_with_carried_state_equal_one_pass(cut, settings):
    inputs = make_inputs()
    out, state = ttt_mlp_with_states(*inputs, mini_batch_size=4, **settings)
    whole = _all_outputs(out, state.weights, state.biases)
    first, carried = ttt_mlp_with_states(*inputs.cut(0, cut), mini_batch_size=4, **settings)
    second, last = ttt_mlp_with_states(*inputs.cut(cut, 11), mini_batch_size=4, state=carried, **settings)
    split = _all_outputs(torch.cat([first, second], 2), last.weights, last.biases)
    for a, b in zip(split, whole, strict=True):
        assert_close(a, b, 1e-9)
    for a, b in zip(_gradients(split, inputs), _gradients(whole, inputs), strict=True):
        assert_close(a, b, 1e-9)


def test_single_tokens_with_carried_state_equal_one_pass():
    inputs = make_inputs(requires_grad=False)
    whole = ttt_mlp(*inputs, mini_batch_size=4)
    state, outputs = None, []
    for t in range(11):
        out, state = ttt_mlp_with_states(*inputs.cut(t, t + 1), mini_batch_size=4, state=state)
        outputs.append(out)
    assert_close(torch.cat(outputs, 2), whole, 1e-9)


def test_the_state_given_is_not_modified():
    inputs = make_inputs(requires_grad=False)
    _, state = ttt_mlp_with_states(*inputs.cut(0, 6), mini_batch_size=4)
    before = [x.clone() for group in state for x in group]
    ttt_mlp_with_states(*inputs.cut(6, 11), mini_batch_size=4, state=state)
    assert all(torch.equal(a, b) for a, b in zip(before, (x for group in state for x in group), strict=True))


def test_a_non_causal_sequence_cannot_continue_inside_a_mini_batch():
    inputs = make_inputs(requires_grad=False)
    _, state = ttt_mlp_with_states(*inputs.cut(0, 6), mini_batch_size=4, causal=False)
    with pytest.raises(ValueError, match="2 tokens are pending"):
        ttt_mlp_with_states(*inputs.cut(6, 11), mini_batch_size=4, causal=False, state=state)


@pytest.mark.parametrize("causal", [True, False])
def test_only_the_causal_form_keeps_earlier_outputs_when_a_token_changes(causal):
    inputs = make_inputs(requires_grad=False)
    changed = make_inputs(requires_grad=False)
    changed.xk[:, :, 6], changed.xv[:, :, 6] = inputs.xk[:, :, 0], 3.0
    difference = ttt_mlp(*changed, mini_batch_size=4, causal=causal) - ttt_mlp(
        *inputs, mini_batch_size=4, causal=causal
    )
    assert difference[:, :, 6:].abs().max() > 1e-3
    leaked = difference[:, :, 4:6].abs().max()
    assert leaked == 0 if causal else leaked > 1e-4


@pytest.mark.parametrize("backend", ["autograd", "manual"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_gradients_pass_gradcheck(num_layers, settings, backend):
    inputs = make_inputs(batch_size=1, num_heads=1, num_tokens=5, head_dim=3, num_layers=num_layers)
    # Two full mini-batches and an unfinished one.
    options = {"mini_batch_size": 2, "backend": backend, **settings}

    def function(*tensors):
        tokens, rest = tensors[:4], tensors[4:]
        weights, biases, norms = rest[:num_layers], rest[num_layers : 2 * num_layers], rest[2 * num_layers :]
        out, state = ttt_mlp_with_states(*tokens, weights, biases, *norms, **options)
        return out, *state.weights, *state.biases

    assert torch.autograd.gradcheck(function, inputs.tensors())


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = make_inputs(num_tokens=64, requires_grad=False, dtype=torch.bfloat16)
    upcast = [x.float() for x in inputs[:4]], [[x.float() for x in part] for part in inputs[4:6]]
    expected, _ = ttt_mlp_with_states(
        *upcast[0], *upcast[1], inputs.ln_weight.float(), inputs.ln_bias.float(), mini_batch_size=4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = ttt_mlp_with_states(*inputs, mini_batch_size=4)
    assert out.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in (*state.start_weights, *state.weights, *state.biases))
    assert torch.equal(out, expected.bfloat16())


def test_tokens_with_eta_zero_teach_nothing():
    inputs = make_inputs(requires_grad=False)
    inputs.eta[:, :, 6:] = 0
    _, state = ttt_mlp_with_states(*inputs, mini_batch_size=4)
    _, shorter = ttt_mlp_with_states(*inputs.cut(0, 6), mini_batch_size=4)
    for a, b in zip(state.weights, shorter.weights, strict=True):
        assert_close(a, b, 1e-12)


def test_rows_of_a_batch_have_their_own_fast_weights():
    inputs = make_inputs(requires_grad=False)
    out, state = ttt_mlp_with_states(*inputs, mini_batch_size=4)
    alone, state_alone = ttt_mlp_with_states(*(x[1:] for x in inputs[:4]), *inputs[4:], mini_batch_size=4)
    assert_close(out[1:], alone, 1e-12)
    assert_close(state.weights[0][1:], state_alone.weights[0], 1e-12)
    assert (state.weights[0][0] - state.weights[0][1]).abs().max() > 1e-3


def test_inner_losses_equal_the_losses_of_the_definition():
    inputs = make_inputs(num_tokens=6, requires_grad=False)
    at_w0, before, after = inner_losses(*inputs[1:], mini_batch_size=4)

    def loss(num_steps, token):
        # The weights after num_steps tokens, read with the key of another token.
        if num_steps == 0:
            weights = [w.expand(2, *w.shape) for w in inputs.weights]
            biases = [b.expand(2, *b.shape) for b in inputs.biases]
        else:
            _, weights, biases = ttt_mlp_reference(*inputs.cut(0, num_steps), mini_batch_size=4)
        k, v = inputs.xk[:, :, token : token + 1], inputs.xv[:, :, token : token + 1]
        hidden = torch.nn.functional.gelu(k @ weights[0] + biases[0], approximate="tanh")
        z = hidden @ weights[1] + biases[1]
        normed = torch.nn.functional.layer_norm(z, (6,), eps=1e-8)
        normed = normed * inputs.ln_weight[:, None] + inputs.ln_bias[:, None]
        return 0.5 * ((normed - (v - k)) ** 2).sum((-1, -2))

    for token in range(6):
        assert_close(at_w0[:, :, token], loss(0, token), 1e-9)
        assert_close(before[:, :, token], loss(token, token), 1e-9)
        assert_close(after[:, :, token], loss(token + 1, token), 1e-9)
    assert (after < before).double().mean() > 0.9
