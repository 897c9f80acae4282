"""What a run keeps of the weights it started from: in what it saves for use, and in what it resumes from."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import TrainArgs
from finetune.base_model.locate import find_model_files, lm_config
from finetune.checkpoint.layout import list_checkpoints
from finetune.checkpoint.reading import load_checkpoint_model, warm_start
from finetune.checkpoint.resume_tensors import collect_state, load_state
from finetune.checkpointing import Checkpointer, ResumeState
from finetune.config_io import build_args
from finetune.errors import CheckpointError
from finetune.training.run import run_training
from finetune.wrapped_model import build_model
from run_helpers import MODES, TTT, read_metrics, run_args, saved_weights

LORA = {"enable": True, "rank": 4}
FIXED_GATES = TTT | {"gating_trainable": False}
STARTS = {
    "full": {"full_finetuning": True},
    "full_ttt": {"full_finetuning": True, "ttt": FIXED_GATES | {"initial_gating_alpha": 0.3}},
    "lora": {"lora": LORA},
    "embeddings": {"lora": LORA | {"ft_embed": True}},
    "embeddings_ttt": {
        "lora": LORA | {"ft_embed": True},
        "ttt": FIXED_GATES | {"initial_gating_alpha": 0.3},
    },
}
GOES_ON = {
    "lora": {"lora": LORA},
    "merged": {"lora": LORA, "save_adapters": False},
    "lora_ttt": {"lora": LORA, "ttt": FIXED_GATES},
    "ttt": {"ttt": FIXED_GATES},
}
PAIRS = [
    ("full", "lora"),
    ("full_ttt", "ttt"),
    ("lora", "lora_ttt"),
    ("embeddings", "lora"),
    ("embeddings", "merged"),
    ("embeddings_ttt", "lora_ttt"),
]


def _args(values, base, **changes):
    shared = {"param_dtype": "float32", "moshi_paths": {"hf_repo_id": str(base)}}
    return build_args(TrainArgs, copy.deepcopy(shared | values | changes))


def _model(args):
    return build_model(args, find_model_files(args.moshi_paths), device=torch.device("cpu"))


def _train(model, seed):
    """Move whatever trains, without the cost of a step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def _save(model, args, run_dir, *, frozen=(), state=None):
    info = find_model_files(args.moshi_paths)
    return Checkpointer(run_dir, args, lm_config(info), frozen=frozen).save(model, 1, state)


def _logits(model):
    codes = torch.randint(20, (1, 17, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model.eval()(codes)
    return output.text_logits[output.text_mask], output.logits[output.mask]


@pytest.fixture(scope="module")
def started(tiny_base, tmp_path_factory):
    """Run directories of every kind to start from, made when first asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            args = _args(STARTS[kind], tiny_base)
            model = _model(args)
            _train(model, 0)
            made[kind] = tmp_path_factory.mktemp("started") / kind
            _save(model, args, made[kind])
        return made[kind]

    return run


@pytest.mark.parametrize(("start", "goes_on"), PAIRS)
def test_the_model_that_is_saved_is_the_one_that_trained(started, tiny_base, tmp_path, start, goes_on):
    source, paths = started(start), {"hf_repo_id": str(tiny_base)}
    weights = list_checkpoints(source / "checkpoints")[-1] / "consolidated" / "consolidated.safetensors"
    if weights.exists():
        paths["moshi_path"] = str(weights)  # as a run does that starts from full weights
    args = _args(GOES_ON[goes_on], tiny_base, moshi_paths=paths)
    model = _model(args)
    frozen = warm_start(model, source, args).frozen
    _train(model, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = ResumeState(collect_state(model, optimizer, {}, frozen=frozen))
    folder = _save(model, args, tmp_path / "run", frozen=frozen, state=state)
    resumed = _model(args)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad])
    load_state(folder / "state", resumed, optimizer, {}, frozen=frozen, source="here")
    trained = model.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in resumed.state_dict().items())
    loaded = load_checkpoint_model(tmp_path / "run", dtype=torch.float32)
    for ours, theirs in zip(_logits(loaded), _logits(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_nothing_of_the_base_model_is_saved_again(started, tiny_base):
    args = _args(GOES_ON["lora"], tiny_base)
    assert warm_start(_model(args), started("lora"), args).frozen == []
    start = warm_start(_model(args), started("embeddings"), args)
    assert len(start.frozen) == 25 and all("emb" in name for name in start.frozen)
    assert any(line.startswith("25 of these tensors do not train in this run, for") for line in start.lines)


def test_embeddings_without_a_file_to_save_them_in_are_refused(started, tiny_base, tmp_path):
    shutil.copytree(list_checkpoints(started("embeddings") / "checkpoints")[-1], tmp_path / "start")
    path = tmp_path / "start" / "consolidated" / "lora.safetensors"
    save_file({name: t.clone() for name, t in load_file(path).items() if "lora" not in name}, path)
    args = _args(GOES_ON["ttt"], tiny_base)
    with pytest.raises(
        CheckpointError, match=r"init_from: .*emb.* beside LoRA adapters; .* with lora.enable"
    ):
        warm_start(_model(args), tmp_path / "start", args)


def test_a_run_resumes_with_the_frozen_weights_it_started_from(demo, tmp_path):
    settings = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 1}
    lora = MODES["lora"]["lora"] | {"ft_embed": True}
    run_training(run_args(demo, tmp_path / "start", "lora", lora=lora, **settings | {"optim": {"lr": 0.05}}))
    settings |= {"init_from": str(tmp_path / "start"), "max_steps": 2, "ckpt_freq": 1}
    run_training(run_args(demo, tmp_path / "whole", "lora", **settings))
    shutil.rmtree(tmp_path / "start")  # which a resume does not need
    half = str(tmp_path / "whole" / "checkpoints" / "checkpoint_000001")
    run_training(run_args(demo, tmp_path / "again", "lora", resume=half, **settings))
    losses = [read_metrics(tmp_path / name, "train")[-1]["loss"] for name in ("whole", "again")]
    assert losses[0] == losses[1]
    first, second = saved_weights(tmp_path / "whole", 2), saved_weights(tmp_path / "again", 2)
    assert first.keys() == second.keys() and any("emb" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_resume_on_the_full_weights_they_began_with(demo, tmp_path):
    settings = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 1, "num_ckpt_keep": None}
    run_training(run_args(demo, tmp_path / "full", "full", **settings))
    started = settings | {"init_from": str(tmp_path / "full")}
    run_training(run_args(demo, tmp_path / "lora", "lora", **started))
    run_training(run_args(demo, tmp_path / "full", "full", resume="auto", **settings | {"max_steps": 2}))
    run_training(run_args(demo, tmp_path / "lora", "lora", resume="auto", **started | {"max_steps": 2}))
    folder = list_checkpoints(tmp_path / "lora" / "checkpoints")[-1] / "consolidated"
    training = json.loads((folder / "training.json").read_text())
    assert training["step"] == 2 and "checkpoint_000001" in training["moshi_paths"]["moshi_path"]
