"""Errors whose text is meant for the user: one line that says what, where and how to fix it."""


class UserError(Exception):
    """Something that the user can mend. Command lines print it without a traceback, exit status 2.

    Attributes:
        of_all: every process of a run meets it, so one of them prints it; False where it is this one's own.
    """

    of_all = True


class StateError(UserError, ValueError):
    """A file with a streaming state cannot be written, read or used with this model; one line says why."""
