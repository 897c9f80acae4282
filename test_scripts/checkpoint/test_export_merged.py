"""Full weights for an export: adapters merged, readable by stock Moshi, the same model."""

import json
import shutil

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file

from finetune.checkpoint.reading import load_checkpoint_model
from finetune.demo.model_folder import write_random_repository
from finetune.errors import CheckpointError, ConfigError
from finetune.export import merge as export_weights
from finetune.export.command import export
from finetune.export.folder import export_checkpoint
from run_helpers import checkpoint_content, write_untrained_run

SHARED = {"config.json", "training.json", "README.md"}
CODES = torch.randint(60, (1, 17, 40), generator=torch.Generator().manual_seed(1))


def logits(model):
    """Text and audio logits, so that the depth transformer counts too."""
    with torch.no_grad():
        output = model(CODES)
    return torch.cat([output.text_logits.flatten(), output.logits.nan_to_num().flatten()])


def ours(path):
    return logits(load_checkpoint_model(path, dtype=torch.float32))


def merged(run, out, dtype="float32"):
    export_checkpoint(run, out, merged_dtype=dtype)
    return out


def stock(base, folder, **files):
    """The model as stock Moshi's server loads it."""
    info = CheckpointInfo.from_hf_repo(
        "unused",
        mimi_weights=base / "mimi.safetensors",
        tokenizer=base / "tokenizer.model",
        config_path=folder / "config.json",
        mimi_config_path=base / "mimi_config.json",
        **files,
    )
    return info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=False)


def test_stock_moshi_reads_exported_adapters_exactly(untrained_run, tiny_base, tmp_path):
    export_checkpoint(untrained_run("lora"), tmp_path / "out")
    files = {
        "moshi_weights": tiny_base / "model.safetensors",
        "lora_weights": str(tmp_path / "out" / "lora.safetensors"),
    }
    assert torch.equal(logits(stock(tiny_base, tmp_path / "out", **files)), ours(untrained_run("lora")))


def test_stock_moshi_reads_merged_weights(untrained_run, tiny_base, tmp_path):
    out = merged(untrained_run("lora"), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == SHARED | {"consolidated.safetensors"}
    theirs = logits(stock(tiny_base, out, moshi_weights=out / "consolidated.safetensors"))
    assert torch.equal(theirs, ours(out))
    # (W + s B A) x is summed in another order than W x + s B (A x).
    adapters = ours(untrained_run("lora"))
    assert (theirs - adapters).abs().max() < 1e-5 * adapters.abs().max()
    base = logits(stock(tiny_base, tiny_base, moshi_weights=tiny_base / "model.safetensors"))
    assert (theirs - base).abs().max() > 0.01, "the adapters do something"


@pytest.mark.parametrize("mode", ["lora_ttt", "ttt"])
def test_merged_weights_with_ttt_are_the_same_model(untrained_run, tmp_path, mode):
    out = merged(untrained_run(mode), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == SHARED | {"consolidated.safetensors", "ttt.safetensors"}
    separate = ours(untrained_run(mode))
    # Relative to the largest logit: the inner loop of this test (base_lr 5) enlarges differences of rounding.
    assert (ours(out) - separate).abs().max() < 1e-5 * separate.abs().max()
    config = json.loads((out / "config.json").read_text())
    assert config["lora"] is False and config["moshi_name"] == "consolidated.safetensors"
    assert not {"lora_rank", "lora_scaling", "lora_name"} & config.keys()
    training = json.loads((out / "training.json").read_text())
    assert training["files"] == ["consolidated.safetensors", "ttt.safetensors"]
    assert training["moshi_paths"]["moshi_path"] is None and training["step"] == 7


def test_sums_are_rounded_once(untrained_run, tiny_base, tmp_path):
    out = merged(untrained_run("lora"), tmp_path / "out", "bfloat16")
    single = load_file(merged(untrained_run("lora"), tmp_path / "single") / "consolidated.safetensors")
    for name, tensor in load_file(out / "consolidated.safetensors").items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, single[name].bfloat16()), name
    base = load_file(tiny_base / "model.safetensors")
    adapters = load_file(checkpoint_content(untrained_run("lora")) / "lora.safetensors")
    layer = "transformer.layers.2.gating.linear_in."
    exact = base[f"{layer}weight"].double() + 2.0 * (
        adapters[f"{layer}lora_B.weight"].double() @ adapters[f"{layer}lora_A.weight"].double()
    )
    assert torch.allclose(single[f"{layer}weight"].double(), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("recorded", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), (None, torch.bfloat16), ([], torch.bfloat16)],
)
def test_the_dtype_of_training_is_the_default(untrained_run, tmp_path, recorded, dtype):
    shutil.copytree(checkpoint_content(untrained_run("lora")), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"param_dtype": recorded}))
    out = merged(tmp_path / "checkpoint", tmp_path / "out", "auto")
    assert {tensor.dtype for tensor in load_file(out / "consolidated.safetensors").values()} == {dtype}


