"""A user's mistakes: one clear line, exit status 2, nothing written."""

import json
import shutil
import sys
import wave

import numpy as np
import pytest

from run_helpers import command_line, run_values, write_yaml


@pytest.fixture
def data(demo, tmp_path):
    """A copy of the data set that a test may damage."""
    shutil.copytree(demo.out_dir / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def fails(demo, tmp_path, monkeypatch, capfd):
    """Run train.py with a changed configuration; return its one error line."""

    def run(*options, change=None, text=None, config=None, run_dir=None):
        run_dir = run_dir or tmp_path / "run"
        values = run_values(demo, run_dir, do_eval=True)
        if change is not None:
            change(values)
        path = write_yaml(tmp_path / "config.yaml", values)
        if text is not None:
            path.write_text(text)
        existed = run_dir.exists()
        capfd.readouterr()
        status = command_line(monkeypatch, config or path, *options)
        error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert status == 2
        assert len(error) == 1
        assert run_dir.exists() == existed, "a run that cannot start must not leave a run directory"
        return error[0]

    return run


def test_no_configuration(monkeypatch, capsys):
    assert command_line(monkeypatch) == 2
    assert "No configuration given" in capsys.readouterr().err


def test_missing_configuration_file(fails):
    assert "nowhere.yaml: cannot read the configuration: No such file" in fails(config="nowhere.yaml")


def test_configuration_that_is_not_yaml(fails):
    assert "config.yaml: not valid YAML" in fails(text="a: [1, 2\nb: 3")


def test_configuration_with_a_key_twice(fails):
    assert "duplicate key" in fails(text="max_steps: 1\nmax_steps: 2")


def test_configuration_that_is_a_list(fails):
    assert "expected keys and values, found list" in fails(text="- 1\n- 2")


def test_unknown_key(fails):
    line = fails(change=lambda v: v["ttt"].update(minibatch_size=3))
    assert "ttt.minibatch_size: unknown key, did you mean ttt.mini_batch_size?" in line


@pytest.mark.parametrize(
    ("section", "key", "replacement"),
    [
        (None, "ttt_fig5_enable", "ttt.log_inner_loop_losses"),
        (None, "librilight_evaluation_mode", "evaluate.py long-context"),
        (None, "training", "optim.lr"),
        ("ttt", "ttt_base_lr", "ttt.base_lr"),
        (None, "paper_metrics_eval", "evaluate.py"),
    ],
)
def test_foreign_keys_name_their_replacement(fails, section, key, replacement):
    def change(values):
        (values if section is None else values[section])[key] = {"lr": 1e-4} if key == "training" else True

    line = fails(change=change)
    assert key in line and replacement in line


def test_unknown_option(fails):
    assert "optim.learning_rate: unknown key" in fails("--optim.learning_rate", "1")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_steps", "1.5", "max_steps: 1.5 is not allowed, expected whole number"),
        ("batch_size", "two", "batch_size: 'two' is not allowed, expected whole number"),
        ("batch_size", "0", "batch_size: 0 is not allowed, must be greater than or equal to 1"),
        ("data.shuffle", "yes", "data.shuffle: 'yes' is not allowed, expected true or false"),
        ("optim.lr", "-1e-3", "optim.lr: -0.001 is not allowed, must be greater than 0"),
        ("optim.lr", ".nan", "optim.lr: nan is not allowed"),
        ("ttt.gating", "sum", "ttt.gating: 'sum' is not allowed, expected residual or blend"),
        ("ttt.layers", "first", "ttt.layers: 'first' is not none, all, middle or indices such as 29,30,31"),
        ("ttt.layers", "99", "ttt.layers: index 99 does not exist, the model has 4 layers (0 to 3)"),
        ("ttt.layers", "1,1", "ttt.layers: '1,1' names a layer twice"),
        ("ttt.ttt_mlp_hidden_dims", "[3, 4]", "ttt.ttt_mlp_hidden_dims: [3, 4] does not fit"),
        ("param_dtype", "float16", "param_dtype: 'float16' is not allowed, expected bfloat16 or float32"),
        ("device", "gpu", "device: 'gpu' is not a device"),
        ("device", "cuda:7", "device: 'cuda:7' is not available"),
        ("full_finetuning", "true", "full_finetuning and lora.enable exclude each other"),
        ("wandb.project", "", "wandb.project: '' is empty"),
        ("ttt.layers", "[]", "ttt.layers: the list is empty"),
        ("optim.lr", "null", "optim.lr: null is not allowed"),
    ],
)
def test_wrong_values(fails, option, value, message):
    assert message in fails(f"--{option}={value}")


