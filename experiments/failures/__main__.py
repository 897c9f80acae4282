"""Train the cases and see what the monitor finds, in about two minutes on one core.

    python -m experiments.failures --out runs/failures
    python -m experiments.failures one_rate_low bfloat16_gate --out runs/failures

Written to the folder, which must be new or empty: `results.json`, `report.md`, `cases.png`, a run directory
and a figure of each case.
Exit status 1 if a case was not as expected.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.failures.cases import CASES
from experiments.failures.leak import measure_leak
from experiments.failures.report import cases_table, leak_table, write_figures
from experiments.failures.runs import run_case
from experiments.folders import make_empty_folder
from finetune.commands import Parser, run_command
from finetune.demo.assets import make_demo_assets
from finetune.errors import ConfigError
from finetune.files import write_json
from finetune.inference.options import positive_integer
from moshi_ttt.files.atomic_file import replacing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0 or 1.

    Raises:
        ConfigError: there is no such case, or the folder is not empty.
    """
    options = parse(arguments)
    unknown = next((name for name in options.cases if name not in CASES), None)
    if unknown is not None:
        raise ConfigError(f"{unknown}: no such case; there are {', '.join(CASES)}.")
    make_empty_folder(options.out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    names = options.cases or list(CASES)
    demo = make_demo_assets(options.out / "demo", num_train=4, num_eval=1, minutes=1.0, seed=0)
    results: dict[str, Any] = {}
    leaks: dict[str, Any] = {}
    for name in names:
        results[name] = run_case(name, CASES[name], demo, options.out, num_steps=options.steps)
        _save(options, results, leaks)
    if "non_causal" in names:
        leaks = {str(causal).lower(): measure_leak(causal=causal) for causal in (True, False)}
        _save(options, results, leaks)
    report = "\n\n".join([cases_table(results), *([leak_table(leaks)] if leaks else [])])
    with replacing(options.out / "report.md") as partial:
        partial.write_text(report + "\n", encoding="utf-8")
    write_figures(options.out, names)
    print(report)
    return 0 if all(result["as_expected"] for result in results.values()) else 1


def _save(options: argparse.Namespace, results: dict[str, Any], leaks: dict[str, Any]) -> None:
    with replacing(options.out / "results.json") as partial:
        write_json(partial, {"steps": options.steps, "cases": results, "leak": leaks})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; a mistake ends the process with one line and status 2."""
    parser = Parser(
        prog="python -m experiments.failures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; none means all")
    parser.add_argument("--out", type=Path, default=Path("runs/failures"), help="folder (%(default)s)")
    parser.add_argument("--steps", type=positive_integer, default=24, help="of each case (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
