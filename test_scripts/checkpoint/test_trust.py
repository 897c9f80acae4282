"""Files that a stranger wrote: read as data only, and looked at before anything is built from them."""

import ast
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import wrapped_model
from finetune.args import ModelPaths, TrainArgs
from finetune.base_model.codec import load_codec
from finetune.base_model.locate import find_architecture, find_model_files
from finetune.base_model.weight_files import read_header
from finetune.checkpoint.reading import load_checkpoint_model, open_checkpoint, warm_start
from finetune.config_io import build_args, load_train_args
from finetune.errors import CheckpointError, ConfigError, StateError
from moshi_ttt.memory import inspect_ttt_states
from project_root import ROOT
from run_helpers import MODES, checkpoint_content

UNPICKLING_MODULES = {"pickle", "dill", "joblib", "marshal", "shelve"}
# Nothing that is handed over may be read by these. Adding a file needs a reason: who wrote what it reads?
MAY_UNPICKLE = {
    # torch.distributed.checkpoint, its index by an unpickler that finds listed classes only
    "finetune/checkpoint/resume_tensors.py",
}


@pytest.fixture
def checkpoint(untrained_run, tmp_path):
    """A copy of a checkpoint that a test may change."""
    shutil.copytree(checkpoint_content(untrained_run("lora_ttt")), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def repository(tiny_base, tmp_path):
    """A copy of the base model that a test may change."""
    shutil.copytree(tiny_base, tmp_path / "base")
    return tmp_path / "base"


def edit(path, **changes):
    """Change keys of a JSON file; `ttt` is changed key by key."""
    values = json.loads(path.read_text())
    ttt = changes.pop("ttt", None)
    values |= changes
    if ttt is not None:
        values["ttt"] |= ttt
    path.write_text(json.dumps(values))


def refusal(action, *arguments, **settings):
    """The one line of the error."""
    with pytest.raises(CheckpointError) as error:
        action(*arguments, **settings)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fail when a model gets memory, or when a tensor of a checkpoint is read."""

    def forbidden(*_, **__):
        raise AssertionError("read or allocated before the check")

    monkeypatch.setattr("finetune.checkpoint.reading.load_base", forbidden)
    monkeypatch.setattr("finetune.base_model.weight_files.load_file", forbidden)


def _unpickling(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [module, *(f"{module}.{alias.name}".removeprefix(".") for alias in node.names)]
            yield from (name for name in names if name.split(".")[0] in UNPICKLING_MODULES)
            # Its reader unpickles the file `.metadata`; `state_dict` only names what is in memory.
            dcp = (name for name in names if name.startswith("torch.distributed.checkpoint"))
            yield from (name for name in dcp if "checkpoint.state_dict" not in name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if f"{node.value.id}.{node.attr}" in ("torch.load", "yaml.load", "np.load", "numpy.load"):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from {node.func.id} & {"eval", "exec"}


def test_the_search_for_unpickling_finds_it():
    for code in (
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "f(allow_pickle=True)",
        "eval(x)",
    ):
        assert list(_unpickling(ast.parse(code))), code


def test_nothing_of_the_packages_unpickles():
    found = set()
    for package in ("finetune", "moshi_ttt"):
        for path in (ROOT / package).rglob("*.py"):
            if list(_unpickling(ast.parse(path.read_text()))):
                found.add(str(path.relative_to(ROOT)))
    assert found == MAY_UNPICKLE


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "config.yaml"
    target = tmp_path / "made"
    path.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{target}']\n")
    with pytest.raises(
        ConfigError, match=r"config\.yaml: not valid YAML: .*could not determine a constructor"
    ):
        load_train_args(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 65536}, "linear_in.lora_A.weight has shape [4, 64], expected [65536, 64]"),
        ({"lora_rank": 2}, "lora.safetensors: "),
        ({"lora": False}, "of lora.safetensors"),
        ({"num_layers": 2}, "ttt.layers: index 3 does not exist"),
        ({"num_layers": 10**9}, "num_layers: 1000000000 is not allowed, must be less than or equal to 512"),
        ({"dim": 64}, "has shape"),
        ({"gizmo": 1}, "config.json: the configuration is not one of Moshi"),
        ({"moshi_name": "model.pt"}, "moshi_name: 'model.pt' is not a .safetensors file"),
        (
            {"mimi_name": "/etc/mimi.safetensors"},
            "mimi_name: '/etc/mimi.safetensors' is not the name of a file",
        ),
        (
            {"tokenizer_name": "../../tokenizer.model"},
            "tokenizer_name: '../../tokenizer.model' is not the name",
        ),
        ({"lora_name": "hf://a/b/x.safetensors"}, "lora_name: "),
        ({"mimi_config_name": "C:\\mimi.json"}, "mimi_config_name: "),
        ({"moshi_name": 3}, "moshi_name: 3 is not"),
    ],
)
def test_a_configuration_that_lies_is_refused_before_anything_is_built(
    checkpoint, nothing_is_built, change, message
):
    edit(checkpoint / "config.json", **change)
    line = refusal(open_checkpoint, checkpoint)
    assert message in line and str(checkpoint) in line


def test_inner_layers_of_any_announced_size_cost_nothing(checkpoint, nothing_is_built):
    for name in ("config.json", "training.json"):
        edit(checkpoint / name, ttt={"ttt_mlp_hidden_dims": [1_000_000]})
    line = refusal(open_checkpoint, checkpoint)
    assert "ttt.safetensors: transformer.layers.1." in line
    assert "has shape [4, 1, 128], expected [4, 1, 1000000]" in line


@pytest.mark.parametrize(
    ("key", "value"), [("mini_batch_size", 8), ("base_lr", 0.5), ("layers", "1"), ("causal", False)]
)
@pytest.mark.parametrize("name", ["config.json", "training.json"])
def test_an_edit_of_one_description_is_seen(checkpoint, nothing_is_built, name, key, value):
    edit(checkpoint / name, ttt={key: value})
    line = refusal(open_checkpoint, checkpoint)
    assert f"ttt.{key} is " in line and "config.json" in line and "training.json" in line


def test_the_section_and_the_weights_of_ttt_go_together(checkpoint, untrained_run, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    section = config.pop("ttt")
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "has a ttt.safetensors but no section ttt" in refusal(open_checkpoint, checkpoint)
    shutil.copytree(checkpoint_content(untrained_run("lora")), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    (tmp_path / "lora" / "config.json").write_text(json.dumps(config | {"ttt": section}))
    assert "has a section ttt but no ttt.safetensors" in refusal(open_checkpoint, tmp_path / "lora")


def test_tensors_that_no_training_writes_are_refused(checkpoint):
    path = checkpoint / "lora.safetensors"
    # Clones: what load_file returns is the file itself, which is about to be written.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name, tensor = next(iter(tensors.items()))
    save_file(tensors | {name: tensor.to(torch.int32)}, path)
    assert f"lora.safetensors: {name} has dtype I32" in refusal(load_checkpoint_model, checkpoint)
    save_file(tensors | {name: torch.full_like(tensor, torch.nan)}, path)
    assert f"{name} holds values that are not finite" in refusal(load_checkpoint_model, checkpoint)
    save_file(tensors | {"transformer.layers.1.alien": tensor.clone()}, path)
    assert "transformer.layers.1.alien of lora.safetensors" in refusal(load_checkpoint_model, checkpoint)
    ttt_name, ttt_tensor = next(iter(load_file(checkpoint / "ttt.safetensors").items()))
    save_file(tensors | {ttt_name: ttt_tensor}, path)
    assert f"and ttt.safetensors both hold {ttt_name}" in refusal(load_checkpoint_model, checkpoint)


def test_full_weights_that_are_not_finite_or_not_whole_are_refused(untrained_run, tmp_path):
    shutil.copytree(checkpoint_content(untrained_run("full_ttt")), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "consolidated.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name, tensor = next(iter(tensors.items()))
    save_file(tensors | {name: torch.full_like(tensor, torch.inf)}, path)
    line = refusal(load_checkpoint_model, tmp_path / "checkpoint")
    assert f"consolidated.safetensors: {name} holds values that are not finite" in line
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert f"1 base tensors are missing, for example {name}" in refusal(
        open_checkpoint, tmp_path / "checkpoint"
    )


def _raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_headers_that_are_made_up_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    overlapping = {"a": one, "b": one}
    far = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    twice = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    twice += b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    for header, data in ((overlapping, b"0123"), (far, b"0123"), (twice, b"01234567"), (b"\x80", b"")):
        assert "x.safetensors: cannot be read as safetensors" in refusal(
            read_header, _raw(path, header, data)
        )
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "cannot be read as safetensors" in refusal(read_header, path)
    line = refusal(read_header, _raw(path, b"{" + b" " * (17 * 2**20)))
    assert "its header has 17,825,793 bytes" in line


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.pkl", "model"])
@pytest.mark.parametrize("key", ["moshi_path", "mimi_path"])
def test_weights_that_would_be_unpickled_are_refused(checkpoint, tmp_path, key, name):
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n")
    training = json.loads((checkpoint / "training.json").read_text())
    for value in (str(path), f"hf://somebody/model/{name}"):
        training["moshi_paths"][key] = value
        (checkpoint / "training.json").write_text(json.dumps(training))
        line = refusal(load_checkpoint_model, checkpoint)
        assert f"moshi_paths.{key}: '{value}' is not a .safetensors file" in line and "convert" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moshi_name": "model.pt"}, "moshi_name: 'model.pt' is not a .safetensors file"),
        ({"mimi_name": "mimi.bin"}, "mimi_name: 'mimi.bin' is not a .safetensors file"),
        ({"lora_name": "lora.pkl"}, "lora_name: 'lora.pkl' is not a .safetensors file"),
        (
            {"moshi_name": "../model.safetensors"},
            "moshi_name: '../model.safetensors' is not the name of a file",
        ),
        ({"num_layers": 10**9}, "num_layers: "),
    ],
)
def test_a_base_repository_is_not_trusted_either(repository, change, message):
    edit(repository / "config.json", **change)
    for find in (find_model_files, find_architecture):
        assert message in refusal(find, ModelPaths(hf_repo_id=str(repository)))


LUT = {"n_bins": 4, "dim": 8, "tokenizer": "noop"}


@pytest.mark.parametrize(
    ("lut", "message"),
    [
        ({}, "embed.weight has shape none, it is missing, its configuration announces [5, 8]."),
        ({"dim": 10**9}, "announces [5, 1000000000]."),
        ({"n_bins": 10**30}, "the conditioners are not those of Moshi: "),
        ({"tokenizer": "whitespace"}, "unrecognized tokenizer"),
    ],
)
def test_conditioners_of_any_size_are_refused_before_they_are_built(repository, monkeypatch, lut, message):
    section = {"mood": {"type": "lut", "lut": LUT | lut}}
    edit(repository / "config.json", conditioners=section, fuser={"sum": ["mood"]})
    info = find_model_files(ModelPaths(hf_repo_id=str(repository)))
    monkeypatch.setattr(type(info), "get_moshi", None)
    assert message in refusal(wrapped_model.load_base, info, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conditioners": {"voice": {"type": "tensor", "tensor": {"dim": 10**12}}}},
            "conditioner 'voice' is of type 'tensor'",
        ),
        ({"conditioners": {"voice": 3}}, "conditioner 'voice' is of type None"),
        ({"conditioners": ["voice"]}, "conditioners and fuser must be sections"),
        ({"conditioners": {"mood": {"type": "lut", "lut": LUT}}}, "'mood' is missing in fuser"),
        ({"fuser": {"sum": ["mood"]}}, "'mood' is missing in conditioners"),
        ({"fuser": {"prepend": ["mood"]}}, "Moshi cannot prepend conditions"),
        ({"fuser": {"sum": "mood"}}, "fuser: sum must be a list of names"),
        ({"cross_attention": True}, "cross_attention is True, but the fuser has 0 conditions under cross"),
        (
            {"conditioners": {"mood": {"type": "lut", "lut": LUT}}, "fuser": {"cross": ["mood"]}},
            "cross_attention is False, but the fuser has 1 conditions under cross",
        ),
    ],
)
def test_conditions_that_cannot_reach_the_model_are_refused(repository, monkeypatch, change, message):
    edit(repository / "config.json", **change)
    paths = ModelPaths(hf_repo_id=str(repository))
    info = find_model_files(paths)
    monkeypatch.setattr(type(info), "get_moshi", None)
    assert message in refusal(wrapped_model.load_base, info, device="cpu", dtype=torch.float32)
    args = build_args(TrainArgs, MODES["lora"] | {"moshi_paths": {"hf_repo_id": str(repository)}})
    assert message in refusal(wrapped_model.build_meta_model, args, find_architecture(paths)[0])


def test_a_codec_of_any_announced_size_costs_nothing(repository):
    config = json.loads((repository / "mimi_config.json").read_text())
    for section, change, message in (
        (
            "quantizer",
            {"bins": 10**9},
            "mimi_config.json: quantizer.bins: 1000000000 is not allowed, must be",
        ),
        ("transformer", {"num_layers": 10**9}, "transformer.num_layers: 1000000000 is not allowed, must be"),
        ("seanet", {"ratios": [8, -6]}, "seanet.ratios.1: -6 is not allowed, must be greater than"),
        ("seanet", 3, "mimi_config.json: seanet: 3 is not allowed, must be"),
        ("quantizer", None, "mimi_config.json: quantizer: None is not allowed, must be"),
    ):
        changed = config | {section: config[section] | change if isinstance(change, dict) else change}
        (repository / "mimi_config.json").write_text(json.dumps(changed))
        assert message in refusal(find_model_files, ModelPaths(hf_repo_id=str(repository)))
    wide = config | {"quantizer": config["quantizer"] | {"bins": 10**6}}
    (repository / "mimi_config.json").write_text(json.dumps(wide))
    info = find_model_files(ModelPaths(hf_repo_id=str(repository)))
    line = refusal(load_codec, info, torch.device("cpu"))
    assert "mimi.safetensors" in line and "its configuration announces " in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": {}}, "context: {} is not allowed, must be a valid integer"),
        (
            {"existing_text_padding_id": []},
            "existing_text_padding_id: [] is not allowed, must be a valid integer",
        ),
        (
            {"existing_text_padding_id": 10**6},
            "existing_text_padding_id: 1000000 is not allowed, the text voc",
        ),
        ({"num_heads": -4}, "num_heads: -4 is not allowed, must be greater than or equal to 1"),
        ({"dim": "128"}, "dim: '128' is not allowed, must be a valid integer"),
        ({"delays": 3}, "delays: 3 is not allowed, must be a valid list"),
        ({"delays": [0, -1]}, "delays.1: -1 is not allowed, must be greater than or equal to 0"),
        ({"tts_config": 3}, "tts_config: 3 is not allowed, must be a valid dictionary"),
        ({"depformer_dim_feedforward": [8, "x"]}, "depformer_dim_feedforward"),
        ({"layer_scale": float("nan")}, "layer_scale: nan is not allowed"),
    ],
)
def test_values_of_another_type_or_size_are_named(repository, change, message):
    edit(repository / "config.json", **change)
    for find in (find_model_files, find_architecture):
        line = refusal(find, ModelPaths(hf_repo_id=str(repository)))
        assert f"{repository / 'config.json'}: {message}" in line and len(line) < 300


def test_a_base_model_of_any_announced_size_costs_nothing(repository, monkeypatch):
    edit(repository / "config.json", dim=200_000, context=1000)
    info = find_model_files(ModelPaths(hf_repo_id=str(repository)))
    monkeypatch.setattr(type(info), "get_moshi", None)
    line = refusal(wrapped_model.load_base, info, device="cpu", dtype=torch.float32)
    assert "parameters, the file holds 2,1" in line and "announces " in line


@pytest.mark.parametrize("name", ["config.json", "training.json", "lora.safetensors", "ttt.safetensors"])
def test_pipes_and_devices_are_not_waited_for(checkpoint, tiny_base, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (checkpoint / name).unlink()
        make(checkpoint / name)
        assert (
            name in refusal(load_checkpoint_model, checkpoint, base=str(tiny_base)) or name == "config.json"
        )


@pytest.mark.parametrize("name", ["config.json", "mimi_config.json", "model.safetensors", "mimi.safetensors"])
def test_pipes_of_a_base_model_are_not_waited_for(repository, name):
    (repository / name).unlink()
    os.mkfifo(repository / name)
    refusal(load_checkpoint_model, repository)


def test_a_codec_that_can_be_built_but_not_hear_is_one_line(repository):
    config = json.loads((repository / "mimi_config.json").read_text())
    config["transformer"]["conv_layout"] = False
    (repository / "mimi_config.json").write_text(json.dumps(config))
    info = find_model_files(ModelPaths(hf_repo_id=str(repository)))
    assert "mimi.safetensors: cannot be loaded as Mimi" in refusal(load_codec, info, torch.device("cpu"))


def test_pieces_of_a_tokenizer_that_are_no_text_are_one_line(repository):
    path = repository / "tokenizer.model"
    content = path.read_bytes()
    path.write_bytes(content.replace("▁the".encode(), b"\xe2\x96\xffthe", 1))
    line = refusal(find_model_files, ModelPaths(hf_repo_id=str(repository)))
    assert "tokenizer.model: not a sentencepiece model" in line


@pytest.mark.parametrize("value", [[], 7, {"all": 1}])
def test_a_fingerprint_that_is_no_text_is_one_line(checkpoint, value):
    edit(checkpoint / "training.json", base_fingerprint=value)
    assert "training.json is damaged: base_fingerprint: " in refusal(open_checkpoint, checkpoint)


def test_a_memory_with_an_enormous_header_is_refused(tmp_path):
    with pytest.raises(StateError, match="its header has 17,825,793 bytes"):
        inspect_ttt_states(_raw(tmp_path / "x.safetensors", b"{" + b" " * (17 * 2**20)))


def test_a_repository_of_the_hub_is_looked_at_before_its_weights_are_downloaded(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"moshi_name": "model.pt"}))
    asked = []

    def download(repository, name, **_):
        asked.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr("finetune.base_model.locate.hf_hub_download", download)
    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", download)
    line = refusal(find_model_files, ModelPaths(hf_repo_id="somebody/model"))
    assert "moshi_name: 'model.pt'" in line and asked == ["config.json"]


def test_a_warm_start_looks_before_it_reads(checkpoint, tiny_base, nothing_is_built, tmp_path):
    args = build_args(TrainArgs, MODES["lora_ttt"] | {"moshi_paths": {"hf_repo_id": str(tiny_base)}})
    kwargs, _ = find_architecture(args.moshi_paths)
    model = wrapped_model.build_meta_model(args, kwargs)
    path = checkpoint / "ttt.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name, tensor = next(iter(tensors.items()))
    save_file(tensors | {name: torch.zeros(*tensor.shape, 7)}, path)
    line = refusal(warm_start, model, checkpoint, args)
    assert line.startswith(f"init_from: {checkpoint}: ttt.safetensors: {name} has shape")
    edit(checkpoint / "training.json", ttt={"mini_batch_size": 32})
    assert "ttt.mini_batch_size is 16 in config.json but 32" in refusal(warm_start, model, checkpoint, args)
    edit(checkpoint / "config.json", moshi_name="/x.safetensors")
    assert "moshi_name" in refusal(warm_start, model, checkpoint, args)
