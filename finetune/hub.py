"""Checkpoints that somebody put on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from finetune.errors import CheckpointError
from finetune.repository import MOSHI_ERRORS, one_line


def is_hub_id(name: str) -> bool:
    """Whether this is a repository's name on the Hub, `user/name`, by its form alone."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def download_checkpoint(repository: str) -> Path:
    """The folder with a checkpoint's files, from the cache where they are there already.

    Weights are taken as safetensors only, so nothing of it is ever unpickled.

    Raises:
        CheckpointError: the repository cannot be reached.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.safetensors", "*.json"]))
    except MOSHI_ERRORS as error:
        raise CheckpointError(
            f"{repository}: is neither a local folder nor a repository that can be reached: {one_line(error)}"
        ) from None
