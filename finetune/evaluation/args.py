"""Every key of `eval:`."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moshi_ttt.config import STRICT


@dataclass(frozen=True, config=STRICT)
class SpokenArgs:
    """`eval.spoken:` — spoken-language accuracies during training, when `data` is given."""

    data: str | None = Field(
        default=None,
        min_length=1,
        description="Folder with lexical/, syntactic/, tstory/ and sstory/, or some of them (null: none).",
    )
    tasks: list[Literal["swuggy", "sblimp", "tstory", "sstory"]] = Field(
        default_factory=list, description="Which of them (empty: all that data holds)."
    )
    freq: int = Field(
        default=0, ge=0, le=10**9, description="Steps between two measurements (0: at the end only)."
    )
    limit: int = Field(
        default=200,
        ge=1,
        le=10**6,
        description="Pairs per task, all voices of a pair counted as one; drawn once, the same in every run.",
    )
    conditions: dict[str, str] = Field(
        default_factory=dict, description="What a model with text conditions is told meanwhile, {name: text}."
    )


@dataclass(frozen=True, config=STRICT)
class LongContextArgs:
    """`eval.long_context:` — losses along long recordings during training, when `data` is given."""

    data: str | None = Field(
        default=None, min_length=1, description="Folder of recordings, manifest or audio file (null: none)."
    )
    freq: int = Field(
        default=0, ge=0, le=10**9, description="Steps between two measurements (0: at the end only)."
    )
    limit: int = Field(
        default=4, ge=1, le=10**6, description="Recordings, evenly spread over the data, the same every time."
    )
    max_frames: int = Field(
        default=24_000, ge=2, le=10**9, description="Frames of a recording that are measured, from its start."
    )
    user: Literal["empty", "silent", "real"] = Field(
        default="empty", description="What is heard: no input; digital silence; or the right channel."
    )
    text: Literal["none", "given"] = Field(
        default="none",
        description="No text input, or the words beside the recordings (padding, with data.text: none).",
    )
    conditions: dict[str, str] = Field(
        default_factory=dict,
        description="What a model with text conditions is told meanwhile, {name: text}.",
    )


@dataclass(frozen=True, config=STRICT)
class EvalArgs:
    """`eval:` — evaluation beyond the losses."""

    spoken: SpokenArgs = Field(default_factory=SpokenArgs)
    long_context: LongContextArgs = Field(default_factory=LongContextArgs)
