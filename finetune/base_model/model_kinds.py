"""Which models of the Moshi family can be trained and talked to here; each of the others has its reason."""

from collections.abc import Mapping
from typing import Any

from finetune.base_model.streams import streams_of
from finetune.errors import CheckpointError


def check_model_kind(config: Mapping[str, Any], *, source: str) -> None:
    """See from its configuration alone that a model is of a kind that works, before anything is loaded.

    Args:
        config: arguments of `LMModel`, which may stand beside other keys; missing ones have Moshi's defaults.
        source: where they stand, the start of the line.

    Raises:
        CheckpointError: it is of another kind; says which.
    """
    reason = _unsupported(config)
    if reason is not None:
        raise CheckpointError(f"{source}: {reason}")


def quantised_weights_error(path: object) -> CheckpointError:
    """The error for a weight file that holds quantised tensors, whatever its configuration says."""
    return CheckpointError(f"{path}: holds {_QUANTISED}")


_QUANTISED = (
    "quantised weights, which can neither be trained nor take adapters or TTT layers; give the same model in "
    "bfloat16 (such as kyutai/moshiko-pytorch-bf16)."
)


def _unsupported(config: Mapping[str, Any]) -> str | None:
    if config.get("quantize"):
        return f"quantize: true announces {_QUANTISED}"
    n_q, dep_q = config.get("n_q", 8), config.get("dep_q", 8)
    delays = config.get("delays")
    if n_q == dep_q and isinstance(delays, list) and delays[1 : 1 + n_q // 2] != delays[1 + n_q // 2 :]:
        return (
            f"n_q: {n_q} and dep_q: {dep_q} with these delays is one voice that hears nobody (text to "
            "speech); a model that predicts two voices delays both alike."
        )
    try:
        streams_of(n_q=n_q, dep_q=dep_q)
    except ValueError:
        return (
            f"n_q: {n_q} and dep_q: {dep_q} are neither two voices of the same number of codebooks, of which "
            "one or both are predicted, nor one voice that is heard (dep_q: 0)."
        )
    norm = config.get("depformer_norm")
    if norm is not None and norm != "layer_norm":
        return (
            f"depformer_norm: {norm} is a model whose depth transformer Moshi's own code cannot train (its "
            "norm takes one frame at a time); only none and layer_norm can."
        )
    text_card, written = config.get("text_card", 32000), config.get("text_card_out")
    if written is not None and written < text_card:
        return (
            f"text_card_out: {written} is a model that writes another text vocabulary than the one it reads "
            f"(text_card: {text_card}), as text to speech does; it cannot be trained on words."
        )
    if not config.get("causal", True):
        return "causal: false is a model that sees the future, which cannot talk."
    return None