def test_full_weights_are_copied_unless_a_dtype_is_asked_for(untrained_run, tmp_path):
    run = untrained_run("full_ttt")
    copied = merged(run, tmp_path / "copy", "auto") / "consolidated.safetensors"
    assert copied.read_bytes() == (checkpoint_content(run) / "consolidated.safetensors").read_bytes()
    half = load_file(merged(run, tmp_path / "half", "bfloat16") / "consolidated.safetensors")
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in load_file(copied).items())
    assert "full weights of the model, no adapters" in (tmp_path / "half" / "README.md").read_text()


def test_a_merged_export_can_be_exported_again(untrained_run, tmp_path):
    out = merged(untrained_run("lora_ttt"), tmp_path / "out")
    export_checkpoint(out, tmp_path / "again")
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_card_says_that_adapters_are_merged(untrained_run, tmp_path):
    out = merged(untrained_run("lora_ttt"), tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "fine-tuned with moshi-ttt: LoRA adapters (merged into the weights) and Test-Time-Tr" in card
    assert "| weights | full weights: the LoRA adapters are merged into those of the base model |" in card
    count = sum(tensor.numel() for tensor in load_file(out / "consolidated.safetensors").values())
    assert f"| `consolidated.safetensors` | {count:,} |" in card
    assert "lora.safetensors" not in card and "--moshi-weight consolidated.safetensors" in card
    unchanged = (merged(untrained_run("ttt"), tmp_path / "ttt") / "README.md").read_text()
    assert "| weights | full weights: those of the base model, which training left unchanged |" in unchanged


def test_weights_with_fused_projections_merge_too(tiny_base, tmp_path):
    """Moshi 7B's file holds the query, key and value projections of all steps in one tensor."""
    shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    fused = {}
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")]):
        head, split, _ = name.partition("in_projs.")
        fused.setdefault(f"{head}in_proj_weight" if split else name, []).append(tensors[name])
    assert len(fused) < len(tensors)
    fused = {name: torch.cat(parts).bfloat16() for name, parts in fused.items()}
    save_file(fused, tmp_path / "base" / "model.safetensors")
    run = write_untrained_run(tmp_path / "run", "lora", tmp_path / "base")
    out = merged(run, tmp_path / "out")
    adapters = ours(run)
    assert (ours(out) - adapters).abs().max() < 1e-5 * adapters.abs().max()
    ttt = merged(
        write_untrained_run(tmp_path / "ttt", "ttt", tmp_path / "base"), tmp_path / "half", "bfloat16"
    )
    assert torch.equal(ours(ttt), ours(tmp_path / "ttt")), "bfloat16 of the base file is kept bit by bit"


def test_another_base_model_is_refused(untrained_run, tmp_path):
    other = write_random_repository(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was trained on another base model than"):
        export_checkpoint(untrained_run("lora"), tmp_path / "out", base_model=str(other), merged_dtype="auto")
    assert not (tmp_path / "out").exists()


def test_the_base_model_may_have_moved(untrained_run, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    options = {"base_model": str(tmp_path / "moved"), "merged_dtype": "float32"}
    export_checkpoint(untrained_run("lora_ttt"), tmp_path / "out", **options)
    assert torch.equal(ours(tmp_path / "out"), ours(merged(untrained_run("lora_ttt"), tmp_path / "other")))


@pytest.mark.parametrize("merged_dtype", [None, "auto"])
def test_descriptions_that_disagree_are_refused(untrained_run, tmp_path, merged_dtype):
    for name, key, value, message in (
        (
            "config.json",
            "mini_batch_size",
            8,
            r"ttt\.mini_batch_size is 8 in config\.json but 16 in training",
        ),
        ("both", "ttt_mlp_hidden_dims", [64], r"ttt\.safetensors: .* has shape .*128\], expected .*64\]"),
    ):
        folder = tmp_path / f"{name}-{key}"
        shutil.copytree(checkpoint_content(untrained_run("lora_ttt")), folder)
        for file in ("config.json", "training.json") if name == "both" else (name,):
            values = json.loads((folder / file).read_text())
            values["ttt"][key] = value
            (folder / file).write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(folder, tmp_path / "out", merged_dtype=merged_dtype)
        assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(untrained_run, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_weights, "save_file", disk_full)
    with pytest.raises(CheckpointError, match=r"out: the export cannot be written .*No space left"):
        merged(untrained_run("lora"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_the_command(untrained_run, tmp_path, capsys):
    command = ["--checkpoint", str(untrained_run("lora")), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--dtype: goes with --merged"):
        export([*command, "--dtype", "float32"])
    with pytest.raises(ConfigError, match="--dtype"):
        export([*command, "--merged", "--dtype", "float16"])
    assert export([*command, "--merged", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Exported to {tmp_path / 'out'}"
    weights = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
