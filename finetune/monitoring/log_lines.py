"""The lines that a run prints while it trains, made for people and for grep."""

from collections.abc import Mapping

_TRAIN_FIELDS = (
    ("loss", ".3f"),
    ("text_loss", ".3f"),
    ("audio_loss", ".3f"),
    ("lr_base", ".2e"),
    ("lr_ttt_weights", ".2e"),
    ("lr_ttt_alpha", ".2e"),
    ("grad_norm", ".3f"),
    ("gate_opening", ".6f"),
    ("ttt_alpha", ".6f"),
    ("ttt_raw", ".6f"),
    ("ttt_delta", ".2e"),
    ("tokens_per_sec", ",.0f"),
    ("mfu", ".1%"),
    ("peak_memory_gb", ".2f"),
)
_EVAL_FIELDS = (
    ("text_loss", ".3f"),
    ("unigram_text_loss", ".3f"),
    ("audio_loss", ".3f"),
    ("unigram_audio_loss", ".3f"),
    ("text_perplexity", ".2f"),
    ("audio_perplexity", ".2f"),
    ("long_context_loss", ".3f"),
    ("long_context_slope", ".4f"),
    *((name, ".1%") for name in ("swuggy", "sblimp", "tstory", "sstory")),
)


def train_line(step: int, values: Mapping[str, float]) -> str:
    """One training record, `step: 000100 - loss: 4.210 - …`; what a run does not have is left out."""
    return _line(f"step: {step:06d}", _TRAIN_FIELDS, values)


def eval_line(step: int, values: Mapping[str, float]) -> str:
    """One evaluation record, the unigram losses beside the model's."""
    return _line(f"eval at step: {step:06d}", _EVAL_FIELDS, values)


def _line(head: str, fields: tuple[tuple[str, str], ...], values: Mapping[str, float]) -> str:
    parts = [f"{name}: {values[name]:{fmt}}" for name, fmt in fields if name in values]
    return " - ".join([head, *parts])
