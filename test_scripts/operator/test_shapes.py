"""The shapes that the pure functions of moshi_ttt announce are those that they take and give."""

import inspect

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from moshi_ttt import TTTConfig, format_utils, inner_loop, ops, reference
from ttt_inputs import make_inputs

MODULES = (format_utils, inner_loop, ops, reference)


def checked(function):
    return jaxtyped(function, typechecker=beartype)


@pytest.fixture(autouse=True)
def announced_shapes(monkeypatch):
    """Check arguments and results of every function of the modules and of every method of InnerLoop."""
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                monkeypatch.setattr(module, name, checked(function))
    for name, method in inspect.getmembers(inner_loop.InnerLoop, inspect.isfunction):
        monkeypatch.setattr(inner_loop.InnerLoop, name, checked(method))
    for name in ("weights", "biases"):
        getter = getattr(inner_loop.TTTState, name).fget
        monkeypatch.setattr(inner_loop.TTTState, name, property(checked(getter)))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_definition_and_operator_keep_to_the_shapes_they_announce(num_layers, causal):
    inputs = make_inputs(num_layers=num_layers)
    size = 4 if causal else 1  # a non-causal sequence ends at mini-batches
    _, state = ops.ttt_mlp_with_states(*inputs.cut(0, 6 * size // 4), mini_batch_size=size, causal=causal)
    for backend in ("autograd", "manual"):
        ops.ttt_mlp_with_states(
            *inputs.cut(6 * size // 4, 11), mini_batch_size=size, causal=causal, state=state, backend=backend
        )
    assert len(state.weights) == len(state.biases) == num_layers
    ops.inner_losses(*inputs.cut(6, 11)[1:], mini_batch_size=4, start=state if causal else None)
    reference.ttt_mlp_reference(*inputs, mini_batch_size=4, causal=causal)


def test_the_grid_of_mini_batches_keeps_to_its_shapes():
    grid, info = format_utils.moshi_to_ttt_format(torch.zeros(2, 7, 32), TTTConfig(model_dim=32, num_heads=4))
    assert format_utils.ttt_to_moshi_format(grid, info["original_length"]).shape == (2, 7, 32)


@pytest.mark.parametrize("argument", range(8))
def test_a_tensor_of_another_shape_is_found(argument):
    inputs = list(make_inputs())
    part = inputs[argument]
    inputs[argument] = part[..., :-1, :] if isinstance(part, torch.Tensor) else [x[0] for x in part]
    if argument == 3:
        inputs[argument] = part[..., None]
    with pytest.raises(TypeCheckError):
        ops.ttt_mlp(*inputs, mini_batch_size=4)
