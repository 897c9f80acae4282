"""What the Triton kernels need of a GPU, found by compiling them, without one.

    python -m benchmarks.kernel_resources --arch 90 --head-dim 128 --mini-batch-size 16

prints one line per kernel, shape and precision: shared memory of a block, registers of a thread, and bytes
that a thread spills. `moshi_ttt.fused.layouts` is from here. Needs Triton, which has NVIDIA's
assembler with it.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.commands import Parser, run_command
from finetune.errors import ConfigError
from moshi_ttt.fused.launch import compile_options, group_length
from moshi_ttt.fused.layouts import LAYOUTS
from moshi_ttt.fused.support import EXPANSION, PRECISIONS, interpreted

ARCHS = (80, 86, 89, 90)
KERNELS = ("scan_forward", "scan_backward")
_INTEGERS = ("num_tokens", "N", "H", "NG")
_COUNTERS = ("arrived", "ticket")


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        shared: bytes of shared memory per block.
        registers: per thread.
        spilled: bytes per thread that are stored to and loaded from local memory for want of registers.
    """

    shared: int
    registers: int
    spilled: tuple[int, int]


def resources(kernel: str, arch: int, shape: tuple[int, int], precision: str) -> Resources:
    """Compile a kernel for a GPU that need not be there.

    Args:
        kernel: of `KERNELS`.
        arch: compute capability, 90 for 9.0.
        shape: head_dim and mini_batch_size, of `LAYOUTS`.
        precision: of `PRECISIONS`' values.

    Raises:
        RuntimeError: the assembler says something else than expected.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moshi_ttt.fused import kernels

    function = getattr(kernels, kernel)
    dim, size = shape
    constants: dict[str, Any] = {
        "D": dim,
        "F": EXPANSION * dim,
        "C": size,
        "G": group_length(size) // size,
        "S": LAYOUTS[arch // 10][shape].slices,
        "PRECISION": precision,
    }
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else _type_of(name) for name in names}
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=compile_options(arch // 10))
    said = _assemble(compiled.asm["ptx"], arch, Path(triton.__file__).parent)
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas says neither registers nor spills: {said}")
    return Resources(compiled.metadata.shared, int(registers[1]), (int(spilled[1]), int(spilled[2])))


def _type_of(name: str) -> str:
    if name in _INTEGERS:
        return "i32"
    if name in _COUNTERS:
        return "*i32"
    return "fp32" if name == "eps" else "*fp32"


def _assemble(ptx: str, arch: int, triton_folder: Path) -> str:
    """What NVIDIA's assembler says of the code."""
    assembler = triton_folder / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        command = [
            str(assembler),
            "-v",
            f"-arch={name}",
            "-o",
            str(Path(folder, "kernel.cubin")),
            str(source),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _rows(options: argparse.Namespace) -> Iterator[tuple[str, int, tuple[int, int], str]]:
    for arch in options.arch:
        for precision in options.precision:
            for shape in LAYOUTS[arch // 10]:
                if shape[0] in options.head_dim and shape[1] in options.mini_batch_size:
                    for kernel in KERNELS:
                        yield kernel, arch, shape, precision


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Raises:
        ConfigError: Triton's interpreter is switched on.
    """
    dims, sizes = (sorted(set(numbers)) for numbers in zip(*LAYOUTS[9], strict=True))
    names = list(PRECISIONS.values())
    parser = Parser(
        prog="python -m benchmarks.kernel_resources",
        description="What the Triton kernels need of a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=[90], help="compute capabilities, 90 for 9.0"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", choices=dims, default=dims)
    parser.add_argument("--mini-batch-size", type=int, nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--precision", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    if interpreted():
        raise ConfigError("TRITON_INTERPRET is 1: kernels that are interpreted are not compiled; unset it.")
    print("| kernel | GPU | D | C | precision | shared memory | registers | spilled, stored / loaded |")
    print("|---|---|---|---|---|---|---|---|")
    for kernel, arch, (dim, size), precision in _rows(options):
        found = resources(kernel, arch, (dim, size), precision)
        print(
            f"| {kernel} | sm_{arch} | {dim} | {size} | {precision} | {found.shared:,} | {found.registers} | "
            f"{found.spilled[0]:,} / {found.spilled[1]:,} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_command(main)
