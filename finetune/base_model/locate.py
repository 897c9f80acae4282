"""Where a model's files are: a repository of the Hugging Face Hub or a local folder of the same layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from moshi.models import loaders
from moshi.models.loaders import CheckpointInfo
from safetensors import SafetensorError

from finetune.args import ModelPaths
from finetune.base_model.config_values import check_codec_values
from finetune.base_model.model_kinds import quantised_weights_error
from finetune.base_model.streams import Streams, streams_of
from finetune.base_model.text import load_tokenizer
from finetune.base_model.untrusted import check_config_values, check_weight_file
from finetune.base_model.weight_files import read_header
from finetune.errors import CheckpointError, one_line
from finetune.files import read_json_object

# Repositories that hold Moshi 7B itself, whose architecture is built into the moshi package.
_MOSHI_7B_REPOSITORIES = ("kyutai/moshiko-pytorch-bf16", "kyutai/moshika-pytorch-bf16")
# What Moshi's code raises when a file or configuration is not what it expects: it checks by asserting.
MOSHI_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
_QUANTISED_SUFFIX = ".weight_scb"  # scales beside the int8 weights of bitsandbytes
_FILE_KEYS = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}
_OTHER_KEYS = (
    "mimi_config_name",
    "lora_name",
    "model_type",
    "lm_gen_config",
    "tts_config",
    "stt_config",
    "model_id",
    "ttt",
)


def find_model_files(paths: ModelPaths) -> CheckpointInfo:
    """Locate (and download, where needed) the files of the base model through Moshi's own loader.

    Raises:
        CheckpointError: a file is missing or unreadable, the repository cannot be reached, or the tokenizer
            is that of another model.
    """
    _check_revision(paths)
    overrides = _existing_overrides(paths)
    repository = paths.hf_repo_id or None
    if repository is None:
        if None in overrides.values():
            raise CheckpointError(
                "moshi_paths: without hf_repo_id, moshi_path, mimi_path, tokenizer_path and config_path "
                "must all be given."
            )
        repository = str(Path(str(overrides["config_path"])).parent)
    if Path(repository).is_dir():
        overrides = _local_files(Path(repository), overrides)
    elif overrides["config_path"] is None:
        overrides["config_path"] = _config_of(repository, paths.revision)
    if overrides["config_path"] is not None:
        config_path = Path(str(overrides["config_path"]))
        check_config_values(read_json_object(config_path), source=str(config_path))
    try:
        if paths.revision is not None:
            # Moshi's loader would ask other repositories, whose files are given, for this revision as well.
            overrides |= {key: loaders.hf_get(value) for key, value in overrides.items() if value is not None}
        info = CheckpointInfo.from_hf_repo(repository, revision=paths.revision, **overrides)
    except MOSHI_ERRORS as error:
        raise _unreachable(repository, error, paths.revision) from None
    _reject_ttt_exports(info.raw_config, repository)
    _reject_quantised(info)
    load_tokenizer(info, lm_config(info))  # to see that it is the model's
    return info


def find_architecture(paths: ModelPaths) -> tuple[dict[str, Any], str]:
    """The LM architecture of the base model without its weights, for dry runs.

    Returns:
        Keyword arguments of `LMModel`, and where they come from.
    """
    _check_revision(paths)
    config_path = paths.config_path
    repository = paths.hf_repo_id or ""
    if not repository and config_path is None:
        raise CheckpointError(
            "moshi_paths.hf_repo_id: not set; give a repository, a local folder or config_path."
        )
    if config_path is None and Path(repository).is_dir():
        config_path = str(_existing_config(Path(repository) / "config.json"))
    if config_path is None:
        _check_local_name(repository)
        try:
            config_path = hf_hub_download(
                repository, "config.json", revision=paths.revision, local_files_only=True
            )
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            if repository in _MOSHI_7B_REPOSITORIES:
                return dict(loaders._lm_kwargs), "Moshi 7B as built into the moshi package"
            config_path = _download_config(repository, paths.revision)
    config = read_json_object(Path(config_path))
    check_config_values(config, source=str(config_path))
    _reject_ttt_exports(config, config_path)
    return lm_arguments(config), str(config_path)


def find_streams(paths: ModelPaths) -> Streams:
    """The audio streams of the base model, before its weights are there; raises as `find_architecture`."""
    config, _ = find_architecture(paths)
    return streams_of(n_q=config.get("n_q", 8), dep_q=config.get("dep_q", 8))


def is_local_name(name: str | Path) -> bool:
    """Whether a name is meant for a folder of runs or demo data, not for a repository of the Hub."""
    return Path(name).parts[:1] in (("runs",), ("demo_assets",))


def lm_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `LMModel` in a config.json: without files, generation defaults and our section."""
    return {key: value for key, value in config.items() if key not in (*_FILE_KEYS, *_OTHER_KEYS)}


