"""The experiment on human dialogues in miniature: exchanged speakers, items, losses compared by position."""

import json
import wave

import numpy as np
import pytest
import torch

from experiments.human_speech.items import find_turns, write_human_items
from experiments.human_speech.losses import SPANS, Losses, mean_over_seeds, read_losses, rows
from experiments.human_speech.recordings import REACH, exchange_speakers, read_manifest, write_set
from experiments.human_speech.report import beyond_reach, loss_table, recall_table
from finetune.data.words import load_alignments
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.evaluation.long_context.measure import LossFiles
from finetune.evaluation.long_context.stream_losses import StreamLosses
from finetune.evaluation.recall.items import read_items

RATE = 24_000
NUM_TURNS = 16


def turn_sample(number):
    """What is heard in a turn: a constant of its own."""
    return 100 * (number + 1)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A manifest of one dialogue: turns of 2 s, left and right in turn, every fourth of them 4 s."""
    folder = tmp_path_factory.mktemp("dialogues")
    words, parts, at_sec = [], [], 0.0
    for number in range(NUM_TURNS):
        length_sec = 4.0 if number % 4 > 1 else 2.0
        stereo = np.zeros((round((length_sec + 0.5) * RATE), 2), dtype="<i2")
        stereo[: round(length_sec * RATE), number % 2] = turn_sample(number)
        parts.append(stereo)
        words.append([f"w{number}", [at_sec, at_sec + length_sec], (MAIN, USER)[number % 2]])
        at_sec += length_sec + 0.5
    with wave.open(str(folder / "room.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.concatenate(parts).tobytes())
    (folder / "room.json").write_text(json.dumps({"alignments": words}))
    (folder / "all.jsonl").write_text(json.dumps({"path": "room.wav", "duration": at_sec}) + "\n")
    return read_manifest(folder / "all.jsonl")


def heard(path):
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, 2)


def test_exchanged_dialogues_have_the_other_speaker_on_the_left_with_his_words(dialogues, tmp_path):
    exchange_speakers(dialogues[0].path, tmp_path / "out.wav")
    assert np.array_equal(heard(tmp_path / "out.wav"), heard(dialogues[0].path)[:, ::-1])
    before = load_alignments(dialogues[0].path.with_suffix(".json"))
    after = load_alignments(tmp_path / "out.json")
    assert [word.text for word in after] == [word.text for word in before]
    assert [word.speaker for word in after] == [{MAIN: USER, USER: MAIN}[word.speaker] for word in before]


def test_training_has_both_forms_of_a_dialogue_and_measuring_one(dialogues, tmp_path):
    write_set(tmp_path, "train", {"here": dialogues}, both=True)
    write_set(tmp_path, "eval", {"here": dialogues}, both=False)
    paths = [dialogue.path for dialogue in read_manifest(tmp_path / "train.jsonl")]
    assert paths == [tmp_path / "train/here_room.wav", dialogues[0].path]
    assert [dialogue.path.name for dialogue in read_manifest(tmp_path / "eval.jsonl")] == ["here_room.wav"]


def test_items_are_turns_of_the_dialogues_and_no_filler_is_a_plant(dialogues, tmp_path):
    turns = find_turns("fillets-cs", dialogues[0].path)
    assert [turn.voice for turn in turns] == ["small", "big"] * (NUM_TURNS // 2)
    write_human_items(tmp_path, {"fillets-cs": dialogues}, groups_per_kind=6, seed=1)
    items = read_items(tmp_path)
    assert items.failures == {} and len(items.groups) == 12
    for group in items.groups:
        sounds = [{int(value) for value in heard(path)[2000:4000, 0]} for path in group.answers]
        assert len({sound.pop() for sound in sounds}) == len(group.answers)
        voices = [heard(path).max() // 100 % 2 for path in group.answers]
        if group.kind.startswith("voice"):  # one of either speaker, each of whom has said the plant
            assert sorted(voices) == [0, 1]
            assert [heard(path).max() // 100 % 2 for path in group.plants] == voices
            assert not {path.name for path in group.plants} & {path.name for path in group.answers}
        else:
            assert len(group.answers) == 4 and len(set(voices)) == 1
            assert [heard(path).max() for path in group.plants] == [heard(p).max() for p in group.answers]
        silent = 0 if group.said_by == "user" else 1
        assert all(heard(path)[:, silent].max() == 0 for path in group.plants)
        assert not {heard(p).max() for p in group.filler} & {heard(p).max() for p in group.plants}


def constant(value, lengths):
    return {"audio": {name: np.full(n, value) for name, n in lengths.items()}} | {
        "text": {name: np.full(n, 2 * value) for name, n in lengths.items()}
    }


def test_differences_are_paired_by_frame_and_beyond_reach_apart():
    lengths = {"a": 300, "b": 80}
    on: Losses = constant(1.0, lengths)
    off: Losses = constant(1.5, lengths)
    on["audio"]["a"][:REACH] = 9.0  # within the window, where both are the same
    off["audio"]["a"][:REACH] = 9.0
    on["audio"]["b"][70] = off["audio"]["b"][70] = np.nan
    means, _, difference = rows({"memory on": on, "off": off}, "audio")
    assert [each.num_frames for each in means.estimates] == [24, 305, 50, 0, 0, 355]
    assert means.estimates[0].value == pytest.approx((9 + 1) / 2)
    assert means.estimates[-1].value == 1.0
    assert difference.is_difference and difference.estimates[-1].value == pytest.approx(-0.5)
    assert difference.estimates[0].value == pytest.approx(-0.25)
    assert difference.estimates[-1].interval == pytest.approx((-0.5, -0.5))
    table = loss_table({"memory on": on, "off": off}, "audio").splitlines()
    assert len({line.count("|") for line in table}) == 1 and len(SPANS) + 2 == table[0].count("|")
    assert beyond_reach({"memory on": on, "off": off}, "audio") == (
        "from 12: memory on - off: -0.5000 [-0.5000, -0.5000]"
    )
    assert mean_over_seeds([on, off])["text"]["b"][0] == 2.5


def test_losses_are_those_that_the_measurement_wrote(tmp_path):
    losses = StreamLosses(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0], [2.0, 5.0]]), 0)
    identity = {"name": "a", "num_frames": 2}
    LossFiles(tmp_path, {"weights": "w"}, own_text=False).write(tmp_path / "a.safetensors", identity, losses)
    recording = {"name": "a", "files": {"on": "a.safetensors"}}
    (tmp_path / "results.json").write_text(json.dumps({"data": {"recordings": [recording]}}))
    found = read_losses(tmp_path, "on")
    assert found["text"]["a"].tolist() == [1.0, 2.0] and found["audio"]["a"].tolist() == [1.5, 4.0]


def test_the_table_of_what_is_recalled_has_a_line_per_kind_and_arm(tmp_path):
    for seed, share in ((1, 0.5), (2, 1.0)):
        for model, arm in (("ttt", "on"), ("none", "plain"), ("long", "plain")):
            folder = tmp_path / f"seed{seed}" / f"recall_{model}"
            folder.mkdir(parents=True)
            found = (share, share - 0.25) if arm == "on" else (0.5, 0.0)
            entry = {
                "125": {"audio": dict(zip(("told_apart", "margin"), found, strict=True)) | {"chance": 0.5}}
            }
            (folder / "results.json").write_text(json.dumps({"kind": {"voice, cs": {arm: entry}}}))
    lines = recall_table(sorted(tmp_path.iterdir()), "audio").splitlines()
    assert lines[0].endswith("| 125 |")
    assert lines[2:] == [
        "| voice, cs | long | 50 % | 50 %, +0.000 (+0.000 to +0.000) |",
        "| voice, cs | none | 50 % | 50 %, +0.000 (+0.000 to +0.000) |",
        "| voice, cs | on | 50 % | 75 %, +0.500 (+0.250 to +0.750) |",
    ]
