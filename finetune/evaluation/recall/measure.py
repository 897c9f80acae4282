"""Measuring a folder of items in all arms, item by item, with an account of what failed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from moshi.models.lm import LMModel
from tqdm import tqdm

from finetune.base_model.conditions import TextConditions
from finetune.errors import ConfigError, DataError
from finetune.evaluation.long_context.arms import Arm, enter_arm
from finetune.evaluation.recall.accuracy import Measured, is_finite
from finetune.evaluation.recall.conversations import CodedGroup, Coder
from finetune.evaluation.recall.engine import num_steps, score_groups
from finetune.evaluation.recall.items import Group, Items
from finetune.evaluation.recall.score_file import ScoreFile, Scores

RecallArm = Arm | Literal["sessions"]
SESSIONS: Final = "sessions"  # the memory goes from one session to the next as a file


@dataclass
class Measurement:
    """What became of the items.

    Attributes:
        measured: items with finite scores in every arm, by arm, in the same order.
        failures: why others have none, by name.
        num_reused: items and arms that had been measured before.
    """

    measured: dict[RecallArm, list[Measured]]
    failures: dict[str, str] = field(default_factory=dict)
    num_reused: int = 0


@dataclass(frozen=True)
class Lengths:
    """Frames of the longest plant and of the longest cue of a folder."""

    plant: int
    cue: int


def look_at(items: Items, coder: Coder, *, progress: bool) -> tuple[list[Group], Lengths, dict[str, str]]:
    """Encode all recordings, once; what cannot be used is a failure.

    Returns:
        The items that can be used, their lengths, and why others cannot.

    Raises:
        DataError: none can, or codes cannot be written.
    """
    usable, lengths, failures = [], [], dict(items.failures)
    for group in tqdm(items.groups, desc="Reading items", unit="item", disable=not progress, leave=False):
        try:
            lengths.append(coder.lengths(group))
            usable.append(group)
        except DataError as error:
            failures[group.name] = str(error)
    if not usable:
        first = next(iter(failures.items()))
        raise DataError(f"--data: no item can be used, {len(failures)} failed: {first[0]}: {first[1]}")
    return usable, Lengths(*map(max, zip(*lengths, strict=True))), failures


@dataclass(frozen=True)
class Pass:
    """How items are scored.

    Attributes:
        lm, chunk_frames, lags, conditions: see `score_groups`.
        coder: makes their codes.
        lengths: of `look_at`, over the whole folder, so that scores do not depend on what is measured.
        batch_size: items that are streamed together; changes time and memory, not the scores.
    """

    lm: LMModel
    coder: Coder
    lengths: Lengths
    lags: Sequence[int]
    batch_size: int
    chunk_frames: int
    conditions: TextConditions = field(default_factory=dict)

    def code(self, group: Group) -> CodedGroup:
        """The codes of an item.

        Raises:
            DataError: a recording cannot be used.
        """
        return self.coder.code(group, plant_frames=self.lengths.plant)

    def num_steps(self, num_items: int) -> int:
        """What `score` reports for so many items, in all."""
        return num_items * num_steps(self.lengths.plant, self.lags, self.lengths.cue)

    def score(self, batch: Sequence[CodedGroup], arm: RecallArm, bar: tqdm) -> list[Scores]:
        """The scores of items in an arm.

        Raises:
            ConfigError: they do not fit into memory.
        """
        if not batch:
            return []
        enter_arm(self.lm, "on" if arm == SESSIONS else arm)
        try:
            return score_groups(
                self.lm,
                batch,
                lags=self.lags,
                cue_frames=self.lengths.cue,
                chunk_frames=self.chunk_frames,
                sessions=arm == SESSIONS,
                conditions=self.conditions,
                on_steps=lambda steps: bar.update(steps * len(batch)),
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise ConfigError(
                f"--batch-size: {len(batch)} items at once do not fit into memory; take fewer."
            ) from None


def measure_items(
    groups: Sequence[Group], how: Pass, *, arms: Sequence[RecallArm], file: ScoreFile, progress: bool = False
) -> Measurement:
    """Score all items in all arms; those in the file are not measured again.

    Args:
        groups: the items.
        how: they are scored.
        arms: what the memory does.
        file: with the scores.
        progress: show a bar.

    Raises:
        ConfigError: a batch does not fit into memory, or scores cannot be written.
    """
    found: dict[RecallArm, dict[str, Measured]] = {arm: {} for arm in arms}
    failures: dict[str, str] = {}
    num_reused = 0
    total = len(arms) * how.num_steps(len(groups))
    with tqdm(total=total, unit="frame", disable=not progress, leave=False) as bar:
        for start in range(0, len(groups), how.batch_size):
            batch = []
            for group in groups[start : start + how.batch_size]:
                try:
                    batch.append(how.code(group))
                except DataError as error:
                    failures[group.name] = str(error)
            for arm in arms:
                bar.set_description(arm)
                known = {coded.group.name: file.find(arm, coded.digest, how.lags) for coded in batch}
                missing = [coded for coded in batch if known[coded.group.name] is None]
                num_reused += len(batch) - len(missing)
                bar.update(how.num_steps(len(batch) - len(missing)))
                for coded, new in zip(missing, how.score(missing, arm, bar), strict=True):
                    name = coded.group.name
                    if is_finite(new):
                        file.add(arm, coded.digest, name, new)
                        known[name] = new
                    else:
                        failures[name] = f"its log-likelihoods under the model are not finite (arm {arm})"
                found[arm] |= {
                    coded.group.name: Measured(coded.group, scores)
                    for coded in batch
                    if (scores := known[coded.group.name]) is not None
                }
    names = [group.name for group in groups if group.name not in failures]
    return Measurement(
        {arm: [items[name] for name in names] for arm, items in found.items()}, failures, num_reused
    )
