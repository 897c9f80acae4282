"""The token streams of an item's conversations, put together of the codes of its recordings.

Shapes: n_q audio codebooks, P frames of a plant, N frames of an answer, L frames of the lag.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models.loaders import FRAME_RATE
from torch import Tensor

from finetune.data.args import TextOptions
from finetune.data.batches.interleaver import interleave_text
from finetune.data.words import load_alignments
from finetune.errors import DataError
from finetune.evaluation.audio_codes import CodeStore
from finetune.evaluation.long_context.streams import StreamModel
from finetune.evaluation.recall.items import Group
from finetune.evaluation.sources import Source

_KEPT_FRAMES = 500_000  # whose codes stay in memory


class Pieces:
    """Recordings as frames of text and audio tokens, made as for training.

    Args:
        speech: model, codec and tokenizer.
        store: encodes, and keeps codes on disk.
        placing: how training placed text.
    """

    def __init__(self, speech: StreamModel, store: CodeStore, placing: TextOptions) -> None:
        self._speech, self._store, self._placing = speech, store, placing
        self._kept: dict[Path, Tensor] = {}
        self._num_frames = 0

    def codes(self, path: Path) -> Tensor:
        """Text, Moshi's codebooks and the user's, int64 `[1 + n_q, T]`.

        Raises:
            DataError: the recording is not stereo, or it or its words cannot be read.
        """
        if path not in self._kept:
            self._kept[path] = self._make(path)
            self._num_frames += self._kept[path].shape[1]
            while self._num_frames > _KEPT_FRAMES and len(self._kept) > 1:
                self._num_frames -= self._kept.pop(next(iter(self._kept))).shape[1]
        return self._kept[path]

    def _make(self, path: Path) -> Tensor:
        lm, source = self._speech.lm, Source(str(path), path)
        header = self._store.header(source)
        if header.channels != 2:
            raise DataError(f"{path}: is mono; Moshi belongs on the left channel, the user on the right.")
        self._store.encode(source)
        audio = self._store.load(source, header)
        words = load_alignments(source.alignment_path) if self._placing.text != "none" else []
        text = interleave_text(
            words,
            num_frames=audio.shape[2],
            frame_rate=FRAME_RATE,
            tokenizer=self._speech.tokenizer,
            text_padding_id=lm.text_padding_token_id,
            end_of_text_padding_id=lm.end_of_text_padding_id,
            options=self._placing,
        )
        return torch.cat([text[None], audio.flatten(0, 1)])


class Filler:
    """Recordings one after the other without an end: all of them in a drawn order, then in another.

    Args:
        paths: the recordings.
        codes: of one, `[1 + n_q, T]`.
        seed: of the orders.
    """

    def __init__(self, paths: Sequence[Path], codes: Callable[[Path], Tensor], *, seed: str) -> None:
        self._paths, self._codes, self._random = list(paths), codes, random.Random(seed)
        self._order: list[Path] = []
        self._ends: list[int] = []

    def frames(self, start: int, stop: int) -> Tensor:
        """Some of its frames, `[1 + n_q, stop - start]`."""
        while not self._ends or self._ends[-1] < stop:
            self._go_on()
        parts, first = [], 0
        for path, end in zip(self._order, self._ends, strict=True):
            if end > start and first < stop:
                parts.append(self._codes(path)[:, max(start - first, 0) : stop - first])
            first = end
        return torch.cat(parts, 1) if parts else self._codes(self._order[0])[:, :0]

    def _go_on(self) -> None:
        for path in self._random.sample(self._paths, len(self._paths)):
            end = self._ends[-1] if self._ends else 0
            self._order.append(path)
            self._ends.append(end + self._codes(path).shape[1])


@dataclass(frozen=True)
class Conversation:
    """One stream: silence, a plant that ends at frame P, filler, the cue and an answer.

    Attributes:
        name: for messages.
        plant: `[1 + n_q, P]`, with silence in front; none where the plant was heard in another session.
        filler: what comes in between.
        cue: `[1 + n_q, C]`.
        answer: `[1 + n_q, N]`.
        lag: frames from the end of the plant to the start of the answer.
    """

    name: str
    plant: Tensor
    filler: Filler
    cue: Tensor
    answer: Tensor
    lag: int

    @property
    def answer_start(self) -> int:
        """Frame in which the answer starts."""
        return self.plant.shape[1] + self.lag

    @property
    def num_frames(self) -> int:
        """Of all of it."""
        return self.answer_start + self.answer.shape[1]

    def frames(self, start: int, stop: int) -> Tensor:
        """Some of its frames, `[1 + n_q, stop - start]`."""
        filled = self.answer_start - self.cue.shape[1]
        parts, first = [], 0
        for end, read in (
            (self.plant.shape[1], lambda a, b: self.plant[:, a:b]),
            (filled, self.filler.frames),
            (self.answer_start, lambda a, b: self.cue[:, a:b]),
            (self.num_frames, lambda a, b: self.answer[:, a:b]),
        ):
            low, high = max(start, first), min(stop, end)
            if low < high:
                parts.append(read(low - first, high - first))
            first = end
        return torch.cat(parts, 1) if parts else self.cue[:, :0]


@dataclass(frozen=True)
class CodedGroup:
    """An item as codes.

    Attributes:
        group: the item.
        plants: `[1 + n_q, P]` each, all of the same length.
        filler, cue, answers: as in `Conversation`, the answers one per plant.
        digest: SHA-256 of everything.
    """

    group: Group
    plants: Sequence[Tensor]
    filler: Filler
    cue: Tensor
    answers: Sequence[Tensor]
    digest: str

    def conversation(self, plant: int | None, *, lag: int, answer: int = 0) -> Conversation:
        """With one of the plants, or none, and one of the answers.

        Args:
            plant: its number; None: it was heard in another session.
            lag: in frames, at least the cue's length.
            answer: its number.
        """
        planted = self.cue[:, :0] if plant is None else self.plants[plant]
        return Conversation(self.group.name, planted, self.filler, self.cue, self.answers[answer], lag)


class Coder:
    """Makes codes of items; all plants are made as long as the longest of the folder.

    Args:
        pieces: of the recordings.
        silence: codes of silence of T frames, `[1 + n_q, T]`.
        seed: of the order of the filler.
    """

    def __init__(self, pieces: Pieces, silence: Callable[[int], Tensor], *, seed: int) -> None:
        self._pieces, self._silence, self._seed = pieces, silence, seed

    def lengths(self, group: Group) -> tuple[int, int]:
        """Frames of the longest plant and of the cue, after a look at all recordings.

        Raises:
            DataError: a recording cannot be used.
        """
        for path in group.files:
            self._pieces.codes(path)
        longest = max(self._pieces.codes(path).shape[1] for path in group.plants)
        return longest, self._pieces.codes(group.cue).shape[1]

    def code(self, group: Group, *, plant_frames: int) -> CodedGroup:
        """The codes of an item.

        Args:
            group: the item.
            plant_frames: P, what is missing is silence in front.

        Raises:
            DataError: a recording cannot be used, or two conversations are the same.
        """
        codes = self._pieces.codes
        plants = [codes(path) for path in group.plants]
        padded = [torch.cat([self._silence(plant_frames - p.shape[1]), p], 1) for p in plants]
        answers = [codes(path) for path in group.answers]
        for what, tensors in (("plants", plants), ("answers", answers)):
            if len({_digest([tensor]) for tensor in tensors}) < len(tensors):
                raise DataError(f"two of its {what} have the same words and sound")
        filler = Filler(group.filler, codes, seed=f"{self._seed}/{group.name}")
        digest = _digest([*padded, codes(group.cue), *answers, *map(codes, group.filler)])
        return CodedGroup(group, padded, filler, codes(group.cue), answers, f"{digest}/{self._seed}")


def _digest(tensors: Iterable[Tensor]) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(str(tuple(tensor.shape)).encode())
        hasher.update(tensor.contiguous().numpy().astype("<i4").tobytes())
    return hasher.hexdigest()
