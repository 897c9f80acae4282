"""Whole runs on the demo assets: modes, checkpoints, what reads them, warm start, samples."""

import json
import shutil

import pytest
import sphn
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file

from finetune.base_model.locate import find_model_files
from finetune.checkpoint import consolidated
from finetune.checkpoint.layout import list_checkpoints
from finetune.checkpoint.reading import find_checkpoint, load_checkpoint_model
from finetune.errors import CheckpointError
from finetune.training.run import run_training
from finetune.ttt_utils import classify_ttt_parameter
from finetune.wrapped_model import build_model
from moshi_ttt.hybrid_model import ttt_layers
from run_helpers import MODES, final_folder, read_metrics, run_args, run_values

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
    rates = {"lr_base"} | ({"lr_ttt_weights", "lr_ttt_alpha"} if has_ttt else set())
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
    files = {path.name for path in final_folder(run_dir).iterdir()}
    assert files == EXPECTED_FILES[mode] | {"config.json", "training.json"}
    plots = {"losses.png", "rates.png"} | ({"gates.png"} if has_ttt else set())
    assert {path.name for path in (run_dir / "plots").iterdir()} == plots
    assert list((run_dir / "tb").glob("events.*"))
    config = json.loads((final_folder(run_dir) / "config.json").read_text())
    assert ("ttt" in config) == has_ttt
    assert config["lora"] == mode.startswith("lora")


