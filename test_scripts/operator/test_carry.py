"""Memory carried from chunk to chunk equals one pass over the recording."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

from conftest import make_codes, make_tiny_lm
from moshi_ttt.carry import empty_carry, row_of_carry, stack_carries
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid_model import patch_lm_model, ttt_layers
from moshi_ttt.ttt_layer import TTTLayer

C = 8


def make_layer(**settings):
    torch.manual_seed(0)
    config = TTTConfig(model_dim=32, num_heads=2, mini_batch_size=C, ttt_base_lr=5.0, **settings)
    return TTTLayer(config, dtype=torch.float64)


def fresh(layer, batch_size=1):
    return empty_carry(layer.config, batch_size=batch_size, dtype=torch.float64)


def go_on(layer, x, carry):
    kept = []
    with layer.passing(carry=carry, keep_carry=kept.append):
        out = layer(x)
    return out, kept[0]


@pytest.mark.parametrize("size", [1, C - 1, C, C + 1, 2 * C, 2 * C + 2, 37])
@pytest.mark.parametrize("settings", [{}, {"use_rope": True, "state_decay": 0.1}, {"ttt_mlp_layers": 3}])
def test_chunks_of_any_size_equal_one_pass(size, settings):
    layer = make_layer(**settings)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    carry, outs = fresh(layer, 2), []
    for part in x.split(size, 1):
        out, carry = go_on(layer, part, carry)
        outs.append(out)
    assert (torch.cat(outs, 1) - layer(x)).abs().max() < 1e-12


@pytest.mark.parametrize("seen", [(0, 5, 27), (C, 0, C), (7, 15, 1)])
def test_rows_may_stand_at_different_places(seen):
    layer = make_layer(use_rope=True)
    x = torch.randn(3, 80, 32, dtype=torch.float64)
    whole = layer(x)
    carries = [
        go_on(layer, x[row : row + 1, :frames], fresh(layer))[1] if frames else fresh(layer)
        for row, frames in enumerate(seen)
    ]
    carry, places = stack_carries(carries), list(seen)
    for size in (18, 2, 13):
        parts = torch.stack([x[row, place : place + size] for row, place in enumerate(places)])
        expected = torch.stack([whole[row, place : place + size] for row, place in enumerate(places)])
        out, carry = go_on(layer, parts, carry)
        assert (out - expected).abs().max() < 1e-12
        places = [place + size for place in places]
        assert carry.num_pending == tuple(place % C for place in places)


def test_a_pass_leaves_its_carry_as_it_was():
    layer = make_layer()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    _, carry = go_on(layer, x, fresh(layer))
    before = row_of_carry(carry, 0)
    first, second = go_on(layer, x, carry)[0], go_on(layer, x, carry)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before.weights, carry.weights, strict=True))
    assert torch.equal(before.k, carry.k)


def test_w0_has_its_gradient_in_every_chunk_and_the_carry_has_none():
    layer = make_layer()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    carry = fresh(layer)
    for part in x.split(10, 1):
        layer.zero_grad()
        out, carry = go_on(layer, part, carry)
        out.square().sum().backward()
        assert all(weight.grad.abs().max() > 0 for weight in layer.weights)
        assert not any(tensor.requires_grad for tensor in (*carry.weights, *carry.biases, carry.k, carry.v))


def test_padding_is_not_remembered():
    layer = make_layer()
    x = torch.randn(1, 2 * C, 32, dtype=torch.float64)
    mask = torch.arange(2 * C)[None] < C
    _, short = go_on(layer, x[:, :C], fresh(layer))
    with layer.passing(token_mask=mask):
        _, padded = go_on(layer, x, fresh(layer))
    assert all(torch.equal(a, b) for a, b in zip(short.weights, padded.weights, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_neither_gradients_nor_memory(padded):
    results = []
    for checkpointing in (False, True):
        lm = make_tiny_lm(gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        patch_lm_model(lm, [1, 3], TTTConfig(model_dim=32, num_heads=4, mini_batch_size=C, ttt_base_lr=5.0))
        codes = make_codes(lm, 2, 40)
        if padded:
            codes[1, :, 30:] = lm.zero_token_id
        layers = ttt_layers(lm).values()
        carries = {layer: empty_carry(layer.config, batch_size=2, dtype=torch.float64) for layer in layers}
        for part in codes.split(20, 2):
            lm.zero_grad()
            after = {}
            with ExitStack() as stack:
                for layer in layers:
                    keep = partial(after.__setitem__, layer)
                    stack.enter_context(layer.passing(carry=carries[layer], keep_carry=keep))
                lm(part).text_logits[:, :, :10].square().sum().backward()
            carries = after
        gradients = [parameter.grad for parameter in lm.parameters() if parameter.grad is not None]
        results.append([*gradients, *(w for carry in carries.values() for w in carry.weights)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
