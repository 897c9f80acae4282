"""What a measurement compares: the memory learning, frozen or left out, and the attention windows."""

from typing import Final, Literal

from moshi.models.lm import LMModel

from finetune.errors import ConfigError
from finetune.ttt_integration import attention_windows, set_attention_windows
from moshi_ttt.hybrid_model import TTT_MODES, TTTMode, set_ttt_mode, ttt_layers, ttt_mode

Arm = TTTMode | Literal["plain"]
PLAIN: Final = "plain"  # the one arm of a model without TTT layers


def choose_arms(lm: LMModel, *, compare: bool, source: str) -> tuple[Arm, ...]:
    """The arms to measure: all modes of the memory with `compare`, otherwise the one the model is in.

    Args:
        source: what the model is, for messages.

    Raises:
        ConfigError: there is nothing to compare.
    """
    if ttt_layers(lm):
        return TTT_MODES if compare else (ttt_mode(lm),)
    if compare:
        raise ConfigError(f"--compare: {source} has no TTT layers to compare with; leave it out.")
    return (PLAIN,)


def enter_arm(lm: LMModel, arm: Arm) -> None:
    """Put a model into the mode of an arm."""
    if arm != PLAIN:
        set_ttt_mode(lm, arm)


def override_windows(
    lm: LMModel, *, ttt_layer_context: int | None, non_ttt_layer_context: int | None
) -> dict[str, int]:
    """Give the layers with and without TTT other attention windows, in frames; None leaves theirs.

    Returns:
        How many layers each option changed.

    Raises:
        ConfigError: an option would apply to no layer.
    """
    with_ttt = set(ttt_layers(lm))
    without = set(range(len(lm.transformer.layers))) - with_ttt
    changed = {}
    for option, context_frames, indices in (
        ("--ttt-layer-context", ttt_layer_context, with_ttt),
        ("--non-ttt-layer-context", non_ttt_layer_context, without),
    ):
        if context_frames is None:
            continue
        if not indices:
            raise ConfigError(f"{option}: {context_frames} would apply to no layer here; leave it out.")
        set_attention_windows(lm, indices, context_frames)
        windows = attention_windows(lm)
        changed[option] = sum(windows[index] == context_frames for index in indices)
        assert changed[option] == len(indices)
    return changed