@pytest.mark.parametrize("mode", MODES)
def test_one_step_changes_everything_that_should_train(demo, tmp_path, mode):
    # A step of 1e-30 moves nothing, so that run ends with the values both started from.
    for name, lr in (("still", 1e-30), ("moved", 1e-3)):
        run_training(run_args(demo, tmp_path / name, mode, max_steps=2, ckpt_freq=1, optim={"lr": lr}))
    args = run_args(demo, tmp_path / "unused", mode)
    model = build_model(args, find_model_files(args.moshi_paths), device=torch.device("cpu"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    start, end = {}, {}
    for tensors, name in ((start, "still"), (end, "moved")):
        after_first_step = list_checkpoints(tmp_path / name / "checkpoints")[0]
        for file in EXPECTED_FILES[mode]:
            tensors |= load_file(after_first_step / "consolidated" / file)
    assert trainable == set(end)
    for name in trainable:
        # The first gradient of lora_A is zero, since lora_B starts at zero; it moves from the second step on.
        if "lora_A" not in name:
            assert not torch.equal(start[name], end[name]), f"{name} did not change"
    assert {classify_ttt_parameter(name) for name in trainable} == {
        *({"base"} if mode != "ttt" else set()),
        *({"ttt_weights", "ttt_alpha"} if args.ttt.enable else set()),
    }


def test_initial_values_depend_on_the_seed_alone(demo, tmp_path):
    def new_values(seed, drawn_before):
        args = run_args(demo, tmp_path / "unused", "lora_ttt", seed=seed)
        torch.manual_seed(drawn_before)
        model = build_model(args, find_model_files(args.moshi_paths), device=torch.device("cpu"))
        assert torch.initial_seed() == drawn_before, "what is drawn later should not notice"
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    values = new_values(0, drawn_before=1)
    for name, value in new_values(0, drawn_before=2).items():
        assert torch.equal(value, values[name]), name
    others = new_values(3, drawn_before=1)
    changed = {name for name in values if not torch.equal(values[name], others[name])}
    assert any("lora_A" in name for name in changed) and any(".ttt.weights" in name for name in changed)


@pytest.mark.parametrize("mode", MODES)
def test_the_loader_rebuilds_the_trained_model(finished, mode):
    run_dir = finished(mode)
    model = load_checkpoint_model(run_dir, dtype=torch.float32)
    assert sorted(ttt_layers(model)) == ([1, 3] if mode.endswith("ttt") else [])
    state = model.state_dict()
    for name in EXPECTED_FILES[mode]:
        for key, tensor in load_file(final_folder(run_dir) / name).items():
            assert torch.equal(state[key], tensor)
    assert not model.training


def _stock(demo, folder, **files):
    """The model as stock Moshi's server loads it from our checkpoint."""
    info = CheckpointInfo.from_hf_repo(
        "unused",
        mimi_weights=demo.model_dir / "mimi.safetensors",
        tokenizer=demo.model_dir / "tokenizer.model",
        config_path=folder / "config.json",
        mimi_config_path=demo.model_dir / "mimi_config.json",
        **files,
    )
    return info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=False)


def _same_logits(ours, stock):
    codes = torch.randint(0, 60, (1, 17, 9))
    with torch.no_grad():
        return torch.equal(ours(codes).text_logits, stock(codes).text_logits)


def test_stock_moshi_reads_the_adapters_of_a_lora_run(finished, demo):
    folder = final_folder(finished("lora"))
    base, adapters = demo.model_dir / "model.safetensors", str(folder / "lora.safetensors")
    stock = _stock(demo, folder, moshi_weights=base, lora_weights=adapters)
    assert _same_logits(load_checkpoint_model(folder, dtype=torch.float32), stock)


def test_stock_moshi_reads_the_weights_of_a_full_run(finished, demo):
    folder = final_folder(finished("full"))
    stock = _stock(demo, folder, moshi_weights=folder / "consolidated.safetensors")
    assert _same_logits(load_checkpoint_model(folder, dtype=torch.float32), stock)


def test_stock_moshi_reads_the_baseline_without_ttt_layers(demo, tmp_path):
    ttt = MODES["full_ttt"]["ttt"] | {"layers": "none", "non_ttt_layer_context": 7}
    run_training(run_args(demo, tmp_path / "run", "full_ttt", ttt=ttt, max_steps=1))
    folder = final_folder(tmp_path / "run")
    stock = _stock(demo, folder, moshi_weights=folder / "consolidated.safetensors")
    ours = load_checkpoint_model(folder, dtype=torch.float32)
    assert [layer.self_attn.context for layer in ours.transformer.layers] == [7] * 4
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_merged_adapters_are_full_weights_with_the_same_output(finished, demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", "lora", save_adapters=False))
    assert {p.name for p in final_folder(tmp_path / "run").glob("*.safetensors")} == {
        "consolidated.safetensors"
    }
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
        run_training(
            run_args(demo, tmp_path / "b", init_from=str(finished("lora_ttt")), ttt=ttt | {"layers": "1,2,3"})
        )
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


@pytest.mark.parametrize(
    ("mode", "name"),
    [("lora_ttt", "ttt.safetensors"), ("lora_ttt", "lora.safetensors"), ("full", "consolidated.safetensors")],
)
def test_a_checkpoint_without_one_of_its_files_is_an_error(finished, demo, tmp_path, mode, name):
    copy = tmp_path / "checkpoint"
    shutil.copytree(final_folder(finished(mode)), copy)
    (copy / name).unlink()
    message = "no checkpoint here" if mode == "full" else f"{name} is missing"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_model(copy)
    with pytest.raises(CheckpointError, match=message):
        run_training(run_args(demo, tmp_path / "run", mode, init_from=str(copy)))


def test_a_checkpoint_that_lost_tensors_is_an_error(finished, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(final_folder(finished("lora_ttt")), copy)
    tensors = load_file(copy / "lora.safetensors")
    save_file(dict(list(tensors.items())[:-2]), copy / "lora.safetensors")
    with pytest.raises(CheckpointError, match="2 LoRA tensors are missing"):
        load_checkpoint_model(copy)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "ttt.safetensors", "training.json", "config.json"]
)
def test_a_damaged_checkpoint_is_one_line(finished, tmp_path, name):
    copy = tmp_path / "checkpoint"
    shutil.copytree(final_folder(finished("full_ttt")), copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint_model(copy)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_ttt_can_be_added_to_a_lora_run(finished, demo, tmp_path, caplog, logs):
    run_training(
        run_args(demo, tmp_path / "run", init_from=str(finished("lora")), max_steps=1, optim={"lr": 1e-30})
    )
    assert any("The checkpoint has no TTT" in line for line in logs(caplog))
    before = load_file(final_folder(finished("lora")) / "lora.safetensors")
    after = load_file(final_folder(tmp_path / "run") / "lora.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_adapters_of_moshi_finetune_are_a_start(finished, demo, tmp_path):
    # moshi-finetune writes lora.safetensors and config.json, nothing else.
    folder = tmp_path / "checkpoints" / "checkpoint_000100" / "consolidated"
    shutil.copytree(final_folder(finished("lora")), folder)
    (folder / "training.json").unlink()
    run_training(
        run_args(demo, tmp_path / "run", "lora", init_from=str(tmp_path), max_steps=1, optim={"lr": 1e-30})
    )
    before, after = (
        load_file(path / "lora.safetensors") for path in (folder, final_folder(tmp_path / "run"))
    )
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_full_weights_are_a_start_for_adapters(finished, demo, tmp_path):
    start_from = {"init_from": str(finished("full")), "max_steps": 1, "do_eval": True, "optim": {"lr": 1e-30}}
    run_training(run_args(demo, tmp_path / "run", **start_from))
    start, end = read_metrics(finished("full"), "eval")[-1], read_metrics(tmp_path / "run", "eval")[-1]
    # The new TTT layers enter through a gate of 0.005.
    assert end["text_loss"] == pytest.approx(start["text_loss"], rel=0.02)


def test_warm_start_says_which_settings_differ(finished, demo, tmp_path, caplog, logs):
    ttt = MODES["lora_ttt"]["ttt"] | {"mini_batch_size": 8}
    lora = {"enable": True, "rank": 4, "scaling": 8.0}
    run_training(
        run_args(demo, tmp_path / "run", init_from=str(finished("lora_ttt")), max_steps=1, ttt=ttt, lora=lora)
    )
    lines = [line for line in logs(caplog) if line.startswith("Differs")]
    assert lines == [
        "Differs: lora.scaling is 8.0, the checkpoint had 2.0.",
        "Differs: ttt.mini_batch_size is 8, the checkpoint had 16.",
    ]


def test_stray_names_among_the_checkpoints_do_no_harm(finished, demo, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished("ttt"), run_dir)
    (run_dir / "checkpoints" / "checkpoint_best").mkdir()
    (run_dir / "checkpoints" / "checkpoint_000009").mkdir()
    (run_dir / "checkpoints" / "checkpoint_000010").write_text("")
    assert find_checkpoint(run_dir).parent.name == "checkpoint_000003"


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_the_others(demo, tmp_path, monkeypatch):
    original = consolidated.save_file

    def disk_full(tensors, path):
        if "000002" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(consolidated, "save_file", disk_full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are intact"):
        run_training(run_args(demo, tmp_path / "run", "ttt", ckpt_freq=1))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint_000001"]


def test_loader_workers_do_not_change_the_run(finished, demo, tmp_path):
    values = run_values(demo, tmp_path / "run", do_eval=True)
    args = run_args(demo, tmp_path / "run", do_eval=True, data=values["data"] | {"num_workers": 1})
    run_training(args)
    losses = [
        [r["loss"] for r in read_metrics(path, "train")] for path in (tmp_path / "run", finished("lora_ttt"))
    ]
    assert losses[0] == losses[1]


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
