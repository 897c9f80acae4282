"""Whole runs on the demo assets: modes, checkpoints, warm start, accumulation, interruption, divergence."""

import json
import os
import signal

import pytest
import sphn
import torch
from moshi.models.loaders import get_moshi_lm
from safetensors.torch import load_file

from finetune.checkpointing import list_checkpoints
from finetune.config_io import load_train_args
from finetune.errors import CheckpointError, TrainingDivergedError
from finetune.loading import load_checkpoint_model
from finetune.repository import find_model_files
from finetune.run import run_training
from finetune.trainer import Trainer
from finetune.ttt_utils import classify_ttt_parameter
from finetune.wrapped_model import build_model
from moshi_ttt.hybrid_model import ttt_layers
from runs import MODES, command_line, read_metrics, run_args, run_values, write_yaml

EXPECTED_FILES = {
    "full": {"consolidated.safetensors"},
    "full_ttt": {"consolidated.safetensors", "ttt.safetensors"},
    "lora": {"lora.safetensors"},
    "lora_ttt": {"lora.safetensors", "ttt.safetensors"},
    "ttt": {"ttt.safetensors"},
}


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """Run directories of one short run per mode, made when first asked for."""
    runs = {}

    def run(mode):
        if mode not in runs:
            runs[mode] = tmp_path_factory.mktemp(mode) / "run"
            run_training(run_args(demo, runs[mode], mode, do_eval=True))
        return runs[mode]

    return run


def _final(run_dir):
    return list_checkpoints(run_dir / "checkpoints")[-1] / "consolidated"


def _start_and_end(demo, tmp_path, mode):
    args = run_args(demo, tmp_path / "unused", mode)
    torch.manual_seed(args.seed)
    start = build_model(args, find_model_files(args.moshi_paths), device=torch.device("cpu"))
    return args, start


@pytest.mark.parametrize("mode", MODES)
def test_a_run_writes_metrics_plots_and_a_checkpoint(finished, mode):
    run_dir = finished(mode)
    train, evaluation = read_metrics(run_dir, "train"), read_metrics(run_dir, "eval")
    assert [record["step"] for record in train] == [1, 2, 3]
    assert evaluation[-1]["step"] == 3
    for name in ("loss", "text_loss", "audio_loss", "grad_norm", "tokens_per_sec", "peak_memory_gb"):
        assert train[-1][name] > 0
    for name in ("text_loss", "audio_loss", "text_perplexity", "audio_perplexity", "unigram_text_loss"):
        assert evaluation[-1][name] > 0
    has_ttt = mode.endswith("ttt")
    rates = {"lr_base"} if mode != "ttt" else set()
    rates |= {"lr_ttt_weights", "lr_ttt_alpha"} if has_ttt else set()
    assert {name for name in train[-1] if name.startswith("lr_")} == rates
    assert ("ttt_alpha" in train[-1]) == has_ttt
    if has_ttt:
        for layer in (1, 3):
            before, after = (train[-1][f"inner_loss_{when}/layer_{layer}"] for when in ("before", "after"))
            assert 0 < after < before
            assert train[-1][f"fast_weight_norm/layer_{layer}"] > 0
            low, mean, high = (
                train[-1][f"{n}/layer_{layer}"] for n in ("ttt_alpha_min", "ttt_alpha", "ttt_alpha_max")
            )
            assert low <= mean <= high
    files = {path.name for path in _final(run_dir).iterdir()}
    assert files == EXPECTED_FILES[mode] | {"config.json", "training.json"}
    plots = {"losses.png", "rates.png"} | ({"gates.png"} if has_ttt else set())
    assert {path.name for path in (run_dir / "plots").iterdir()} == plots
    assert list((run_dir / "tb").glob("events.*"))
    config = json.loads((_final(run_dir) / "config.json").read_text())
    assert ("ttt" in config) == has_ttt
    assert config["lora"] == mode.startswith("lora")


