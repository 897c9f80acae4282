"""Keys, defaults, overrides, help and dry runs."""

import dataclasses
import re

import pytest
import torch
from pydantic import ValidationError

from finetune.args import OptimArgs, TrainArgs, TTTArgs
from finetune.config_io import all_keys, build_args, dump_yaml, load_train_args, read_yaml
from finetune.errors import ConfigError, UserError
from finetune.training.command import parse_train_command
from finetune.ttt_utils import outer_learning_rates
from moshi_ttt import TTTConfig
from moshi_ttt.config import TTTOptions
from project_root import ROOT
from run_helpers import command_line, run_values, write_yaml

EXAMPLES = sorted((ROOT / "example").glob("*.yaml"))
MOSHI_FINETUNE_DEFAULTS = {
    "data.train_data": "",
    "data.eval_data": "",
    "data.shuffle": False,
    "moshi_paths.hf_repo_id": "kyutai/moshiko-pytorch-bf16",
    "moshi_paths.mimi_path": None,
    "moshi_paths.moshi_path": None,
    "moshi_paths.tokenizer_path": None,
    "moshi_paths.config_path": None,
    "full_finetuning": False,
    "lora.enable": False,
    "lora.rank": 64,
    "lora.scaling": 2.0,
    "lora.ft_embed": False,
    "first_codebook_weight_multiplier": 1.0,
    "text_padding_weight": 0.5,
    "optim.lr": 1e-4,
    "optim.weight_decay": 0.1,
    "optim.pct_start": 0.05,
    "duration_sec": 10,
    "batch_size": 1,
    "num_microbatches": 1,
    "max_norm": 1.0,
    "max_steps": 100,
    "gradient_checkpointing": True,
    "seed": 0,
    "log_freq": 1,
    "eval_freq": 0,
    "do_eval": False,
    "do_ckpt": True,
    "ckpt_freq": 0,
    "num_ckpt_keep": 3,
    "save_adapters": True,
    "param_dtype": "bfloat16",
    "overwrite_run_dir": False,
    "wandb.project": None,
    "wandb.offline": False,
    "wandb.key": None,
    "wandb.run_name": None,
}
TTT_DEFAULTS = {
    "enable": False,
    "layers": "middle",
    "base_lr": 1.0,
    "base_lr_scale": "share",
    "key_shift": 1,
    "tied_start": True,
    "mini_batch_size": 16,
    "causal": True,
    "persistent_states": True,
    "initial_gating_alpha": 0.005,
    "ttt_mlp_layers": 2,
    "ttt_mlp_expansion_factor": 4.0,
    "ttt_mlp_hidden_dims": None,
    "use_rope": False,
    "rope_theta": 10000,
    "pre_norm": True,
    "backend": "auto",
    "inner_init": "unit_variance",
    "weight_lr_multiplier": 25,
    "alpha_lr_multiplier": 1000,
    "ttt_layer_context": None,
    "non_ttt_layer_context": None,
    "log_inner_loop_losses": False,
    "inner_loop_log_interval": 1,
    "save_inner_loop_plots": True,
    "inner_loop_plot_dir": "./evaluation_plots/inner_loop",
    "gating_trainable": True,
    "gating": "residual",
    "eps": 1e-8,
    "inner_grad_clip": None,
    "state_decay": None,
}


def test_every_moshi_finetune_key_has_its_default():
    defaults = {key: info.get_default(call_default_factory=True) for key, info in all_keys()}
    assert {key: defaults[key] for key in MOSHI_FINETUNE_DEFAULTS} == MOSHI_FINETUNE_DEFAULTS


def test_every_ttt_key_has_its_default():
    assert dataclasses.asdict(TTTArgs()) == TTT_DEFAULTS


