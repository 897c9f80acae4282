"""A checkpoint as a folder to hand to others, and its way to the Hub.

The folder gets the weight files, config.json and training.json of the checkpoint and README.md, a model card;
merged, the whole model instead of adapters.
Nothing in it names a path of this machine, but for the base model where that is local.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError

from finetune.args import ModelPaths, TTTArgs
from finetune.base_model.locate import describe_error, find_model_files, is_hub_id
from finetune.base_model.weight_files import count_parameters
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.layout import CONFIG_FILE, FULL_FILE, TRAINING_FILE, TTT_FILE, WEIGHT_FILES
from finetune.checkpoint.reading import open_checkpoint
from finetune.errors import CheckpointError, ConfigError
from finetune.export.card import DEFAULT_LICENSE, CardFacts, model_card
from finetune.export.merge import MergePlan, merged_config, plan_merge, write_merged
from finetune.files import new_folder

CARD_FILE = "README.md"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the folder will hold.

    Attributes:
        source: the checkpoint, its base model being that of the export.
        config: config.json of the export.
        training: training.json of the export.
        parameters: number of parameters by weight file.
        merge: what becomes of the base weights; None: adapters stay adapters, full weights are copied.
    """

    source: CheckpointDescription
    config: dict[str, Any]
    training: dict[str, Any]
    parameters: dict[str, int]
    merge: MergePlan | None = None