def test_nothing_to_train(fails):
    line = fails("--lora.enable", "false", "--ttt.enable", "false")
    assert "nothing to train" in line
    assert "nothing to train" in fails("--lora.enable", "false", "--ttt.layers", "none")


def test_section_given_as_a_value(fails):
    assert "optim: 3 is not a section" in fails(change=lambda v: v.update(optim=3))


def test_run_dir_not_set(fails):
    assert "run_dir: not set" in fails("--run_dir", "")


def test_existing_run_directory(fails, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "precious.txt").write_text("kept")
    assert "old exists already; choose another, or set overwrite_run_dir" in fails(run_dir=old)
    assert (old / "precious.txt").read_text() == "kept"


def test_run_directory_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "file is a file" in fails(run_dir=tmp_path / "file")


def test_train_data_not_set_or_missing(fails):
    assert "data.train_data: not set" in fails("--data.train_data", "")
    assert "data.train_data: nowhere.jsonl does not exist" in fails("--data.train_data", "nowhere.jsonl")


def test_evaluation_without_data(fails):
    assert "data.eval_data: not set, but do_eval is true" in fails("--data.eval_data", "")


def test_empty_manifest(fails, data):
    (data / "train.jsonl").write_text("\n")
    assert "lists no recordings" in fails("--data.train_data", str(data / "train.jsonl"))


def test_manifest_that_is_not_json(fails, data):
    (data / "train.jsonl").write_text("{path: a.wav}\n")
    assert "train.jsonl line 1: not valid JSON" in fails("--data.train_data", str(data / "train.jsonl"))


def test_missing_audio_and_missing_alignments(fails, data):
    wav = data / "train" / "dialogue_000.wav"
    wav.with_suffix(".json").unlink()
    line = fails("--data.train_data", str(data / "train.jsonl"))
    assert "line 1" in line and "dialogue_000.json do not exist" in line
    wav.unlink()
    assert "dialogue_000.wav does not exist" in fails("--data.train_data", str(data / "train.jsonl"))


def test_broken_alignments(fails, data):
    (data / "train" / "dialogue_001.json").write_text(
        json.dumps({"alignments": [["hi", [0.1], "SPEAKER_MAIN"]]})
    )
    line = fails("--data.train_data", str(data / "train.jsonl"))
    assert "dialogue_001.json: alignments[0]: the times must be" in line


def _rewrite(path, channels):
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, 2)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(24000)
        file.writeframes(samples[:, :channels].tobytes())


def test_mono_recording(fails, data):
    _rewrite(data / "train" / "dialogue_001.wav", 1)
    line = fails("--data.train_data", str(data / "train.jsonl"))
    assert "dialogue_001.wav: mono, which trains 9 streams instead of 17" in line


def test_truncated_recording(fails, data):
    wav = data / "train" / "dialogue_001.wav"
    wav.write_bytes(wav.read_bytes()[:100_000])
    assert "dialogue_001.wav: truncated" in fails("--data.train_data", str(data / "train.jsonl"))


def test_recording_that_is_not_audio(fails, data):
    (data / "train" / "dialogue_001.wav").write_bytes(b"not a wav at all" * 100)
    assert "dialogue_001.wav: cannot be read as audio" in fails(
        "--data.train_data", str(data / "train.jsonl")
    )


def test_demo_model_that_is_not_there_is_not_looked_for_on_the_hub(fails, monkeypatch, tmp_path):
    monkeypatch.setattr("finetune.base_model.locate.hf_hub_download", pytest.fail)
    monkeypatch.chdir(tmp_path)
    line = fails("--moshi_paths.hf_repo_id", "demo_assets/model")
    assert "demo_assets/model does not exist; python -m finetune.demo makes it" in line


