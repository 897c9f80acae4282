"""Is a run healthy? Command line: `python -m finetune.diagnose RUN_DIR [--report FILE.html]`.

Exit status: 0 healthy, 1 something was outside its range, 2 it cannot be judged.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune.commands import Parser
from finetune.diagnose.page import write_report
from finetune.diagnose.verdict import conclusion, diagnose_run, remark_lines, table_lines
from finetune.errors import ConfigError
from finetune.monitoring.html_page import SUFFIXES


def diagnose(arguments: Sequence[str] | None = None) -> int:
    """Judge a run and print the verdict.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0 or 1.

    Raises:
        UserError: the run cannot be judged.
    """
    options = _parse(arguments)
    if options.report is not None and options.report.suffix not in SUFFIXES:
        raise ConfigError(f"--report: {options.report} must end in {' or '.join(SUFFIXES)}.")
    diagnosis = diagnose_run(options.run_dir)
    for line in table_lines(diagnosis):
        print(line)
    print()
    for line in remark_lines(diagnosis):
        print(line)
    print(conclusion(diagnosis))
    if options.report is not None:
        write_report(diagnosis, options.report)
        print(f"Report: {options.report}")
    return 0 if diagnosis.is_healthy else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m finetune.diagnose",
        description="Is a run healthy? Exit status 0: yes, 1: no, 2: it cannot be judged.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="of a run, also while it trains")
    parser.add_argument("--report", type=Path, metavar="FILE", help="a page (.html) or its plots (.png)")
    return parser.parse_args(arguments)
