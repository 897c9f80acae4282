"""Between Moshi's layout and the mini-batch grid."""

import pytest
import torch

from moshi_ttt import TTTConfig
from moshi_ttt.format_utils import merge_heads, moshi_to_ttt_format, split_heads, ttt_to_moshi_format

CONFIG = TTTConfig(model_dim=12, num_heads=3, mini_batch_size=4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12])
def test_there_and_back_changes_nothing(length):
    x = torch.randn(2, length, 12)
    grid, info = moshi_to_ttt_format(x, CONFIG)
    padded = -(-length // 4) * 4
    assert info == {"original_length": length, "padded_length": padded}
    assert grid.shape == (2, 3, padded // 4, 4, 4)
    assert torch.equal(ttt_to_moshi_format(grid, length), x)


def test_a_frame_lands_in_its_mini_batch_and_a_channel_in_its_head():
    x = torch.arange(2 * 6 * 12.0).view(2, 6, 12)
    grid, _ = moshi_to_ttt_format(x, CONFIG)
    # Frame 5 is the second of mini-batch 1; channel 7 is the fourth of head 1.
    assert grid[1, 1, 1, 1, 3] == x[1, 5, 7]
    assert (grid[:, :, 1, 2:] == 0).all()


def test_heads_split_and_merge():
    x = torch.randn(2, 5, 12)
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"Expected \[B, T, 12\], got \[2, 5, 13\]"):
        moshi_to_ttt_format(torch.zeros(2, 5, 13), CONFIG)
    with pytest.raises(ValueError, match="at least 9 frames"):
        ttt_to_moshi_format(torch.zeros(2, 3, 2, 4, 4), 9)
