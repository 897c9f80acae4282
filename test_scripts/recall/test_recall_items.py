"""Folders of items: what is read, what is refused and by which name, and what the demonstration makes."""

import json
from pathlib import Path

import numpy as np
import pytest
import sphn

from finetune.demo.recall.plants import WORDS, Plant
from finetune.errors import DataError
from finetune.evaluation.recall.items import read_items

GOOD = {
    "id": "one",
    "kind": "name",
    "said_by": "user",
    "plants": ["p0.wav", "p1.wav"],
    "cue": "cue.wav",
    "answers": ["a0.wav", "a1.wav"],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Recordings that nobody listens to."""
    (tmp_path / "filler").mkdir()
    for name in ("p0", "p1", "cue", "a0", "a1", "filler/f"):
        sphn.write_wav(str(tmp_path / f"{name}.wav"), np.zeros((2, 1920), dtype=np.float32), 24_000)
    return tmp_path


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "recall.jsonl").write_text(text + "\n")


def test_a_line_is_a_group_of_conversations(folder):
    write(folder, GOOD, GOOD | {"id": "two", "filler": ["cue.wav"], "note": "for people"})
    items = read_items(folder)
    assert items.failures == {}
    one, two = items.groups
    assert (one.name, one.kind, one.said_by) == ("one", "name", "user")
    assert one.plants == (folder / "p0.wav", folder / "p1.wav") and one.answers[1] == folder / "a1.wav"
    assert one.filler == (folder / "filler" / "f.wav",) and two.filler == (folder / "cue.wav",)


FAULTS = {
    "said_by": (GOOD | {"said_by": "cat"}, "said_by: "),
    "no id": ({key: GOOD[key] for key in GOOD if key != "id"}, "id: field required"),
    "one plant": (GOOD | {"plants": ["p0.wav"]}, "plants: "),
    "more answers": (
        GOOD | {"answers": ["a0.wav", "a1.wav", "a0.wav"]},
        "2 plants need as many answers, not 3",
    ),
    "missing file": (GOOD | {"cue": "no.wav"}, "no.wav does not exist; paths are relative to"),
    "path of another type": (GOOD | {"cue": 7}, "cue: "),
    "no filler": (GOOD | {"filler": []}, "filler: "),
    "no object": ("[1]", "a JSON object is needed, not list"),
    "no JSON": ('{"id": ', "not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_line_is_a_failure_by_name_and_the_others_are_read(folder, fault):
    line, message = FAULTS[fault]
    write(folder, line, GOOD | {"id": "good"})
    items = read_items(folder)
    assert [group.name for group in items.groups] == ["good"]
    ((name, reason),) = items.failures.items()
    assert name in ("one", "line 1") and message in reason and "recall.jsonl, line 1: " in reason


def test_an_id_that_comes_twice_is_a_failure(folder):
    write(folder, GOOD, GOOD)
    items = read_items(folder)
    assert len(items.groups) == 1 and "is that of an earlier line" in items.failures["line 2"]


def test_a_folder_without_items_is_one_line(folder):
    with pytest.raises(DataError, match=r"cannot read .*recall\.jsonl \(No such file"):
        read_items(folder)
    write(folder, "")
    with pytest.raises(DataError, match=r"recall\.jsonl lists no items"):
        read_items(folder)


def test_no_plant_is_for_training_and_for_measuring():
    words = [(a, b, "Ann", "Ben") for a in WORDS["name"] for b in WORDS["name"]]
    splits = [Plant("name", each).split for each in words]
    assert splits.count("train") + splits.count("eval") == len(words)
    assert 0.2 < splits.count("eval") / len(words) < 0.5
