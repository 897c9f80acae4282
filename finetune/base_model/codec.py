"""The codec Mimi of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from moshi.models import MimiModel, loaders
from moshi.models.lm import LMModel
from moshi.models.loaders import FRAME_RATE, CheckpointInfo, get_mimi

from finetune.base_model.config_values import check_codec_values
from finetune.base_model.locate import MOSHI_ERRORS, describe_error
from finetune.base_model.streams import model_streams, streams_of
from finetune.base_model.weight_files import check_finite_model, count_parameters
from finetune.errors import CheckpointError


def load_codec(info: CheckpointInfo, device: torch.device) -> MimiModel:
    """The Mimi codec, frozen.

    Raises:
        CheckpointError: its weights are unreadable, not finite, or do not fit its configuration.
    """
    _check_codec_size(info)
    try:
        mimi = get_mimi(
            info.mimi_weights, info.mimi_config, device=device, num_codebooks=_num_codebooks(info)
        ).requires_grad_(False)
        with torch.no_grad():  # a frame of silence, because not all that can be built can hear
            mimi.decode(mimi.encode(torch.zeros(1, 1, mimi.frame_size, device=device)))
    except MOSHI_ERRORS as error:
        raise CheckpointError(
            f"{info.mimi_weights}: cannot be loaded as Mimi: {describe_error(error)}"
        ) from None
    check_finite_model(mimi, source=str(info.mimi_weights))
    return mimi


def _num_codebooks(info: CheckpointInfo) -> int:
    config: Mapping[str, Any] = loaders._lm_kwargs if info.lm_config is None else info.lm_config
    return streams_of(n_q=config["n_q"], dep_q=config["dep_q"]).num_codebooks


def _check_codec_size(info: CheckpointInfo) -> None:
    """Moshi builds the codec in memory before it reads the weights: see that they are of one size.

    Names are not compared, since Moshi renames tensors of its published files while it loads them.
    """
    source = str(info.mimi_weights)
    held = count_parameters(Path(info.mimi_weights))
    if info.mimi_config is not None:
        check_codec_values(info.mimi_config, source=f"configuration of {source}")
    try:
        with torch.device("meta"):
            state = get_mimi(None, info.mimi_config, device="meta").state_dict()
    except MOSHI_ERRORS as error:
        raise CheckpointError(f"{source}: cannot be loaded as Mimi: {describe_error(error)}") from None
    announced = sum(tensor.numel() for tensor in state.values())
    if announced > 2 * held:
        raise CheckpointError(
            f"{source}: holds {held:,} parameters, its configuration announces {announced:,}."
        )


def check_codec(mimi: MimiModel, model: LMModel, info: CheckpointInfo) -> None:
    """Compare frame rate and codebooks of codec and model.

    Raises:
        CheckpointError: they do not fit each other.
    """
    num_codebooks = model_streams(model).num_codebooks
    if mimi.frame_rate != FRAME_RATE or mimi.num_codebooks != num_codebooks:
        raise CheckpointError(
            f"{info.mimi_weights}: this codec has {mimi.frame_rate:g} frames a second and "
            f"{mimi.num_codebooks} codebooks; this model needs {FRAME_RATE:g} and {num_codebooks}, "
            "the same for each voice."
        )
    if mimi.cardinality > model.card:
        raise CheckpointError(
            f"{info.mimi_weights}: this codec has {mimi.cardinality} codes in a codebook, this model knows "
            f"{model.card}."
        )
