"""The values that a model's and a codec's configuration may hold: their types, and sizes that a machine has.

Moshi checks hardly any. What it does not know it refuses by name, so unknown keys are left to it.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.errors import CheckpointError

_Count = Annotated[int, Field(ge=1, le=4096)]  # of layers, heads, codebooks
_Size = Annotated[int, Field(ge=1, le=2**18)]  # of a dimension
_Card = Annotated[int, Field(ge=1, le=2**22)]  # of a vocabulary
_Frames = Annotated[int, Field(ge=1, le=100_000)]  # an attention window: its cache is as long
_Delay = Annotated[int, Field(ge=0, le=4096)]
_Token = Annotated[int, Field(ge=0, le=2**22)]
_Factor = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Section = dict[str, Any]
_DEFAULT_TEXT_CARD = 32000  # Moshi's


class StrictValues(BaseModel):
    """Keys of a JSON object with the types of their values; others are left alone."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _TransformerValues(StrictValues):
    num_heads: _Count = 1
    num_layers: Annotated[int, Field(ge=1, le=512)] = 1
    causal: bool = True
    layer_scale: _Factor | None = None
    context: _Frames | None = None
    max_period: _Factor = 1
    gating: str = ""
    norm: str = ""
    positional_embedding: str = ""
    dim_feedforward: _Size | list[_Size] | None = None
    cross_attention: bool = False
    kv_repeat: _Count = 1


class _ModelValues(_TransformerValues):
    delays: list[_Delay] = []
    n_q: Annotated[int, Field(ge=0, le=256)] = 0
    dep_q: Annotated[int, Field(ge=0, le=128)] = 0
    card: _Card = 1
    text_card: _Card = 1
    text_card_out: _Card | None = None
    dim: _Size = 1
    hidden_scale: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 1
    norm_emb: bool = False
    bias_proj: bool = False
    quantize: bool = False
    demux_second_stream: bool = False
    demux_second_text_stream: bool = False
    depformer_dim: _Size = 1
    depformer_dim_feedforward: _Size | list[_Size] | None = None
    depformer_num_heads: _Count = 1
    depformer_num_layers: Annotated[int, Field(ge=1, le=64)] = 1
    depformer_layer_scale: _Factor | None = None
    depformer_context: _Frames | None = None
    depformer_max_period: _Factor = 1
    depformer_gating: str = ""
    depformer_pos_emb: str = ""
    depformer_norm: str | None = None
    depformer_multi_linear: bool = False
    depformer_weights_per_step: bool = False
    depformer_weights_per_step_schedule: list[Annotated[int, Field(ge=0, le=256)]] | None = None
    depformer_low_rank_embeddings: _Size | None = None
    depformer_kv_repeat: _Count = 1
    existing_text_padding_id: _Token = 0
    existing_text_end_padding_id: _Token = 0
    extra_heads_num_heads: Annotated[int, Field(ge=0, le=256)] = 0
    extra_heads_dim: _Size = 1
    lora: bool = False
    lora_rank: _Size = 1
    lora_scaling: _Factor = 1
    model_type: str = ""
    lm_gen_config: _Section | None = {}
    tts_config: _Section = {}
    stt_config: _Section | None = {}


class _SeanetValues(StrictValues):
    causal: Literal[True]
    channels: _Count = 1
    dimension: _Size = 1
    n_filters: _Size = 1
    n_residual_layers: Annotated[int, Field(ge=0, le=64)] = 0
    compress: _Count = 1
    dilation_base: Annotated[int, Field(ge=1, le=16)] = 1
    kernel_size: _Count = 1
    residual_kernel_size: _Count = 1
    last_kernel_size: _Count = 1
    ratios: Annotated[list[_Count], Field(max_length=16)] = []


class _QuantizerValues(StrictValues):
    dimension: _Size = 1
    n_q: Annotated[int, Field(ge=1, le=256)] = 1
    bins: _Card = 1
    input_dimension: _Size | None = None
    output_dimension: _Size | None = None


class _CodecTransformerValues(_TransformerValues):
    causal: Literal[True]
    context: _Frames
    d_model: _Size = 1
    input_dimension: _Size = 1
    output_dimensions: Annotated[list[_Size], Field(max_length=16)] = []


class _CodecValues(StrictValues):
    channels: _Count
    sample_rate: Annotated[int, Field(ge=8000, le=192_000)]
    frame_rate: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)]
    seanet: _SeanetValues
    quantizer: _QuantizerValues
    transformer: _CodecTransformerValues


def check_model_values(config: Mapping[str, Any], *, source: str) -> None:
    """Look at the values of a `config.json`, whatever other keys it has.

    Args:
        config: of a model or a checkpoint.
        source: its path, the start of the line.

    Raises:
        CheckpointError: names key, value and what is allowed.
    """
    check_values(_ModelValues, config, source=source)
    text_card = config.get("text_card", _DEFAULT_TEXT_CARD)
    for key in ("existing_text_padding_id", "existing_text_end_padding_id"):
        if config.get(key, 0) >= text_card:
            raise CheckpointError(
                f"{source}: {key}: {config[key]} is not allowed, the text vocabulary has {text_card} tokens."
            )


def check_codec_values(config: object, *, source: str) -> None:
    """Look at the values of a `mimi_config.json`, arguments as in `check_model_values`.

    Raises:
        CheckpointError: names key, value and what is allowed.
    """
    check_values(_CodecValues, config, source=source)


def check_values(values: type[StrictValues], config: object, *, source: str) -> None:
    """Look at the values of a JSON object.

    Args:
        values: what they must be.
        config: the object.
        source: its path, the start of the line.

    Raises:
        CheckpointError: names the first key that is missing, or key, value and what is allowed.
    """
    try:
        values.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "missing":
            raise CheckpointError(f"{source}: {'.'.join(map(str, first['loc']))} is missing.") from None
        path = _path(config, first["loc"])
        where = f"{path}: " if path else ""
        expected = first["msg"].replace("Input should be", "must be")
        raise CheckpointError(
            f"{source}: {where}{reprlib.repr(first['input'])} is not allowed, {expected}."
        ) from None


def _path(config: object, loc: tuple[int | str, ...]) -> str:
    """The dotted way to a value, without the names of types that pydantic puts into it."""
    parts = []
    for part in loc:
        try:
            config = config[part]  # type: ignore[index]
        except (LookupError, TypeError):
            continue
        parts.append(str(part))
    return ".".join(parts)
