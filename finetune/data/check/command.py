"""The command line of `python -m finetune.data.check`."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from finetune.commands import Parser
from finetune.data.args import TextOptions
from finetune.data.check.data_set import CheckedLine, check_data_set, sorted_findings
from finetune.data.check.fast import MONO
from finetune.data.check.fix import FIXABLE, fix_durations, is_fixable
from finetune.data.check.full import Settings, Spelling
from finetune.data.check.overview import write_overview
from finetune.data.check.report import short_name, text_report, write_json_report
from finetune.errors import ConfigError
from finetune.monitoring.html_page import SUFFIXES
from moshi_ttt.files.state_file import check_writable

TEXT = ("given", "none")


def check(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, see `python -m finetune.data.check --help`.

    Returns:
        The exit status: 1 where there are errors.

    Raises:
        UserError: an option or the manifest cannot be used.
        StateError: a report cannot be written, which is found out before anything is checked.
    """
    options = _parser().parse_args(arguments)
    if options.jobs < 1:
        raise ConfigError(f"--jobs: {options.jobs} is less than 1.")
    for path in (options.json, options.overview):
        if path is not None:
            check_writable(path)
    if options.overview is not None and options.overview.suffix not in SUFFIXES:
        raise ConfigError(f"--overview: {options.overview} must end in {' or '.join(SUFFIXES)}.")
    tokenizer = _find_tokenizer(options)
    text = TextOptions(options.text, options.keep_and_shift, not options.all_speakers)
    settings = Settings(mono=options.mono, tokenizer=tokenizer, text=text)
    manifest = options.manifest.expanduser()
    items = check_data_set(manifest, settings, num_jobs=options.jobs, follow=_progress)
    if options.fix:
        items = _fix(items)
    findings = sorted_findings(items)
    left_out = ["whether the tokenizer can spell the words and their tokens fit; give --tokenizer"]
    left_out = [] if tokenizer or options.text == "none" else left_out
    print(text_report(items, findings, left_out=left_out))
    if options.json is not None:
        write_json_report(options.json, items, findings)
    if options.overview is not None:
        write_overview(options.overview, items, findings)
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _progress(outcomes: Iterable) -> Iterable:
    return tqdm(outcomes, unit="recording", disable=not sys.stderr.isatty(), leave=False)


def _fix(items: Sequence[CheckedLine]) -> list[CheckedLine]:
    """Write the durations; what is returned has no findings about those any more."""
    for manifest, backup in fix_durations(items).items():
        count = sum(is_fixable(item) for item in items if item.line.manifest == manifest)
        print(f"fixed {count} durations in {short_name(manifest)}; before: {short_name(backup)}")
    return [_without_fixed(item) if is_fixable(item) else item for item in items]


def _without_fixed(item: CheckedLine) -> CheckedLine:
    left = [finding for finding in item.checked.findings if finding.code not in FIXABLE]
    return replace(item, checked=replace(item.checked, findings=left))


def _find_tokenizer(options: argparse.Namespace) -> Path | None:
    path = options.tokenizer
    if path is None and (options.checkpoint or options.base):
        path = _tokenizer_of_model(options.checkpoint, options.base)
    if path is not None:
        Spelling(path)  # refused here rather than in every process
    return path


def _tokenizer_of_model(checkpoint: str | None, base: str | None) -> Path:
    # Only here: both bring torch and Moshi.
    from finetune.args import ModelPaths
    from finetune.base_model.locate import find_model_files
    from finetune.checkpoint.reading import open_checkpoint

    paths = ModelPaths(hf_repo_id=base)
    if checkpoint is not None:
        paths = open_checkpoint(checkpoint, base=base).model_paths
    return Path(find_model_files(paths).tokenizer)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m finetune.data.check",
        description="Read every file of a data set and say what is wrong with it.",
        epilog="Exit status: 0 no errors, 1 errors, 2 the check could not be made.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "manifest", type=Path, metavar="MANIFEST", help="a .jsonl file, or a folder of manifests"
    )
    parser.add_argument(
        "--mono", choices=MONO, default="error", help="what training does with mono files [%(default)s]"
    )
    parser.add_argument(
        "--text",
        choices=TEXT,
        default="given",
        help="what training does with words [%(default)s]",
    )
    parser.add_argument("--keep-and-shift", action="store_true", help="training sets data.keep_and_shift")
    parser.add_argument(
        "--all-speakers", action="store_true", help="training sets data.keep_main_only to false"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="write the decoded durations into the manifest; the old one is kept as .bak",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings for programs")
    parser.add_argument(
        "--overview", type=Path, metavar="FILE", help="write plots: a page (.html) or a picture (.png)"
    )
    group = parser.add_argument_group("tokenizer", "to see which words it cannot spell or place; one of")
    group.add_argument("--tokenizer", type=Path, metavar="PATH", help="a sentencepiece model")
    group.add_argument("--checkpoint", metavar="PATH", help="that of a trained model")
    group.add_argument(
        "--base", metavar="PATH", help="the tokenizer of a base model: a folder or a repository"
    )
    return parser
