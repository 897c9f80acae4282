"""A corpus of faulty and odd data: every fault is reported with its file, and nothing else is."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from faulty_data import Case, write_corpus
from finetune.args import TrainArgs
from finetune.base_model.codec import load_codec
from finetune.config_io import build_args
from finetune.data.check.data_set import CheckedLine, check_data_set
from finetune.data.check.fast import check_fast
from finetune.data.check.findings import KINDS
from finetune.data.check.full import Settings
from finetune.data.codes.cache import CodeCache
from finetune.data.pipeline import load_recordings
from finetune.data.recordings.lengths import measure_all
from finetune.data.recordings.skipped import SKIPPED_FILE
from finetune.demo.model_folder import open_repository
from finetune.errors import DataError
from finetune.training.run import run_training
from run_helpers import run_args

# What only decoding shows, and training does not refuse.
NOT_SEEN_BY_TRAINING = {"swapped-channels"}


class Corpus(NamedTuple):
    """The corpus on disk, and what the check said of each case."""

    folder: Path
    cases: list[Case]
    items: list[list[CheckedLine]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    cases = write_corpus(folder)
    manifest = folder / "all.jsonl"
    manifest.write_bytes(b"\xef\xbb\xbf" + b"".join(case.line + b"\n" for case in cases))
    items = {item.line.number: item for item in check_data_set(manifest, Settings(), num_jobs=2)}
    heights = [case.line.count(b"\n") + 1 for case in cases]
    ends = list(itertools.accumulate(heights))
    lines = [range(end - height + 1, end + 1) for end, height in zip(ends, heights, strict=True)]
    return Corpus(folder, cases, [[items[n] for n in numbers if n in items] for numbers in lines])


def codes_of(items: list[CheckedLine]) -> set[str]:
    return {finding.code for item in items for finding in item.findings} - {"resampled"}


def test_the_corpus_is_large(corpus):
    assert sum(case.code is not None for case in corpus.cases) >= 120
    assert sum(case.code is None for case in corpus.cases) >= 30


def test_every_fault_is_reported_with_a_reason_that_fits(corpus):
    missed = {
        case.name: (case.code, codes_of(items))
        for case, items in zip(corpus.cases, corpus.items, strict=True)
        if case.code is not None and case.code not in codes_of(items)
    }
    assert missed == {}


def test_nothing_is_found_in_what_is_right(corpus):
    blamed = {
        case.name: codes_of(items)
        for case, items in zip(corpus.cases, corpus.items, strict=True)
        if case.code is None and codes_of(items)
    }
    assert blamed == {}


def test_no_file_stops_its_process(corpus):
    assert not any("check-failed" in codes_of(items) for items in corpus.items)


def test_findings_name_file_and_line_in_one_line(corpus):
    for case, items in zip(corpus.cases, corpus.items, strict=True):
        for item in items:
            for finding in item.findings:
                assert finding.line == f"{item.line.manifest} line {item.line.number}"
                assert "\n" not in finding.reason, case.name
                expected = item.line.manifest if item.line.entry is None else item.line.entry.path
                assert finding.path in (expected, expected.with_suffix(".json") if expected.name else None)


def test_what_the_fast_check_finds_the_full_check_finds(corpus):
    for case, items in zip(corpus.cases, corpus.items, strict=True):
        recording = items[-1].recording
        if recording is None:
            continue
        fast = {finding.code for finding in check_fast(recording)}
        assert fast <= codes_of(items), case.name
        if case.code is not None and not case.code.startswith(("manifest", "shared")):
            assert (case.code in fast) == case.by_header, case.name


def test_no_file_stops_the_measuring_of_durations(corpus):
    files = sorted(path for path in corpus.folder.iterdir() if path.suffix in {".wav", ".flac", ".mp3"})
    measured = {file.path.name: file for file in measure_all(files, num_jobs=2)}
    assert list(measured) == [path.name for path in files]
    assert measured["good.wav"].duration_sec == 0.5
    assert measured["good-48-kHz.wav"].duration_sec == 0.5
    assert measured["no-json.wav"].reason.startswith("has no word timings")
    for name in (
        "pipe.wav",
        "device.wav",
        "loop.wav",
        "zero-rate.wav",
        "text-named-wav.wav",
        "no-samples.wav",
    ):
        assert measured[name].reason, name


def faults_of(corpus):
    """The cases that training is to refuse."""
    return [
        case
        for case in corpus.cases
        if case.code not in (None, *NOT_SEEN_BY_TRAINING) and KINDS[case.code].severity == "error"
    ]


def test_a_run_leaves_out_every_fault_names_it_and_trains_on_all_the_rest(corpus, demo, tmp_path):
    faults = faults_of(corpus)
    refused = {id(case) for case in faults}
    args = run_args(
        demo,
        tmp_path / "run",
        "full",
        data={
            "train_data": str(corpus.folder / "all.jsonl"),
            "cache_dir": str(tmp_path / "codes"),
            "num_workers": 0,
            "on_error": "skip",
        },
        duration_sec=0.48,
        max_steps=1,
        do_ckpt=False,
    )
    run_training(args)
    skipped = json.loads((tmp_path / "run" / SKIPPED_FILE).read_text())
    by_line = {entry["line"]: entry for entry in skipped}
    assert len(by_line) == len(skipped)
    for case, items in zip(corpus.cases, corpus.items, strict=True):
        numbers = [item.line.number for item in items]
        if id(case) in refused:
            assert any(number in by_line for number in numbers), case.name
        else:
            assert not any(number in by_line for number in numbers), (case.name, by_line)
    for entry in skipped:
        assert entry["manifest"] == str(corpus.folder / "all.jsonl")
        assert entry["reason"] and "\n" not in entry["reason"].replace(entry["path"], "")


def test_by_default_each_fault_ends_the_run_with_one_line(corpus, demo, tmp_path):
    info = open_repository(demo.model_dir)
    mimi = load_codec(info, "cpu")
    cache = CodeCache.of_model(info, num_codebooks=mimi.num_codebooks, cache_dir=str(tmp_path))
    manifest = corpus.folder / "one.jsonl"
    args = build_args(TrainArgs, {"data": {"train_data": str(manifest)}, "full_finetuning": True})
    used = []
    for case in faults_of(corpus):
        if case.code == "shared-timings":  # a fault of two lines, which the test above has together
            continue
        manifest.write_bytes(case.line + b"\n")
        try:
            cache.fill(load_recordings(args).train, mimi, progress=False)
        except DataError as error:
            assert "\n" not in str(error).replace(case.name, "")
        else:
            used.append(case.name)
    manifest.unlink()
    assert used == []
