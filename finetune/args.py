"""Every key of a training configuration, with its unit, default and allowed values.

The dataclasses mirror the YAML; `finetune.config_io` reads and writes it, `finetune.training.command` makes
an option of the command line from each field. `data:`, `eval:` and `optim:` are in the `args.py` of their
rooms.
"""

import importlib
import math
from typing import Literal, get_args

from moshi.models.loaders import FRAME_RATE
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from finetune.data.args import DataArgs, TextOptions
from finetune.evaluation.args import EvalArgs
from finetune.training.args import OptimArgs
from moshi_ttt.config import STRICT, TTTConfig, TTTOptions
from moshi_ttt.errors import UserError

_NamedLayers = Literal["none", "all", "middle"]
_NAMED_LAYERS: tuple[_NamedLayers, ...] = get_args(_NamedLayers)


@dataclass(frozen=True, config=STRICT)
class ModelPaths:
    """`moshi_paths:` — where the base model comes from."""

    hf_repo_id: str | None = Field(
        default="kyutai/moshiko-pytorch-bf16",
        description="Hugging Face repository of the base model, or a local folder with the same files.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Commit, tag or branch of hf_repo_id on the Hub (null: the newest of its main branch).",
    )
    mimi_path: str | None = Field(default=None, description="Mimi weights, instead of the repository's.")
    moshi_path: str | None = Field(default=None, description="Moshi weights, instead of the repository's.")
    tokenizer_path: str | None = Field(default=None, description="Tokenizer, instead of the repository's.")
    config_path: str | None = Field(default=None, description="config.json, instead of the repository's.")


@dataclass(frozen=True, config=STRICT)
class LoraArgs:
    """`lora:` — low-rank adapters on every linear layer of Moshi."""

    enable: bool = Field(default=False, description="Train LoRA adapters.")
    rank: int = Field(default=64, ge=1, le=65536, description="Rank of the adapters.")
    scaling: float = Field(default=2.0, gt=0, le=1e6, description="Factor of the adapters' output.")
    ft_embed: bool = Field(default=False, description="Train the embedding tables as well.")


@dataclass(frozen=True, config=STRICT)
class WandbArgs:
    """`wandb:` — Weights & Biases, used when a project is given."""

    project: str | None = Field(default=None, description="Project name; null: not used.")
    offline: bool = Field(default=False, description="Write the run to disk for `wandb sync`.")
    key: str | None = Field(default=None, description="API key; never written to the run directory.")
    run_name: str | None = Field(default=None, description="Name of the run (null: name of run_dir).")


@dataclass(frozen=True, config=STRICT)
class DiagnosticsArgs:
    """`diagnostics:` — the health of the run, measured while it trains."""

    freq: int = Field(
        default=10,
        ge=0,
        le=10**9,
        description="Steps between two measurements of the run's health (0: none).",
    )


@dataclass(frozen=True, config=STRICT)
class ParallelArgs:
    """`parallel:` — how the model is spread over the processes of torchrun."""

    strategy: Literal["auto", "none", "ddp", "fsdp"] = Field(
        default="auto",
        description="fsdp: weights, gradients and optimiser in shards; ddp: a whole model per process; "
        "none: one process; auto: fsdp with several processes, otherwise none.",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=65536,
        description="Hybrid sharding: copies of the model, each sharded over processes / replicas.",
    )

    @model_validator(mode="after")
    def _check_replicas(self) -> "ParallelArgs":
        if self.replicas > 1 and self.strategy in ("none", "ddp"):
            raise ValueError(f"replicas: {self.replicas} belongs to strategy fsdp, not {self.strategy}")
        return self


