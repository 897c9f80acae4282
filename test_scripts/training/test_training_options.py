"""Whole runs with one setting changed: accumulation, dtypes, fixed gates, divergence, inner losses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpoint.layout import list_checkpoints
from finetune.checkpoint.reading import load_checkpoint_model
from finetune.config_io import load_train_args
from finetune.errors import TrainingDivergedError
from finetune.monitoring.trajectories import summarise
from finetune.training.run import run_training
from finetune.training.trainer import Trainer
from run_helpers import MODES, final_folder, read_metrics, run_args


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
    for flag in (False, True):
        run_training(run_args(demo, tmp_path / str(flag), gradient_checkpointing=flag))
    plain, recomputed = (read_metrics(tmp_path / str(flag), "train") for flag in (False, True))
    assert [r["loss"] for r in plain] == [r["loss"] for r in recomputed]
    weights = [load_file(final_folder(tmp_path / str(flag)) / "ttt.safetensors") for flag in (False, True)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


@pytest.mark.parametrize("mode", ["lora_ttt", "full_ttt"])
def test_bfloat16_computation_trains_float32_masters(demo, tmp_path, mode):
    run_training(run_args(demo, tmp_path / "run", mode, param_dtype="bfloat16"))
    tensors = load_file(final_folder(tmp_path / "run") / "ttt.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, tensor in tensors.items():
        if name.endswith("gating_alpha"):
            assert 1e-4 < (tensor - 0.005).abs().mean() < 0.1
            assert not torch.equal(tensor, tensor.bfloat16().float()), "the gate moved in steps of bfloat16"
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


def test_a_gradient_that_is_not_finite_changes_no_parameter_no_moment_and_no_memory(
    demo, tmp_path, monkeypatch
):
    original = Trainer._train_step
    before, after = [], []

    def snapshot(trainer):
        optimizer = trainer.state.optimizer
        moments = [optimizer.state[p][name] for p in trainer.trainable for name in ("exp_avg", "exp_avg_sq")]
        memory = list(trainer.state.memory.tensors().values())
        places = trainer.state.memory.places()
        return [t.detach().clone() for t in [*trainer.trainable, *moments, *memory]], places, trainer.step

    def spoil_in_third_step(self, batches):
        if self.step < 2:
            return original(self, batches)
        before.append(snapshot(self))
        self.trainable[0].register_hook(lambda gradient: gradient * torch.nan)
        try:
            return original(self, batches)
        finally:
            after.append(snapshot(self))

    monkeypatch.setattr(Trainer, "_train_step", spoil_in_third_step)
    args = run_args(demo, tmp_path / "run", max_steps=5, do_ckpt=False, do_eval=False)
    with pytest.raises(TrainingDivergedError, match=r"step 3: the gradient of .* is not finite"):
        run_training(args)
    (tensors, *rest), (new_tensors, *new_rest) = before[0], after[0]
    assert rest == new_rest
    assert all(torch.equal(a, b) for a, b in zip(tensors, new_tensors, strict=True))


def test_inner_loop_losses_are_written_summarised_and_plotted(demo, tmp_path, caplog, logs):
    ttt = MODES["ttt"]["ttt"] | {"log_inner_loop_losses": True, "inner_loop_log_interval": 2}
    run_training(run_args(demo, tmp_path / "run", "ttt", ttt=ttt, max_steps=4, log_freq=100))
    lines = (tmp_path / "run" / "inner_loop_losses.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [2, 4]
    assert set(records[0]["layers"]) == {"1", "3"}
    at_w0, before, after = (torch.tensor(row) for row in records[0]["layers"]["3"])
    assert at_w0.shape == (48,)
    assert (after < before).double().mean() > 0.9
    assert before[0] < at_w0[0]  # the second chunk of a recording goes on with the memory of the first
    plots = tmp_path / "run" / "evaluation_plots" / "inner_loop"
    assert {p.name for p in plots.iterdir()} == {"inner_loss_layer_1.png", "inner_loss_layer_3.png"}
    for layer in (1, 3):
        summary = summarise(torch.tensor(records[1]["layers"][str(layer)]))
        share, gain = f"{100 * summary.share_ordered:.2f} %", f"{summary.gain_per_step:.3g}"
        head = f"Inner loop at step 4, layer {layer}: W0 > before > after at"
        assert f"{head} {share} of frames, gain per step {gain}." in logs(caplog)


def test_without_the_plots_the_summary_is_still_logged(demo, tmp_path, caplog, logs):
    ttt = MODES["ttt"]["ttt"] | {"log_inner_loop_losses": True, "save_inner_loop_plots": False}
    run_training(run_args(demo, tmp_path / "run", "ttt", ttt=ttt, max_steps=1, do_ckpt=False))
    assert any(line.startswith("Inner loop at step 1, layer 3: ") for line in logs(caplog))
    assert not (tmp_path / "run" / "evaluation_plots").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_can_be_fixed(demo, tmp_path, dtype):
    ttt = MODES["ttt"]["ttt"] | {"gating_trainable": False, "initial_gating_alpha": 0.3}
    run_training(run_args(demo, tmp_path / "run", "ttt", ttt=ttt, param_dtype=dtype))
    tensors = load_file(final_folder(tmp_path / "run") / "ttt.safetensors")
    gates = [tensor for name, tensor in tensors.items() if name.endswith("gating_alpha")]
    assert len(gates) == 2 and all((gate == torch.tensor(0.3)).all() for gate in gates)
    assert read_metrics(tmp_path / "run", "train")[-1]["ttt_delta"] == 0


def test_the_last_record_has_its_own_inner_losses(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", "ttt", log_freq=2))
    second, third = read_metrics(tmp_path / "run", "train")
    assert (second["step"], third["step"]) == (2, 3)
    assert second["inner_loss_before/layer_1"] != third["inner_loss_before/layer_1"]


def test_a_text_without_any_target_is_no_loss_of_zero(demo, tmp_path):
    chunks = {"text_padding_weight": 0.0, "batch_size": 1, "duration_sec": 0.08}
    run_training(run_args(demo, tmp_path / "run", "ttt", **chunks))
    records = read_metrics(tmp_path / "run", "train")
    assert any(record["text_loss"] is None for record in records)
    assert all(record["loss"] > 0 for record in records)


def test_embeddings_train_on_request(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", "lora", lora={"enable": True, "rank": 4, "ft_embed": True}))
    tensors = load_file(final_folder(tmp_path / "run") / "lora.safetensors")
    assert "text_emb.weight" in tensors and "depformer_emb.0.weight" in tensors
    assert "text_linear.weight" not in tensors


def test_the_run_directory_keeps_the_configuration_without_the_key(demo, tmp_path):
    args = run_args(demo, tmp_path / "run", "ttt", max_steps=1, wandb={"key": "secret"})
    run_training(args)
    saved = tmp_path / "run" / "args.yaml"
    assert "secret" not in saved.read_text()
    assert load_train_args(saved, {"wandb.key": "secret"}) == args