def describe_error(error: Exception) -> str:
    """What an exception of Moshi's code says, on one line, its kind where it says nothing clear."""
    text = one_line(error, limit=300)
    return text if isinstance(error, (RuntimeError, SafetensorError)) else f"{type(error).__name__}: {text}"


def lm_config(info: CheckpointInfo) -> dict[str, Any]:
    """The configuration that belongs beside exported weights: the repository's, or Moshi 7B's."""
    return dict(loaders._lm_kwargs if info.raw_config is None else info.raw_config)


def _check_revision(paths: ModelPaths) -> None:
    """See that what has a revision is a repository of the Hub."""
    if paths.revision is not None and (not paths.hf_repo_id or Path(paths.hf_repo_id).is_dir()):
        what = f"{paths.hf_repo_id} is a folder" if paths.hf_repo_id else "hf_repo_id is not set"
        raise CheckpointError(
            f"moshi_paths.revision: {paths.revision!r} is of a repository of the Hub, {what}; leave it out."
        )


def _download_config(repository: str, revision: str | None) -> str:
    _check_local_name(repository)
    try:
        return hf_hub_download(repository, "config.json", revision=revision)
    except MOSHI_ERRORS as error:
        raise _unreachable(repository, error, revision) from None


def _config_of(repository: str, revision: str | None) -> str | None:
    """Its config.json, looked at before the files that it names are downloaded; None where it has none."""
    _check_local_name(repository)
    try:
        return hf_hub_download(repository, "config.json", revision=revision)
    except EntryNotFoundError:
        return None  # an old repository of Moshi 7B, Moshi's loader knows its files
    except MOSHI_ERRORS as error:
        raise _unreachable(repository, error, revision) from None


def _check_local_name(name: str) -> None:
    if is_local_name(name) and not Path(name).exists():
        hint = "; python -m finetune.demo makes it" if Path(name) == Path("demo_assets/model") else ""
        raise CheckpointError(f"moshi_paths.hf_repo_id: {Path(name).absolute()} does not exist{hint}.")


def _unreachable(repository: str, error: Exception, revision: str | None) -> CheckpointError:
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"moshi_paths.revision: {revision!r} does not exist in {repository}.")
    at = "" if revision is None else f" (revision {revision})"
    return CheckpointError(
        f"moshi_paths.hf_repo_id: {repository!r}{at} is neither a local folder with the files of a Moshi "
        f"repository nor a repository that can be reached: {describe_error(error)}"
    )


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
        if value is not None and key in ("moshi_path", "mimi_path"):
            check_weight_file(value, key=f"moshi_paths.{key}")
        overrides[argument] = value if value is None or value.startswith("hf://") else Path(value)
    return overrides


def _existing_config(path: Path) -> Path:
    if path.is_file():
        return path
    hint = " It holds a run of training: start from it with init_from." if _is_run(path.parent) else ""
    raise CheckpointError(f"moshi_paths.hf_repo_id: {path} does not exist.{hint}")


def _local_files(folder: Path, overrides: dict[str, Path | str | None]) -> dict[str, Path | str | None]:
    config_path = _existing_config(Path(overrides["config_path"] or folder / "config.json"))
    config = read_json_object(config_path)
    check_config_values(config, source=str(config_path))
    _reject_ttt_exports(config, str(config_path))
    found = dict(overrides, config_path=config_path)
    for argument, key in (
        ("moshi_weights", "moshi_name"),
        ("mimi_weights", "mimi_name"),
        ("tokenizer", "tokenizer_name"),
    ):
        if found[argument] is None:
            path = folder / str(config.get(key, _FILE_KEYS[key]))
            if not path.is_file():
                raise CheckpointError(f"moshi_paths.hf_repo_id: {path} does not exist.")
            found[argument] = path
    if config.get("mimi_config_name") is not None:
        mimi_config = found["mimi_config_path"] = folder / str(config["mimi_config_name"])
        check_codec_values(read_json_object(mimi_config), source=str(mimi_config))
    if config.get("lora_name") is not None:
        found["lora_weights"] = folder / str(config["lora_name"])
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or (folder / "consolidated").is_dir()


def _reject_ttt_exports(config: dict[str, Any] | None, source: str) -> None:
    if config is not None and "ttt" in config:
        raise CheckpointError(
            f"moshi_paths: {source} is a checkpoint with TTT layers, not a base model; "
            "start from it with init_from."
        )


def _reject_quantised(info: CheckpointInfo) -> None:
    """Whatever config.json says: the weights may be another file."""
    if any(name.endswith(_QUANTISED_SUFFIX) for name in read_header(Path(info.moshi_weights))):
        raise quantised_weights_error(info.moshi_weights)


def holds_base(folder: Path) -> bool:
    """Whether a folder holds the weights of a base model and its codec, by their names."""
    config = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    names = [str(config.get(key, _FILE_KEYS[key])) for key in ("moshi_name", "mimi_name")]
    return all((folder / name).is_file() for name in names)


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
            f"{repository}: is neither a local folder nor a repository that can be reached: "
            f"{describe_error(error)}"
        ) from None