@pytest.mark.parametrize("mode", MODES)
def test_what_should_train_changes_and_the_rest_stays(finished, demo, tmp_path, mode):
    args, start = _start_and_end(demo, tmp_path, mode)
    trained = {}
    for name in EXPECTED_FILES[mode]:
        trained |= load_file(_final(finished(mode)) / name)
    for name, parameter in start.named_parameters():
        if not parameter.requires_grad:
            assert name not in trained or mode == "full", name
            continue
        assert name in trained, name
        if "lora_A" in name:
            continue  # may stand still for a step, as long as lora_B is zero
        assert not torch.equal(trained[name], parameter.detach()), f"{name} did not change"
    groups = {classify_ttt_parameter(name) for name in trained}
    assert groups == {
        *({"base"} if mode != "ttt" else set()),
        *({"ttt_weights", "ttt_alpha"} if args.ttt.enable else set()),
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_loader_rebuilds_the_trained_model(finished, mode):
    run_dir = finished(mode)
    model = load_checkpoint_model(run_dir, dtype=torch.float32)
    assert sorted(ttt_layers(model)) == ([1, 3] if mode.endswith("ttt") else [])
    state = model.state_dict()
    for name in EXPECTED_FILES[mode]:
        for key, tensor in load_file(_final(run_dir) / name).items():
            assert torch.equal(state[key], tensor)
    assert not model.training


def test_stock_moshi_reads_the_adapters_of_a_lora_run(finished, demo):
    folder = _final(finished("lora"))
    config = json.loads((folder / "config.json").read_text())
    kwargs = {
        key: value for key, value in config.items() if not key.endswith("_name") and key != "model_type"
    }
    stock = get_moshi_lm(
        demo.model_dir / "model.safetensors",
        lm_kwargs=kwargs,
        dtype=torch.float32,
        lora_weights=folder / "lora.safetensors",
        fuse_lora=False,
    )
    ours = load_checkpoint_model(folder, dtype=torch.float32)
    codes = torch.randint(0, 60, (1, 17, 9))
    with torch.no_grad():
        assert torch.equal(ours(codes).text_logits, stock(codes).text_logits)


def test_stock_moshi_reads_the_weights_of_a_full_run(finished):
    folder = _final(finished("full"))
    config = json.loads((folder / "config.json").read_text())
    kwargs = {
        key: value for key, value in config.items() if not key.endswith("_name") and key != "model_type"
    }
    stock = get_moshi_lm(folder / "consolidated.safetensors", lm_kwargs=kwargs, dtype=torch.float32)
    ours = load_checkpoint_model(folder, dtype=torch.float32)
    codes = torch.randint(0, 60, (1, 17, 9))
    with torch.no_grad():
        assert torch.equal(ours(codes).text_logits, stock(codes).text_logits)


def test_merged_adapters_are_full_weights_with_the_same_output(finished, demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", "lora", save_adapters=False))
    assert {p.name for p in _final(tmp_path / "run").glob("*.safetensors")} == {"consolidated.safetensors"}
    merged = load_checkpoint_model(tmp_path / "run", dtype=torch.float32)
    adapters = load_checkpoint_model(finished("lora"), dtype=torch.float32)
    codes = torch.randint(0, 60, (1, 17, 9))
    with torch.no_grad():
        difference = merged(codes).text_logits - adapters(codes).text_logits
    assert difference.abs().max() < 1e-4


def test_evaluation_of_the_rebuilt_model_gives_the_logged_loss(finished, demo, tmp_path):
    run_dir = finished("lora_ttt")
    args = run_args(
        demo, tmp_path / "again", init_from=str(run_dir), max_steps=1, do_eval=True, optim={"lr": 1e-30}
    )
    run_training(args)
    again, logged = read_metrics(tmp_path / "again", "eval")[-1], read_metrics(run_dir, "eval")[-1]
    assert again["text_loss"] == pytest.approx(logged["text_loss"], rel=1e-5)
    assert again["audio_loss"] == pytest.approx(logged["audio_loss"], rel=1e-5)


def test_warm_start_with_other_layers_is_an_error(finished, demo, tmp_path):
    ttt = MODES["lora_ttt"]["ttt"]
    with pytest.raises(
        CheckpointError, match=r"tensors have no place in this model, for example .*layers\.1\."
    ):
        run_training(
            run_args(demo, tmp_path / "a", init_from=str(finished("lora_ttt")), ttt=ttt | {"layers": "2,3"})
        )
    with pytest.raises(CheckpointError, match=r"TTT tensors are missing"):
        run_training(run_args(demo, tmp_path / "b", init_from=str(finished("lora"))))
    with pytest.raises(CheckpointError, match=r"has shape \[4, .*expected \[8"):
        run_training(
            run_args(
                demo,
                tmp_path / "c",
                "lora",
                init_from=str(finished("lora")),
                lora={"enable": True, "rank": 8},
            )
        )


def test_a_checkpoint_without_its_ttt_tensors_is_an_error(finished, tmp_path):
    source = _final(finished("lora_ttt"))
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for path in source.iterdir():
        if path.name != "ttt.safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="TTT tensors are missing"):
        load_checkpoint_model(copy)


def test_accumulation_equals_one_large_batch(demo, tmp_path):
    for name, batch_size, num_microbatches in (("large", 4, 1), ("small", 1, 4)):
        run_training(
            run_args(demo, tmp_path / name, batch_size=batch_size, num_microbatches=num_microbatches)
        )
    large, small = (read_metrics(tmp_path / name, "train") for name in ("large", "small"))
    for a, b in zip(large, small, strict=True):
        for key in ("loss", "text_loss", "audio_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_gradient_checkpointing_trains_the_same(demo, tmp_path):
    for checkpointing in (False, True):
        run_training(run_args(demo, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing))
    plain, recomputed = (read_metrics(tmp_path / str(flag), "train") for flag in (False, True))
    assert [r["loss"] for r in plain] == [r["loss"] for r in recomputed]


def test_loader_workers_do_not_change_the_run(finished, demo, tmp_path):
    values = run_values(demo, tmp_path / "run", do_eval=True)
    args = run_args(demo, tmp_path / "run", do_eval=True, data=values["data"] | {"num_workers": 1})
    run_training(args)
    losses = [
        [r["loss"] for r in read_metrics(path, "train")] for path in (tmp_path / "run", finished("lora_ttt"))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mode", ["lora_ttt", "full_ttt"])
def test_bfloat16_computation_trains_float32_masters(demo, tmp_path, mode):
    run_training(run_args(demo, tmp_path / "run", mode, param_dtype="bfloat16"))
    tensors = load_file(_final(tmp_path / "run") / "ttt.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(record["loss"] > 0 for record in read_metrics(tmp_path / "run", "train"))


def test_only_the_newest_checkpoints_are_kept(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", "ttt", max_steps=4, ckpt_freq=1, num_ckpt_keep=2))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "checkpoint_000003",
        "checkpoint_000004",
    ]


def test_an_old_run_directory_is_renamed_and_never_deleted(demo, tmp_path):
    old = tmp_path / "run"
    old.mkdir()
    (old / "precious.txt").write_text("kept")
    run_training(run_args(demo, old, "ttt", overwrite_run_dir=True, max_steps=1))
    (backup,) = tmp_path.glob("run.bak-*")
    assert (backup / "precious.txt").read_text() == "kept"
    assert not (old / "precious.txt").exists()


def test_ctrl_c_finishes_the_step_and_saves(demo, tmp_path, monkeypatch, capfd):
    original = Trainer._train_step

    def interrupt_in_second_step(self, batches):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupt_in_second_step)
    path = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run", max_steps=50))
    assert command_line(monkeypatch, path) == 0
    assert "Stopped at step 2 of 50" in capfd.readouterr().err
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint_000002"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_stops_with_the_layer_and_keeps_the_checkpoint(demo, tmp_path, monkeypatch):
    original = Trainer._train_step

    def explode_in_third_step(self, batches):
        if self.step == 2:
            self.model.transformer.layers[3].ttt.weights[0].data.fill_(float("inf"))
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", explode_in_third_step)
    args = run_args(demo, tmp_path / "run", max_steps=5, ckpt_freq=1)
    with pytest.raises(
        TrainingDivergedError, match=r"step 3: the TTT fast weights of transformer\.layers\.3"
    ):
        run_training(args)
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "checkpoint_000001",
        "checkpoint_000002",
    ]
    load_checkpoint_model(tmp_path / "run")


def test_inner_loop_losses_are_written_and_plotted(demo, tmp_path):
    ttt = MODES["ttt"]["ttt"] | {"log_inner_loop_losses": True, "inner_loop_log_interval": 2}
    run_training(run_args(demo, tmp_path / "run", "ttt", ttt=ttt, max_steps=4, log_freq=100))
    lines = (tmp_path / "run" / "inner_loop_losses.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [2, 4]
    assert set(records[0]["layers"]) == {"1", "3"}
    at_w0, before, after = (torch.tensor(row) for row in records[0]["layers"]["3"])
    assert at_w0.shape == (48,)
    assert at_w0[0] == before[0] and (after < before).double().mean() > 0.9
    plots = tmp_path / "run" / "evaluation_plots" / "inner_loop"
    assert {p.name for p in plots.iterdir()} == {"inner_loss_layer_1.png", "inner_loss_layer_3.png"}


@pytest.mark.parametrize(("mode", "dtype"), [("full_ttt", "float32"), ("lora_ttt", "bfloat16")])
def test_audio_samples_are_stereo_and_do_not_change_training(finished, demo, tmp_path, mode, dtype):
    prompt = demo.out_dir / "data" / "eval" / "dialogue_000.wav"
    args = run_args(
        demo,
        tmp_path / "run",
        mode,
        sample_freq=2,
        sample_prompts=[str(prompt)],
        sample_duration_sec=6.0,
        param_dtype=dtype,
    )
    run_training(args)
    samples, rate = sphn.read(str(tmp_path / "run" / "samples" / "step_2.wav"))
    assert rate == 24000 and samples.shape == (2, 144000)
    assert abs(samples[1]).max() > 0.01
    assert (tmp_path / "run" / "samples" / "step_3.wav").exists()
    if dtype == "float32":
        without = read_metrics(finished(mode), "train")
        assert [r["loss"] for r in read_metrics(tmp_path / "run", "train")] == [r["loss"] for r in without]


def test_gates_can_be_fixed(demo, tmp_path):
    ttt = MODES["ttt"]["ttt"] | {"gating_trainable": False, "initial_gating_alpha": 0.3}
    run_training(run_args(demo, tmp_path / "run", "ttt", ttt=ttt))
    tensors = load_file(_final(tmp_path / "run") / "ttt.safetensors")
    gates = [tensor for name, tensor in tensors.items() if name.endswith("gating_alpha")]
    assert len(gates) == 2 and all((gate == 0.3).all() for gate in gates)
    assert "lr_ttt_alpha" not in read_metrics(tmp_path / "run", "train")[-1]


def test_embeddings_train_on_request(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", "lora", lora={"enable": True, "rank": 4, "ft_embed": True}))
    tensors = load_file(_final(tmp_path / "run") / "lora.safetensors")
    assert "text_emb.weight" in tensors and "depformer_emb.0.weight" in tensors
    assert "text_linear.weight" not in tensors


def test_the_run_directory_keeps_the_configuration_without_the_key(demo, tmp_path):
    args = run_args(demo, tmp_path / "run", "ttt", max_steps=1, wandb={"key": "secret"})
    run_training(args)
    saved = tmp_path / "run" / "args.yaml"
    assert "secret" not in saved.read_text()
    assert load_train_args(saved, {"wandb.key": "secret"}) == args
