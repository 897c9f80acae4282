"""All backends of the operator compute the same: values, states and gradients, whatever the layout."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from finetune.args import TrainArgs
from finetune.config_io import build_args
from finetune.errors import ConfigError
from finetune.training.plan.activations import StorageTracker
from finetune.training.run import _check_backend
from moshi_ttt import backends
from moshi_ttt.backends import choose_backend
from moshi_ttt.config import TTTConfig
from moshi_ttt.inner_loop import InnerLoop
from moshi_ttt.manual import run_manual
from moshi_ttt.manual.function import GROUPS_PER_COPY, group_length
from moshi_ttt.ops import ttt_mlp_with_states
from moshi_ttt.ttt_layer import TTTLayer
from ttt_inputs import assert_close, make_inputs, needs_compiler, values_and_gradients

C = 4
GROUP = group_length(head_dim=6, mini_batch_size=1)
OTHER_SETTINGS = {"causal": False, "inner_grad_clip": 0.5}
_COMPILER = list(needs_compiler("compiled").marks)


@pytest.fixture(scope="module", autouse=True)
def _few_compilations():
    # One compiled function sees the shapes of all tests; over the limit it would run eagerly.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def test_a_backend_that_does_not_exist_is_refused_wherever_one_is_chosen():
    message = "backend is 'nonsense', it must be one of auto, autograd, manual, compiled, fused"
    for settings in ({}, {"state_decay": 0.1}):
        with pytest.raises(ValueError, match=message):
            run(make_inputs(num_tokens=6), backend="nonsense", **settings)
    with pytest.raises(ValueError, match=message):
        choose_backend("nonsense", torch.empty(0, device="meta"))


def run(inputs, *, backend, **settings):
    out, state = ttt_mlp_with_states(*inputs, mini_batch_size=C, backend=backend, **settings)
    return [out, *state.weights, *state.biases]


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance", "settings"),
    [
        ("manual", torch.float64, 1e-9, {}),
        ("manual", torch.float64, 1e-9, OTHER_SETTINGS),
        ("manual", torch.float32, 1e-4, {}),
        ("manual", torch.float32, 1e-4, OTHER_SETTINGS),
        pytest.param("compiled", torch.float32, 1e-4, {}, marks=_COMPILER),
        pytest.param("compiled", torch.float32, 1e-4, OTHER_SETTINGS, marks=[pytest.mark.slow, *_COMPILER]),
        pytest.param("compiled", torch.float64, 1e-9, {}, marks=[pytest.mark.slow, *_COMPILER]),
        pytest.param("compiled", torch.float64, 1e-9, OTHER_SETTINGS, marks=[pytest.mark.slow, *_COMPILER]),
    ],
    ids=str,
)
def test_backends_equal_autograd(backend, dtype, tolerance, settings):
    inputs = make_inputs(num_tokens=9 * C + 3, dtype=dtype)
    expected = values_and_gradients(run(inputs, backend="autograd", **settings), inputs)
    found = values_and_gradients(run(inputs, backend=backend, **settings), inputs)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize(
    "num_tokens", [1, 2, 3, GROUP, GROUP + 1, 2 * GROUP, 3 * GROUP - 1, (GROUPS_PER_COPY + 1) * GROUP + 1]
)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_groups_of_mini_batches_may_end_anywhere(num_layers, num_tokens):
    inputs = make_inputs(num_tokens=num_tokens, num_layers=num_layers)
    results = []
    for backend in ("manual", "autograd"):
        out, state = ttt_mlp_with_states(*inputs, mini_batch_size=1, backend=backend)
        results.append(values_and_gradients([out, *state.weights, *state.biases], inputs))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-9)


def test_rounding_does_not_add_up_where_steps_are_taken_back():
    single = make_inputs(num_tokens=1000 * C, num_layers=2, dtype=torch.float32, head_dim=8)
    double = make_inputs(num_tokens=1000 * C, num_layers=2, head_dim=8)
    errors = {}
    expected = values_and_gradients(run(double, backend="manual"), double)
    for backend in ("manual", "autograd"):
        found = values_and_gradients(run(single, backend=backend), single)
        errors[backend] = max(
            float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
        )
    assert errors["manual"] < 10 * errors["autograd"] < 1e-3


@pytest.mark.parametrize("index", [0, 1, 3])  # outputs, a weight, a bias
def test_gradients_of_one_output_alone_are_right(index):
    inputs = make_inputs(num_tokens=3 * C)
    found, expected = (
        torch.autograd.grad(
            run(inputs, backend=backend)[index].sum(),
            inputs.tensors(),
            allow_unused=True,
            materialize_grads=True,
        )
        for backend in ("manual", "autograd")
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-9)


def test_the_state_given_is_not_modified_by_hand():
    inputs = make_inputs(num_tokens=4 * C, requires_grad=False)
    _, state = ttt_mlp_with_states(*inputs.cut(0, 2 * C), mini_batch_size=C, backend="manual")
    before = [part.clone() for part in (*state.start_weights, *state.start_biases)]
    ttt_mlp_with_states(*inputs.cut(2 * C, 4 * C), mini_batch_size=C, backend="manual", state=state)
    for a, b in zip((*state.start_weights, *state.start_biases), before, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_an_error_by_hand_and_not_a_wrong_number():
    inputs = make_inputs(num_tokens=2 * C)
    (gradient,) = torch.autograd.grad(
        run(inputs, backend="manual")[0].square().sum(), inputs.xq, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _peak_bytes(function):
    with StorageTracker() as tracker:
        function()
    return max(level for _, level in tracker.history)


def _large_inputs(num_batches):
    return make_inputs(
        batch_size=1, num_heads=1, num_tokens=num_batches * C, head_dim=64, dtype=torch.float32
    )


def test_inference_by_hand_keeps_one_state_whatever_the_length():
    state_bytes = 2 * 64 * 128 * 4
    peaks = {}
    for num_batches in (32, 256):
        inputs = _large_inputs(num_batches)
        with torch.no_grad():
            peaks[num_batches] = _peak_bytes(lambda inputs=inputs: run(inputs, backend="manual"))
    # What grows are the outputs and copies of the inputs.
    assert peaks[256] - peaks[32] < (256 - 32) * state_bytes / 10


def test_training_by_hand_needs_a_third_of_the_memory():
    inputs = _large_inputs(256)
    by_hand, by_autograd = (
        _peak_bytes(lambda backend=backend: run(inputs, backend=backend)[0].sum().backward())
        for backend in ("manual", "autograd")
    )
    assert by_hand < by_autograd / 3


def test_auto_is_by_hand_on_the_cpu_and_a_state_that_decays_is_left_to_autograd():
    tokens = torch.zeros(1)
    assert choose_backend("auto", tokens) == "manual"
    assert choose_backend("autograd", tokens) == "autograd"
    assert choose_backend("manual", tokens, state_decay=0.1) == "autograd"
    assert choose_backend("compiled", tokens.to("meta")) == "manual"


def test_compiled_without_a_compiler_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(backends, "_has_compiler", lambda device: False)
    with pytest.raises(ValueError, match=r"backend 'compiled' needs a C\+\+ compiler.*use 'manual'"):
        choose_backend("compiled", torch.zeros(1))
    args = build_args(TrainArgs, {"ttt": {"enable": True, "backend": "compiled"}})
    with pytest.raises(ConfigError, match=r"^ttt.backend 'compiled' needs"):
        _check_backend(args, torch.device("cpu"))


@pytest.mark.parametrize("backend", ["autograd", "manual", needs_compiler("compiled")])
def test_the_configuration_reaches_the_operator(backend, monkeypatch):
    layer = TTTLayer(TTTConfig(model_dim=8, num_heads=2, mini_batch_size=C, backend=backend))
    assert layer.inner_loop().settings.backend == backend
    calls = []
    monkeypatch.setattr(
        "moshi_ttt.inner_loop.run_manual", lambda *args: calls.append(args) or run_manual(*args)
    )
    with torch.no_grad():
        layer(torch.randn(1, 2 * C, 8))
    assert [call[-1].backend for call in calls] == ([] if backend == "autograd" else [backend])


def test_what_is_around_the_operator_is_compiled_in_training_passes_alone(monkeypatch):
    layer = TTTLayer(TTTConfig(model_dim=8, num_heads=2, mini_batch_size=C))
    names = []
    monkeypatch.setattr(InnerLoop, "compiles", lambda *_: True)
    compiled = "moshi_ttt.ttt_layer.compiled"
    monkeypatch.setattr(compiled, lambda method: names.append(method.__name__) or method)
    x = torch.randn(1, C + 1, 8)
    layer(x)
    assert names == ["_normalise_input", "_inner_inputs", "_normalise_output"]
    with torch.no_grad(), layer.streaming(1):
        layer(x)
    with torch.no_grad():
        layer(x)
    assert len(names) == 3


@pytest.mark.parametrize(
    ("chosen", "device", "has_compiler", "expected"),
    [
        ("compiled", "cpu", True, True),
        ("manual", "cuda", True, False),
        ("autograd", "cuda", True, False),
        ("fused", "cuda", True, True),
        ("fused", "cuda", False, False),
        ("fused", "cpu", True, False),  # in Triton's interpreter, beside which torch.compile does not work
    ],
)
def test_what_is_around_the_operator_is_compiled_where_the_operator_has_kernels_made(
    chosen, device, has_compiler, expected, monkeypatch
):
    monkeypatch.setattr(backends, "_has_compiler", lambda _: has_compiler)
    tokens = Mock(is_cuda=device == "cuda")
    assert backends.compiles(chosen, tokens) is expected


@pytest.mark.slow
@pytest.mark.parametrize("backend", [needs_compiler("compiled")])
def test_a_compiled_layer_equals_the_eager_one_and_layers_share_their_graphs(backend):
    config = TTTConfig(model_dim=32, num_heads=2, mini_batch_size=C, use_rope=False)
    torch.manual_seed(0)
    layers = [TTTLayer(config, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(2, 3 * C + 1, 32, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.rand(2, x.shape[1]) > 0.2):
        graphs = []
        for layer in layers:
            results = []
            for name in ("manual", backend):
                layer.config = replace(config, backend=name)
                with layer.passing(token_mask=mask):
                    out = layer(x)
                results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
            for found, expected in zip(*results, strict=True):
                assert_close(found, expected, 1e-9)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1] == graphs[2]
