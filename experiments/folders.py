"""Where an experiment writes."""

from pathlib import Path

from finetune.errors import ConfigError


def make_empty_folder(path: Path) -> None:
    """Make the folder of `--out`; nothing of an earlier run is replaced.

    Raises:
        ConfigError: it is a file, is not empty or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_empty = not any(path.iterdir())
    except OSError as error:
        raise ConfigError(f"--out: {path}: {error.strerror}; give a folder that can be written.") from None
    if not is_empty:
        raise ConfigError(f"--out: {path} is not empty; give a new folder, nothing is replaced.")
