"""config.json of `MoshiForConditionalGeneration`, from that of a Moshi and back.

transformers has one kind of Moshi, that of the 7B model: two voices, a depth transformer with a matrix per
codebook, codebooks that are one frame late. Any other is refused here, with the key that says so.
"""

from collections.abc import Mapping
from typing import Any

from finetune.errors import CheckpointError
from finetune.export.formats.names import Sizes

Shapes = Mapping[str, tuple[int, ...]]

ARCHITECTURE = "MoshiForConditionalGeneration"
_EPS = {"rms_norm_f32": 1e-8, "rms_norm": 1e-5}  # of Moshi's norms
# Each key of Moshi with the only value that transformers' class has, and the value where it is missing.
_FIXED: dict[str, tuple[Any, Any]] = {
    "positional_embedding": ("rope", "sin"),
    "depformer_pos_emb": ("none", "sin"),
    "gating": ("silu", "none"),
    "depformer_gating": ("silu", None),  # None: as the key without depformer_
    "layer_scale": (None, None),
    "depformer_layer_scale": (None, None),
    "depformer_multi_linear": (True, False),
    "depformer_weights_per_step": (True, False),
    "depformer_weights_per_step_schedule": (None, None),
    "depformer_low_rank_embeddings": (None, None),
    "depformer_norm": (None, None),
    "text_card_out": (None, None),
    "demux_second_stream": (False, False),
    "demux_second_text_stream": (False, False),
    "norm_emb": (False, False),
    "bias_proj": (False, False),
    "cross_attention": (False, False),
    "extra_heads_num_heads": (0, 0),
    "conditioners": (None, None),
    "causal": (True, True),
    "quantize": (False, False),
}
# Of LMModel, where a config.json leaves a key out.
_OUR_DEFAULTS: dict[str, Any] = {
    "n_q": 8,
    "dep_q": 8,
    "card": 1024,
    "text_card": 32000,
    "dim": 128,
    "num_heads": 8,
    "depformer_dim": 256,
    "delays": [0],
}
# What MoshiConfig and MoshiDepthConfig of transformers have where a config.json leaves a key out.
_THEIR_DEFAULTS = {"num_attention_heads": 32, "sliding_window": 3000, "rms_norm_eps": 1e-8}
_THEIR_DEPTH_HEADS = 16
_THEIR_THETA = 10000.0


def transformers_config(
    config: Mapping[str, Any], shapes: Shapes, *, dtype: str, source: str
) -> dict[str, Any]:
    """config.json for transformers.

    Args:
        config: arguments of `LMModel`, which may stand beside other keys.
        shapes: of the model's tensors, by name.
        dtype: of the weights, `bfloat16` or `float32`.
        source: what the line of an error starts with.

    Raises:
        CheckpointError: it is a model that transformers' class cannot be; names the key.
    """
    config = _OUR_DEFAULTS | dict(config)
    _check_kind(config, source=source)
    sizes = sizes_of(config, shapes)
    period = float(config.get("max_period", 10000))
    shared = {
        "vocab_size": config["text_card"],
        "audio_vocab_size": config["card"],
        "num_codebooks": sizes.dep_q,
        "hidden_act": "silu",
        "rms_norm_eps": _EPS[config["norm"]],
        "tie_word_embeddings": False,
    }
    depth = {
        "model_type": "moshi_depth",
        "hidden_size": sizes.depth_dim,
        "input_size": sizes.dim,
        "num_hidden_layers": sizes.depth_layers,
        "num_attention_heads": sizes.depth_heads,
        "num_key_value_heads": sizes.depth_kv_heads,
        "ffn_dim": shapes["depformer.layers.0.gating.0.linear_in.weight"][0],
        "max_position_embeddings": sizes.dep_q + 1,
        "sliding_window": sizes.dep_q,
    }
    return shared | {
        "architectures": [ARCHITECTURE],
        "model_type": "moshi",
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.kv_heads,
        "ffn_dim": shapes["transformer.layers.0.gating.linear_in.weight"][0],
        "max_position_embeddings": config["context"],
        "sliding_window": config["context"],
        "rope_theta": period,  # before transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": period},
        "depth_decoder_config": shared | depth,
        "audio_encoder_config": {"model_type": "mimi", "codebook_size": config["card"]},
    }


def sizes_of(config: Mapping[str, Any], shapes: Shapes) -> Sizes:
    """The sizes of a Moshi whose kind was checked."""
    config = _OUR_DEFAULTS | dict(config)
    heads = config["num_heads"]
    depth_heads = config.get("depformer_num_heads", heads)
    return Sizes(
        dim=config["dim"],
        depth_dim=config["depformer_dim"],
        num_layers=_count(shapes, "transformer.layers."),
        depth_layers=_count(shapes, "depformer.layers."),
        num_heads=heads,
        depth_heads=depth_heads,
        kv_heads=heads // config.get("kv_repeat", 1),
        depth_kv_heads=depth_heads // config.get("depformer_kv_repeat", config.get("kv_repeat", 1)),
        dep_q=config["dep_q"],
    )


