"""Exports for other libraries: names, shapes and values, and the way back."""

import json
import shutil

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from finetune.checkpoint.reading import load_checkpoint_model
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config
from finetune.errors import CheckpointError
from finetune.export.command import export
from finetune.export.formats.folder import export_in_format
from finetune.export.formats.names import to_alternating, to_halves, to_ours, to_theirs
from finetune.export.formats.transformers_config import (
    moshi_config,
    sizes_of,
    their_sizes,
    transformers_config,
)
from run_helpers import checkpoint_content, write_untrained_run

CONFIG = tiny_moshi_config(text_card=50, card=20, dim=64, num_layers=2)
RANK = 4  # of the untrained runs, whose scaling is 2


def exported(checkpoint, out, name, **options):
    export_in_format(name, checkpoint, out, **options)
    return out


def changed(model, **changes):
    """A config.json and shapes like those of a model, with other values."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return CONFIG | changes, shapes


@pytest.fixture(scope="module")
def their_base(tiny_base, tmp_path_factory):
    """The tiny base model as transformers has it, in float32."""
    folder = tmp_path_factory.mktemp("transformers") / "base"
    return exported(tiny_base, folder, "transformers", dtype="float32")


@pytest.fixture(scope="module")
def model():
    return make_tiny_moshi(CONFIG, seed=0)


@pytest.mark.parametrize("kv_repeat", [1, 2])
@pytest.mark.parametrize("hidden_scale", [4.125, 4, 3.3])
def test_the_way_to_transformers_and_back_changes_no_bit(hidden_scale, kv_repeat):
    config = CONFIG | {"hidden_scale": hidden_scale, "kv_repeat": kv_repeat, "depformer_kv_repeat": 1}
    state = make_tiny_moshi(config, seed=1).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    theirs = dict(to_theirs(state, sizes_of(config, shapes)))
    described = json.loads(
        json.dumps(transformers_config(config, shapes, dtype="float32", source="config.json"))
    )
    their_shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    sizes = their_sizes(described, their_shapes, source="config.json")
    assert sizes == sizes_of(config, shapes)
    back = to_ours(theirs, sizes)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    again = moshi_config(described, their_shapes, CONFIG, source="config.json")
    again = make_tiny_moshi(again, seed=0).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == shapes


def test_every_number_of_a_model_is_in_its_tensors_once(model):
    config, shapes = changed(model)
    theirs = dict(to_theirs(model.state_dict(), sizes_of(config, shapes)))
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(p.numel() for p in model.parameters())
    assert theirs["decoder.model.layers.1.self_attn.q_proj.linear.weight"].shape == (64, 64)
    assert theirs["depth_decoder.layers.0.self_attn.k_proj.linear.weight"].shape == (8, 64, 64)
    assert theirs["depth_decoder.input_projections.weight"].shape == (8, 64, 64)
    assert theirs["decoder.model.norm.weight"].shape == (64,)
    assert theirs["embed_tokens.15.weight"].shape == (21, 64)


def test_a_heads_halves_lie_behind_each_other():
    assert to_halves(torch.arange(12), 2).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert to_alternating(to_halves(torch.arange(12), 2), 2).tolist() == list(range(12))
    assert to_halves(torch.arange(12), 0).tolist() == list(range(12))


def test_the_7b_models_configuration_is_the_one_that_transformers_has_by_default():
    config = loaders._lm_kwargs
    shapes = {
        f"{part}.layers.0.gating.{step}linear_in.weight": size
        for part, step, size in (("transformer", "", (22528, 4096)), ("depformer", "0.", (5632, 1024)))
    }
    shapes |= {f"transformer.layers.{n}.x": () for n in range(32)} | {
        f"depformer.layers.{n}.x": () for n in range(6)
    }
    made = transformers_config(config, shapes, dtype="bfloat16", source="config.json")
    assert (made["ffn_dim"], made["hidden_size"], made["num_hidden_layers"]) == (22528, 4096, 32)
    assert (made["vocab_size"], made["audio_vocab_size"], made["sliding_window"]) == (32000, 2048, 3000)
    assert made["rms_norm_eps"] == 1e-8 and made["rope_parameters"]["rope_theta"] == 10000.0
    depth = made["depth_decoder_config"]
    assert (depth["ffn_dim"], depth["hidden_size"], depth["num_hidden_layers"]) == (5632, 1024, 6)
    assert (depth["max_position_embeddings"], depth["sliding_window"], depth["input_size"]) == (9, 8, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positional_embedding": "sin"},
            "positional_embedding: sin is what the Moshi of transformers cannot be",
        ),
        ({"depformer_weights_per_step_schedule": [0] * 8}, "depformer_weights_per_step_schedule"),
        ({"norm": "layer_norm"}, "norm: layer_norm .* only RMS norms"),
        ({"dep_q": 16}, "dep_q: 16 .* two voices"),
        ({"delays": [0] * 17}, "delays: .* only "),
        ({"context": None}, "context: None"),
        ({"conditioners": {"description": {}}}, "conditioners"),
        ({"extra_heads_num_heads": 4}, "extra_heads_num_heads: 4"),
    ],
)
def test_another_kind_of_moshi_is_refused_with_the_key_that_says_so(model, changes, message):
    config, shapes = changed(model, **changes)
    with pytest.raises(CheckpointError, match=f"^config.json: {message}"):
        transformers_config(config, shapes, dtype="float32", source="config.json")


def test_weights_that_lack_a_tensor_are_no_model(model):
    config, shapes = changed(model)
    theirs = dict(to_theirs(model.state_dict(), sizes_of(config, shapes)))
    del theirs["decoder.lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.lm_head\.weight is missing"):
        to_ours(theirs, sizes_of(config, shapes))


def test_a_base_model_comes_back_from_transformers_as_it_was(tiny_base, their_base, tmp_path):
    assert {path.name for path in their_base.iterdir()} == {"config.json", "model.safetensors"}
    ours = exported(their_base, tmp_path / "ours", "kyutai", base_model=str(tiny_base))
    before, after = load_file(tiny_base / "model.safetensors"), load_file(ours / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    codes = torch.randint(60, (1, 17, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (
            load_checkpoint_model(folder, dtype=torch.float32)(codes) for folder in (tiny_base, ours)
        )
    assert torch.equal(first.text_logits, second.text_logits)


def test_merged_adapters_go_to_transformers(untrained_run, tiny_base, tmp_path):
    run = untrained_run("lora")
    theirs = load_file(
        exported(run, tmp_path / "theirs", "transformers", dtype="float32") / "model.safetensors"
    )
    export_in_format("kyutai", tmp_path / "theirs", tmp_path / "ours", base_model=str(tiny_base))
    export(["--checkpoint", str(run), "--out", str(tmp_path / "merged"), "--merged", "--dtype", "float32"])
    merged = load_file(tmp_path / "merged" / "consolidated.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in merged.items())
    half = exported(run, tmp_path / "half", "transformers", dtype="bfloat16")
    tensors = load_file(half / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor.bfloat16()) for name, tensor in theirs.items())
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_file_of_peft_holds_every_adapter(untrained_run, tmp_path):
    run = untrained_run("lora")
    out = exported(run, tmp_path / "out", "peft")
    ours = load_file(checkpoint_content(run) / "lora.safetensors")
    theirs = load_file(out / "adapter_model.safetensors")
    assert theirs.keys() == {f"base_model.model.{name}" for name in ours}
    assert all(torch.equal(theirs[f"base_model.model.{name}"], tensor) for name, tensor in ours.items())
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, 2 * RANK)
    assert {f"{name}.lora_A.weight" for name in config["target_modules"]} == {
        n for n in ours if "lora_A" in n
    }
    assert config["modules_to_save"] is None and config["base_model_name_or_path"] is None


def test_an_adapter_for_transformers_adds_what_ours_does(untrained_run, their_base, tmp_path):
    """By PEFT's own rule, for matrices and for tensors of several: [codebooks, out, in]."""
    run = untrained_run("lora")
    out = exported(run, tmp_path / "out", "peft-transformers")
    config = json.loads((out / "adapter_config.json").read_text())
    adapters = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(out / "adapter_model.safetensors").items()
    }
    theirs = load_file(their_base / "model.safetensors")
    merged = load_file(exported(run, tmp_path / "run", "transformers", dtype="float32") / "model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    for name, weight in theirs.items():
        module = name.removesuffix(".weight")
        down, up = (adapters.pop(f"{module}.lora_{part}.weight", None) for part in "AB")
        if down is not None and weight.ndim == 2:
            assert module in config["target_modules"]
            weight = weight + scaling * up @ down
        elif down is not None:
            assert name in config["target_parameters"]
            down = down.view(len(weight), RANK, -1)
            weight = weight + scaling * torch.einsum("ork,kri->koi", up.view(len(up), RANK, -1), down)
        assert torch.allclose(weight, merged[name], atol=1e-5), name
    assert not adapters


def test_embeddings_trained_beside_adapters_are_saved_with_them_or_refused(
    untrained_run, tiny_base, tmp_path
):
    run = write_untrained_run(tmp_path / "run", "lora", tiny_base)
    file = checkpoint_content(run) / "lora.safetensors"
    tensors = load_file(file)
    embedding = load_file(tiny_base / "model.safetensors")["emb.3.weight"]
    save_file(tensors | {"emb.3.weight": embedding}, file)
    out = exported(run, tmp_path / "out", "peft")
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["emb.3"]
    assert torch.equal(
        load_file(out / "adapter_model.safetensors")["base_model.model.emb.3.weight"], embedding
    )
    with pytest.raises(CheckpointError, match=r"emb\.3\.weight was changed .* --format transformers"):
        export_in_format("peft-transformers", run, tmp_path / "other")
    norm = load_file(tiny_base / "model.safetensors")["out_norm.alpha"]
    save_file(tensors | {"out_norm.alpha": norm}, file)
    with pytest.raises(CheckpointError, match=r"out_norm\.alpha was changed beside the adapters"):
        export_in_format("peft", run, tmp_path / "other")


@pytest.mark.parametrize("name", ["peft", "peft-transformers", "transformers"])
def test_ttt_layers_are_refused(untrained_run, tmp_path, name):
    with pytest.raises(CheckpointError, match=f"has TTT layers, which --format {name} has no place for"):
        export_in_format(name, untrained_run("lora_ttt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_format_is_one_line(untrained_run, tiny_base, tmp_path, command):
    out, run = tmp_path / "out", untrained_run("lora")
    for arguments, message in (
        (["--checkpoint", tiny_base, "--format", "peft"], "holds no LoRA adapters"),
        (["--checkpoint", run, "--format", "peft", "--merged"], "--merged: goes without --format"),
        (["--checkpoint", run, "--format", "peft", "--title", "A"], "--title: goes without --format"),
        (["--checkpoint", run, "--format", "peft", "--dtype", "float32"], "--dtype: goes with --merged or"),
        (["--checkpoint", run, "--format", "kyutai"], "give with --base-model the Moshi repository"),
        (
            ["--checkpoint", tiny_base, "--format", "kyutai", "--base-model", tiny_base],
            "is not that of transf",
        ),
    ):
        status, _, (line,) = command(export, *arguments, "--out", out)
        assert status == 2 and message in line
        assert not out.exists()
    out.mkdir()
    status, _, (line,) = command(export, "--checkpoint", run, "--format", "peft", "--out", out)
    assert status == 2 and "exists already" in line


def test_a_base_model_with_other_text_is_refused(tiny_base, their_base, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(their_base, theirs)
    tensors = load_file(theirs / "model.safetensors")
    tensors["decoder.lm_head.weight"] = tensors["decoder.lm_head.weight"][:-1].clone()
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(CheckpointError, match="has shape"):
        export_in_format("kyutai", theirs, tmp_path / "out", base_model=str(tiny_base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.model.layers.0.mlp.fc2.weight", r"does not fit the tensors beside it \('decoder"),
        ("depth_decoder.input_projections.weight", "is no Moshi of transformers"),
        ("decoder.model.layers.1.input_layernorm.weight", r"input_layernorm\.weight is missing"),
    ],
)
def test_a_model_of_transformers_without_one_of_its_tensors_is_one_line(
    tiny_base, their_base, tmp_path, name, message
):
    theirs = tmp_path / "theirs"
    shutil.copytree(their_base, theirs)
    tensors = load_file(theirs / "model.safetensors")
    del tensors[name]
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        export_in_format("kyutai", theirs, tmp_path / "out", base_model=str(tiny_base))


def test_windows_of_ones_own_are_refused(untrained_run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_content(untrained_run("lora")), folder)
    training = json.loads((folder / "training.json").read_text())
    training["ttt"] |= {"enable": True, "layers": "none", "non_ttt_layer_context": 25}
    (folder / "training.json").write_text(json.dumps(training))
    with pytest.raises(CheckpointError, match="attention windows of its own"):
        export_in_format("transformers", folder, tmp_path / "out")
