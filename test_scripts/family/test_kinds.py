"""Every kind of model goes the whole way: dry run, training, resuming, evaluation, export, and inference."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

from finetune.evaluation.command import evaluate
from finetune.export.command import export
from finetune.inference.command import generate
from finetune.training.command import train
from miniatures.family import KINDS, write_kind
from run_helpers import read_metrics, run_values, saved_weights, write_yaml

SIBLINGS = [kind for kind in KINDS if kind != "moshi"]  # all other tests are of a Moshi
NO_AUDIO = {"audio_loss", "unigram_audio_loss", "audio_perplexity", "semantic_loss", "acoustic_loss"}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The repository of a kind, made once."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_kind(tmp_path_factory.mktemp("kinds") / kind.replace(" ", "_"), kind)
        return made[kind]

    return find


@pytest.fixture(scope="module")
def trained(demo, model_of, tmp_path_factory):
    """The run directory of 20 steps of a kind, with checkpoints after 10 and 20."""
    made = {}

    def find(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("run")
            values = run_values(
                demo, folder / "run", "full_ttt", moshi_paths={"hf_repo_id": str(model_of(kind))}
            )
            values |= {
                "duration_sec": 1.28,
                "max_steps": 20,
                "ckpt_freq": 10,
                "do_eval": True,
                "eval_freq": 20,
            }
            values |= {"full_finetuning": False, "lora": {"enable": True, "rank": 2}}
            train(["--config", str(write_yaml(folder / "config.yaml", values))])
            made[kind] = folder
        return made[kind]

    return find


@pytest.mark.parametrize("kind", SIBLINGS)
def test_a_run_that_resumes_ends_with_the_weights_of_one_that_does_not(trained, tmp_path, kind):
    folder = trained(kind)
    (record,) = read_metrics(folder / "run", "eval")
    absent = NO_AUDIO if kind == "speech to text" else set()
    assert {"text_loss", *NO_AUDIO} - record.keys() == absent
    assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))
    resume = folder / "run" / "checkpoints" / "checkpoint_000010"
    train(
        [
            "--config",
            str(folder / "config.yaml"),
            "--resume",
            str(resume),
            "--run_dir",
            str(tmp_path / "again"),
        ]
    )
    expected, actual = saved_weights(folder / "run", 20), saved_weights(tmp_path / "again", 20)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    before = saved_weights(folder / "run", 10)
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert any("ttt" in name for name in changed) and any("lora" in name for name in changed)


@pytest.mark.parametrize("kind", SIBLINGS)
def test_a_dry_run_estimates_its_memory(trained, command, kind):
    status, output, errors = command(train, "--config", trained(kind) / "config.yaml", "--dry-run")
    assert (status, errors) == (0, []) and "peak" in output


@pytest.fixture
def user(tmp_path):
    """1 s of noise."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(24000).astype(np.float32)
    sphn.write_wav(str(tmp_path / "user.wav"), samples, 24000)
    return tmp_path / "user.wav"


@pytest.mark.parametrize("kind", SIBLINGS)
def test_an_export_answers_as_its_checkpoint_does(trained, command, user, tmp_path, kind):
    run = trained(kind) / "run"
    suffix = "json" if kind == "speech to text" else "wav"
    assert command(export, "--checkpoint", run, "--out", tmp_path / "merged", "--merged")[0] == 0
    assert (
        f"in.wav {'words.json' if suffix == 'json' else 'out.wav'}"
        in (tmp_path / "merged/README.md").read_text()
    )
    answers = []
    for name, checkpoint in (("run", run), ("merged", tmp_path / "merged")):
        out, report = tmp_path / f"{name}.{suffix}", tmp_path / f"{name}_report.json"
        arguments = (user, out, "--checkpoint", checkpoint, "--seed", 3, "--report", report)
        assert command(generate, *arguments)[0] == 0
        answers.append((out.read_bytes(), json.loads(report.read_text())["text"]))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", SIBLINGS)
def test_losses_by_position_are_measured_of_what_speaks(demo, trained, command, tmp_path, kind):
    arguments = ("--data", demo.eval_jsonl, "--checkpoint", trained(kind) / "run", "--out", tmp_path / "out")
    more = ("--user", "real", "--text", "given", "--max-frames", "40")
    status, _, errors = command(evaluate, "long-context", *arguments, *more)
    if kind == "speech to text":
        assert status == 2 and len(errors) == 1 and "this model writes text only (dep_q: 0)" in errors[0]
        return
    assert (status, errors) == (0, [])
    (recording,) = json.loads((tmp_path / "out" / "results.json").read_text())["data"]["recordings"]
    assert recording["num_frames"] == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_freq": 5}, "sample_freq: 5 needs a model that speaks"),
        ({"data.text": "none"}, "data.text: none leaves nothing to train"),
    ],
)
def test_what_needs_a_voice_is_refused_of_a_model_that_writes_text_only(
    demo, model_of, command, tmp_path, change, message
):
    base = {"hf_repo_id": str(model_of("speech to text"))}
    config = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run", moshi_paths=base))
    options = [text for key, value in change.items() for text in (f"--{key}", value)]
    status, _, errors = command(partial(train), "--config", config, *options)
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "suffix"), [("moshi", "json"), ("speech to text", "wav")])
def test_the_name_of_the_output_must_fit_the_model(model_of, command, user, tmp_path, kind, suffix):
    out = tmp_path / f"out.{suffix}"
    status, _, errors = command(generate, user, out, "--base", model_of(kind))
    assert status == 2 and len(errors) == 1 and "output must end with" in errors[0] and not out.exists()
