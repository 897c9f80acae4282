"""The demonstration of the memory: its dialogues, the frames that need a memory, and the comparison."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from finetune.commands import run_command
from finetune.config_io import load_train_args
from finetune.data.codes.cache import CodeCache
from finetune.data.recordings.lines import load_manifest
from finetune.data.words import SPEAKERS, load_alignments
from finetune.demo.memory import command as command_module
from finetune.demo.memory import training
from finetune.demo.memory.assets import Hearings, make_memory_assets
from finetune.demo.memory.command import demo_memory
from finetune.demo.memory.compare import ARMS, DialogueLosses, compare, describe, select
from finetune.demo.memory.dialogues import CHUNK_FRAMES, CODE_WORDS, REACH, WINDOW
from finetune.demo.model_folder import open_repository
from finetune.training.command import train as train_command
from project_root import ROOT

SIZES = {"num_train": 16, "num_eval": 3, "seed": 5}
SHORT = ("--num-train", "16", "--num-eval", "3", "--seed", "5", "--base-steps", "2", "--steps", "2")
SETS = ("echo_train", "recall_train", "recall_eval")


def train_here(config, changes):
    """Train in this process, which has imported everything already."""
    return train_command(training.arguments(config, changes))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of a short demonstration, and the trainings in their order."""
    out = tmp_path_factory.mktemp("shown") / "memory"
    trainings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_module, "train", lambda *each: trainings.append(each) or train_here(*each))
        assert demo_memory(["--out", str(out), *SHORT]) == 0
    return out, trainings


@pytest.fixture(scope="module")
def assets(shown):
    """Of the demonstration."""
    found = make_memory_assets(shown[0] / "assets", **SIZES)
    assert found.reused
    return found


@pytest.fixture(scope="module")
def recordings(assets):
    """Codes `[2, K, T]` and word timings of every dialogue, by set and name."""
    info = open_repository(assets.model_dir)
    mimi = info.get_mimi()
    mimi.set_num_codebooks(2)
    cache = CodeCache.of_model(info, num_codebooks=2)
    found = {}
    for name in SETS:
        manifest = load_manifest(assets.manifest(name), key="data")
        cache.fill(manifest, mimi, progress=False)
        found[name] = {
            f"{name}/{each.path.name}": (
                cache.load(each).view(2, 2, -1),
                load_alignments(each.alignment_path),
            )
            for each in manifest
        }
    return found


def code_of(words, frames) -> list[str]:
    """What Moshi says in these frames."""
    starts = {round(word.start_sec * 12.5, 3): word.text for word in words if word.speaker == SPEAKERS[0]}
    return [starts[float(frame)] for frame in frames]


@pytest.mark.parametrize("name", SETS)
def test_the_same_words_come_back_and_sound_the_same(name, assets, recordings):
    same = []
    for dialogue, heard in assets.hearings(name).items():
        codes, words = recordings[name][dialogue]
        said = code_of(words, heard.first)
        assert set(said) <= set(CODE_WORDS)
        assert code_of(words, heard.second) == said
        for frame in range(2):
            first, second = (np.array(frames) + frame for frames in heard)
            same.append((codes[0][:, first] == codes[0][:, second]).float().mean())
    # What was said before a word is still heard in its first frame.
    assert np.mean(same) > (0.95 if name.startswith("recall") else 0.7)


def test_attention_sees_a_code_again_in_the_first_dialogues_only(assets):
    for heard in assets.hearings("echo_train").values():
        assert all(b - a <= WINDOW for a, b in zip(*heard, strict=True))
    for name in ("recall_train", "recall_eval"):
        for heard in assets.hearings(name).values():
            assert heard.second[0] - heard.first[-1] > REACH + 1


def test_a_dialogue_is_one_chunk(recordings):
    assert max(codes.shape[-1] for part in recordings.values() for codes, _ in part.values()) <= CHUNK_FRAMES
    for name in ("memory_base.yaml", "memory.yaml"):
        assert load_train_args(ROOT / "example" / name).chunk_frames == CHUNK_FRAMES


def test_held_out_dialogues_have_codes_of_their_own(assets, recordings):
    codes = {
        name: [
            tuple(code_of(recordings[name][dialogue][1], heard.first))
            for dialogue, heard in assets.hearings(name).items()
        ]
        for name in ("recall_train", "recall_eval")
    }
    everything = codes["recall_train"] + codes["recall_eval"]
    assert len(set(everything)) == len(everything) == SIZES["num_train"] + SIZES["num_eval"]


def test_each_word_of_a_code_is_one_token(assets):
    tokenizer = open_repository(assets.model_dir).get_text_tokenizer()
    tokens = [tuple(tokenizer.encode(word)) for word in CODE_WORDS]
    assert {len(each) for each in tokens} == {1}
    assert len(set(tokens)) == len(CODE_WORDS)


def test_both_fine_tunings_differ_in_ttt_only_and_ttt_has_its_defaults(shown):
    out, ((first, base), (second, ttt), (third, none)) = shown
    assert (first, second, third) == ("memory_base.yaml", "memory.yaml", "memory.yaml")
    assert ttt["init_from"] == base["run_dir"] == out / "base"
    assert none | {"run_dir": ttt["run_dir"]} == ttt | {"ttt.layers": "none"}
    with_ttt, without = (load_train_args(out / name / "args.yaml") for name in ("ttt", "none"))
    assert with_ttt.ttt == type(with_ttt.ttt)(enable=True, layers="1,2")
    assert without.ttt == type(without.ttt)(enable=True, layers="none")
    assert (with_ttt.ttt.initial_gating_alpha, with_ttt.ttt.key_shift, with_ttt.ttt.tied_start) == (
        0.005,
        1,
        True,
    )


