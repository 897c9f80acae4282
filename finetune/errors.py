"""Errors whose text is meant for the user: one line that says what, where and how to fix it."""

from moshi_ttt.errors import StateError, UserError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "StateError",
    "TrainingDivergedError",
    "UserError",
    "one_line",
    "printable",
]


class ConfigError(UserError):
    """A key of the configuration or an option of the command line is wrong."""


class DataError(UserError):
    """A manifest, a recording or its word timings cannot be used.

    Attributes:
        code: the fault's code in `finetune.data.check`; None where the place that raises it knows no code.
    """

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class CheckpointError(UserError):
    """A checkpoint or a model repository cannot be used."""


class TrainingDivergedError(Exception):
    """A loss, a gradient or a fast weight is no longer finite. Nothing saved is lost; exit status 1."""


def printable(text: str) -> str:
    """A text without line breaks and without what a terminal takes for a command; both are shown in hex."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def one_line(message: object, *, limit: int | None = None) -> str:
    """A message on one line, line breaks and what else is white space as single spaces.

    Args:
        message: an exception, or a text.
        limit: characters that are kept; None: all.
    """
    return " ".join(str(message).split())[:limit]
