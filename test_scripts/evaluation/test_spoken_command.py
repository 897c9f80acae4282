"""evaluate.py swuggy, sblimp, tstory, sstory and all: results, comparisons, failures, a user's mistakes."""

import json
import math
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from evaluation_helpers import failure
from finetune.args import TrainArgs
from finetune.base_model.fingerprint import base_fingerprint
from finetune.base_model.locate import lm_config
from finetune.checkpointing import Checkpointer
from finetune.config_io import build_args
from finetune.evaluation.spoken import measure
from finetune.evaluation.spoken.encoding import encode_items
from finetune.evaluation.spoken.zerospeech import load_zerospeech
from finetune.inference.speech_model import load_speech_model
from finetune.loss import loss_sums, loss_weights
from run_helpers import MODES, checkpoint_content
from spoken_helpers import spoken_command, write_sblimp, write_stories, write_swuggy

NUM_IDS = {"swuggy": 10, "sblimp": 8, "tstory": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Miniature sWUGGY, sBLIMP and tStoryCloze."""
    root = tmp_path_factory.mktemp("spoken")
    write_swuggy(root, num_ids=NUM_IDS["swuggy"])
    write_sblimp(root, num_ids=NUM_IDS["sblimp"])
    write_stories(root / "tStoryCloze", num_ids=NUM_IDS["tstory"])
    return root


@pytest.fixture
def command(capsys, untrained_run, data, tmp_path):
    return spoken_command(capsys, untrained_run, data, tmp_path)


@pytest.fixture
def results(command, tmp_path):
    """Run it without mistakes; return what it wrote."""

    def run(name, *options, out="out", **settings):
        status, output, errors = command(name, *options, out=out, **settings)
        assert (status, errors) == (0, []), (output, errors)
        return json.loads((tmp_path / out / "results.json").read_text()) | {"output": output}

    return run


@pytest.fixture(scope="module")
def fitted_run(untrained_run, data, tmp_path_factory) -> Path:
    """A run whose model has learnt the correct items of sWUGGY by heart."""
    run_dir = tmp_path_factory.mktemp("fitted") / "run"
    speech = load_speech_model(str(untrained_run("full")), device=torch.device("cpu"), dtype=torch.float32)
    values = MODES["full"] | {"param_dtype": "float32", "moshi_paths": asdict(speech.checkpoint.base)}
    args = build_args(TrainArgs, values | {"run_dir": str(run_dir)})
    pairs = load_zerospeech(data, "swuggy").pairs
    codes = [row for row in encode_items([pair.correct for pair in pairs], speech)[0] if row is not None]
    length = max(row.shape[1] for row in codes) + max(speech.lm.delays)
    batch = torch.full((len(codes), speech.lm.num_codebooks, length), speech.lm.zero_token_id)
    for row, own in zip(batch, codes, strict=True):
        row[:, : own.shape[1]] = own
    lm = speech.lm.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    weights = loss_weights(batch, lm, args)
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_sums(lm(batch), batch, weights, lm).audio / weights.audio.sum()
        loss.backward()
        optimizer.step()
    Checkpointer(run_dir, args, lm_config(speech.info), base_fingerprint(speech.info)).save(lm, 60)
    return run_dir


def fingerprint(found: dict) -> str:
    return found["tasks"]["swuggy"]["data"]["fingerprint"]


def test_a_model_that_knows_the_correct_items_prefers_them_and_a_random_one_does_not(
    results, fitted_run, tmp_path
):
    fitted = results("swuggy", checkpoint=fitted_run)
    assert fitted["scores"]["swuggy"] > 0.95
    assert fitted["tasks"]["swuggy"]["accuracy"]["semantic"]["value"] > 0.95
    swapped = tmp_path / "swapped"
    write_swuggy(swapped, num_ids=NUM_IDS["swuggy"], swapped=True)  # the same recordings
    complement = results("swuggy", checkpoint=fitted_run, folder=swapped, out="swapped")
    assert fingerprint(complement) != fingerprint(fitted)  # other items are the correct ones
    assert fingerprint(results("swuggy", out="again")) == fingerprint(fitted)
    assert complement["scores"]["swuggy"] == pytest.approx(1 - fitted["scores"]["swuggy"])
    random = results("swuggy", out="random")["tasks"]["swuggy"]["accuracy"]["combined"]
    assert random["interval"][0] <= 0.5 <= random["interval"][1]


def test_all_measures_what_is_there_and_says_what_is_not(results, tmp_path):
    found = results("all")
    assert list(found["scores"]) == ["swuggy", "sblimp", "tstory"]
    assert "sstory" in found["absent"] and "sstory: left out" in found["output"]
    for name, num_ids in NUM_IDS.items():
        entry = found["tasks"][name]
        voices = 2 if name == "swuggy" else 1
        assert (entry["num_ids"], entry["num_pairs"]) == (num_ids, voices * num_ids)
        assert (entry["failures"], entry["excluded_pairs"], entry["subset"]) == ({}, [], False)
        low, high = entry["accuracy"]["combined"]["interval"]
        assert low <= found["scores"][name] == entry["accuracy"]["combined"]["value"] <= high
        assert f"{100 * found['scores'][name]:.1f} [" in found["output"]
        assert entry["seconds_per_item"] > 0
    assert set(found["tasks"]["swuggy"]["by_subtype"]) == {"1-5", ">100"}
    assert set(found["tasks"]["sblimp"]["by_subtype"]) == {"agreement/noun", "agreement/verb"}
    assert found["model"]["step"] == 7 and found["model"]["semantic_weight"] == 1
    assert found["definitions"]["combined"].startswith("the headline")
    for name in NUM_IDS:
        _check_accuracy_by_hand(found, name)
    gold = load_zerospeech(Path(found["tasks"]["swuggy"]["data"]["path"]), "swuggy").pairs
    assert found["pairs"]["swuggy"] == [
        {"id": pair.id, "voice": pair.voice, "subtype": pair.subtype}
        | {"correct": pair.correct.name, "incorrect": pair.incorrect.name, "outcome": entry["outcome"]}
        for pair, entry in zip(gold, found["pairs"]["swuggy"], strict=True)
    ]


def _check_accuracy_by_hand(found: dict, task: str) -> None:
    """From the pairs and log-likelihoods in the file alone, without our functions."""
    scores = {}
    for name, entry in found["items"][task].items():
        assert entry["num_tokens"] == [entry["num_frames"]] * 8
        scores[name] = sum(entry["log_likelihood"]) / sum(entry["num_tokens"])
        assert entry["scores"]["combined"] == pytest.approx(scores[name])
    by_id: dict[str, list[bool]] = {}
    for pair in found["pairs"][task]:
        assert pair["outcome"] == (scores[pair["correct"]] > scores[pair["incorrect"]])
        by_id.setdefault(pair["id"], []).append(pair["outcome"])
    means = [sum(values) / len(values) for values in by_id.values()]
    assert found["scores"][task] == pytest.approx(sum(means) / len(means))


def test_files_for_the_challenge_name_every_item_once(results, data, tmp_path):
    found = results("all")
    for name, folder in (("swuggy", "lexical"), ("sblimp", "syntactic")):
        entry = found["tasks"][name]["submission"]
        assert entry["file"] == f"submission/{folder}/dev.txt" and entry["complete"]
        lines = [line.split(" ") for line in (tmp_path / "out" / entry["file"]).read_text().splitlines()]
        assert sorted(stem for stem, _ in lines) == sorted(
            path.stem for path in (data / folder / "dev").glob("*.wav")
        )
        for stem, score in lines:
            assert float(score) == found["items"][name][stem]["scores"]["combined"]
    assert found["tasks"]["tstory"]["submission"] is None


def test_batches_change_nothing_and_prompt_text_user_and_memory_do(results, data):
    plain = results("swuggy", out="plain")["items"]["swuggy"]
    single = results("swuggy", "--batch-size", 1, out="single")["items"]["swuggy"]
    narrow = results("swuggy", "--batch-frames", 20, out="narrow")["items"]["swuggy"]
    for name, entry in plain.items():
        for other in (single, narrow):
            assert other[name]["scores"]["combined"] == pytest.approx(entry["scores"]["combined"], abs=1e-4)
    prompt = data / "lexical" / "dev" / "item003.wav"
    found = {tuple(entry["scores"]["combined"] for entry in plain.values())}
    for options in (
        ("--prompt", prompt),
        ("--user", "silent"),
        ("--text", "own"),
        ("--ttt", "frozen"),
    ):
        changed = results("swuggy", *options, out=f"{options[0]}-{Path(options[1]).stem}")
        found.add(tuple(entry["scores"]["combined"] for entry in changed["items"]["swuggy"].values()))
        assert changed["settings"][options[0].removeprefix("--")] == str(options[1])
    assert len(found) == 5


def test_a_subset_is_of_whole_ids_and_said(results):
    found = results("swuggy", "--limit", 5)
    entry = found["tasks"]["swuggy"]
    assert (entry["num_ids"], entry["num_pairs"], entry["num_ids_of_data"]) == (5, 10, 10)
    assert entry["subset"] and not entry["submission"]["complete"] and found["settings"]["limit"] == 5
    assert "5 of 10 ids" in found["output"] and "the challenge wants all" in found["output"]
    assert results("swuggy", "--limit", 5, out="again")["items"].keys() == found["items"].keys()
    other = results("swuggy", "--limit", 5, "--seed", 1, out="other")
    assert other["items"]["swuggy"].keys() != found["items"]["swuggy"].keys()


def test_two_checkpoints_are_compared_on_the_same_pairs(command, untrained_run, fitted_run, tmp_path):
    status, output, errors = command("swuggy", "--compare", fitted_run, untrained_run("lora_ttt"))
    assert (status, errors) == (0, []), output
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    singles = [
        json.loads((tmp_path / "out" / part / "results.json").read_text()) for part in ("first", "second")
    ]
    entry = found["tasks"]["swuggy"]
    for part, single in zip(("first", "second"), singles, strict=True):
        assert entry[part] == single["tasks"]["swuggy"]["accuracy"]
    difference = entry["difference"]["combined"]
    assert difference["value"] == pytest.approx(
        singles[0]["scores"]["swuggy"] - singles[1]["scores"]["swuggy"]
    )
    assert 0 < difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    assert fingerprint(singles[0]) == fingerprint(singles[1])
    assert [model["step"] for model in found["models"]] == [60, 7]
    assert f"{100 * difference['value']:+.1f} [" in output


def test_models_with_different_weights_need_one_for_both(command, untrained_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint_content(untrained_run("lora")), other)
    training = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps(training | {"first_codebook_weight_multiplier": 100.0}))
    compare = ("--compare", untrained_run("lora"), other)
    status, _, errors = command("swuggy", *compare)
    assert status == 2 and "the semantic codebook weighs 1 for" in errors[0]
    assert "give one --semantic-weight for both" in errors[0]
    status, _, errors = command("swuggy", *compare, "--semantic-weight", 10)
    assert (status, errors) == (0, [])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {model["semantic_weight"] for model in found["models"]} == {10}
    assert found["tasks"]["swuggy"]["difference"]["combined"]["value"] == 0  # the same weights in both


def test_failures_are_named_excluded_and_counted(command, results, data, monkeypatch, tmp_path):
    folder = tmp_path / "data"
    for name in ("lexical", "syntactic"):
        shutil.copytree(data / name, folder / name)
    wavs = folder / "lexical" / "dev"
    good = results("swuggy", out="good")
    (wavs / "item001.wav").write_bytes(b"noise")
    (wavs / "item008.wav").unlink()
    original = measure.score_items

    def broken(lm, codes, **settings):
        scores = original(lm, codes, **settings)
        if len(codes) > 30:
            scores[20].log_likelihood[3] = math.inf
        return scores

    monkeypatch.setattr(measure, "score_items", broken)
    status, output, errors = command("all", "--max-failures", 2, folder=folder)
    assert status == 2 and len(errors) == 1 and "3 items failed, 2 may" in errors[0]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = found["tasks"]["swuggy"]
    assert {"item001", "item008"} < entry["failures"].keys() and len(entry["failures"]) == 3
    infinite = (entry["failures"].keys() - {"item001", "item008"}).pop()
    assert "not finite" in entry["failures"][infinite] and "does not exist" in entry["failures"]["item008"]
    assert found["items"]["swuggy"][infinite]["scores"] is None
    excluded = {name for pair in entry["excluded_pairs"] for name in pair["items"]}
    assert {"item000", "item001", infinite} <= excluded and entry["num_pairs"] == 20 - 3
    assert entry["num_ids"] == 10 and not entry["submission"]["complete"]
    assert all(f"failed: {name}" in output for name in entry["failures"])
    assert "sblimp" in found["scores"]
    kept = {name: entry for name, entry in found["items"]["swuggy"].items() if name != infinite}
    for name, values in kept.items():
        assert values["scores"]["combined"] == pytest.approx(
            good["items"]["swuggy"][name]["scores"]["combined"], abs=1e-4
        )
    status, _, errors = command("all", "--max-failures", 3, folder=folder, out="allowed")
    assert (status, errors) == (0, [])


def test_by_default_results_of_one_setting_lie_in_the_run_directory(command, untrained_run):
    folder = untrained_run("ttt") / "evaluation" / "spoken"
    for options, num_folders in (((), 1), ((), 1), (("--limit", 2), 2)):
        status, _, errors = command("sblimp", *options, mode="ttt", out=None)
        assert (status, errors) == (0, [])
        names = sorted(path.name for path in folder.iterdir())
        assert len(names) == num_folders and all(name.startswith("step_000007-") for name in names)


def test_mistakes_are_one_line(command, tmp_path, data, untrained_run):
    fails = partial(failure, command, tmp_path)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")
    run = untrained_run("lora_ttt")
    assert "has no folder lexical/, syntactic/, tstory/" in fails("all", folder=tmp_path / "empty")
    assert "does not exist" in fails("all", folder=tmp_path / "nowhere")
    assert "is not a folder" in fails("swuggy", folder=tmp_path / "file")
    assert "lexical/dev/gold.csv" in fails("swuggy", folder=tmp_path / "empty")
    assert "has no folder sstory/ or" in fails("sstory")  # it must not take all stories below
    assert "is not swuggy" in fails("swuggy", folder=data / "syntactic")
    for task, folder, other in (("tstory", "sSC", "sstory"), ("sstory", "tStoryCloze", "tstory")):
        stories = write_stories(tmp_path / folder, num_ids=1)
        line = fails(task, folder=stories)
        assert f"{folder}: is not {task}: folders of this name hold {other}" in line
    assert "test" in fails("swuggy", "--split", "test")
    assert "no checkpoint here" in fails("swuggy", checkpoint=tmp_path / "empty")
    assert "no checkpoint here" in fails("swuggy", "--compare", run, tmp_path / "empty")
    assert "two with --compare" in fails("swuggy", "--compare", run, run, "--checkpoint", run)
    assert "expected 2 arguments" in fails("swuggy", "--compare", run)
    assert "--prompt: nowhere.wav is not a file" in fails("swuggy", "--prompt", "nowhere.wav")
    assert "--prompt: " in fails("swuggy", "--prompt", tmp_path / "file")
    assert "--limit: 0 is not allowed" in fails("swuggy", "--limit", 0)
    assert "--batch-size: 0 is not allowed" in fails("swuggy", "--batch-size", 0)
    assert "--semantic-weight: '0' is not allowed" in fails("swuggy", "--semantic-weight", 0)
    assert "--max-failures: -1 is not allowed" in fails("swuggy", "--max-failures=-1")
    assert "invalid choice: 'loud'" in fails("swuggy", "--user", "loud")
    assert "has no TTT layers" in fails("swuggy", "--ttt", "frozen", mode="lora")
    assert "is a file" in fails("swuggy", out="file")
    assert "holds results.json already" in fails("swuggy", out="done")
