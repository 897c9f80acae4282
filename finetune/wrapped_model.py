"""The model that trains: base weights, LoRA, TTT, what is frozen, and which dtype it has."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.models.lm_utils import ScaledEmbedding
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch import nn

from finetune.args import LoraArgs, TrainArgs
from finetune.base_model.announced_conditions import (
    check_condition_config,
    check_conditioner_sizes,
    with_own_config,
)
from finetune.base_model.int8_linear import check_bitsandbytes, quantise_base
from finetune.base_model.locate import MOSHI_ERRORS, describe_error
from finetune.base_model.streams import make_trainable
from finetune.base_model.weight_files import check_finite_model, count_parameters
from finetune.errors import CheckpointError, ConfigError
from finetune.ttt_integration import apply_ttt_to_model
from finetune.ttt_utils import is_ttt_parameter
from moshi_ttt.hybrid_model import transformer_layers
from moshi_ttt.ssm_gating import SSMGating
from moshi_ttt.ttt_layer import TTTLayer


def load_base(
    info: CheckpointInfo,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
) -> LMModel:
    """The base model through Moshi's own loader, adapters of its repository merged into it.

    Raises:
        CheckpointError: the weights do not fit the architecture or are not finite, or it is one that cannot
            train.
    """
    overrides: dict[str, object] = {"gradient_checkpointing": gradient_checkpointing}
    check_conditioner_sizes(info)
    _check_announced_size(info)
    info = with_own_config(info)
    if info.lora_weights is None:
        overrides["lora"] = False
    try:
        model = info.get_moshi(device=device, dtype=dtype, lm_kwargs_overrides=overrides, fuse_lora=True)
    except MOSHI_ERRORS as error:
        raise CheckpointError(
            f"{info.moshi_weights}: cannot be loaded as this Moshi model: {describe_error(error)}"
        ) from None
    check_finite_model(model, source=str(info.moshi_weights))
    if model.condition_provider is not None:
        model.condition_provider.float()  # as Moshi keeps it, but not where it merges adapters
    return make_trainable(model)


def build_model(args: TrainArgs, info: CheckpointInfo, *, device: torch.device) -> LMModel:
    """Base weights, then LoRA, TTT, freezing and dtypes, in the order that keeps Moshi's names.

    Returns:
        A model in training mode whose frozen weights have `args.param_dtype` and whose trainable weights
        are float32 masters; run it under `autocast(args)` when param_dtype is bfloat16.

    Raises:
        CheckpointError: see `load_base`.
        ConfigError: what `args.quantise` needs is not installed.
    """
    if args.quantise is not None:
        check_bitsandbytes()
    # What is rounded must not be on a small card before.
    first = torch.device("cpu") if args.quantise is not None else device
    dtype = _base_dtype(args)
    model = load_base(info, device=first, dtype=dtype, gradient_checkpointing=args.gradient_checkpointing)
    return _quantised(prepare_model(model, args), args).to(device)


def build_meta_model(args: TrainArgs, lm_kwargs: dict) -> LMModel:
    """The same model without weights, on the meta device.

    Args:
        lm_kwargs: arguments of `LMModel`.

    Raises:
        CheckpointError: Moshi refuses them.
    """
    model = load_without_weights(
        lm_kwargs,
        dtype=_base_dtype(args),
        source="moshi_paths: the configuration",
        gradient_checkpointing=args.gradient_checkpointing,
    )
    return _quantised(prepare_model(model, args), args)


def _quantised(model: LMModel, args: TrainArgs) -> LMModel:
    if args.quantise is not None:
        quantise_base(model)
    return model


def load_without_weights(
    lm_kwargs: Mapping[str, Any], *, dtype: torch.dtype, source: str, gradient_checkpointing: bool = False
) -> LMModel:
    """A base model on the meta device, which has names and shapes but takes no memory.

    Args:
        lm_kwargs: arguments of `LMModel`.
        dtype: of its parameters.
        source: what the line of the error starts with.
        gradient_checkpointing: see `LMModel`.

    Raises:
        CheckpointError: Moshi refuses them.
    """
    overrides = {"gradient_checkpointing": gradient_checkpointing, "lora": False}
    check_condition_config(lm_kwargs, source=source)
    try:
        with torch.device("meta"):
            model = get_moshi_lm(
                None,
                copy.deepcopy(dict(lm_kwargs)),
                device="meta",
                dtype=dtype,
                lm_kwargs_overrides=overrides,
            )
            return make_trainable(model)
    except MOSHI_ERRORS as error:
        raise CheckpointError(f"{source} is not one of Moshi: {describe_error(error)}") from None


def _check_announced_size(info: CheckpointInfo) -> None:
    """Moshi makes some layers in memory before it reads the weights: see that they are of one size.

    Names are not compared, since Moshi renames tensors of its published files while it loads them.
    """
    source = f"configuration of {info.moshi_weights}"
    lm_kwargs = loaders._lm_kwargs if info.lm_config is None else info.lm_config
    model = load_without_weights(lm_kwargs, dtype=torch.bfloat16, source=source)
    announced = sum(tensor.numel() for tensor in model.state_dict().values())
    held = count_parameters(Path(info.moshi_weights))
    if announced > 2 * held:
        raise CheckpointError(f"{source}: announces {announced:,} parameters, the file holds {held:,}.")


def _base_dtype(args: TrainArgs) -> torch.dtype:
    return torch.float32 if args.full_finetuning else getattr(torch, args.param_dtype)


def prepare_model(model: LMModel, args: TrainArgs) -> LMModel:
    """Add LoRA and TTT to a loaded base model, freeze the rest, make float32 masters.

    What is new is drawn from `args.seed` alone, wherever and after whatever else a process builds the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        if args.lora.enable:
            add_lora(model, args.lora, dtype=torch.float32)
        apply_ttt_to_model(model, args.ttt)
        set_trainable(model, args)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # TTT layers were drawn on their device when they were made, which moves this generator or another.
        torch.default_generator.manual_seed(args.seed + 1)
        for module in model.modules():
            if isinstance(module, (TTTLayer, SSMGating)):
                # Drawn again in float32, fixed gates included: a gate of 0.005 is 0.0050049 in bfloat16.
                module.float()
                with _on_host(module):
                    module.reset_parameters()
    return model.train()


