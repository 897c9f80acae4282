"""How the kernels are cut into programs, by GPU and shape, and the shared memory that takes.

Found by compiling them, `python -m benchmarks.kernel_resources`: as few programs per row as can hold their
slices of both fast weights without spilling much. No other GPUs and shapes were tried.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """Of one shape.

    Attributes:
        slices: programs per row.
        shared: bytes of shared memory per block, by precision, the larger of both kernels.
    """

    slices: int
    shared: dict[str, int]


LAYOUTS: dict[int, dict[tuple[int, int], Layout]] = {
    9: {
        (32, 16): Layout(1, {"tf32x3": 49_152, "tf32": 55_296, "bf16": 32_768}),
        (32, 32): Layout(1, {"tf32x3": 65_536, "tf32": 77_824, "bf16": 32_768}),
        (32, 64): Layout(2, {"tf32x3": 65_536, "tf32": 106_496, "bf16": 32_768}),
        (64, 16): Layout(2, {"tf32x3": 81_920, "tf32": 98_304, "bf16": 65_536}),
        (64, 32): Layout(2, {"tf32x3": 98_304, "tf32": 131_072, "bf16": 65_536}),
        (64, 64): Layout(4, {"tf32x3": 131_072, "tf32": 180_224, "bf16": 32_768}),
        (128, 16): Layout(4, {"tf32x3": 147_456, "tf32": 180_224, "bf16": 131_072}),
        (128, 32): Layout(8, {"tf32x3": 98_304, "tf32": 147_456, "bf16": 65_536}),
        (128, 64): Layout(16, {"tf32x3": 229_376, "tf32": 212_992, "bf16": 49_152}),
    },
    8: {
        (32, 16): Layout(2, {"tf32x3": 20_480, "tf32": 26_624, "bf16": 16_384}),
        (32, 32): Layout(2, {"tf32x3": 32_768, "tf32": 36_864, "bf16": 16_384}),
        (32, 64): Layout(2, {"tf32x3": 65_536, "tf32": 73_728, "bf16": 32_768}),
        (64, 16): Layout(4, {"tf32x3": 40_960, "tf32": 49_152, "bf16": 32_768}),
        (64, 32): Layout(4, {"tf32x3": 49_152, "tf32": 65_536, "bf16": 32_768}),
        (64, 64): Layout(4, {"tf32x3": 98_304, "tf32": 98_304, "bf16": 32_768}),
        (128, 16): Layout(8, {"tf32x3": 81_920, "tf32": 61_440, "bf16": 32_768}),
        (128, 32): Layout(8, {"tf32x3": 98_304, "tf32": 90_112, "bf16": 32_768}),
        (128, 64): Layout(16, {"tf32x3": 196_608, "tf32": 155_648, "bf16": 49_152}),
    },
}
"""By the first number of the compute capability, then by head_dim and mini_batch_size."""