def test_fields_shared_by_configuration_and_layer_are_declared_once():
    shared = set(TTTOptions.__dataclass_fields__)
    for cls in (TTTArgs, TTTConfig):
        assert not shared & set(vars(cls).get("__annotations__", {}))
        assert shared <= set(cls.__dataclass_fields__)
    for scale in ({}, {"base_lr_scale": "share"}):
        args = TTTArgs(mini_batch_size=4, base_lr=0.3, initial_gating_alpha=0.2, key_shift=2, **scale)
        assert args.to_config(model_dim=32, num_heads=4) == TTTConfig(
            model_dim=32,
            num_heads=4,
            mini_batch_size=4,
            ttt_base_lr=0.3,
            gating_alpha_init=0.2,
            key_shift=2,
            base_lr_scale=scale.get("base_lr_scale", "published"),
        )


def test_a_rate_without_its_scale_is_in_the_published_one():
    """Configurations from before there were scales go on meaning the rate that they give."""
    assert TTTArgs().base_lr_scale == TTTConfig().base_lr_scale == "share"
    assert TTTArgs(base_lr=0.1).base_lr_scale == TTTConfig(ttt_base_lr=0.1).base_lr_scale == "published"

    def built(**ttt):
        return build_args(TrainArgs, {"full_finetuning": True, "ttt": ttt}).ttt

    assert built(base_lr=0.1).base_lr_scale == "published"
    assert built(base_lr=0.1, base_lr_scale="share").base_lr_scale == "share"
    at_default = built(key_shift=0)
    assert (at_default.base_lr, at_default.base_lr_scale) == (1.0, "share")


def test_every_key_is_documented():
    assert all(info.description and len(info.description) > 15 for _, info in all_keys())


def test_direct_construction_validates_too():
    with pytest.raises(ValidationError, match="mini_batch_size"):
        TTTArgs(mini_batch_size=0)
    with pytest.raises(ValidationError, match="not a multiple of num_heads"):
        TTTConfig(model_dim=30, num_heads=4)
    with pytest.raises(ValueError, match="lr"):
        OptimArgs(lr="fast")


def test_yaml_numbers_overrides_and_both_ways_to_name_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("optim:\n  lr: 2e-6\nlora: {enable: true}\nrun_dir: old\nttt:\n")
    for argv in ([str(path)], ["--config", str(path)]):
        command = parse_train_command([*argv, "--ttt.layers", "1,3", "--optim.weight_decay", "1e-4"])
        args = command.args
        assert args.optim.lr == 2e-6 and args.optim.weight_decay == 1e-4
        assert args.ttt.layers == "1,3" and args.lora.enable and not command.dry_run
    overrides = ["--run_dir=2024", "--num_ckpt_keep", "null", "--ttt.layers", "[1, 3]", "--lora.enable=false"]
    command = parse_train_command([str(path), *overrides, "--ttt.enable", "true", "--dry-run"])
    args = command.args
    assert args.run_dir == "2024" and args.num_ckpt_keep is None and command.dry_run
    assert args.ttt.layer_indices(4) == [1, 3] and not args.lora.enable


def test_yaml_round_trip_keeps_everything_but_the_key(tmp_path):
    args = TrainArgs(ttt=TTTArgs(enable=True, layers=[1, 2], state_decay=0.1), sample_prompts=["a.wav"])
    path = tmp_path / "args.yaml"
    path.write_text(dump_yaml(args))
    assert load_train_args(path) == args


