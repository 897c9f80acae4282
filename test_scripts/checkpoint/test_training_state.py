"""The tensors of a training state: what is restored, and what a foreign one may do."""

import os
import pickle
import random

import numpy as np
import pytest
import torch

from conftest import make_tiny_lm
from finetune.checkpoint.resume_tensors import StateReader, collect_state, load_state, save_state
from finetune.errors import CheckpointError


@pytest.fixture
def trained():
    """A model with an optimiser that has made steps; some parameters frozen, one never used."""
    lm = make_tiny_lm(dtype=torch.float32)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("norm" in name or name == "text_linear.weight")
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in parameters[1:]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return lm, optimizer


def load(folder, lm, **others):
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=0.1)
    load_state(folder, lm, optimizer, others, source="here")
    return optimizer


def test_weights_moments_random_states_and_other_tensors_come_back(trained, tmp_path):
    lm, optimizer = trained
    save_state(collect_state(lm, optimizer, {"gate.1": torch.arange(3.0)}), tmp_path / "state", None)
    drawn = torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss(0, 1)
    other = make_tiny_lm(dtype=torch.float32, seed=1)
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(lm.get_parameter(name).requires_grad)
    gate = torch.zeros(3)
    restored = load(tmp_path / "state", other, **{"gate.1": gate})
    assert gate.tolist() == [0.0, 1.0, 2.0]
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            twin = other.get_parameter(name)
            assert torch.equal(parameter, twin)
            moments, found = optimizer.state.get(parameter, {}), restored.state.get(twin, {})
            assert moments.keys() == found.keys()
            assert all(torch.equal(moments[key], found[key]) for key in moments)
    again = torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss(0, 1)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_a_state_without_some_moments_of_the_optimiser_is_one_line(trained, tmp_path):
    lm, optimizer = trained
    tensors = collect_state(lm, optimizer, {})
    name = next(name for name in tensors if name.endswith(".exp_avg_sq"))
    save_state({key: value for key, value in tensors.items() if key != name}, tmp_path / "state", None)
    with pytest.raises(CheckpointError, match=r"other moments than AdamW \(exp_avg_sq\)"):
        load(tmp_path / "state", lm)


@pytest.mark.parametrize("change", ["fewer", "more", "shape"])
def test_a_state_of_another_model_is_one_line(trained, tmp_path, change):
    lm, optimizer = trained
    save_state(collect_state(lm, optimizer, {}), tmp_path / "state", None)
    if change == "fewer":
        lm.text_linear.weight.requires_grad_(False)
    elif change == "more":
        lm.text_emb.weight.requires_grad_(True)
    else:
        lm.text_linear.weight = torch.nn.Parameter(torch.zeros(3, 3))
    message = {
        "fewer": "here: text_linear.weight has no place in this model",
        "more": "here: text_emb.weight is not in the checkpoint",
        "shape": "here: text_linear.weight has another shape",
    }[change]
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "state", lm)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["posix.mkdir", "torch.distributed.checkpoint.metadata.os.mkdir", "dict"])
def test_an_index_cannot_call_functions(trained, tmp_path, name):
    lm, optimizer = trained
    save_state(collect_state(lm, optimizer, {}), tmp_path / "state", None)
    made = tmp_path / "made"
    if name == "dict":
        content = pickle.dumps({"no": "index"})
    elif name == "posix.mkdir":
        content = pickle.dumps(_Hostile(str(made)))
    else:
        module, path = b"torch.distributed.checkpoint.metadata", str(made).encode()
        content = b"\x80\x04" + _text(module) + _text(b"os.mkdir") + b"\x93" + _text(path) + b"\x85R."
    (tmp_path / "state" / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"here: the training state cannot be read: .*the index"):
        load(tmp_path / "state", lm)
    assert not made.exists()


def _text(value: bytes) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value


def test_the_index_reads_as_pytorch_reads_it(trained, tmp_path):
    lm, optimizer = trained
    save_state(collect_state(lm, optimizer, {}), tmp_path / "state", None)
    ours = StateReader(tmp_path / "state").read_metadata()
    theirs = torch.distributed.checkpoint.FileSystemReader(tmp_path / "state").read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