def export_checkpoint(
    checkpoint: str | Path,
    out: Path,
    *,
    base_model: str | None = None,
    title: str | None = None,
    license_id: str = DEFAULT_LICENSE,
    repo_id: str | None = None,
    merged_dtype: str | None = None,
) -> ModelPaths:
    """Write the folder, complete or not at all.

    Args:
        checkpoint: a run directory (its newest checkpoint), a checkpoint, or a base model to be merged.
        out: the folder to make.
        base_model: Hub id or local folder that replaces where training found the base model.
        title: heading of the model card.
        license_id: license identifier of the Hub.
        repo_id: where the folder will be pushed, which a local base model makes pointless.
        merged_dtype: write the whole model, adapters merged, in this dtype (`bfloat16`, `float32`; `auto`:
            that of training); None: adapters stay adapters.

    Returns:
        Where the exported model finds its base model.

    Raises:
        ConfigError: an argument is wrong.
        CheckpointError: the checkpoint is damaged, or the folder exists or cannot be written.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; choose another --out, nothing is overwritten.")
    title, license_id = _checked_title(title), _checked_license(license_id)
    replacement = None if base_model is None else _checked_base(base_model)
    if repo_id is not None and not is_hub_id(repo_id):
        raise ConfigError(f"--push-to-hub: {repo_id!r} is not a repository of the Hub such as USER/REPO.")
    source = open_checkpoint(checkpoint, base=replacement)
    if source.base.hf_repo_id and (Path(source.base.hf_repo_id) / CONFIG_FILE).is_file():
        find_model_files(source.base)  # whose tokenizer must be the model's
    if source.is_bare and merged_dtype is None:
        raise ConfigError(
            f"--checkpoint: {checkpoint} is a base model; of that only --merged makes an export."
        )
    local = local_files(source.base)
    if repo_id is not None and local:
        raise ConfigError(
            f"--push-to-hub: the base model is local ({local[0]}), where nobody else finds it; "
            "give its repository on the Hub with --base-model."
        )
    plan = _plan(source, merged_dtype)
    _write_folder(out, plan, _texts(plan, title=title, license_id=license_id, repo_id=repo_id))
    return source.base


def _plan(source: CheckpointDescription, merged_dtype: str | None) -> _Plan:
    training = _training(source) | {"moshi_paths": dataclasses.asdict(source.base)}
    parameters = {
        name: count_parameters(source.folder / name) for name in WEIGHT_FILES if name in source.files
    }
    plan = _Plan(source, source.config, training, parameters)
    if merged_dtype is None or (merged_dtype == "auto" and source.has_full_weights):
        return plan
    merge = plan_merge(source, training, dtype=merged_dtype)
    return dataclasses.replace(
        plan,
        config=merged_config(source.config),
        training=merge.training,
        parameters=merge.parameters | _without_base_weights(parameters),
        merge=merge,
    )


def _training(source: CheckpointDescription) -> dict[str, Any]:
    """Its training.json, or what there is to say of a checkpoint that has none."""
    made = {"step": source.step, "files": sorted(source.files), "ttt": dataclasses.asdict(source.ttt)}
    return source.training or made


def _texts(plan: _Plan, *, title: str | None, license_id: str, repo_id: str | None) -> dict[str, str]:
    facts = CardFacts(
        step=plan.training["step"],
        config=plan.config,
        ttt=plan.source.ttt,
        parameters=plan.parameters,
        base_model=None if local_files(plan.source.base) else plan.source.base.hf_repo_id,
        repo_id=repo_id,
        merged_lora=plan.training.get("merged_lora"),
        trained_with="moshi-ttt" if plan.source.training else "moshi-finetune",
    )
    try:
        card = model_card(facts, title=title, license_id=license_id)
    except CheckpointError as error:
        raise CheckpointError(f"{plan.source.folder}: {error}") from None
    return {
        CONFIG_FILE: _json_text(_without_plot_dir(plan.config)),
        TRAINING_FILE: _json_text(_without_plot_dir(plan.training)),
        CARD_FILE: card,
    }


def local_files(base: ModelPaths) -> list[str]:
    """The values of `moshi_paths` that name files of this machine."""
    folder = [base.hf_repo_id] if base.hf_repo_id and not is_hub_id(base.hf_repo_id) else []
    files = (base.moshi_path, base.mimi_path, base.tokenizer_path, base.config_path)
    return folder + [name for name in files if name is not None and not name.startswith("hf://")]


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder as a model repository of the Hub, made where it does not exist.

    Args:
        folder: what `export_checkpoint` wrote.
        repo_id: USER/REPO.
        private: make it private; otherwise the owner's default decides.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the Hub cannot be reached or refuses; the folder is untouched.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a moshi-ttt checkpoint")
    except (OSError, ValueError, RuntimeError) as error:
        # OSError: network, token, the Hub's answers. ValueError: names it refuses. RuntimeError: transfers.
        option = "--private " if private else ""
        again = f"huggingface-cli upload {option}{repo_id} {shlex.quote(str(folder))} ."
        raise CheckpointError(
            f"{folder} is complete, but pushing it to {repo_id} failed ({describe_error(error)}); log in "
            f"with `huggingface-cli login` where that is the reason, then try again: {again}"
        ) from None
    return str(url)


def _checked_base(value: str) -> str:
    """A Hub id as it is, a local folder as an absolute path."""
    folder = Path(value)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(f"--base-model: {folder / CONFIG_FILE} does not exist.")
        return str(folder.resolve())
    if not is_hub_id(value):
        raise ConfigError(
            f"--base-model: {value!r} is neither a folder nor a repository of the Hub such as USER/REPO."
        )
    return value


def _checked_title(title: str | None) -> str | None:
    if title is None:
        return None
    line = " ".join(title.split())
    if not line or not line.isprintable():
        raise ConfigError(f"--title: {title!r} is empty or holds characters that cannot be shown.")
    return line


def _checked_license(license_id: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id):
        raise ConfigError(
            f"--license: {license_id!r} is not a license identifier of the Hub such as {DEFAULT_LICENSE}."
        )
    return license_id


def _without_plot_dir(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the default for the plots' folder, the only path in a `ttt` section."""
    if not isinstance(values.get("ttt"), dict):
        return values
    return values | {"ttt": values["ttt"] | {"inner_loop_plot_dir": TTTArgs().inner_loop_plot_dir}}


def _json_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _without_base_weights(parameters: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in parameters.items() if name == TTT_FILE}


def _write_folder(out: Path, plan: _Plan, texts: Mapping[str, str]) -> None:
    try:
        with new_folder(out) as partial:
            for name in plan.parameters:
                if plan.merge is not None and name == FULL_FILE:
                    write_merged(plan.merge, partial / name)
                else:
                    shutil.copyfile(plan.source.folder / name, partial / name)
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: the export cannot be written ({error}).") from None
