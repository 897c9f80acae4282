"""Training runs and commands of models with text conditions."""

import json
import shutil

import numpy as np
import pytest
import sphn
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file

from condition_helpers import forward, make_conditioned_demo, write_conditions
from conftest import make_codes
from evaluation_helpers import run_evaluate
from finetune.checkpoint.reading import load_checkpoint_model
from finetune.data.recordings.lines import load_manifest
from finetune.export.command import export
from finetune.inference.command import generate
from finetune.training.run import run_training
from run_helpers import command_line, read_metrics, run_args, run_values, saved_weights, write_yaml
from spoken_helpers import write_swuggy

SETTINGS = {"duration_sec": 1.6, "do_eval": True, "max_steps": 4, "ckpt_freq": 2, "num_ckpt_keep": None}
CALM, ANGRY = {"mood": "calm"}, {"mood": "angry"}


@pytest.fixture(scope="module")
def conditioned(demo, tmp_path_factory):
    """The demo's recordings with a mood beside them, and a model that is told it."""
    return make_conditioned_demo(demo, tmp_path_factory.mktemp("conditioned") / "assets", mood="sum")


@pytest.fixture(scope="module")
def runs(conditioned, tmp_path_factory):
    """Run directories by mode, trained when first asked for, not to be written to."""
    made = {}

    def run(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("runs") / mode
            run_training(run_args(conditioned, made[mode], mode, **SETTINGS))
        return made[mode]

    return run


@pytest.fixture
def user(tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(12 * 1920).astype(np.float32)
    sphn.write_wav(str(tmp_path / "user.wav"), samples, 24000)
    return tmp_path / "user.wav"


def copy_of(conditioned, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(conditioned.out_dir, folder)
    return type(conditioned)(folder, conditioned.settings, conditioned.report, reused=True)


def transcripts(assets):
    return [recording.alignment_path for recording in load_manifest(str(assets.train_jsonl), key="x")]


def test_the_texts_beside_the_recordings_change_the_losses(conditioned, runs, tmp_path):
    other = copy_of(conditioned, tmp_path)
    for path in transcripts(other):
        write_conditions(path, None)
    run_training(run_args(other, tmp_path / "run", "full", **(SETTINGS | {"max_steps": 1})))
    told, untold = (read_metrics(run, "train")[0]["loss"] for run in (runs("full"), tmp_path / "run"))
    assert abs(told - untold) > 1e-4


@pytest.mark.parametrize("mode", ["full_ttt", "lora_ttt"])
def test_a_resumed_run_equals_one_that_never_stopped(conditioned, runs, tmp_path, mode):
    source = runs(mode) / "checkpoints" / "checkpoint_000002"
    run_training(run_args(conditioned, tmp_path / "run", mode, **SETTINGS, resume=str(source)))
    whole, resumed = saved_weights(runs(mode), 4), saved_weights(tmp_path / "run", 4)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    trained = [name for name in whole if name.startswith("condition_provider.conditioners.mood.")]
    early = saved_weights(runs(mode), 2)
    assert trained and any(not torch.equal(whole[name], early[name]) for name in trained)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_stock_moshi_reads_the_checkpoint(conditioned, runs, mode):
    folder = runs(mode) / "checkpoints" / "checkpoint_000004" / "consolidated"
    files = {"lora_weights": folder / "lora.safetensors"} if mode == "lora" else {}
    base = conditioned.model_dir / "model.safetensors"
    info = CheckpointInfo.from_hf_repo(
        str(folder),
        moshi_weights=base if mode == "lora" else folder / "consolidated.safetensors",
        mimi_weights=conditioned.model_dir / "mimi.safetensors",
        tokenizer=conditioned.model_dir / "tokenizer.model",
        config_path=folder / "config.json",
        mimi_config_path=conditioned.model_dir / "mimi_config.json",
        **files,
    )
    stock = info.get_moshi(dtype=torch.float32)
    ours = load_checkpoint_model(runs(mode), dtype=torch.float32)
    codes = make_codes(ours, 2, 8)
    with torch.no_grad():
        a, b = forward(stock, codes, [CALM, {}]), forward(ours, codes, [CALM, {}])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (a[0] - a[1]).abs().max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_export_keeps_the_conditioners_in_float32(runs, tmp_path, command, dtype):
    out = tmp_path / "export"
    status, _, errors = command(
        export, "--checkpoint", runs("lora_ttt"), "--out", out, "--merged", "--dtype", dtype
    )
    assert (status, errors) == (0, [])
    tensors = load_file(out / "consolidated.safetensors")
    names = {name for name in tensors if name.startswith("condition_provider.")}
    assert names and {tensors[name].dtype for name in names} == {torch.float32}
    assert {tensors[name].dtype for name in tensors.keys() - names} == {getattr(torch, dtype)}
    whole = load_checkpoint_model(out, dtype=torch.float32)
    apart = load_checkpoint_model(runs("lora_ttt"), dtype=torch.float32)
    codes = make_codes(whole, 1, 8)
    with torch.no_grad():
        a, b = forward(whole, codes, [ANGRY]), forward(apart, codes, [ANGRY])
    assert (a - b).abs().max() < (1e-3 if dtype == "float32" else 0.2) * b.abs().max()


def test_samples_are_told_what_the_configuration_says(conditioned, tmp_path):
    settings = SETTINGS | {"max_steps": 1, "sample_freq": 1, "sample_duration_sec": 2.0}
    for name, conditions in (("calm", CALM), ("angry", ANGRY), ("none", {})):
        values = settings | {"sample_conditions": conditions, "param_dtype": "bfloat16"}
        run_training(run_args(conditioned, tmp_path / name, "lora_ttt", **values))
    said = [
        sphn.read(str(tmp_path / name / "samples/step_1.wav"))[0][0] for name in ("calm", "angry", "none")
    ]
    assert not np.array_equal(said[0], said[1]) and not np.array_equal(said[0], said[2])


def test_generate_is_told_by_its_options_and_a_session_remembers(runs, user, tmp_path, command):
    def talk(*options, out="out.wav"):
        arguments = ("--checkpoint", runs("lora_ttt"), user, tmp_path / out, *options)
        status, output, errors = command(generate, *arguments, "--report", tmp_path / "report.json")
        assert (status, errors) == (0, []), errors
        report = json.loads((tmp_path / "report.json").read_text())
        return sphn.read(str(tmp_path / out))[0][0], report, output

    calm, report, output = talk("--condition", "mood=calm", "--save-session", tmp_path / "session")
    assert report["conditions"] == CALM and "mood 'calm'" in output
    assert not np.array_equal(calm, talk("--condition", "mood=angry")[0])
    assert not np.array_equal(calm, talk()[0])
    both = np.concatenate([sphn.read(str(user))[0][0]] * 2)
    sphn.write_wav(str(user), both, 24000)
    long = talk("--condition", "mood=calm")[0]
    sphn.write_wav(str(user), both[len(both) // 2 :], 24000)
    again, report, _ = talk("--load-session", tmp_path / "session")
    assert report["conditions"] is None
    assert np.abs(long[len(calm) :] - again).max() < 1e-3


def test_mistakes_with_options_are_one_line(runs, user, tmp_path, command):
    for options, message in (
        (["--condition", "tone=calm"], "--condition: this model has no condition 'tone', it has mood."),
        (["--condition", "mood=sad"], "--condition: mood: 'sad' is not a text that this model knows"),
        (["--condition", "mood"], "'mood' is not NAME=TEXT"),
        (["--condition", "mood="], "'mood=' is not NAME=TEXT"),
        (["--condition", "mood=calm", "--condition", "mood=angry"], "--condition: mood is given twice."),
        (["--condition", "mood=calm", "--load-session", "x"], "a session holds its conditions already"),
    ):
        arguments = ("--checkpoint", runs("lora"), user, tmp_path / "out.wav", *options)
        status, _, errors = command(generate, *arguments)
        assert status == 2 and len(errors) == 1 and message in errors[0], errors


def test_a_model_without_conditions_refuses_the_option(untrained_run, user, tmp_path, command):
    arguments = ("--checkpoint", untrained_run("lora"), user, tmp_path / "out.wav")
    status, _, errors = command(generate, *arguments, "--condition", "mood=calm")
    assert status == 2 and "this model has no condition 'mood', it has none." in errors[0]


def test_measurements_are_told_and_kept_apart(runs, conditioned, tmp_path, capsys):
    arguments = ["long-context", "--checkpoint", runs("lora_ttt"), "--data", conditioned.eval_jsonl]
    arguments += ["--max-frames", 40, "--at", 20, "--half-width", 10, "--user", "real", "--text", "given"]
    losses = {}
    for mood in ("calm", "angry"):
        out = ["--out", tmp_path / mood, "--condition", f"mood={mood}"]
        status, output, errors = run_evaluate(capsys, *arguments, *out)
        assert (status, errors) == (0, []) and f"condition of all recordings: mood '{mood}'" in output
        losses[mood] = json.loads((tmp_path / mood / "results.json").read_text())["scores"]["on"]["loss"]
    assert losses["calm"] != losses["angry"]
    status, _, errors = run_evaluate(capsys, *arguments, "--out", tmp_path / "calm", *out[2:])
    assert status == 2 and "with conditions" in errors[0]
    data = write_swuggy(tmp_path / "data", num_ids=2).parents[1]
    for mood in ("calm", "angry"):
        options = ["--checkpoint", runs("lora_ttt"), "--data", data, "--out", tmp_path / f"words-{mood}"]
        status, _, errors = run_evaluate(capsys, "swuggy", *options, "--condition", f"mood={mood}")
        assert (status, errors) == (0, [])
    words = [(tmp_path / f"words-{mood}" / "items.jsonl") for mood in ("calm", "angry")]
    results = [json.loads((path.parent / "results.json").read_text()) for path in words]
    assert [result["settings"]["conditions"] for result in results] == [CALM, ANGRY]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"mood": "sad"}, "text_conditions: mood: 'sad' is not a text that this model knows"),
        ({"mood": 3}, "text_conditions: 'mood' must be a string, not 3"),
        (["calm"], """text_conditions: expected {"name": "text", ...}, not ['calm']"""),
    ],
)
def test_a_faulty_text_is_one_line_with_its_file(
    conditioned, tmp_path, monkeypatch, capsys, conditions, message
):
    other = copy_of(conditioned, tmp_path)
    path = transcripts(other)[1]
    write_conditions(path, conditions)
    config = write_yaml(tmp_path / "config.yaml", run_values(other, tmp_path / "run", "lora"))
    assert command_line(monkeypatch, "--config", config) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and f"{path}: {message}" in lines[0]
    assert not (tmp_path / "run").exists()


def test_texts_that_a_model_does_not_have_are_counted_in_one_line(demo, conditioned, tmp_path, capsys):
    other = copy_of(conditioned, tmp_path)
    shutil.copytree(demo.model_dir, other.model_dir, dirs_exist_ok=True)
    run_training(run_args(other, tmp_path / "run", "lora", max_steps=1, do_ckpt=False))
    lines = [line for line in capsys.readouterr().err.splitlines() if "text_conditions" in line]
    expected = "Training data: text_conditions that are not used, the model has none: 'mood' in 2 of 2."
    assert len(lines) == 1 and lines[0].endswith(expected)


@pytest.mark.parametrize("key", ["sample_conditions", "eval.spoken.conditions"])
def test_conditions_of_the_configuration_are_checked_before_the_first_step(
    conditioned, tmp_path, monkeypatch, capsys, key
):
    write_swuggy(tmp_path / "data", num_ids=1)
    overrides = {"sample_freq": 1, "eval": {"spoken": {"data": str(tmp_path / "data")}}}
    values = run_values(conditioned, tmp_path / "run", "lora", **overrides)
    config = write_yaml(tmp_path / "config.yaml", values)
    for text, message in (("{tone: x}", "no condition 'tone'"), ("{mood: 3}", "names with texts")):
        assert command_line(monkeypatch, "--config", config, f"--{key}", text) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {key}: ") and message in lines[0]


@pytest.mark.slow
def test_a_dry_run_names_the_conditions(conditioned, tmp_path, monkeypatch, capsys):
    config = write_yaml(tmp_path / "config.yaml", run_values(conditioned, tmp_path / "run", "lora_ttt"))
    assert command_line(monkeypatch, "--config", config, "--dry-run") == 0
    assert "Text conditions: mood (sum)." in capsys.readouterr().out
