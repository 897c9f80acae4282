"""Options that measurements share."""

import argparse

from finetune.inference.options import positive_integer, seed, whole_number


def add_cache_dir(group: argparse._ArgumentGroup) -> None:
    """Where codes are kept."""
    group.add_argument(
        "--cache-dir", metavar="DIR", help="one folder for all codes (a hidden one beside the recordings)"
    )


def add_max_failures(group: argparse._ArgumentGroup, *, units: str) -> None:
    """How many `units` may fail."""
    group.add_argument(
        "--max-failures",
        type=_count,
        default=0,
        metavar="N",
        help=f"so many {units} may fail before the exit status says so (%(default)s)",
    )


def add_bootstrap(group: argparse._ArgumentGroup, *, units: str, seeds: str) -> None:
    """Draws of `units` for intervals, and what the seed is of."""
    group.add_argument(
        "--resamples",
        type=positive_integer,
        default=1000,
        metavar="N",
        help=f"of the {units}, for the 95 %% intervals (%(default)s)",
    )
    group.add_argument("--seed", type=seed, default=0, help=f"of {seeds} (%(default)s)")


def _count(text: str) -> int:
    return whole_number(text, lowest=0, highest=10**9)
