"""Items and dialogues of `python -m finetune.demo.recall`: disjoint, seeded, as long as they say."""

import itertools
import json
import random

import pytest

from finetune.commands import run_command
from finetune.data.recordings.lines import load_manifest
from finetune.data.words import load_alignments
from finetune.demo.recall.assets import make_recall_assets
from finetune.demo.recall.command import demo_recall
from finetune.demo.recall.dialogues import CHUNK_FRAMES, REACH, make_dialogue
from finetune.demo.recall.plants import LEADS, WORDS, draw_plant, other_lines, word_lines
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.evaluation.recall.items import read_items

SIZES = {"num_items": 30, "num_train": 6, "seed": 3}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_recall_assets(tmp_path_factory.mktemp("recall") / "assets", **SIZES)


def planted(words):
    """What a recording says once: the words after a lead, by text."""
    text = " ".join(word.text for word in words)
    return [text.split(lead)[1].split()[:4] for lead in LEADS.values() if lead in text]


def test_items_are_of_all_kinds_and_speakers_and_no_plant_comes_twice(assets):
    items = read_items(assets.items_dir)
    assert items.failures == {} and len(items.groups) == 8  # of four: rounded up
    assert {group.said_by for group in items.groups} == {"user", "moshi"}
    assert {group.kind for group in items.groups} == set(WORDS)
    plants = [path.stem.split(".")[0] for group in items.groups for path in group.plants]
    assert len(set(plants)) == len(plants) == 32
    for group in items.groups:
        assert [p.stem.split(".")[0] for p in group.plants] == [a.stem.split(".")[0] for a in group.answers]
        for path in group.plants:
            (words,) = planted(load_alignments(path.with_suffix(".json")))
            assert path.stem.startswith("_".join([group.kind, *words]))
            speaker = MAIN if group.said_by == "moshi" else USER
            assert {word.speaker for word in load_alignments(path.with_suffix(".json"))} == {speaker}


def test_training_never_hears_what_is_measured(assets):
    measured = {
        path.stem.split(".")[0] for group in read_items(assets.items_dir).groups for path in group.plants
    }
    heard = set()
    for recording in load_manifest(str(assets.manifest("recall_train")), key="data.train_data"):
        assert recording.duration_sec * 12.5 <= CHUNK_FRAMES["recall"]
        words = load_alignments(recording.alignment_path)
        text = " ".join(word.text for word in words)
        kinds = [kind for kind, lead in LEADS.items() if lead in text]
        assert kinds
        for kind in kinds:
            first, again = (part.split()[:4] for part in text.split(LEADS[kind])[1:])
            assert first == again  # the answer is what was planted
            heard.add("_".join([kind, *first]))
    assert heard and not heard & measured
    rng = random.Random(0)
    train, held_out = ({draw_plant(rng, "name", split) for _ in range(2000)} for split in ("train", "eval"))
    assert not train & held_out


def test_gaps_are_from_beyond_the_window_to_the_whole_chunk():
    lengths = dict.fromkeys(word_lines(), 2) | dict.fromkeys(other_lines(), 8)
    lengths = _Default(lengths)
    gaps, numbers = [], set()
    for seed in range(60):
        turns = make_dialogue("recall", str(seed), lengths)
        starts = [0, *itertools.accumulate(1 + sum(lengths[line] for line in turn) for turn in turns)]
        assert starts[-1] <= CHUNK_FRAMES["recall"]
        said = [(turn[0].text, number) for number, turn in enumerate(turns) if turn[0].text in LEADS.values()]
        for lead in {text for text, _ in said}:
            first, again = (number for text, number in said if text == lead)
            gaps.append(starts[again] - starts[first + 1])
        numbers.add(len(said) // 2)
    assert min(gaps) < 2 * REACH and max(gaps) > 150 and numbers == {1, 2, 3, 4}


class _Default(dict):
    def __missing__(self, line):
        return 9


def test_the_same_seed_gives_the_same_items_and_dialogues(assets, tmp_path):
    again = make_recall_assets(
        tmp_path / "again", **SIZES
    )  # in a process of its own the sound is the same too
    assert (again.items_dir / "recall.jsonl").read_bytes() == (assets.items_dir / "recall.jsonl").read_bytes()
    lengths = _Default()
    assert make_dialogue("echo", "5", lengths) == make_dialogue("echo", "5", lengths)
    assert make_dialogue("echo", "5", lengths) != make_dialogue("echo", "6", lengths)
    assert make_recall_assets(assets.folder, **SIZES).reused


def test_the_command_says_what_it_made_and_a_mistake_is_one_line(assets, capsys):
    sizes = ("--num-items", "30", "--num-train", "6", "--seed", "3")
    demo_recall(["--out", str(assets.folder), *sizes])
    output = capsys.readouterr().out
    assert output.startswith("reused ") and "for evaluate.py recall --data" in output
    assert len(json.loads((assets.folder / "demo.json").read_text())) > 1
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: demo_recall(["--num-items", "3"]))
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