@pytest.mark.parametrize(("name", "what"), [("no-run", "does not exist"), (".", "has no args.yaml")])
def test_resuming_what_is_no_run(monkeypatch, capsys, tmp_path, name, what):
    assert command_line(monkeypatch, "--resume", tmp_path / name) == 2
    assert f"{what}; give the run_dir of a training." in capsys.readouterr().err


@pytest.fixture
def model_dir(demo, tmp_path):
    shutil.copytree(demo.model_dir, tmp_path / "model")
    return tmp_path / "model"


def test_model_repository_that_cannot_be_reached(fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fails("--moshi_paths.hf_repo_id", "nobody/no-such-model")
    assert "moshi_paths.hf_repo_id: 'nobody/no-such-model' is neither a local folder" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "cannot be read as safetensors"),
        ("mimi.safetensors", "cannot be read as safetensors"),
        ("tokenizer.model", "not a sentencepiece model"),
        ("config.json", "not valid JSON"),
    ],
)
def test_damaged_model_file(fails, model_dir, name, message):
    (model_dir / name).write_bytes(b"damaged")
    line = fails("--moshi_paths.hf_repo_id", str(model_dir))
    assert name in line and message in line


def test_missing_model_file(fails, model_dir):
    (model_dir / "model.safetensors").unlink()
    line = fails("--moshi_paths.hf_repo_id", str(model_dir))
    assert "model.safetensors does not exist" in line


def test_weights_of_another_architecture(fails, model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    line = fails("--moshi_paths.hf_repo_id", str(model_dir))
    assert "model.safetensors: cannot be loaded as this Moshi model" in line


def test_init_from_without_a_checkpoint(fails, tmp_path):
    assert "no checkpoint here" in fails("--init_from", str(tmp_path))


def test_sample_prompt_that_does_not_exist(fails):
    line = fails("--sample_freq", "1", "--sample_prompts", "[nowhere.wav]")
    assert "sample_prompts: nowhere.wav does not exist" in line


def test_a_run_directory_that_contains_its_inputs(fails, data):
    line = fails("--data.train_data", str(data / "train.jsonl"), "--overwrite_run_dir", "true", run_dir=data)
    assert "contains data.train_data" in line
    assert (data / "train.jsonl").exists()


def test_a_run_directory_with_an_impossible_name(fails):
    assert "run_dir: " in fails("--run_dir", "x" * 300)


@pytest.mark.parametrize("text", ["", "[" * 5000, "a: " + "9" * 5000])
def test_strange_yaml(fails, text):
    assert "config.yaml: " in fails(text=text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", str(2**32)),
        ("duration_sec", "1e300"),
        ("ttt.mini_batch_size", str(10**30)),
        ("ttt.initial_gating_alpha", "-1e39"),
        ("optim.lr", "1e300"),
        ("device", "cpu:3"),
        ("device", "hpu"),
    ],
)
def test_values_beyond_all_reason(fails, option, value):
    assert fails(f"--{option}", value).startswith(f"error: {option}: ")


def test_words_that_are_no_text(fails, data):
    path = data / "train" / "dialogue_001.json"
    path.write_text('{"alignments": [["\\ud800", [0.1, 0.2], "SPEAKER_MAIN"]]}')
    assert "holds characters that no text has" in fails("--data.train_data", str(data / "train.jsonl"))


@pytest.mark.parametrize("change", [{"num_heads": 0}, {"delays": [0]}, {"unknown": 1}])
def test_impossible_architectures(fails, model_dir, change):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | change))
    for options in ((), ("--dry-run",)):
        fails("--moshi_paths.hf_repo_id", str(model_dir), *options)


def test_a_codec_without_configuration(fails, model_dir):
    (model_dir / "mimi_config.json").write_text("{}")
    assert "mimi_config.json: channels is missing" in fails("--moshi_paths.hf_repo_id", str(model_dir))


def test_a_run_given_as_base_model(fails, tmp_path):
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    assert "start from it with init_from" in fails("--moshi_paths.hf_repo_id", str(tmp_path / "old"))


def test_wandb_that_is_not_installed(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'moshi-ttt[wandb]'" in fails("--wandb.project", "p")


def test_samples_of_a_model_that_cannot_stream(fails):
    line = fails("--sample_freq", "1", "--ttt.causal", "false")
    assert "sample_freq: a model with ttt.causal: false cannot stream" in line
