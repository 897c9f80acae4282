"""Token streams of long recordings, handed out in pieces.

Shapes: K codebooks of one voice, T frames.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm

from finetune.data.args import TextOptions
from finetune.data.audio.checks import AudioHeader
from finetune.data.audio.find import printable
from finetune.data.batches.interleaver import interleave_text
from finetune.data.codes.cache import UnwritableCacheError
from finetune.data.words import load_alignments
from finetune.errors import ConfigError, DataError
from finetune.evaluation.audio_codes import CodeStore
from finetune.evaluation.sources import Source, find_sources, group_sources

logger = logging.getLogger(__name__)

UserMode = Literal["empty", "silent", "real"]
TextMode = Literal["none", "given", "own"]
GroupMode = Literal["single", "speaker"]


@dataclass(frozen=True)
class StreamOptions:
    """What the streams are made of.

    Attributes:
        user: the user's codebooks: `empty`, no input at all; `silent`, digital silence; `real`, the
            right channel of stereo files.
        text: the text row: `none`, no input; `given`, the word timings beside each file; `own`, what
            the model says, which whoever measures fills in: here it is as `none`.
        group: `single`, one stream per recording; `speaker`, the recordings of a speaker one after
            another.
        max_frames: longer streams are cut.
        min_frames: shorter streams are left out.
        max_streams: so many, evenly spread over the data; None: all.
        cache_dir: one folder for all codes; by default `.moshi_ttt_codes` beside each audio file.
        cache_key: configuration key or option that held it, for messages.
        placing: how training placed text; where it had none, what is given is padding.
    """

    user: UserMode = "empty"
    text: TextMode = "none"
    group: GroupMode = "single"
    max_frames: int | None = None
    min_frames: int | None = None
    max_streams: int | None = None
    cache_dir: str | None = None
    cache_key: str = "--cache-dir"
    placing: TextOptions = field(default_factory=TextOptions)

    @property
    def needs_words(self) -> bool:
        """Whether word timings are read."""
        return self.text == "given" and self.placing.text != "none"

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that is not allowed."""
        for name, modes in (("user", UserMode), ("text", TextMode), ("group", GroupMode)):
            if getattr(self, name) not in get_args(modes):
                allowed = ", ".join(get_args(modes))
                raise ConfigError(f"--{name}: {getattr(self, name)} is unknown; it is one of {allowed}.")
        for name in ("max_frames", "min_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is below 1.")
        if self.max_frames is not None and self.min_frames is not None and self.max_frames < self.min_frames:
            raise ConfigError(
                f"--min-frames: {self.min_frames} is above --max-frames {self.max_frames}, which cuts every "
                "stream; lower it."
            )


@dataclass(frozen=True)
class StreamPart:
    """A recording's place in a stream.

    Attributes:
        source: the recording.
        header: what its file says about itself.
        start_frame: where it starts in the stream.
        num_frames: how many of its frames, from its first one, are in the stream.
    """

    source: Source
    header: AudioHeader
    start_frame: int
    num_frames: int


class StreamModel(Protocol):
    """What is needed of a model, for example a `finetune.inference.speech_model.SpeechModel`."""

    @property
    def lm(self) -> LMModel:
        """Whose tokens are made; its weights do not count."""
        ...

    @property
    def mimi(self) -> MimiModel:
        """The codec, not streaming."""
        ...

    @property
    def tokenizer(self) -> SentencePieceProcessor:
        """Of the text stream."""
        ...


