"""Moshi 7B on the meta device: parameter counts and the classification of every parameter."""

import pytest
import torch
from moshi.models import loaders
from moshi.models.lm import LMModel

from finetune.args import TTTArgs
from finetune.ttt_integration import apply_ttt_to_model
from finetune.ttt_utils import classify_ttt_parameter, get_parameter_groups


@pytest.fixture(scope="module")
def moshi_7b() -> LMModel:
    with torch.device("meta"):
        return LMModel(device="meta", dtype=torch.bfloat16, **loaders._lm_kwargs)


def test_parameter_counts(moshi_7b):
    stock = {name: p.numel() for name, p in moshi_7b.named_parameters()}
    assert sum(stock.values()) == 7_687_729_152
    assert apply_ttt_to_model(moshi_7b, TTTArgs(enable=True, layers="29,30,31")) == [29, 30, 31]
    new = {name: p.numel() for name, p in moshi_7b.named_parameters() if name not in stock}
    assert sum(new.values()) == 3 * (71_491_616 + 4_096)
    without_pre_norm = sum(n for name, n in new.items() if "pre_norm" not in name)
    assert without_pre_norm == 3 * 71_491_616
    groups = get_parameter_groups(moshi_7b)
    assert {name: sum(p.numel() for p in group) for name, group in groups.items()} == {
        "base": 7_687_729_152,
        "ttt_weights": 3 * (71_491_616 + 4_096 - 4_096),
        "ttt_alpha": 3 * 4_096,
    }
    for name in stock:
        assert classify_ttt_parameter(name) == "base"
    assert all(p.is_meta for p in moshi_7b.parameters())


def test_middle_is_layers_8_to_23():
    assert TTTArgs(layers="middle").layer_indices(32) == list(range(8, 24))
