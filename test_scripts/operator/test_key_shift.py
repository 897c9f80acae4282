"""Keys of an earlier frame: the definition, and the same in one pass, in chunks and in a stream."""

import pytest
import torch

from moshi_ttt.carry import empty_carry
from moshi_ttt.config import TTTConfig
from moshi_ttt.inputs.key_shift import no_keys, shift_keys
from moshi_ttt.reference import shift_keys_reference, ttt_mlp_reference
from moshi_ttt.ttt_layer import TTTLayer
from ttt_inputs import assert_close

C, DIM, HEADS = 4, 16, 2


def make_layer(key_shift, **settings):
    torch.manual_seed(0)
    config = TTTConfig(
        model_dim=DIM, num_heads=HEADS, mini_batch_size=C, ttt_base_lr=5.0, key_shift=key_shift, **settings
    )
    return TTTLayer(config, dtype=torch.float64)


def make_mask(num_frames):
    """Padding at the start, in the middle and at the end, another in each row."""
    mask = torch.rand(3, num_frames, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0] = True
    return mask


@pytest.mark.parametrize("key_shift", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 19])
def test_shifted_keys_are_those_of_the_definition_however_the_frames_are_split(key_shift, size):
    keys, mask = torch.randn(3, HEADS, 19, 8, dtype=torch.float64), make_mask(19)
    expected, exists = shift_keys_reference(keys, mask, key_shift=key_shift)
    heard, found = no_keys(keys, key_shift), []
    for part, is_heard in zip(keys.split(size, 2), mask.split(size, 1), strict=True):
        shifted, there, heard = shift_keys(part, heard, is_heard)
        found.append((torch.where(there[:, None, :, None], shifted, 0), there))
    shifted, there = torch.cat([a for a, _ in found], 2), torch.cat([b for _, b in found], 1)
    relevant = mask[:, None, :, None]  # what padding would see is of no meaning
    assert torch.equal(torch.where(relevant, shifted, 0), torch.where(relevant, expected, 0))
    assert torch.equal(there & mask, exists & mask)


def test_without_padding_a_mask_changes_nothing():
    keys = torch.randn(2, HEADS, 9, 8)
    everything = torch.ones(2, 9, dtype=torch.bool)
    (*without, heard), (*masked, also_heard) = (
        shift_keys(keys, no_keys(keys, 2), mask) for mask in (None, everything)
    )
    pairs = zip((*without, *heard), (*masked, *also_heard), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("key_shift", [0, 1, 2])
def test_a_layer_is_its_definition(key_shift):
    """Projections, the shift token by token and the inner loop by automatic differentiation."""
    layer, mask = make_layer(key_shift), make_mask(11)
    x = torch.randn(3, 11, DIM, dtype=torch.float64)
    unshifted = make_layer(0)  # the same weights
    q, k, _, _ = unshifted.prepare(x, torch.arange(11)[None] % C, mask).tokens
    k, exists = shift_keys_reference(k, mask, key_shift=key_shift)
    projected = layer.wv(layer.pre_norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    v = layer.reconstruction_target(k, projected)
    eta = layer.inner_rate(layer.pre_norm(x)) * (mask & exists)[:, None]
    norm = layer.ttt_norm_weight, layer.ttt_norm_bias
    out, *_ = ttt_mlp_reference(
        q, k, v, eta, list(layer.weights), list(layer.biases), *norm, mini_batch_size=C
    )
    with layer.passing(token_mask=mask):
        actual = layer(x)
    expected = layer.wo(layer.post_norm(out.transpose(1, 2).flatten(2)))
    heard = mask[:, :, None]
    assert_close(torch.where(heard, actual, 0), torch.where(heard, expected, 0), 1e-9)


@pytest.mark.parametrize("key_shift", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 3, C, 9])
@pytest.mark.parametrize("use_rope", [False, True])
def test_carried_chunks_and_a_stream_with_padding_equal_one_pass(key_shift, size, use_rope):
    layer, mask = make_layer(key_shift, use_rope=use_rope), make_mask(26)
    x = torch.randn(3, 26, DIM, dtype=torch.float64)
    with layer.passing(token_mask=mask):
        whole = layer(x)
    carried, streamed, kept = [], [], [empty_carry(layer.config, batch_size=3, dtype=torch.float64)]
    parts = list(zip(x.split(size, 1), mask.split(size, 1), strict=True))
    for part, is_heard in parts:
        with layer.passing(token_mask=is_heard, carry=kept[-1], keep_carry=kept.append):
            carried.append(layer(part))
    with torch.no_grad(), layer.streaming(3):
        for part, is_heard in parts:
            with layer.passing(token_mask=is_heard):
                streamed.append(layer(part))
    assert_close(torch.cat(carried, 1), whole, 1e-9)
    assert_close(torch.cat(streamed, 1), whole, 1e-9)


@pytest.mark.parametrize("key_shift", [1, 2])
@torch.no_grad()
def test_the_predecessor_is_what_the_row_itself_heard_last(key_shift):
    """Rows at their own pace, and one that starts anew in between."""
    layer = make_layer(key_shift)
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    heard, out = [0, 0], [[], []]
    with layer.streaming(2):
        for step in range(24):
            if step == 9:
                layer.reset_streaming(torch.tensor([False, True]))
                first = heard[1]
            mask = torch.tensor([step % 3 != 1, step % 4 != 2])
            layer.set_exec_mask(mask)
            frames = layer(torch.stack([x[row, [min(place, 19)]] for row, place in enumerate(heard)]))
            for row in mask.nonzero().flatten().tolist():
                out[row].append(frames[row])
                heard[row] += 1
    assert_close(torch.cat(out[0]), layer(x[:1, : heard[0]])[0], 1e-9)
    assert_close(torch.cat(out[1][:first]), layer(x[1:, :first])[0], 1e-9)
    assert_close(torch.cat(out[1][first:]), layer(x[1:, first : heard[1]])[0], 1e-9)


def test_the_first_frames_of_a_recording_teach_nothing():
    layer = make_layer(2)
    eta = layer.prepare(torch.randn(1, 6, DIM, dtype=torch.float64), torch.arange(6)[None] % C).tokens.eta
    assert (eta[:, :, :2] == 0).all() and (eta[:, :, 2:] > 0).all()


def test_keys_get_their_gradient_from_the_frames_after_them():
    layer = make_layer(1)
    x = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
    layer(x)[:, 3].sum().backward()
    assert all(x.grad[0, frame].abs().max() > 0 for frame in range(4))
    assert (x.grad[0, 4:] == 0).all()


@pytest.mark.parametrize("key_shift", [0, 1, 2])
def test_what_a_row_keeps_for_the_shift_is_that_many_keys(key_shift):
    layer = make_layer(key_shift)
    carried = empty_carry(layer.config, batch_size=3).heard
    with layer.streaming(3):
        streamed = layer._streaming_state.heard
    for heard in (carried, streamed):
        numbers = 0 if heard is None else heard.keys[0].numel()
        assert numbers == key_shift * DIM