def their_sizes(config: Mapping[str, Any], shapes: Shapes, *, source: str) -> Sizes:
    """The sizes of a model of transformers, from its tensors as far as they show them.

    Args:
        config: its config.json, in which values that are defaults may be missing.
        shapes: of its tensors, by name.
        source: what the line of an error starts with.

    Raises:
        CheckpointError: a tensor that shows a size is missing.
    """
    depth = config.get("depth_decoder_config") or {}
    heads = config.get("num_attention_heads", _THEIR_DEFAULTS["num_attention_heads"])
    depth_heads = depth.get("num_attention_heads", _THEIR_DEPTH_HEADS)
    try:
        inputs = shapes["depth_decoder.input_projections.weight"]
        sizes = Sizes(
            dim=inputs[2],
            depth_dim=inputs[1],
            num_layers=_count(shapes, "decoder.model.layers."),
            depth_layers=_count(shapes, "depth_decoder.layers."),
            num_heads=int(heads),
            depth_heads=int(depth_heads),
            kv_heads=int(config.get("num_key_value_heads") or heads),
            depth_kv_heads=int(depth.get("num_key_value_heads") or depth_heads),
            dep_q=inputs[0],
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: is no Moshi of transformers ({error} is missing or wrong)."
        ) from None
    return sizes


def moshi_config(
    theirs: Mapping[str, Any], shapes: Shapes, base: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """config.json of a Moshi, from that of transformers.

    Args:
        theirs: config.json of transformers.
        shapes: of the tensors in transformers, by name.
        base: config.json of the Moshi whose codec and tokenizer belong to it; what transformers does not
            record (the names of files, the padding tokens) is taken from it.
        source: what the line of an error starts with.

    Raises:
        CheckpointError: a value is missing, or one that Moshi does not have.
    """
    sizes = their_sizes(theirs, shapes, source=source)
    eps = theirs.get("rms_norm_eps", _THEIR_DEFAULTS["rms_norm_eps"])
    norm = next((name for name, value in _EPS.items() if value == eps), None)
    if norm is None:
        raise CheckpointError(f"{source}: rms_norm_eps: {eps} is of no norm that Moshi has, 1e-08 or 1e-05.")
    rope = theirs.get("rope_parameters") or {}
    width = shapes["decoder.model.layers.0.mlp.fc2.weight"][1]
    depth_width = shapes["depth_decoder.layers.0.mlp.fc2.weight"][2]
    own = {key: fixed for key, (fixed, missing) in _FIXED.items() if fixed != missing}
    kept = {key: value for key, value in base.items() if key not in {*_FIXED, "lora_name", "lora"}}
    return (
        kept
        | own
        | {
            "dim": sizes.dim,
            "text_card": shapes["decoder.lm_head.weight"][0],
            "card": shapes["depth_decoder.lm_heads.weight"][1],
            "n_q": 2 * sizes.dep_q,
            "dep_q": sizes.dep_q,
            "num_heads": sizes.num_heads,
            "num_layers": sizes.num_layers,
            "kv_repeat": sizes.num_heads // sizes.kv_heads,
            "depformer_kv_repeat": sizes.depth_heads // sizes.depth_kv_heads,
            "hidden_scale": _hidden_scale(sizes.dim, width),
            "context": theirs.get("sliding_window", _THEIR_DEFAULTS["sliding_window"]),
            "max_period": rope.get("rope_theta", theirs.get("rope_theta", _THEIR_THETA)),
            "norm": norm,
            "depformer_dim": sizes.depth_dim,
            "depformer_dim_feedforward": _feedforward(sizes.depth_dim, depth_width),
            "depformer_num_heads": sizes.depth_heads,
            "depformer_num_layers": sizes.depth_layers,
            "delays": _their_delays(sizes.dep_q),
        }
    )


def _check_kind(config: Mapping[str, Any], *, source: str) -> None:
    dep_q = config["dep_q"]
    if dep_q < 2 or config["n_q"] != 2 * dep_q:
        raise _unlike(source, "dep_q", dep_q, "two voices of the same number of codebooks, at least 2")
    for key, (fixed, missing) in _FIXED.items():
        value = config.get(key, missing)
        if key == "depformer_gating" and value is None:
            value = config.get("gating", "none")
        if value != fixed:
            raise _unlike(source, key, value, f"only {fixed}")
    if config.get("norm") not in _EPS:
        raise _unlike(source, "norm", config.get("norm"), "only RMS norms")
    if list(config["delays"]) != _their_delays(dep_q):
        raise _unlike(source, "delays", config["delays"], f"only {_their_delays(dep_q)}")
    if config.get("context") is None:
        raise _unlike(source, "context", None, "only a window of some frames")


def _unlike(source: str, key: str, value: object, instead: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {key}: {value} is what the Moshi of transformers cannot be; it has {instead}."
    )


def _their_delays(dep_q: int) -> list[int]:
    """What transformers' `build_delay_pattern_mask` does: all but the first codebook are a frame late."""
    voice = [0, *[1] * (dep_q - 1)]
    return [0, *voice, *voice]


def _count(shapes: Shapes, prefix: str) -> int:
    found = {name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)}
    return len(found)


def _feedforward(dim: int, width: int) -> int:
    """The `dim_feedforward` of which Moshi makes a gated layer of this width: 2/3 of it, or 21/8 of `dim`."""
    return 4 * dim if width == 21 * dim // 8 else -(-3 * width // 2)


def _hidden_scale(dim: int, width: int) -> float:
    feedforward = _feedforward(dim, width)
    scale = feedforward / dim
    return scale if int(scale * dim) == feedforward else (feedforward + 0.5) / dim
