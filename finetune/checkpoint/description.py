"""What a checkpoint says about itself, parsed once and held against its weight files.

`config.json` and `training.json` must agree with each other (`read`), and the headers of the weight files
with the model that the two announce (`verify`).
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo

from finetune.args import LoraArgs, ModelPaths, TTTArgs
from finetune.base_model.locate import lm_arguments, lm_config
from finetune.base_model.untrusted import check_config_values
from finetune.base_model.weight_files import check_headers, read_headers
from finetune.checkpoint.layout import (
    CONFIG_FILE,
    FIRST_CODEBOOK_KEY,
    FULL_FILE,
    LORA_FILE,
    TEXT_KEY,
    TRAINING_FILE,
    TTT_FILE,
    WEIGHT_FILES,
    step_of,
)
from finetune.config_io import as_recorded, build_args, yaml_text
from finetune.data.args import TextOptions
from finetune.errors import CheckpointError, ConfigError
from finetune.files import read_json_object
from finetune.ttt_integration import apply_ttt_to_model
from finetune.wrapped_model import add_lora, load_without_weights

_OF_ONE_MACHINE = "inner_loop_plot_dir"


@dataclass(frozen=True)
class CheckpointDescription:
    """The descriptions of a checkpoint, read and checked; its weights are not loaded yet.

    Attributes:
        folder: with the files.
        config: config.json, which describes the base model too.
        training: training.json; empty for a checkpoint of moshi-finetune and a bare base model, which have
            none.
        files: the weight files; none for a bare base model.
        step: of the training run; 0 where nothing says so.
        base: where the base model comes from.
        lora: shape of the adapters, None without.
        ttt: the `ttt:` section it was trained with.
        first_codebook_weight: of the semantic codebook in the audio loss it was trained with
            (`first_codebook_weight_multiplier`), None where nothing says so.
        text: how the text of its training was placed.
    """

    folder: Path
    config: dict[str, Any]
    training: dict[str, Any]
    files: tuple[str, ...]
    step: int
    base: ModelPaths
    lora: LoraArgs | None
    ttt: TTTArgs
    first_codebook_weight: float | None
    text: TextOptions = dataclasses.field(default_factory=TextOptions)

    @classmethod
    def read(cls, folder: Path) -> "CheckpointDescription":
        """Parse both descriptions and see that they agree, and that the files they name are there.

        A checkpoint of moshi-finetune has no training.json, so nothing names its base model.

        Args:
            folder: with the files, see `finetune.checkpoint.reading.find_checkpoint`.

        Raises:
            CheckpointError: a file is missing, damaged or not listed, or the descriptions disagree.
        """
        config = read_json_object(folder / CONFIG_FILE)
        check_config_values(config, source=str(folder / CONFIG_FILE))
        is_ours = os.path.lexists(folder / TRAINING_FILE)
        if not is_ours and ("ttt" in config or (folder / TTT_FILE).exists()):
            raise CheckpointError(f"{folder}: {TRAINING_FILE} is missing, which says how TTT was trained.")
        training = read_json_object(folder / TRAINING_FILE) if is_ours else {}
        config, training = as_recorded(config), as_recorded(training)
        try:
            parse = cls._of_ours if is_ours else cls._of_moshi_finetune
            description = parse(folder, config, training)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"{folder}: {CONFIG_FILE} or {TRAINING_FILE} is damaged: {error}") from None
        description._check_files()
        if is_ours:
            description._check_ttt_sections()
        return description

    @classmethod
    def _of_moshi_finetune(
        cls, folder: Path, config: dict[str, Any], training: dict[str, Any]
    ) -> "CheckpointDescription":
        files = tuple(name for name in WEIGHT_FILES if (folder / name).is_file())
        # Its config.json speaks of adapters even where they are merged into full weights.
        lora = _adapters(config) if LORA_FILE in files else None
        step = step_of(folder.resolve().parent) or 0
        return cls(folder, config, training, files, step, ModelPaths(), lora, TTTArgs(), None)

    @classmethod
    def of_base(cls, base: ModelPaths, info: CheckpointInfo) -> "CheckpointDescription":
        """A bare base model, as a checkpoint in which nothing was trained.

        Args:
            base: where it comes from.
            info: its files.
        """
        return cls(Path(info.moshi_weights).parent, lm_config(info), {}, (), 0, base, None, TTTArgs(), None)

    @classmethod
    def _of_ours(
        cls, folder: Path, config: dict[str, Any], training: dict[str, Any]
    ) -> "CheckpointDescription":
        _check_fingerprint(training.get("base_fingerprint"))
        return cls(
            folder,
            config,
            training,
            tuple(map(_file_name, training["files"])),
            int(training["step"]),
            build_args(ModelPaths, dict(training["moshi_paths"]), "moshi_paths."),
            _adapters(config) if config["lora"] else None,
            build_args(TTTArgs, training["ttt"], "ttt."),
            _first_codebook_weight(training),
            build_args(TextOptions, dict(training.get(TEXT_KEY, {})), f"{TEXT_KEY}."),
        )

    @property
    def is_bare(self) -> bool:
        """Whether it is a base model of which nothing was trained."""
        return not self.files

    @property
    def has_full_weights(self) -> bool:
        """Whether it holds the whole model, so that the base model's weights are not needed."""
        return FULL_FILE in self.files

    @property
    def model_paths(self) -> ModelPaths:
        """Where the files to load are: of the base model, but own full weights in place of its weights."""
        if not self.has_full_weights:
            return self.base
        return dataclasses.replace(self.base, moshi_path=str(self.folder / FULL_FILE))

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base model it was trained on, None where it is not known or not needed."""
        return None if self.has_full_weights else self.training.get("base_fingerprint")

    def verify(self) -> None:
        """Compare the headers of all weight files with the model that the descriptions announce.

        That model is built without memory, so a description may lie about sizes at no cost.

        Raises:
            CheckpointError: a tensor is missing, unknown, twice there, no floating-point one or of another
                shape; names file, tensor and values.
        """
        try:
            self._compare(lm_arguments(self.config), source=str(self.folder / CONFIG_FILE))
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder}: {CONFIG_FILE} and {TRAINING_FILE} do not fit each other: {error}"
            ) from None

    def verify_on(self, info: CheckpointInfo) -> None:
        """The same with adapters and TTT in a certain base model, where config.json announces another.

        Args:
            info: files of the base model.

        Raises:
            CheckpointError: see `verify`.
        """
        lm_kwargs = lm_arguments(lm_config(info))
        if lm_kwargs == lm_arguments(self.config):
            return
        try:
            self._compare(lm_kwargs, source=str(info.moshi_weights))
        except ConfigError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None

    def _compare(self, lm_kwargs: Mapping[str, Any], *, source: str) -> None:
        headers = read_headers(self.folder, self.files)
        shapes = self._announced_shapes(lm_kwargs, source=source)
        complete = ("lora", "ttt", "base") if self.has_full_weights else ("lora", "ttt")
        check_headers(headers, shapes, complete=complete, source=str(self.folder))

    def _announced_shapes(self, lm_kwargs: Mapping[str, Any], *, source: str) -> dict[str, tuple[int, ...]]:
        source = f"{source}: the configuration"
        model = load_without_weights(lm_kwargs, dtype=torch.float32, source=source)
        if self.lora is not None:
            add_lora(model, self.lora, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the model could not do: this one does nothing
            apply_ttt_to_model(model, self.ttt)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def _check_files(self) -> None:
        for name in self.files:
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder}: {name} is missing, the checkpoint is not complete.")
        for name in WEIGHT_FILES:
            if name not in self.files and (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder}: {TRAINING_FILE} does not list {name}, which is there.")

    def _check_ttt_sections(self) -> None:
        """Both files hold the `ttt` section, and config.json has it exactly where there are TTT weights.

        The weights do not show a changed `mini_batch_size` or `base_lr`, which make another model all the
        same.
        """
        folder, has_weights = self.folder, TTT_FILE in self.files
        if ("ttt" in self.config) != has_weights:
            there, missing = ("section ttt", TTT_FILE) if not has_weights else (TTT_FILE, "section ttt")
            raise CheckpointError(
                f"{folder}: has a {there} but no {missing}; {CONFIG_FILE} and files disagree."
            )
        if not has_weights:
            return
        try:
            theirs = build_args(TTTArgs, self.config["ttt"], "ttt.")
        except (AttributeError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: damaged: {error}") from None
        for field in dataclasses.fields(TTTArgs):
            first, second = getattr(theirs, field.name), getattr(self.ttt, field.name)
            if first != second and field.name != _OF_ONE_MACHINE:
                raise CheckpointError(
                    f"{folder}: ttt.{field.name} is {yaml_text(first)} in {CONFIG_FILE} but "
                    f"{yaml_text(second)} in {TRAINING_FILE}; one of them was changed after training."
                )


def _adapters(config: Mapping[str, Any]) -> LoraArgs:
    shape = {"rank": config["lora_rank"], "scaling": config["lora_scaling"]}
    return build_args(LoraArgs, {"enable": True} | shape, "lora_")


def _file_name(value: object) -> str:
    if value not in WEIGHT_FILES:
        raise ValueError(f"files: {value!r} is no file of a checkpoint")
    return str(value)


def _check_fingerprint(value: object) -> None:
    if not isinstance(value, str | None):
        raise ValueError(f"base_fingerprint: {value!r} is no text")


def _first_codebook_weight(training: Mapping[str, Any]) -> float | None:
    value = training.get(FIRST_CODEBOOK_KEY)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{FIRST_CODEBOOK_KEY}: {value!r} is not a number greater than 0")
    return float(value)
