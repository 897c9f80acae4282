"""Outputs, final states and gradients of the TTT-MLP that were computed independently."""

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from project_root import ROOT
from ttt_inputs import assert_close

GOLDEN = sorted((ROOT / "test_scripts" / "golden").glob("*.safetensors"))

Implementation = Callable[..., tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]


def check_golden_values(path: Path, implementation: Implementation) -> None:
    """Compare an implementation with a file of `GOLDEN`, all to 1e-9.

    Args:
        path: of the file.
        implementation: takes the arguments of `ttt_mlp`, returns outputs, final weights and final biases.
    """
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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    settings = {
        "mini_batch_size": int(metadata["mini_batch_size"]),
        "causal": metadata["causal"] == "True",
        "eps": float(metadata["eps"]),
    }
    return tensors, settings
