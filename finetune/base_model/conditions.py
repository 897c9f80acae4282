"""Text conditions: what a model is told about a recording beside its codes, such as a language or a manner.

Each condition has a name and, for a row of a batch, a text or none. Moshi embeds the texts and adds the
result to every frame or lets every frame attend to it; for a missing text it has an embedding of its own.

Shapes: B batch rows.
"""

import logging
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from moshi.conditioners import ConditionAttributes, ConditionProvider, ConditionType
from moshi.conditioners.text import LUTConditioner
from moshi.models.lm import LMModel
from torch import Tensor, nn

from finetune.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

TextConditions = Mapping[str, str]  # texts by the name of the condition; one that is missing has no text

_MAX_SHOWN = 8


class Conditions(Mapping[str, ConditionType]):
    """Conditions of a batch, embedded when the forward pass of the model asks for them.

    Not earlier: sharded parameters are whole inside that pass only.

    Args:
        provider: of the model, None where it has none.
        prepared: of `ConditionProvider.prepare`.
    """

    def __init__(self, provider: ConditionProvider | None, prepared: Mapping[str, Any]) -> None:
        self._provider = provider
        self._prepared = prepared

    def __getitem__(self, name: str) -> ConditionType:
        inputs = self._prepared[name]
        assert self._provider is not None
        return self._provider.conditioners[name](inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prepared)

    def __len__(self) -> int:
        return len(self._prepared)


class FusedConditions(NamedTuple):
    """What `LMModel.forward_text` takes beside the codes; None where a model has no such condition."""

    sum_condition: Tensor | None  # [B, 1, dim], added to every frame
    cross_attention_src: Tensor | None  # [B, number of them, dim]


def condition_names(model: LMModel) -> list[str]:
    """The names of a model's conditions; empty where it has none."""
    return [] if model.condition_provider is None else list(model.condition_provider.conditioners)


def condition_parameters(model: LMModel) -> list[nn.Parameter]:
    """The parameters of a model's conditioners, which are float32 in a model of any dtype."""
    return [] if model.condition_provider is None else list(model.condition_provider.parameters())


def prepare_conditions(model: LMModel, rows: Sequence[TextConditions]) -> Conditions | None:
    """The second argument of a model's forward pass, its tokens on the device of the model.

    Args:
        rows: of each row of the batch, B of them. Names that the model does not have are left out.

    Returns:
        None for a model without conditions.
    """
    if model.fuser is None:
        return None
    provider, names = model.condition_provider, condition_names(model)
    if provider is None:
        return Conditions(None, {})
    texts = [ConditionAttributes(text={name: row.get(name) for name in names}) for row in rows]
    return Conditions(provider, provider.prepare(texts))


@torch.no_grad()
def condition_tensors(
    model: LMModel, conditions: TextConditions, *, batch_size: int
) -> dict[str, ConditionType] | None:
    """The conditions of `LMGen`, the same in every row; None for a model without conditions."""
    prepared = prepare_conditions(model, [conditions] * batch_size)
    return None if prepared is None else dict(prepared)


def fused_conditions(model: LMModel, conditions: TextConditions, *, batch_size: int) -> FusedConditions:
    """The arguments of `LMModel.forward_text`, the same in every row."""
    tensors = condition_tensors(model, conditions, batch_size=batch_size)
    if tensors is None:
        return FusedConditions(None, None)
    assert model.fuser is not None
    return FusedConditions(model.fuser.get_sum(tensors), model.fuser.get_cross(tensors))


def check_conditions(model: LMModel, conditions: TextConditions, *, source: str) -> None:
    """See that a model has these conditions and knows these texts.

    Args:
        source: the option or key that names them, the start of the line.

    Raises:
        ConfigError: it does not; says which it has.
    """
    names = condition_names(model)
    for name in conditions:
        if name not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise ConfigError(f"{source}: this model has no condition {name!r}, {has}.")
    _check_texts(model, conditions, source=source, error=ConfigError)


def check_recordings(
    model: LMModel, recordings: Iterable[tuple[object, TextConditions]], *, source: str
) -> None:
    """See that a model knows the texts of recordings; conditions that it does not have get a warning.

    Args:
        recordings: the file with the conditions, and these.
        source: what the recordings are, for the log.

    Raises:
        DataError: a text that the model does not know; names the file.
    """
    names = condition_names(model)
    unknown: dict[str, int] = {}
    given = dict.fromkeys(names, 0)
    total = 0
    for path, conditions in recordings:
        total += 1
        _check_texts(model, conditions, source=f"{path}: text_conditions", error=DataError)
        for name in conditions:
            counts = given if name in given else unknown
            counts[name] = counts.get(name, 0) + 1
    if names:
        counted = ", ".join(f"{name} in {count} of {total}" for name, count in given.items())
        logger.info("%s: text conditions of recordings: %s.", source, counted)
    if unknown:
        counted = ", ".join(f"{name!r} in {count} of {total}" for name, count in sorted(unknown.items()))
        has = f"has {', '.join(names)} only" if names else "has none"
        logger.warning("%s: text_conditions that are not used, the model %s: %s.", source, has, counted)


def describe_conditions(model: LMModel) -> str:
    """A model's conditions and how they reach it, in a line; empty without conditions."""
    methods: dict[str, list[str]] = {}
    for method, names in ({} if model.fuser is None else model.fuser.fuse2cond).items():
        for name in names:
            methods.setdefault(name, []).append(method)
    return ", ".join(f"{name} ({' and '.join(ways)})" for name, ways in methods.items())


def _check_texts(model: LMModel, conditions: TextConditions, *, source: str, error: type[UserError]) -> None:
    for name in conditions.keys() & set(condition_names(model)):
        assert model.condition_provider is not None
        conditioner = model.condition_provider.conditioners[name]
        assert isinstance(conditioner, LUTConditioner)
        known = conditioner.tokenizer.possible_values
        if known is not None and conditions[name] not in known:
            shown = ", ".join(map(repr, list(known)[:_MAX_SHOWN])) + (
                ", …" if len(known) > _MAX_SHOWN else ""
            )
            text = reprlib.repr(conditions[name])
            raise error(f"{source}: {name}: {text} is not a text that this model knows, it knows {shown}.")
