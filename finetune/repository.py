"""Where the base model's files are: a Hugging Face repository or a local folder of the same layout."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import HFValidationError
from moshi.models import loaders
from moshi.models.loaders import CheckpointInfo

from finetune.args import ModelPaths
from finetune.errors import CheckpointError

# Repositories that hold Moshi 7B itself, whose architecture is built into the moshi package.
_MOSHI_7B_REPOSITORIES = ("kyutai/moshiko-pytorch-bf16", "kyutai/moshika-pytorch-bf16")
_FILE_KEYS = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}


def find_model_files(paths: ModelPaths) -> CheckpointInfo:
    """Locate (and download, where needed) the files of the base model through Moshi's own loader.

    Raises:
        CheckpointError: a file is missing or unreadable, or the repository cannot be reached.
    """
    overrides = _existing_overrides(paths)
    repository = paths.hf_repo_id
    if repository is None:
        missing = [key for key, value in overrides.items() if value is None and key != "mimi_config_path"]
        if missing:
            raise CheckpointError(
                "moshi_paths: without hf_repo_id, moshi_path, mimi_path, tokenizer_path and config_path "
                "must all be given."
            )
        repository = "local"
    elif Path(repository).is_dir():
        overrides = _local_files(Path(repository), overrides)
    try:
        info = CheckpointInfo.from_hf_repo(repository, **overrides)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"moshi_paths.hf_repo_id: {repository!r} is neither a local folder nor a repository that can be "
            f"reached: {' '.join(str(error).split())[:200]}"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"moshi_paths: the configuration of {repository} is not valid JSON: {error}."
        ) from None
    _reject_ttt_exports(info.raw_config, repository)
    return info


def find_architecture(paths: ModelPaths) -> tuple[dict[str, Any], str]:
    """The LM architecture of the base model without its weights, for dry runs.

    Returns:
        Keyword arguments of `LMModel`, and where they come from.
    """
    config_path = paths.config_path
    repository = paths.hf_repo_id or ""
    if config_path is None and Path(repository).is_dir():
        config_path = str(Path(repository) / "config.json")
    if config_path is None:
        try:
            config_path = hf_hub_download(repository, "config.json", local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            if repository in _MOSHI_7B_REPOSITORIES:
                return dict(loaders._lm_kwargs), "Moshi 7B as built into the moshi package"
            return _architecture(find_model_files(paths)), repository
    config = _read_json(Path(config_path))
    _reject_ttt_exports(config, config_path)
    other = (
        "mimi_config_name",
        "lora_name",
        "model_type",
        "lm_gen_config",
        "tts_config",
        "stt_config",
        "model_id",
    )
    return {k: v for k, v in config.items() if k not in (*_FILE_KEYS, *other)}, str(config_path)


def lm_config(info: CheckpointInfo) -> dict[str, Any]:
    """The configuration that belongs beside exported weights: the repository's, or Moshi 7B's."""
    return dict(loaders._lm_kwargs if info.raw_config is None else info.raw_config)


def _architecture(info: CheckpointInfo) -> dict[str, Any]:
    return dict(loaders._lm_kwargs if info.lm_config is None else info.lm_config)


def _existing_overrides(paths: ModelPaths) -> dict[str, Path | str | None]:
    overrides: dict[str, Path | str | None] = {}
    for key, value, argument in (
        ("moshi_path", paths.moshi_path, "moshi_weights"),
        ("mimi_path", paths.mimi_path, "mimi_weights"),
        ("tokenizer_path", paths.tokenizer_path, "tokenizer"),
        ("config_path", paths.config_path, "config_path"),
    ):
        if value is not None and not value.startswith("hf://") and not Path(value).is_file():
            raise CheckpointError(f"moshi_paths.{key}: {value} does not exist.")
        is_local = value is not None and not value.startswith("hf://")
        overrides[argument] = Path(value) if is_local else value
    return overrides


def _local_files(folder: Path, overrides: dict[str, Path | str | None]) -> dict[str, Path | str | None]:
    config_path = Path(overrides["config_path"] or folder / "config.json")
    config = _read_json(config_path)
    found = dict(overrides, config_path=config_path)
    for argument, key in (
        ("moshi_weights", "moshi_name"),
        ("mimi_weights", "mimi_name"),
        ("tokenizer", "tokenizer_name"),
    ):
        if found[argument] is None:
            found[argument] = folder / config.get(key, _FILE_KEYS[key])
            if not Path(found[argument]).is_file():
                raise CheckpointError(f"moshi_paths.hf_repo_id: {found[argument]} does not exist.")
    if "mimi_config_name" in config:
        found["mimi_config_path"] = folder / config["mimi_config_name"]
    if "lora_name" in config:
        found["lora_weights"] = folder / config["lora_name"]
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object.")
    return value


def _reject_ttt_exports(config: dict[str, Any] | None, source: str) -> None:
    if config is not None and "ttt" in config:
        raise CheckpointError(
            f"moshi_paths: {source} is a checkpoint with TTT layers, not a base model; "
            "start from it with init_from."
        )