@contextmanager
def _on_host(module: nn.Module) -> Iterator[None]:
    """Draw initial values on the CPU: they shall not depend on where a process builds the model."""
    device = next(module.parameters()).device
    if device.type != "meta":
        module.cpu()
    yield
    module.to(device)


def add_lora(model: LMModel, args: LoraArgs, *, dtype: torch.dtype) -> None:
    """Wrap every linear layer in a LoRA adapter that starts as the identity; adapters get this dtype.

    Those of conditioners are float32 like what they are added to.

    Cross-attention keeps its plain linears: Moshi's own code slices their weights.
    """
    crossed = [layer for layer in transformer_layers(model.transformer) if layer.cross_attention is not None]
    kept = [layer.cross_attention for layer in crossed]
    for layer in crossed:
        layer.cross_attention = None
    replace_all_linear_with_lora(model, args.rank, args.scaling, device="meta", dtype=dtype)
    for layer, attention in zip(crossed, kept, strict=True):
        layer.cross_attention = attention
    for module in model.modules():
        if isinstance(module, LoRALinear):
            device = module.frozen_W.weight.device
            for adapter in (module.lora_A, module.lora_B):
                adapter.to_empty(device=device)
            with _on_host(module.lora_A):
                nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B.weight)
    if model.condition_provider is not None:
        model.condition_provider.float()


def set_trainable(model: LMModel, args: TrainArgs) -> None:
    """Decide for every parameter whether it trains.

    Raises:
        ConfigError: none of them does.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(args.full_finetuning or is_ttt_parameter(name))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)
        elif isinstance(module, ScaledEmbedding) and args.lora.enable and args.lora.ft_embed:
            module.requires_grad_(True)
        elif isinstance(module, SSMGating):
            module.requires_grad_(module.trainable)
    for unused in (model.extra_heads, *([model.depformer_in] if model.depformer is None else [])):
        unused.requires_grad_(False)  # no loss reaches them
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("ttt.layers: none leaves nothing to train; enable lora or full_finetuning as well.")


def autocast(args: TrainArgs, device: torch.device) -> torch.autocast:
    """The context in which the model computes: bfloat16 around float32 masters, or nothing."""
    # Without its cache, which would keep a bfloat16 copy of every trained weight until the end of the pass.
    enabled = args.param_dtype == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


def context_frames(model: LMModel) -> int:
    """Frames before a chunk with which its first frame has the input that it has in the whole recording.

    The input is the frame before, of which a codebook delayed by d shows the frame d earlier.
    """
    return 1 + max(model.delays)