def test_the_demonstration_ends_with_figures_and_a_picture(shown):
    out, _ = shown
    results = json.loads((out / "results.json").read_text())
    assert set(results["means"]) == set(ARMS)
    for arm in ARMS:
        assert results["means"][arm]["second"]["num_frames"] == 8 * SIZES["num_eval"]
        assert results["means"][arm]["second"]["num_recordings"] == SIZES["num_eval"]
    change = results["ttt - none"]["second"]
    ends = [results["means"][arm]["second"]["value"] for arm in ("ttt", "none")]
    assert change["value"] == pytest.approx(ends[0] - ends[1], abs=1e-6)
    assert change["interval"][0] < change["value"] < change["interval"][1]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")


def losses_of(words: list[float]) -> DialogueLosses:
    """A dialogue of ten frames, whose code is said in frames 1 and 2, and 7 and 8 with these losses."""
    text = np.full(10, 0.25, dtype=np.float32)
    text[[1, 2, 7, 8]] = [3, 3, *words]
    return DialogueLosses(text, text / 2)


def test_means_differences_and_intervals_are_those_of_the_frames_that_need_a_memory():
    hearings = {name: Hearings([1, 2], [7, 8]) for name in "abcdefgh"}
    generator = np.random.default_rng(0)
    without = {name: generator.normal(3, 0.5, 2) for name in hearings}
    gains = {name: generator.normal(1, 0.5) for name in hearings}
    arms = {
        "none": {name: losses_of(list(words)) for name, words in without.items()},
        "ttt": {name: losses_of(list(words - gains[name])) for name, words in without.items()},
        "frozen": {name: losses_of(list(words)) for name, words in without.items()},
    }
    comparison = compare(arms, hearings)
    assert comparison.means["none"]["second"].value == pytest.approx(
        np.mean(list(without.values())), abs=1e-6
    )
    assert comparison.means["none"]["second_sound"].value == pytest.approx(
        np.mean(list(without.values())) / 2, abs=1e-6
    )
    assert comparison.means["ttt"]["first"].value == 3
    assert comparison.means["ttt"]["others"].value == 0.25
    change = comparison.differences["second"]
    values = -np.array(list(gains.values()))
    assert change.value == pytest.approx(values.mean(), abs=1e-6)
    drawn = np.random.default_rng(1).choice(values, (20_000, len(values))).mean(1)
    assert change.interval == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.05)
    assert comparison.differences["others"].interval == (0, 0)
    assert "predicts these words better" in describe(comparison)[-1]
    assert "is no better" in describe(compare(arms | {"ttt": arms["none"]}, hearings))[-1]


def test_no_frame_is_in_two_parts():
    hearings = {"a": Hearings([1, 2], [7, 8])}
    text = np.arange(10, dtype=np.float32)
    losses = {"a": DialogueLosses(text, text + 100)}
    parts = {part: select(losses, hearings, part)[0].tolist() for part in ("first", "second", "others")}
    assert parts == {"first": [1, 2], "second": [7, 8], "others": [0, 3, 4, 5, 6, 9]}
    assert select(losses, hearings, "second_sound")[0].tolist() == [107, 108]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed: -1 is not allowed"),
        (["--seed", "one"], "--seed: 'one' is not a whole number"),
        (["--num-train", "1"], "--num-train: 1 is not allowed"),
        (["--steps", "0"], "--steps"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_bad_options_end_with_one_line_and_status_2(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: demo_memory(["--out", str(tmp_path / "memory"), *options]))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "memory").exists()


def test_a_training_that_fails_ends_the_demonstration_with_its_status(shown, monkeypatch, capsys):
    monkeypatch.setattr(command_module, "train", lambda *_: 130)
    monkeypatch.setattr(command_module, "measure", None)
    assert demo_memory(["--out", str(shown[0]), *SHORT]) == 130
    assert capsys.readouterr().out.startswith("reused ")


def test_away_from_the_repository_one_line_says_what_is_missing(shown, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "_ROOT", tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: demo_memory(["--out", str(shown[0]), *SHORT]))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.py does not exist" in line and "clone" in line


def test_what_is_shown_is_the_command_that_is_run(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: started.append(command) or subprocess.CompletedProcess(command, 7)
    )
    assert training.train("memory.yaml", {"seed": 3, "max_steps": None, "run_dir": "a b"}) == 7
    ((python, script, *arguments),) = started
    assert (python, script) == (sys.executable, str(ROOT / "train.py"))
    assert arguments == ["--config", str(ROOT / "example" / "memory.yaml"), "--seed", "3", "--run_dir", "a b"]
    shown = capsys.readouterr().out.strip()
    assert shown == "$ python train.py --config example/memory.yaml --seed 3 --run_dir 'a b'"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_with_ttt_the_held_out_words_are_predicted_better(seed, tmp_path):
    command = [
        sys.executable,
        "-m",
        "finetune.demo.memory",
        "--seed",
        str(seed),
        "--out",
        str(tmp_path / "memory"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "memory" / "results.json").read_text())
    change = results["ttt - none"]["second"]
    assert change["value"] < -0.3 and change["interval"][1] < 0
    # Without TTT nobody knows more than which words there are.
    assert results["means"]["none"]["second"]["value"] == pytest.approx(math.log(len(CODE_WORDS)), abs=0.2)
