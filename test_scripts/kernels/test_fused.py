"""The Triton kernels in Triton's interpreter, against the definition in float64.

Run with TRITON_INTERPRET=1 in a process of their own; `test_scripts/operator/test_fused_backend.py` does.
"""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from moshi_ttt.fused import launch
from moshi_ttt.fused.support import interpreted
from moshi_ttt.ops import ttt_mlp_with_states

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

if interpreted():
    from interpreter import operands_rounded_to, programs_at_the_same_time

    import moshi_ttt.fused.kernels as kernels


def make_arguments(batch_size, num_heads, num_tokens, dim, size):
    """q, k, v, eta, two weights, two biases, norm weight and bias in float64; inner steps that show."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = (batch_size, num_heads, num_tokens)
    q, k = (F.normalize(normal(*tokens, dim), dim=-1) for _ in range(2))
    rates = torch.rand(*tokens, generator=generator, dtype=torch.float64) * 2 / size
    rates[:, :, num_tokens // 2] = 0  # padding
    hidden = 4 * dim
    weights = [normal(num_heads, dim, hidden), normal(num_heads, hidden, dim) / hidden**0.5]
    biases = [0.1 * normal(num_heads, 1, hidden), 0.1 * normal(num_heads, 1, dim)]
    norm = [1 + 0.1 * normal(num_heads, dim), 0.1 * normal(num_heads, dim)]
    return [q, k, k + normal(*tokens, dim), rates, *weights, *biases, *norm]


def results(arguments, dtype, *, lengths, **settings):
    """Outputs, states and the gradients of all arguments; the state is carried through chunks."""
    leaves = [x.to(dtype).requires_grad_() for x in arguments]
    outputs, state, start = [], None, 0
    for length in lengths:
        part = [x[:, :, start : start + length] for x in leaves[:4]]
        out, state = ttt_mlp_with_states(
            *part, leaves[4:6], leaves[6:8], *leaves[8:], state=state, **settings
        )
        outputs.append(out)
        start += length
    found = [torch.cat(outputs, 2), *state.weights, *state.biases]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in found)
    return [*found, *torch.autograd.grad(loss, leaves)]


def worst_error(shape, size, *, lengths=None, causal=True):
    """Largest norm of a difference to the definition, relative to the norm of what it should be."""
    arguments = make_arguments(*shape, size)
    lengths = lengths or [shape[2]]
    settings = {"mini_batch_size": size, "causal": causal}
    expected = results(arguments, torch.float64, lengths=[shape[2]], backend="autograd", **settings)
    found = results(arguments, torch.float32, lengths=lengths, backend="fused", **settings)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch):
    """Every test of this file must have gone through the kernels."""
    calls = []
    run = launch.launch
    monkeypatch.setattr(
        "moshi_ttt.fused.function.launch", lambda *args, **named: calls.append(args[0]) or run(*args, **named)
    )
    yield
    assert calls


@pytest.mark.parametrize(
    ("shape", "size", "causal"),
    [
        ((2, 2, 50, 32), 16, True),  # a begun mini-batch at the end
        ((1, 2, 131, 32), 16, True),  # several groups
        ((1, 1, 48, 32), 16, False),
        ((1, 2, 70, 32), 32, True),
        ((1, 1, 129, 32), 64, False),
        ((1, 1, 50, 64), 16, True),
        ((1, 1, 33, 128), 16, True),
    ],
    ids=str,
)
def test_values_states_and_gradients_equal_the_definition(shape, size, causal):
    assert worst_error(shape, size, causal=causal) < 1e-5


@pytest.mark.parametrize("lengths", [[64, 41], [20, 30, 55], [5, 5, 95]], ids=str)
def test_chunks_with_the_state_carried_equal_one_pass(lengths):
    assert worst_error((1, 2, 105, 32), 16, lengths=lengths) < 1e-5


@pytest.mark.parametrize("seed", [0, 1])
def test_programs_that_wait_for_each_other_agree_and_end(seed, monkeypatch):
    monkeypatch.setattr(launch, "num_slices", lambda shape, major: 2)
    with programs_at_the_same_time(seed):
        assert worst_error((1, 2, 33, 32), 16) < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-3), ("bf16", 1e-2)])
def test_rounded_operands_stay_within_their_precision(precision, tolerance):
    with operands_rounded_to(precision):
        assert 1e-5 < worst_error((1, 1, 130, 64), 16) < tolerance


MUTATIONS = {
    "an unfinished mini-batch is committed": (
        "full = (n * C + C <= num_tokens).to(tl.float32)",
        "full = 1.0",
    ),
    "no du W_1": ("part = _product(du, own_w1, PRECISION) - full", "part = -full"),
    "no second derivative of GELU": (" + own_ds0 * tl.load(u_phi2 + first * F + at_f)", ""),
    "W_1 is not taken back": (
        "own_w1 = _add_product(own_w1, tl.trans(own_x1), s1 * full, PRECISION)",
        "pass",
    ),
    "no mean(G g)": ("- rstd * normed * (tl.sum(push * raw, 1)[:, None] / D)", ""),
    "the weights after a group are those of its start": (
        "(group - 1) * D * F + at_w0",
        "group * D * F + at_w0",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_the_kernels_shows(name, monkeypatch, tmp_path):
    source, (right, wrong) = _source(), MUTATIONS[name]
    assert right in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setitem(sys.modules, "moshi_ttt.fused.kernels", mutant)
    assert worst_error((1, 2, 150, 32), 16) > 1e-3


def _source():
    with open(kernels.__file__, encoding="utf-8") as file:
        return file.read()
