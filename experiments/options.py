"""Options that the experiments' command lines share."""

from collections.abc import Collection, Sequence

from finetune.errors import ConfigError


def check_only(only: Sequence[str] | None, labels: Collection[str]) -> None:
    """See that the runs that `--only` names exist.

    Raises:
        ConfigError: names one that does not, and those that do.
    """
    unknown = sorted(set(only or ()) - set(labels))
    if unknown:
        raise ConfigError(f"--only: there is no run {unknown[0]!r}, choose from {', '.join(labels)}.")
