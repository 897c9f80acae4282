"""The operator and its reference against values computed independently."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moshi_ttt.ops import ttt_mlp_with_states
from moshi_ttt.reference import ttt_mlp_reference
from ttt_inputs import assert_close, needs_compiler

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    settings = {
        "mini_batch_size": int(metadata["mini_batch_size"]),
        "causal": metadata["causal"] == "True",
        "eps": float(metadata["eps"]),
    }
    return tensors, settings


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
@pytest.mark.parametrize("name", ["autograd", "manual", needs_compiler("compiled"), "reference"])
def test_values_and_gradients_equal_the_golden_ones(path, name):
    implementation = IMPLEMENTATIONS[name]
    tensors, settings = _read(path)
    num_layers = sum(name.startswith("weight_") for name in tensors)
    names = ["xq", "xk", "xv", "eta", "ln_weight", "ln_bias"]
    names += [f"{kind}_{i}" for kind in ("weight", "bias") for i in range(num_layers)]
    leaves = {name: tensors[name].clone().requires_grad_() for name in names}
    weights = [leaves[f"weight_{i}"] for i in range(num_layers)]
    biases = [leaves[f"bias_{i}"] for i in range(num_layers)]
    out, final_weights, final_biases = implementation(
        *(leaves[name] for name in ("xq", "xk", "xv", "eta")),
        weights,
        biases,
        leaves["ln_weight"],
        leaves["ln_bias"],
        **settings,
    )
    values = {"out": out}
    values |= {f"final_weight_{i}": w for i, w in enumerate(final_weights)}
    values |= {f"final_bias_{i}": b for i, b in enumerate(final_biases)}
    for name, value in values.items():
        assert_close(value, tensors[name], 1e-9)
    sum((value * tensors[f"cotangent_{name}"]).sum() for name, value in values.items()).backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, tensors[f"grad_{name}"], 1e-9)