def test_help_lists_every_key_with_its_default(monkeypatch, capsys):
    assert command_line(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for key, _ in all_keys():
        assert f"--{key} " in text
    assert "default 0.005" in re.sub(r"\s+", " ", text)


def _no_estimate(*args, **kwargs):
    return [], True


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_builds_in_a_dry_run(path, demo, monkeypatch, capsys):
    args = load_train_args(path)
    is_tiny = not str(args.moshi_paths.hf_repo_id).startswith("kyutai/")
    model = ["--moshi_paths.hf_repo_id", str(demo.model_dir)] if is_tiny else []
    monkeypatch.setattr("finetune.training.plan.dry_run.memory_lines", _no_estimate)
    assert command_line(monkeypatch, path, "--dry-run", *model) == 0
    text = capsys.readouterr().out
    base = "2,123,776" if is_tiny else "7,687,729,152"
    assert f"{base} of the base model" in text
    assert "Dry run: nothing was trained or written." in text
    assert f"{args.chunk_frames:,} frames" in text
    if args.ttt.enable:
        for name in ("ttt_weights", "ttt_alpha"):
            assert re.search(rf"  {name}: [\d,]+ params, lr=", text)


def test_the_examples_promised_are_there():
    assert {path.stem for path in EXAMPLES} == {
        "moshi_7B",
        "moshi_7B_ttt",
        "quickstart",
        "debian_prompts",
        "human_speech",
        "human_speech_base",
        "memory",
        "memory_base",
        "recall",
        "recall_base",
        "recall_short",
        "librilight_pretrain",
        "dailytalk_finetune_from_librilight",
        "dailytalk_finetune_ttt_fixed",
        "progressive_stage1",
        "progressive_stage2",
        "test_multi_lr",
        "figure5_quick",
    }
    dailytalk = load_train_args(ROOT / "example" / "dailytalk_finetune_from_librilight.yaml")
    assert dailytalk.ttt.layer_indices(32) == [25, 26, 27, 28, 29, 30]
    assert (dailytalk.optim.lr, dailytalk.optim.weight_decay, dailytalk.optim.pct_start) == (3e-7, 0.1, 0.1)
    assert (dailytalk.ttt.ttt_layer_context, dailytalk.ttt.non_ttt_layer_context) == (50, 100)
    assert dailytalk.duration_sec == 160 and dailytalk.init_from


REPRODUCTIONS = {
    "figure5_quick",
    "librilight_pretrain",
    "dailytalk_finetune_from_librilight",
    "dailytalk_finetune_ttt_fixed",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_the_defaults_or_say_that_they_are_the_published_form(path):
    given, args = read_yaml(path).get("ttt"), load_train_args(path).ttt
    if given is None:
        return
    found = (args.base_lr, args.base_lr_scale, args.key_shift, args.tied_start)
    if path.stem in REPRODUCTIONS:
        assert found == (0.1, "published", 0, False)
        assert "see docs/experiments.md" in path.read_text()
    else:
        defaults = TTTArgs()
        assert found == (defaults.base_lr, defaults.base_lr_scale, defaults.key_shift, defaults.tied_start)
    # With both, a rate of the command line is in the scale that the file names.
    assert ("base_lr" in given) == ("base_lr_scale" in given)


def test_dry_run_prints_windows_groups_and_mini_batches(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("finetune.training.plan.dry_run.memory_lines", _no_estimate)
    values = run_values(demo, tmp_path / "run", duration_sec=160, max_steps=200)
    values["ttt"] |= {"ttt_layer_context": 50, "non_ttt_layer_context": 100, "alpha_lr_multiplier": 1000}
    values["optim"] = {"lr": 3e-7, "pct_start": 0.1}
    path = write_yaml(tmp_path / "config.yaml", values)
    assert command_line(monkeypatch, path, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "  ttt_alpha: 256 params, lr=3.00e-04 (1000x base)" in text
    assert "Attention window: 50 frames (4 s) in 2 layers (1, 3)." in text
    assert "Attention window: 100 frames (8 s) in 2 layers (0, 2)." in text
    assert "160 s = 2,000 frames = 125 mini-batches of 16." in text
    assert "200, of which 20 warm up" in text
    assert "base_lr 1 in shares of a token's error, mini-batches of 16" in text
    assert "TTT keys: of the frame before, the memory learns what follows a frame (ttt.key_shift: 1)." in text
    assert "TTT memory: is carried from chunk to chunk" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key_shift", "line"),
    [
        (0, "TTT keys: of the frame itself, the memory learns what a frame is (ttt.key_shift: 0)."),
        (3, "TTT keys: of the frame 3 before, the memory learns what follows a frame (ttt.key_shift: 3)."),
    ],
)
def test_dry_run_says_what_the_memory_learns(demo, tmp_path, monkeypatch, capsys, key_shift, line):
    monkeypatch.setattr("finetune.training.plan.dry_run.memory_lines", _no_estimate)
    path = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run"))
    options = ("--ttt.key_shift", str(key_shift), "--ttt.base_lr", "0.1")
    assert command_line(monkeypatch, path, "--dry-run", *options) == 0
    text = capsys.readouterr().out
    assert line in text and "base_lr 0.1 in the published scale" in text


@pytest.mark.parametrize(
    ("ttt", "adds"),
    [
        ({"persistent_states": False}, "a memory has nothing to add"),
        ({"persistent_states": True}, "a memory has only what is further back"),
        ({"ttt_layer_context": 50}, None),
        ({"layers": "none"}, None),
    ],
)
def test_attention_that_sees_every_chunk_whole_is_remarked(demo, tmp_path, monkeypatch, capsys, ttt, adds):
    monkeypatch.setattr("finetune.training.plan.dry_run.memory_lines", _no_estimate)
    values = run_values(demo, tmp_path / "run", duration_sec=8)
    values["ttt"] |= {"ttt_layer_context": None, "non_ttt_layer_context": 100} | ttt
    path = write_yaml(tmp_path / "config.yaml", values)
    assert command_line(monkeypatch, path, "--dry-run") == 0
    line = r"Note: the attention of every layer sees a chunk of 100 frames whole; (.*)"
    notes = re.findall(line, capsys.readouterr().out)
    assert [adds in note for note in notes] == ([] if adds is None else [True])


def test_the_stages_have_the_rates_of_the_training_guide():
    for stage, weights in ((1, 3e-4), (2, 1e-4)):
        rates = outer_learning_rates(load_train_args(ROOT / "example" / f"progressive_stage{stage}.yaml"))
        assert rates["ttt_weights"] == pytest.approx(weights, rel=1e-3)
        assert rates["ttt_alpha"] == pytest.approx(3e-4)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_for_moshi_7b_open_their_gates_no_faster_than_the_guides_table(path):
    args = load_train_args(path)
    if args.moshi_paths.hf_repo_id.startswith("kyutai/") and args.ttt.enable:
        assert outer_learning_rates(args)["ttt_alpha"] <= 6e-4


def test_layers_none_says_that_it_is_the_baseline(demo, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run", "lora_ttt"))
    assert command_line(monkeypatch, path, "--dry-run", "--ttt.layers", "none") == 0
    assert "this run is the baseline without TTT layers" in capsys.readouterr().out


def test_device_is_chosen_once_and_cpu_works():
    from finetune.distributed import choose_device

    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("duration_sec", "frames"), [(160, 2000), (15, 188), (0.56, 7), (10, 125), (0.01, 1)]
)
def test_chunk_length_in_frames(duration_sec, frames):
    assert TrainArgs(ttt=TTTArgs(enable=True), duration_sec=float(duration_sec)).chunk_frames == frames


def test_the_call_of_moshi_finetune_reads_a_configuration(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", {"lora": {"enable": True}, "optim": {"lr": 2e-6}})
    assert TrainArgs.load(str(path), drop_extra_fields=False) == TrainArgs.load(path) == load_train_args(path)
    assert TrainArgs.load(path).optim.lr == 2e-6
    path = write_yaml(tmp_path / "b.yaml", {"lora": {"enable": True, "rnk": 4}})
    with pytest.raises(ConfigError, match=r"^lora\.rnk: unknown key, did you mean lora\.rank\?$"):
        TrainArgs.load(path)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the configuration"):
        TrainArgs.load("nowhere.yaml")
    with pytest.raises(UserError, match="drop_extra_fields"):
        TrainArgs.load(path, drop_extra_fields=True)
