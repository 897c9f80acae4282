"""Errors whose text is meant for the user: one line that says what, where and how to fix it."""


class UserError(Exception):
    """Something that the user can mend. Command lines print it without a traceback, exit status 2.

    Attributes:
        of_all: every process of a run meets it, so one of them prints it; False where it is this one's own.
    """

    of_all = True


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
