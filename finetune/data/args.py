"""Every key of `data:`."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from moshi_ttt.config import STRICT


@dataclass(frozen=True, config=STRICT)
class TextOptions:
    """Keys of `data:` about the text stream; checkpoints record them."""

    text: Literal["given", "none"] = Field(
        default="given",
        description="The words beside the recordings; or none: audio alone is trained, the text stream is "
        "padding and has no loss.",
    )
    keep_and_shift: bool = Field(
        default=False,
        description="A word whose tokens do not fit before the next one is not cut, the next one waits.",
    )
    keep_main_only: bool = Field(
        default=True, description="Only words of SPEAKER_MAIN become text; false: those of every speaker."
    )


@dataclass(frozen=True, config=STRICT)
class DataArgs(TextOptions):
    """`data:` — recordings and how they are read."""

    train_data: str = Field(
        default="",
        description="Manifest (.jsonl) of the training recordings, or a folder of manifests; or several, "
        "with or without their shares: a.jsonl:0.7,b.jsonl:0.3.",
    )
    eval_data: str = Field(default="", description="The same for evaluation; needed with do_eval.")
    max_hours: float | list[float | None] | None = Field(
        default=None,
        description="Hours of recordings taken from each source of train_data, drawn by the seed; a list has "
        "a number for each (null: all).",
    )
    shuffle: bool = Field(
        default=False,
        description="Draw a new order every epoch: of chunks, with carried memory of whole recordings.",
    )
    num_workers: int = Field(
        default=2, ge=0, le=256, description="Loader processes; the batches do not depend on it."
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the audio code cache (null: beside each recording).",
    )
    mono: Literal["error", "duplicate", "user_silent"] = Field(
        default="error",
        description="Mono recordings: refused; one voice on both channels; or Moshi's, beside a silent user.",
    )
    on_error: Literal["raise", "skip"] = Field(
        default="raise",
        description="A recording that cannot be used ends the run, or is left out and listed in "
        "data_skipped.json.",
    )

    @model_validator(mode="after")
    def _check_hours(self) -> "DataArgs":
        for hours in self.max_hours if isinstance(self.max_hours, list) else [self.max_hours]:
            if hours is not None and not 0 < hours <= 1e9:
                raise ValueError(f"max_hours: {hours:g} is not allowed, must be above 0 and at most 1e9")
        return self