@dataclass(frozen=True, config=STRICT)
class TTTArgs(TTTOptions):
    """`ttt:` — the Test-Time-Training layers."""

    enable: bool = Field(default=False, description="Add TTT layers; false makes the whole section inert.")
    layers: str | int | list[int] = Field(
        default="middle",
        description="Transformer layers that get TTT: none, all, middle (L/4 to 3L/4) or indices `29,30,31`.",
    )
    base_lr: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="Inner learning rate, see base_lr_scale; the outer rates come from the multipliers.",
    )
    persistent_states: bool = Field(
        default=True, description="Carry the fast weights across the chunks of one recording."
    )
    initial_gating_alpha: float = Field(
        default=0.005, ge=-10, le=10, description="Gate parameter alpha at start."
    )
    weight_lr_multiplier: float = Field(
        default=25.0, gt=0, le=1e9, description="Outer rate of the TTT weights, relative to optim.lr."
    )
    alpha_lr_multiplier: float = Field(
        default=1000.0, gt=0, le=1e9, description="Outer rate of the gates, relative to optim.lr."
    )
    ttt_layer_context: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Attention window of layers with TTT, frames (null: the model's).",
    )
    non_ttt_layer_context: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Attention window of the other layers, frames (null: the model's).",
    )
    log_inner_loop_losses: bool = Field(
        default=False, description="Write the inner losses per layer and frame to inner_loop_losses.jsonl."
    )
    inner_loop_log_interval: int = Field(default=1, ge=1, description="Steps between two such records.")
    save_inner_loop_plots: bool = Field(default=True, description="Plot them at the end of the run.")
    inner_loop_plot_dir: str = Field(
        default="./evaluation_plots/inner_loop",
        description="Folder of these plots, inside run_dir if relative.",
    )

    @model_validator(mode="after")
    def _check_layers(self) -> "TTTArgs":
        self._parse_layers()
        return self

    def _parse_layers(self) -> list[int] | _NamedLayers:
        if isinstance(self.layers, int):
            return [self.layers]
        if isinstance(self.layers, list):
            if not self.layers:
                raise ValueError("layers: the list is empty; write none for the baseline without TTT layers")
            return self.layers
        for name in _NAMED_LAYERS:
            if self.layers == name:
                return name
        try:
            return [int(part) for part in self.layers.split(",")]
        except ValueError:
            raise ValueError(
                f"layers: {self.layers!r} is not none, all, middle or indices such as 29,30,31"
            ) from None

    def layer_indices(self, num_layers: int) -> list[int]:
        """Indices of the layers that get TTT in a model of `num_layers`, sorted.

        Raises:
            ValueError: an index does not exist or is given twice, or the model has no middle.
        """
        choice = self._parse_layers()
        if choice == "none":
            return []
        if choice == "all":
            return list(range(num_layers))
        if choice == "middle":
            middle = list(range(num_layers // 4, 3 * num_layers // 4))
            if not middle:
                raise ValueError(f"ttt.layers: a model of {num_layers} layers has no middle; give indices.")
            return middle
        for index in choice:
            if not 0 <= index < num_layers:
                raise ValueError(
                    f"ttt.layers: index {index} does not exist, the model has {num_layers} layers "
                    f"(0 to {num_layers - 1})."
                )
        if len(set(choice)) < len(choice):
            raise ValueError(f"ttt.layers: {self.layers!r} names a layer twice.")
        return sorted(choice)

    def to_config(self, *, model_dim: int, num_heads: int) -> TTTConfig:
        """The configuration of a TTT layer in a transformer of this width and number of heads."""
        shared = {name: getattr(self, name) for name in TTTOptions.__dataclass_fields__}
        return TTTConfig(
            model_dim=model_dim,
            num_heads=num_heads,
            ttt_base_lr=self.base_lr,
            gating_alpha_init=self.initial_gating_alpha,
            **shared,
        )


@dataclass(frozen=True, config=STRICT)
class TrainArgs:
    """A whole training run."""

    run_dir: str = Field(default="", description="Folder of everything the run writes; must not exist yet.")
    overwrite_run_dir: bool = Field(
        default=False, description="Rename an existing run_dir to run_dir.bak-<time>; nothing is deleted."
    )
    resume: str | None = Field(
        default=None,
        min_length=1,
        description="Go on exactly where a run stopped: auto (run_dir, when it has a checkpoint), a run "
        "directory or one of its checkpoints.",
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Run or checkpoint whose adapters, TTT weights and gates are the start; fresh optimiser.",
    )
    data: DataArgs = Field(default_factory=DataArgs)
    moshi_paths: ModelPaths = Field(default_factory=ModelPaths)

    full_finetuning: bool = Field(default=False, description="Train every parameter of Moshi.")
    quantise: Literal["int8"] | None = Field(
        default=None,
        description="Round the frozen linear layers of the base model to int8, which takes less memory; for "
        "LoRA and TTT in one process.",
    )
    lora: LoraArgs = Field(default_factory=LoraArgs)
    ttt: TTTArgs = Field(default_factory=TTTArgs)

    first_codebook_weight_multiplier: float = Field(
        default=1.0, gt=0, le=1e9, description="Weight of the semantic codebook in the audio loss."
    )
    text_padding_weight: float = Field(
        default=0.5, ge=0, le=1e9, description="Weight of the padding tokens in the text loss."
    )

    optim: OptimArgs = Field(default_factory=OptimArgs)
    duration_sec: float = Field(default=10.0, gt=0, le=86_400, description="Length of a chunk, seconds.")
    batch_size: int = Field(default=1, ge=1, le=65536, description="Chunks per process and micro-batch.")
    num_microbatches: int = Field(default=1, ge=1, le=65536, description="Micro-batches per optimiser step.")
    max_norm: float = Field(default=1.0, gt=0, description="Gradient norm above which gradients are scaled.")
    max_steps: int = Field(default=100, ge=1, le=10**9, description="Optimiser steps.")
    gradient_checkpointing: bool = Field(
        default=True, description="Recompute activations during backward: less memory, slower."
    )
    param_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="Dtype of frozen weights and of the computation; trained weights are float32.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps, …")
    parallel: ParallelArgs = Field(default_factory=ParallelArgs)
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Peak bfloat16 TFLOP/s of one device, for the utilisation (null: known GPUs only).",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Of the initial weights and of the order of the data."
    )

    log_freq: int = Field(default=1, ge=1, description="Steps between two records of the metrics.")
    diagnostics: DiagnosticsArgs = Field(default_factory=DiagnosticsArgs)
    do_eval: bool = Field(default=False, description="Evaluate on data.eval_data.")
    eval_freq: int = Field(default=0, ge=0, description="Steps between evaluations (0: at the end only).")
    eval: EvalArgs = Field(default_factory=EvalArgs)
    do_ckpt: bool = Field(default=True, description="Save checkpoints.")
    ckpt_freq: int = Field(default=0, ge=0, description="Steps between checkpoints (0: at the end only).")
    num_ckpt_keep: int | None = Field(default=3, ge=1, description="Newest checkpoints kept (null: all).")
    ckpt_keep_best: bool = Field(
        default=True, description="Keep the checkpoint with the lowest evaluation loss as well."
    )
    ckpt_async: bool = Field(
        default=False, description="Write checkpoints in the background, from a copy in host memory."
    )
    ckpt_on_error: Literal["stop", "continue"] = Field(
        default="stop", description="What a checkpoint that cannot be written does to the training."
    )
    save_adapters: bool = Field(
        default=True, description="Save LoRA as adapters; false merges them into full weights."
    )

    sample_freq: int = Field(default=0, ge=0, description="Steps between audio samples (0: none).")
    sample_prompts: list[str] = Field(
        default_factory=list,
        description="Recordings of a user to answer in the samples (empty: a silent user).",
    )
    sample_conditions: dict[str, str] = Field(
        default_factory=dict,
        description="What a model with text conditions is told in the samples, {name: text}.",
    )
    sample_duration_sec: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Length of a sample without a prompt, seconds; longest otherwise.",
    )

    wandb: WandbArgs = Field(default_factory=WandbArgs)

    @model_validator(mode="after")
    def _check_combinations(self) -> "TrainArgs":
        if self.full_finetuning and self.lora.enable:
            raise ValueError("full_finetuning and lora.enable exclude each other; set one of them to false")
        if not (self.full_finetuning or self.lora.enable or self.ttt.enable):
            raise ValueError(
                "full_finetuning, lora.enable and ttt.enable are all false: nothing to train; set one to true"
            )
        self._check_quantise()
        if self.sample_freq and self.ttt.enable and not self.ttt.causal:
            raise ValueError(
                "sample_freq: a model with ttt.causal: false cannot stream; set sample_freq to 0"
            )
        for name, data in (("spoken", self.eval.spoken.data), ("long_context", self.eval.long_context.data)):
            if data is not None and self.ttt.enable and not self.ttt.causal:
                raise ValueError(f"eval.{name}.data: a model with ttt.causal: false sees what it predicts")
        self.optim.check_steps(self.max_steps)
        if self.wandb.project == "":
            raise ValueError("wandb.project: '' is empty; give a name, or null to do without W&B")
        return self

    def _check_quantise(self) -> None:
        if self.quantise is None:
            return
        what = None
        if self.full_finetuning:
            what = "full_finetuning: true trains the weights that it rounds; set lora.enable instead"
        elif self.lora.enable and not self.save_adapters:
            what = "save_adapters: false would merge the adapters into rounded weights; set it to true"
        elif not self.lora.enable:
            for key, used in (
                ("sample_freq", self.sample_freq),
                ("eval.spoken.data", self.eval.spoken.data),
                ("eval.long_context.data", self.eval.long_context.data),
            ):
                if used:
                    what = f"{key} needs lora.enable: Moshi's code streams no other rounded model"
        if what is not None:
            raise ValueError(f"quantise: {self.quantise} is not possible, {what}")

    @classmethod
    def load(cls, path: str, drop_extra_fields: bool = False) -> "TrainArgs":
        """Read a YAML file, as moshi-finetune's call does; unknown keys are errors.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong; one line.
        """
        if drop_extra_fields:
            raise UserError("drop_extra_fields: True is not allowed, no key of a configuration is dropped.")
        # By its name: it knows this class, and imports go down.
        return importlib.import_module("finetune.config_io").load_train_args(path)

    @property
    def text_options(self) -> TextOptions:
        """Those of the text stream alone."""
        return TextOptions(self.data.text, self.data.keep_and_shift, self.data.keep_main_only)

    @property
    def carries_memory(self) -> bool:
        """Whether rows follow recordings and the fast weights go on from chunk to chunk."""
        return self.ttt.enable and self.ttt.persistent_states

    @property
    def chunk_frames(self) -> int:
        """Frames of a chunk: `duration_sec` at 12.5 frames a second, rounded up."""
        # 0.56 * 12.5 is a little more than 7 in floating point.
        return math.ceil(round(self.duration_sec * FRAME_RATE, 6))
