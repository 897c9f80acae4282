"""The operator and its reference against values computed independently."""

import pytest

from golden_values import GOLDEN, check_golden_values
from moshi_ttt.ops import ttt_mlp_with_states
from moshi_ttt.reference import ttt_mlp_reference


def _operator(*args, **settings):
    out, state = ttt_mlp_with_states(*args, **settings)
    return out, state.weights, state.biases


def test_there_are_golden_values_for_one_two_and_three_layers_and_both_forms():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("implementation", [_operator, ttt_mlp_reference], ids=["ops", "reference"])
def test_values_and_gradients_equal_the_golden_ones(path, implementation):
    check_golden_values(path, implementation)
