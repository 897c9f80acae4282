"""The operator and its reference against values computed independently."""

import pytest

from golden_values import GOLDEN, check_golden_values
from moshi_ttt.ops import ttt_mlp_with_states
from moshi_ttt.reference import ttt_mlp_reference
from ttt_inputs import needs_compiler


def _operator(backend):
    def run(*args, **settings):
        out, state = ttt_mlp_with_states(*args, backend=backend, **settings)
        return out, state.weights, state.biases

    return run


IMPLEMENTATIONS = {
    "autograd": _operator("autograd"),
    "manual": _operator("manual"),
    "compiled": _operator("compiled"),
    "reference": ttt_mlp_reference,
}


def test_there_are_golden_values_for_one_two_and_three_layers_and_both_forms():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["autograd", "manual", "reference"])
def test_values_and_gradients_equal_the_golden_ones(path, name):
    check_golden_values(path, IMPLEMENTATIONS[name])


@pytest.mark.slow  # half a minute of compiling each
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", [needs_compiler("compiled")])
def test_compiled_values_and_gradients_equal_the_golden_ones(path, name):
    check_golden_values(path, IMPLEMENTATIONS[name])
