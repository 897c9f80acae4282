"""Exporting a checkpoint: the same model elsewhere, a card that is true, the Hub, and a user's mistakes."""

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from moshi.models.loaders import CheckpointInfo
from ruamel.yaml import YAML
from safetensors.torch import load_file

from finetune.args import TTTArgs
from finetune.base_model.weight_files import count_parameters
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.reading import load_checkpoint_model
from finetune.commands import run_command
from finetune.config_io import build_args
from finetune.export import folder as folder_module
from finetune.export.card import CardFacts, model_card
from finetune.export.command import export
from finetune.export.folder import export_checkpoint
from finetune.ttt_utils import is_ttt_parameter
from run_helpers import TTT, checkpoint_content

FILES = {
    "lora_ttt": {"lora.safetensors", "ttt.safetensors"},
    "lora": {"lora.safetensors"},
    "full_ttt": {"consolidated.safetensors", "ttt.safetensors"},
    "ttt": {"ttt.safetensors"},
}
HUB_BASE = "kyutai/moshiko-pytorch-bf16"


@pytest.fixture
def export_command(monkeypatch, capsys):
    """Run the command in this process; return status, lines of output and lines of errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(export)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def fails(export_command, tmp_path):
    """Run the command with a mistake; return its one line, after a look that nothing was written."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        status, output, errors = export_command(*arguments)
        assert status == 2 and output == []
        assert len(errors) == 1 and errors[0].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return errors[0]

    return run


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub that keeps the calls, or raises `hub.error`."""

    class FakeHub:
        error = None
        calls = ()

        def create_repo(self, repo_id, **options):
            FakeHub.calls += (("create_repo", repo_id, options),)
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, **_):
            if FakeHub.error is not None:
                raise FakeHub.error
            FakeHub.calls += (
                ("upload_folder", repo_id, sorted(path.name for path in folder_path.iterdir())),
            )

    monkeypatch.setattr(folder_module, "HfApi", FakeHub)
    return FakeHub


@pytest.fixture
def checkpoint(untrained_run, tmp_path):
    """A copy of a checkpoint that a test may damage."""
    shutil.copytree(checkpoint_content(untrained_run("lora_ttt")), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _logits(path):
    model = load_checkpoint_model(path, dtype=torch.float32)
    codes = torch.randint(60, (1, 17, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(codes).text_logits


def _front_matter(card):
    _, front_matter, _ = card.split("---\n", 2)
    return YAML(typ="safe").load(front_matter)


def _facts(untrained_run, mode, **changes):
    source = CheckpointDescription.read(checkpoint_content(untrained_run(mode)))
    values = {
        "step": source.training["step"],
        "config": source.config,
        "ttt": source.ttt,
        "parameters": {name: count_parameters(source.folder / name) for name in source.files},
        "base_model": HUB_BASE,
    }
    return CardFacts(**(values | changes))


@pytest.mark.parametrize("mode", FILES)
def test_the_exported_model_gives_the_same_logits(untrained_run, export_command, tmp_path, mode):
    out = tmp_path / "new" / "exported"
    status, output, errors = export_command("--checkpoint", untrained_run(mode), "--out", out)
    assert (status, errors) == (0, [])
    assert output[-1] == f"Exported to {out}"
    assert {path.name for path in out.iterdir()} == FILES[mode] | {
        "config.json",
        "training.json",
        "README.md",
    }
    assert [path.name for path in out.parent.iterdir()] == ["exported"]
    assert torch.equal(_logits(out), _logits(untrained_run(mode)))


def test_a_local_base_model_is_kept_and_mentioned(untrained_run, tiny_base, export_command, tmp_path):
    _, output, _ = export_command("--checkpoint", untrained_run("lora_ttt"), "--out", tmp_path / "out")
    assert output[0] == f"The base model is local ({tiny_base}): other machines need --base-model USER/REPO."
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["moshi_paths"]["hf_repo_id"] == str(tiny_base)
    assert str(tiny_base) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("mode", FILES)
def test_with_a_base_model_on_the_hub_no_local_path_is_left(
    untrained_run, tiny_base, export_command, tmp_path, mode
):
    options = ("--checkpoint", untrained_run(mode), "--out", tmp_path / "out", "--base-model", HUB_BASE)
    status, output, _ = export_command(*options)
    assert (status, output) == (0, [f"Exported to {tmp_path / 'out'}"])
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    others = dict.fromkeys(("revision", "mimi_path", "moshi_path", "tokenizer_path", "config_path"))
    assert training["moshi_paths"] == {"hf_repo_id": HUB_BASE} | others
    assert training["step"] == 7
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for local in (tiny_base, untrained_run(mode), tmp_path):
            assert str(local).encode() not in content, f"{path.name} names {local}"


def test_a_base_model_in_another_folder(untrained_run, tiny_base, export_command, tmp_path, monkeypatch):
    shutil.copytree(tiny_base, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    export_command("--checkpoint", untrained_run("lora_ttt"), "--out", "out", "--base-model", "moved")
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["moshi_paths"]["hf_repo_id"] == str(tmp_path / "moved")
    assert torch.equal(_logits(tmp_path / "out"), _logits(untrained_run("lora_ttt")))


def test_the_card_names_base_model_and_settings(untrained_run, export_command, tmp_path):
    options = ("--checkpoint", untrained_run("lora_ttt"), "--out", tmp_path / "out", "--base-model", HUB_BASE)
    export_command(*options, "--title", "A listener: it learns", "--license", "mit")
    card = (tmp_path / "out" / "README.md").read_text()
    assert _front_matter(card) == {
        "license": "mit",
        "library_name": "moshi-ttt",
        "base_model": HUB_BASE,
        "pipeline_tag": "audio-to-audio",
        "tags": ["moshi", "test-time-training", "speech"],
    }
    for line in (
        "# A listener: it learns",
        "| training step | 7 |",
        "| LoRA rank | 4 |",
        "| LoRA scaling | 2 |",
        "| layers | 1, 3 (of 4, counted from 0) |",
        "| inner MLP per head | 32 → 128 → 32 |",
        "| inner learning rate `base_lr` | 5 (`base_lr_scale: published`) |",
        "| keys | of the frame 0.08 s earlier (`key_shift: 1`) |",
        "| mini-batch | 16 frames (1.28 s) |",
        "| attention window of these layers | 25 frames (2 s) |",
        "| attention window of the other layers | 500 frames (40 s) |",
        "python generate.py --checkpoint USER/REPO in.wav out.wav",
    ):
        assert line in card.splitlines()
    for name in FILES["lora_ttt"]:
        count = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / name).values())
        assert f"| `{name}` | {count:,} |" in card
    assert "impersonate" in card and "Défossez et al. 2024" in card and "Dalal et al. 2025" in card


def test_the_card_of_a_lora_run_says_nothing_of_ttt(untrained_run):
    card = model_card(_facts(untrained_run, "lora", base_model=None))
    assert "base_model" not in _front_matter(card)
    assert _front_matter(card)["license"] == "cc-by-4.0"
    assert "The `moshi` package reads `lora.safetensors`." in card
    assert "TTT" not in card and "test-time" not in card


def test_the_card_of_full_weights(untrained_run):
    card = model_card(_facts(untrained_run, "full_ttt"))
    assert "| weights | full weights of the model, no adapters |" in card
    assert "LoRA" not in card and "--moshi-weight consolidated.safetensors" in card


def test_the_card_of_a_baseline_has_its_attention_windows_only(untrained_run):
    ttt = build_args(TTTArgs, {"enable": True, "layers": "none", "non_ttt_layer_context": 25})
    card = model_card(_facts(untrained_run, "lora", ttt=ttt))
    assert "| layers | none (of 4, counted from 0) |" in card
    assert "| attention window of all layers | 25 frames (2 s) |" in card
    assert "inner MLP" not in card and "attention window of the base model instead" in card


def test_the_card_of_a_model_that_cannot_stream_offers_no_conversation(untrained_run):
    ttt = build_args(TTTArgs, TTT | {"causal": False})
    card = model_card(_facts(untrained_run, "ttt", ttt=ttt))
    assert "generate.py" not in card and "cannot stream" in card


def test_stock_moshi_reads_the_adapters_as_the_card_says(untrained_run, tiny_base, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(untrained_run("lora_ttt"), out)

    def stock(config_path):
        info = CheckpointInfo.from_hf_repo(
            "unused",
            moshi_weights=tiny_base / "model.safetensors",
            mimi_weights=tiny_base / "mimi.safetensors",
            tokenizer=tiny_base / "tokenizer.model",
            config_path=config_path,
            mimi_config_path=tiny_base / "mimi_config.json",
            lora_weights=str(out / "lora.safetensors"),
        )
        return info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=False)

    with pytest.raises(TypeError, match="ttt"):
        stock(out / "config.json")
    config = json.loads((out / "config.json").read_text())
    del config["ttt"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = stock(tmp_path / "config.json").state_dict()
    adapters = load_file(out / "lora.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in adapters.items())
    assert not any(is_ttt_parameter(name) for name in state)


@pytest.mark.parametrize("private", [False, True])
def test_pushing_uploads_the_folder(untrained_run, export_command, hub, tmp_path, private):
    options = ["--checkpoint", untrained_run("lora_ttt"), "--out", tmp_path / "out", "--base-model", HUB_BASE]
    options += ["--push-to-hub", "me/listener", *(["--private"] if private else [])]
    status, output, errors = export_command(*options)
    assert (status, errors) == (0, [])
    assert output == [f"Exported to {tmp_path / 'out'} and pushed to https://huggingface.co/me/listener"]
    files = sorted(FILES["lora_ttt"] | {"config.json", "training.json", "README.md"})
    assert hub.calls == (
        ("create_repo", "me/listener", {"private": private or None, "exist_ok": True}),
        ("upload_folder", "me/listener", files),
    )
    assert "serve.py --checkpoint me/listener" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("Token is required,\nbut no token found."),
        HFValidationError("Repo id must use alphanumeric chars"),
        ConnectionError("no route to host"),
        RuntimeError("Error while uploading"),
    ],
)
def test_a_failure_of_the_hub_is_one_line_and_the_folder_stays(
    untrained_run, export_command, hub, tmp_path, error
):
    hub.error = error
    out = tmp_path / "my export"
    options = ("--checkpoint", untrained_run("lora_ttt"), "--out", out, "--base-model", HUB_BASE)
    status, output, errors = export_command(*options, "--push-to-hub", "me/listener", "--private")
    assert (status, output) == (2, [])
    assert len(errors) == 1
    assert f"{out} is complete, but pushing it to me/listener failed" in errors[0]
    assert errors[0].endswith(f"huggingface-cli upload --private me/listener '{out}' .")
    assert {path.name for path in out.iterdir()} >= FILES["lora_ttt"] | {"README.md"}


def test_the_real_client_without_a_network_is_one_line(untrained_run, export_command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    options = ("--checkpoint", untrained_run("lora"), "--out", tmp_path / "out", "--base-model", HUB_BASE)
    status, _, errors = export_command(*options, "--push-to-hub", "me/listener")
    assert status == 2 and len(errors) == 1
    assert "is complete, but pushing it to me/listener failed (" in errors[0]


def test_pushing_with_a_local_base_model_is_refused(untrained_run, tiny_base, fails, hub, tmp_path):
    options = (
        "--checkpoint",
        untrained_run("lora_ttt"),
        "--out",
        tmp_path / "out",
        "--push-to-hub",
        "me/listener",
    )
    for given in ((), ("--base-model", tiny_base)):
        line = fails(*options, *given)
        assert str(tiny_base) in line and "--base-model" in line
    assert hub.calls == ()


def test_an_existing_folder_is_left_alone(untrained_run, fails, tmp_path):
    (tmp_path / "out").mkdir()
    assert "out exists already" in fails("--checkpoint", untrained_run("lora_ttt"), "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_checkpoint(fails, tmp_path):
    assert "no checkpoint here" in fails("--checkpoint", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["lora.safetensors", "ttt.safetensors", "training.json"])
def test_a_missing_file(checkpoint, fails, tmp_path, name):
    (checkpoint / name).unlink()
    assert f"{name} is missing" in fails("--checkpoint", checkpoint, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["lora.safetensors", "ttt.safetensors", "training.json", "config.json"])
def test_a_truncated_file(checkpoint, fails, tmp_path, name):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    assert f"{name}: " in fails("--checkpoint", checkpoint, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("training.json", {"files": None}),
        ("training.json", {"files": ["../../secret"]}),
        ("training.json", {"files": ["lora.safetensors"]}),
        ("training.json", {"moshi_paths": None}),
        ("training.json", {"ttt": {"layers": 0.5}}),
        ("training.json", {"step": None}),
        ("config.json", {"num_layers": 2}),
        ("config.json", {"lora_rank": None}),
        ("config.json", {"dim": "wide"}),
        ("config.json", {"context": []}),
    ],
)
def test_settings_that_do_not_fit(checkpoint, fails, tmp_path, name, changes):
    values = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps(values | changes))
    line = fails("--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert str(checkpoint) in line and name in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--push-to-hub", "listener", "--base-model", HUB_BASE), "--push-to-hub: 'listener' is not a repos"),
        (("--base-model", "/nowhere/model"), "--base-model: '/nowhere/model' is neither"),
        (("--base-model", "."), "--base-model: config.json does not exist"),
        (("--private",), "--private: goes with --push-to-hub"),
        (("--title", " "), "--title: ' ' is empty"),
        (("--title", "\udcff"), "--title: "),
        (("--license", "CC BY"), "--license: 'CC BY' is not a license identifier"),
        (("--license", "mit\nx: y"), "--license: "),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_wrong_options(untrained_run, fails, tmp_path, options, message):
    assert message in fails("--checkpoint", untrained_run("lora_ttt"), "--out", tmp_path / "out", *options)


def test_a_full_disk_leaves_nothing(untrained_run, fails, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.shutil, "copyfile", disk_full)
    line = fails("--checkpoint", untrained_run("lora_ttt"), "--out", tmp_path / "out")
    assert "out: the export cannot be written" in line and "No space left" in line