class Stream:
    """Consecutive frames of text and audio tokens.

    Attributes:
        name: the recording's path relative to the data, or the speaker; unique.
        num_frames: T.
        parts: the recordings that it is made of, in order, without gaps.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[StreamPart],
        *,
        options: StreamOptions,
        speech: StreamModel,
        store: CodeStore,
    ) -> None:
        """Keep the pieces; codes are read when frames are asked for."""
        self.name = name
        self.parts = tuple(parts)
        self.num_frames = sum(part.num_frames for part in parts)
        self._options = options
        self._speech = speech
        self._store = store
        self._last_text: tuple[StreamPart, Tensor] | None = None

    def frames(self, start: int, stop: int) -> Tensor:
        """Some frames, int64 on the CPU, `[1 + n_q, stop - start]`.

        Rows are the text, Moshi's own K codebooks and the user's K codebooks. Rows without input hold the
        model's zero token, whose embedding is exactly zero.

        Raises:
            DataError: codes or word timings have changed or vanished since the stream was opened.
            ValueError: the frames are not within the stream.
        """
        if not 0 <= start <= stop <= self.num_frames:
            raise ValueError(f"{self.name}: frames {start} to {stop} of {self.num_frames}.")
        lm: LMModel = self._speech.lm
        own = slice(1, 1 + lm.n_q // 2)
        user = slice(1 + lm.n_q // 2, 1 + lm.n_q)
        codes = torch.full((1 + lm.n_q, stop - start), lm.zero_token_id)
        for part in self.parts:
            first = max(start, part.start_frame)
            last = min(stop, part.start_frame + part.num_frames)
            if first >= last:
                continue
            there = slice(first - start, last - start)
            here = slice(first - part.start_frame, last - part.start_frame)
            audio = self._store.load(part.source, part.header)
            codes[own, there] = audio[0, :, here]
            if self._options.user == "real":
                codes[user, there] = audio[1, :, here]
            if self._options.text == "given":
                codes[0, there] = self._text(part)[here]
        if self._options.user == "silent":
            codes[user] = self._store.silence(start, stop)
        return codes

    def _text(self, part: StreamPart) -> Tensor:
        """The text tokens of a recording as training interleaves them."""
        if self._last_text is None or self._last_text[0] != part:
            lm, mimi = self._speech.lm, self._speech.mimi
            num_frames = self._store.num_frames(part.source, part.header)
            words = load_alignments(part.source.alignment_path) if self._options.needs_words else []
            text = interleave_text(
                words,
                num_frames=num_frames,
                frame_rate=mimi.frame_rate,
                tokenizer=self._speech.tokenizer,
                text_padding_id=lm.text_padding_token_id,
                end_of_text_padding_id=lm.end_of_text_padding_id,
                options=self._options.placing,
            )
            self._last_text = part, text
        return self._last_text[1]


@dataclass(frozen=True)
class OpenedStreams:
    """What became of a data set.

    Attributes:
        streams: what can be measured, at least one.
        left_out: names of streams that are shorter than asked for, and how long they are.
        failures: names of streams that cannot be used, and why: one sentence each that names the file.
    """

    streams: list[Stream]
    left_out: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def open_streams(
    data: str, options: StreamOptions, speech: StreamModel, info: CheckpointInfo
) -> OpenedStreams:
    """Find the recordings, encode what is not in the cache yet, and line them up.

    Args:
        data: a manifest, a folder or an audio file; see `find_sources`.
        options: what the streams are made of.
        speech: the model, whose codec and tokenizer are used.
        info: the files that its codec was loaded from.

    Returns:
        The streams in the order of `find_sources`, or sorted by speaker.

    Raises:
        ConfigError: the options do not fit each other.
        DataError: there is nothing to measure, or the cache cannot be written.
    """
    groups = _spread(group_sources(find_sources(data), options.group), options.max_streams)
    store = CodeStore(speech.mimi, info, options.cache_dir, key=options.cache_key)
    opening = _Opening(options, store)
    plans = opening.plan(groups)
    opening.encode(plans)
    streams = [
        Stream(name, parts, options=options, speech=speech, store=opening.store)
        for name, parts in opening.line_up(plans).items()
    ]
    if not streams:
        raise DataError(opening.why_nothing(data))
    if options.user == "silent":
        opening.store.encode_silence(max(stream.num_frames for stream in streams))
    return OpenedStreams(streams, opening.left_out, opening.failures)


def _spread(groups: dict[str, list[Source]], most: int | None) -> dict[str, list[Source]]:
    names = list(groups)
    if most is None or most >= len(names):
        return groups
    return {name: groups[name] for name in (names[i * len(names) // most] for i in range(most))}


Plan = list[tuple[Source, AudioHeader]]


class _Opening:
    """The way from files to parts, with an account of what was lost on it."""

    def __init__(self, options: StreamOptions, store: CodeStore) -> None:
        self.options = options
        self.store = store
        self.left_out: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def plan(self, groups: dict[str, list[Source]]) -> dict[str, Plan]:
        """The files that each stream needs, by what they say about themselves."""
        plans = {}
        min_frames = self.options.min_frames or 1
        for name, sources in groups.items():
            with self._failing(name):
                plan, num_frames = self._plan_stream(sources)
                if num_frames < min_frames:
                    self.left_out[name] = f"{num_frames} frames, fewer than --min-frames {min_frames}"
                else:
                    plans[name] = plan
        return plans

    def encode(self, plans: dict[str, Plan]) -> None:
        """Encode what is missing; streams with a file that cannot be are struck from `plans`."""
        missing = {
            name: [source for source, _ in plan if not self.store.is_encoded(source)]
            for name, plan in plans.items()
        }
        num_missing = sum(map(len, missing.values()))
        if num_missing:
            total = sum(map(len, plans.values()))
            logger.info("Encoding %d of %d recordings with Mimi, once.", num_missing, total)
        with tqdm(
            total=num_missing, desc="Encoding audio", unit="file", disable=not sys.stderr.isatty()
        ) as bar:
            for name, sources in missing.items():
                with self._failing(name):
                    for source in sources:
                        self.store.encode(source)
                        bar.update()
                if name in self.failures:
                    del plans[name]

    def line_up(self, plans: dict[str, Plan]) -> dict[str, list[StreamPart]]:
        """Each stream's parts."""
        streams = {}
        for name, plan in plans.items():
            with self._failing(name):
                parts, start = [], 0
                for source, header in plan:
                    num_frames = self.store.num_frames(source, header)
                    if self.options.max_frames is not None:
                        num_frames = min(num_frames, self.options.max_frames - start)
                    if num_frames:
                        parts.append(StreamPart(source, header, start, num_frames))
                    start += num_frames
                streams[name] = parts
        return streams

    def why_nothing(self, data: str) -> str:
        """Say why there is no stream."""
        if not self.failures:
            return (
                f"--data: every stream of {data} is shorter than --min-frames "
                f"{self.options.min_frames}; lower it or use --group speaker."
            )
        first = next(iter(self.failures.values()))
        return f"--data: no stream of {data} can be used, {len(self.failures)} failed: {first}"

    def _plan_stream(self, sources: Sequence[Source]) -> tuple[Plan, int]:
        plan, num_frames = [], 0
        for source in sources:
            if self.options.max_frames is not None and num_frames >= self.options.max_frames:
                break
            header = self.store.header(source)
            if self.options.user == "real" and header.channels == 1:
                raise DataError(
                    f"{source.path}: mono, but --user real takes the user from the right channel; use --user "
                    "empty or silent."
                )
            if self.options.needs_words:
                load_alignments(source.alignment_path)
            plan.append((source, header))
            num_frames += self.store.expected_frames(header)
        return plan, num_frames

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Note what keeps a stream from being used."""
        try:
            yield
        except UnwritableCacheError:
            raise
        except DataError as error:
            self.failures[name] = printable(str(error))
