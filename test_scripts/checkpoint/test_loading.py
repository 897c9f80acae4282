"""Loading a checkpoint to use it: its base model, its precision, its place on the Hub."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.args import ModelPaths
from finetune.base_model.fingerprint import base_fingerprint
from finetune.base_model.locate import find_model_files
from finetune.checkpoint.reading import load_checkpoint_model, open_checkpoint
from finetune.demo.model_folder import write_random_repository
from finetune.errors import CheckpointError
from finetune.export.folder import export_checkpoint
from finetune.inference.speech_model import load_speech_model
from moshi_ttt.hybrid_model import ttt_layers
from moshi_ttt.memory import layer_identity
from run_helpers import checkpoint_content


@pytest.fixture
def checkpoint(untrained_run, tmp_path):
    """A copy of a checkpoint that a test may change."""
    shutil.copytree(checkpoint_content(untrained_run("lora_ttt")), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def logits(model):
    codes = torch.randint(60, (1, 17, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(codes).text_logits


def speak(path, **options):
    return load_speech_model(str(path), device=torch.device("cpu"), dtype=torch.float32, **options)


def test_a_half_precision_model_keeps_what_its_memory_starts_from(checkpoint):
    trained = load_file(checkpoint / "ttt.safetensors")
    model = load_checkpoint_model(checkpoint, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, tensor in trained.items():
        projection = name.split(".")[-2] in ("wq", "wk", "wv", "wo")
        assert state[name].dtype == (torch.bfloat16 if projection else torch.float32), name
        assert torch.equal(state[name], tensor.to(state[name].dtype))
    assert model.text_linear.frozen_W.weight.dtype == torch.bfloat16
    single = load_checkpoint_model(checkpoint, dtype=torch.float32)
    for ours, theirs in zip(ttt_layers(model).values(), ttt_layers(single).values(), strict=True):
        assert layer_identity(ours) == layer_identity(theirs), "memories are portable between precisions"


def test_another_place_of_the_same_base_model_will_do(checkpoint, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    moved = load_checkpoint_model(checkpoint, base=str(tmp_path / "moved"), dtype=torch.float32)
    assert torch.equal(logits(moved), logits(load_checkpoint_model(checkpoint, dtype=torch.float32)))
    training = json.loads((checkpoint / "training.json").read_text())
    training["moshi_paths"]["hf_repo_id"] = str(tmp_path / "gone")
    (checkpoint / "training.json").write_text(json.dumps(training))
    with pytest.raises(CheckpointError, match="gone"):
        load_checkpoint_model(checkpoint)
    load_checkpoint_model(checkpoint, base=str(tmp_path / "moved"))


@pytest.mark.parametrize(("name", "missing"), [("training.json", "files"), ("config.json", "lora")])
def test_a_description_that_leaves_out_what_it_must_say_is_damaged(checkpoint, name, missing):
    values = json.loads((checkpoint / name).read_text())
    kept = {} if name == "training.json" else {key: values[key] for key in values if key != missing}
    (checkpoint / name).write_text(json.dumps(kept))
    # Not taken for a checkpoint of moshi-finetune, of which less is asked.
    with pytest.raises(CheckpointError, match=rf"is damaged: '{missing}'"):
        open_checkpoint(checkpoint)


def test_a_base_model_with_other_weights_or_shapes_is_refused(checkpoint, tmp_path):
    other = write_random_repository(tmp_path / "other", seed=1)
    wider = write_random_repository(tmp_path / "wider", dim=192, num_layers=2)
    for base in (other, wider):
        with pytest.raises(CheckpointError, match="was trained on another base model than") as error:
            load_checkpoint_model(checkpoint, base=str(base))
        assert str(base) in str(error.value) and "\n" not in str(error.value)
    training = json.loads((checkpoint / "training.json").read_text())
    del training["base_fingerprint"]  # as in older checkpoints
    (checkpoint / "training.json").write_text(json.dumps(training))
    load_checkpoint_model(checkpoint, base=str(other))
    with pytest.raises(CheckpointError, match=r"checkpoint: ttt\.layers: index 3 does not exist"):
        load_checkpoint_model(checkpoint, base=str(wider))


def test_the_fingerprint_of_a_base_model_is_that_of_its_values(tiny_base, tmp_path):
    def fingerprint(folder):
        return base_fingerprint(find_model_files(ModelPaths(hf_repo_id=str(folder))))

    shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "base" / "model.safetensors", {"other": "metadata"})
    assert fingerprint(tmp_path / "base") == fingerprint(tiny_base)
    tensors["transformer.layers.2.norm1.alpha"][..., 0] += 1
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    assert fingerprint(tmp_path / "base") != fingerprint(tiny_base)


@pytest.fixture
def redrawn(tiny_base, tmp_path):
    """Make a copy of the base model in which the tensors of a prefix are others."""

    def redraw(prefix):
        folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_base, folder)
        tensors = load_file(tiny_base / "model.safetensors")
        changed = {name: tensor + 0.5 for name, tensor in tensors.items() if name.startswith(prefix)}
        save_file(tensors | changed, folder / "model.safetensors")
        return folder

    return redraw


def test_every_tensor_of_the_base_model_counts(tiny_base, redrawn):
    def fingerprint(folder):
        return base_fingerprint(find_model_files(ModelPaths(hf_repo_id=str(folder))))

    # One of each kind: transformer.layers.0.norm1.alpha stands for all layers.
    kinds = {re.sub(r"\.\d+", "", name): name for name in load_file(tiny_base / "model.safetensors")}
    assert len(kinds) > 15
    found = {name: fingerprint(redrawn(name)) for name in kinds.values()}
    assert len({*found.values(), fingerprint(tiny_base)}) == len(kinds) + 1


@pytest.mark.parametrize(
    "prefix", ["emb.", "text_emb.", "text_linear.", "depformer", "linears.", "out_norm."]
)
def test_a_base_model_is_another_one_whichever_part_was_redrawn(checkpoint, redrawn, tmp_path, prefix):
    base = str(redrawn(prefix))
    with pytest.raises(CheckpointError, match="was trained on another base model than"):
        load_checkpoint_model(checkpoint, base=base)
    with pytest.raises(CheckpointError, match="was trained on another base model than"):
        export_checkpoint(checkpoint, tmp_path / "merged", base_model=base, merged_dtype="auto")


def _earlier_fingerprint(weights):
    """As the version before computed it."""
    digest = hashlib.sha256()
    with safe_open(weights, "pt") as file:
        for name in sorted(name for name in file.keys() if name.startswith("transformer.")):  # noqa: SIM118
            tensor = file.get_slice(name)
            first = tensor[:1].flatten()[:16].double().numpy()
            digest.update(f"{name} {tensor.get_shape()}".encode() + first.tobytes())
    return digest.hexdigest()[:16]


def test_of_an_older_checkpoint_less_is_compared_and_that_is_said(checkpoint, tiny_base, redrawn, caplog):
    training = json.loads((checkpoint / "training.json").read_text())
    load_checkpoint_model(checkpoint)
    assert "only, as the version" not in caplog.text
    training["base_fingerprint"] = _earlier_fingerprint(tiny_base / "model.safetensors")
    (checkpoint / "training.json").write_text(json.dumps(training))
    load_checkpoint_model(checkpoint, base=str(redrawn("emb.")))
    assert "only, as the version" in caplog.text
    with pytest.raises(CheckpointError, match="was trained on another base model than"):
        load_checkpoint_model(checkpoint, base=str(redrawn("transformer.layers.2.norm1")))


def test_checkpoint_and_base_may_be_repositories_of_the_hub(checkpoint, tiny_base, hub_cache):
    expected = logits(speak(checkpoint).lm)
    training = json.loads((checkpoint / "training.json").read_text())
    training["moshi_paths"] |= {"hf_repo_id": "somebody/base"}
    (checkpoint / "training.json").write_text(json.dumps(training))
    hub_cache("somebody/base", tiny_base)
    hub_cache("me/listener", checkpoint)
    speech = speak("me/listener")
    assert torch.equal(logits(speech.lm), expected)
    assert "TTT on in layers 1, 3" in speech.source
    assert torch.equal(logits(speak(checkpoint, base="somebody/base").lm), expected)


def test_a_repository_that_cannot_be_reached_is_one_line(hub_cache, checkpoint):
    with pytest.raises(CheckpointError, match="nobody/nothing: is neither a local folder nor") as error:
        open_checkpoint("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        speak(checkpoint, base="nobody/nothing")


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("finetune.checkpoint.reading.download_checkpoint", pytest.fail)
    with pytest.raises(CheckpointError, match=f"runs/quikstart: does not exist in {Path.cwd()}; give a run"):
        open_checkpoint("runs/quikstart")


def test_ttt_tensors_that_are_missing_are_one_line(checkpoint):
    tensors = load_file(checkpoint / "ttt.safetensors")
    save_file({k: v for k, v in tensors.items() if ".1." in k}, checkpoint / "ttt.safetensors")
    with pytest.raises(CheckpointError, match=r"20 TTT tensors are missing, for .*layers\.3"):
        speak(checkpoint)


def test_windows_are_those_of_training(untrained_run):
    model = load_checkpoint_model(untrained_run("lora_ttt"))
    assert [layer.self_attn.context for layer in model.transformer.layers] == [500, 25, 500, 25]


def test_a_model_that_sees_the_future_cannot_talk(checkpoint, recwarn):
    for name in ("config.json", "training.json"):
        values = json.loads((checkpoint / name).read_text())
        values["ttt"]["causal"] = False
        (checkpoint / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"was trained with ttt\.causal: false"):
        speak(checkpoint)
    assert not [warning for warning in recwarn if "causal" in str(warning.message)]  # the error says it all
