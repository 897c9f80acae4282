"""Measure speed and memory: python -m benchmarks [PART ...].

python -m benchmarks                             all parts (`model` on a GPU only), runs/bench/bench.json
python -m benchmarks operator streaming --threads 2
python -m benchmarks --quick                     tiny sizes, to see that everything works
"""

import argparse
import gc
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.settings import Settings
from benchmarks.report import PARTS, make_report
from finetune.commands import Parser, run_command
from finetune.distributed import choose_device
from finetune.errors import ConfigError
from finetune.inference.options import positive_integer
from moshi_ttt.backends import choose_backend

FUSED_DIMS = (128, 512, 128)  # of the inner MLP in Moshi 7B


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and print its tables.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: an argument is wrong.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    options = _parse(arguments)
    unknown = next((part for part in options.parts if part not in PARTS), None)
    if unknown is not None:
        raise ConfigError(f"{unknown}: no such part; there are {', '.join(PARTS)}.")
    if options.out.suffix != ".json":
        raise ConfigError(f"--out: {options.out} must end in .json; the tables go into an .md beside it.")
    device = choose_device(options.device)
    fits = device.type == "cuda" or options.quick
    if "model" in options.parts and not fits:
        raise ConfigError("model: needs a GPU with 80 GB, or --quick for tiny sizes.")
    settings = Settings(
        device=device,
        dtype=getattr(torch, options.dtype),
        threads=options.threads,
        repetitions=options.repetitions,
        quick=options.quick,
        compiled=_measures_compiled(options.compiled, device),
        fused=choose_backend("auto", torch.empty(0, device=device), dims=FUSED_DIMS) == "fused",
    )
    torch.set_num_threads(settings.threads)
    gc.freeze()  # what was imported need not be looked at by each of the collections between measurements
    try:
        print(
            make_report(
                options.parts or [part for part in PARTS if part != "model" or fits], settings, options.out
            ),
            end="",
        )
    finally:
        gc.unfreeze()
    return 0


def _measures_compiled(is_asked: bool, device: torch.device) -> bool:
    """Whether the compiled backend is among the candidates: asked for, or what this device runs by itself."""
    tokens = torch.empty(0, device=device)
    if not is_asked:
        return choose_backend("auto", tokens) == "compiled"
    try:
        choose_backend("compiled", tokens)
    except ValueError as error:
        raise ConfigError(f"--compiled: {error}") from None
    return True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks", description="Measure speed and memory.", allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none means all")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/bench.json"), help="the report (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, the figures mean nothing")
    parser.add_argument("--threads", type=positive_integer, default=1, help="of the CPU (%(default)s)")
    parser.add_argument(
        "--repetitions", type=positive_integer, default=7, help="timed runs of each candidate (%(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes a GPU where there is one",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of Moshi's layers (%(default)s)"
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also the operator's compiled backend; on a GPU it always is",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
