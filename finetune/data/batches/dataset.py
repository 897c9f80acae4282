"""Chunks of text and audio tokens, alone and in batches.

Shapes: B batch rows, V voices, K codebooks of one voice, T frames of a chunk, L frames of context.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from finetune.data.args import TextOptions
from finetune.data.batches.chunks import Chunk
from finetune.data.batches.interleaver import TextCount, count_text, interleave_text
from finetune.data.batches.mixing import Share
from finetune.data.batches.spelling import Tokenizer
from finetune.data.codes.mono import Voices
from finetune.data.recordings.lines import Recording
from finetune.data.words import Word, delayed, load_alignments

ZERO_TOKEN_ID = -1
MAX_CACHED_TEXTS = 256


class Batch(NamedTuple):
    """Chunks of a batch and where they come from, all tensors int64."""

    codes: Tensor  # [B, 1 + V K, L + T]: text, Moshi's voice, the user's; ZERO_TOKEN_ID after the end
    recording: Tensor  # [B], index of the recording
    start_frame: Tensor  # [B], first frame of the chunk within the recording
    context: Tensor  # [B], frames in front of the chunk: L, or as many as the recording has there
    conditions: Sequence[Mapping[str, str]] = ()  # B, of the recordings; empty: they have none


class Digests(NamedTuple):
    """What tells whether a recording is still the one that it was.

    Attributes:
        words: of its words and text conditions.
        audio: of its audio file and of the codec.
        codes: of its codes, which on other hardware differ a little.
    """

    words: str
    audio: str
    codes: str


class ChunkDataset(Dataset[Tensor]):
    """The token streams of chunks: item i is `[1 + V K, L + T]`, int64, the text row first.

    A chunk is a cut through its recording, text included. It is preceded by up to L frames of context, and
    followed by `ZERO_TOKEN_ID`.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        chunks: Sequence[Chunk],
        voices: Voices,
        *,
        chunk_frames: int,
        context_frames: int = 0,
        frame_rate: float,
        tokenizer: Tokenizer,
        text_padding_id: int,
        end_of_text_padding_id: int,
        conditions: Sequence[Mapping[str, str]] | None = None,
        source_weights: Sequence[float] = (1.0,),
        digests: Sequence[Digests] = (),
        text_options: TextOptions = TextOptions(),  # noqa: B008 - frozen
        text_delay_frames: int = 0,
    ) -> None:
        """Keep the pieces; files are read when items are asked for.

        Args:
            recordings: what the chunks' `recording` counts.
            chunks: the items.
            voices: codes of all recordings.
            chunk_frames: T.
            context_frames: L.
            frame_rate: frames per second.
            tokenizer: see `interleave_text`, as are the other arguments.
            text_padding_id: token of frames without text.
            end_of_text_padding_id: token of the last padding frame before a word.
            conditions: text conditions of each recording; None: batches come without.
            source_weights: shares of the recordings' sources.
            digests: of each recording, where somebody wants to know them again.
            text_options: whether there is text, and how it is placed.
            text_delay_frames: by how much text is later than the audio.
        """
        self.recordings = recordings
        self.chunks = chunks
        self.voices = voices
        self.chunk_frames = chunk_frames
        self.context_frames = context_frames
        self.frame_rate = frame_rate
        self.conditions = conditions
        self.source_weights = source_weights
        self.digests = digests
        self.text_options = text_options
        self.text_delay_frames = text_delay_frames
        self._tokenizer = tokenizer
        self._interleave_text = partial(
            interleave_text,
            frame_rate=frame_rate,
            tokenizer=tokenizer,
            text_padding_id=text_padding_id,
            end_of_text_padding_id=end_of_text_padding_id,
            options=text_options,
        )
        self._num_frames = {chunk.recording: chunk.start_frame + chunk.num_frames for chunk in chunks}
        self._texts: OrderedDict[int, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor:
        """The codes of one chunk, `[1 + V K, L + T]`.

        Raises:
            DataError: the codes or the word timings of the recording cannot be used.
        """
        chunk = self.chunks[index]
        start, end = chunk.start_frame - self.context_of(chunk), chunk.start_frame + chunk.num_frames
        audio = self.voices.load(self.recordings[chunk.recording], start, end - start)
        codes = torch.full((1 + len(audio), self.context_frames + self.chunk_frames), ZERO_TOKEN_ID)
        codes[0, : end - start] = self._text(chunk.recording)[start:end]
        codes[1:, : end - start] = audio
        return codes

    def context_of(self, chunk: Chunk) -> int:
        """The frames of context that a chunk has."""
        return min(self.context_frames, chunk.start_frame)

    def shares(self, *, of_recordings: bool) -> list[Share]:
        """How many chunks, or recordings, each source has, and its weight."""
        if of_recordings:
            counts = Counter(recording.source for recording in self.recordings)
        else:
            counts = Counter(self.recordings[chunk.recording].source for chunk in self.chunks)
        return [Share(counts[source], weight) for source, weight in enumerate(self.source_weights)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Several chunks as a batch; raises as `__getitem__` does."""
        chunks = [self.chunks[index] for index in indices]
        return Batch(
            codes=torch.stack([self[index] for index in indices]),
            recording=torch.tensor([chunk.recording for chunk in chunks]),
            start_frame=torch.tensor([chunk.start_frame for chunk in chunks]),
            context=torch.tensor([self.context_of(chunk) for chunk in chunks]),
            conditions=() if self.conditions is None else [self.conditions[c.recording] for c in chunks],
        )

    def count_text(self, recording: int) -> TextCount:
        """How much of a recording's text is in the text stream; raises as `__getitem__` does."""
        return count_text(
            self._words(recording),
            num_frames=self._num_frames[recording],
            frame_rate=self.frame_rate,
            tokenizer=self._tokenizer,
            options=self.text_options,
        )

    def _words(self, recording: int) -> list[Word]:
        if self.text_options.text == "none":
            return []
        words = load_alignments(self.recordings[recording].alignment_path)
        return delayed(words, self.text_delay_frames / self.frame_rate)

    def _text(self, recording: int) -> Tensor:
        """The text tokens of a whole recording, one per frame."""
        if recording not in self._texts:
            if len(self._texts) >= MAX_CACHED_TEXTS:
                self._texts.popitem(last=False)
            num_frames = self._num_frames[recording]
            self._texts[recording] = self._interleave_text(self._words(recording), num_frames=num_frames)
        self._texts.move_to_end(recording)
        return self._texts[recording]
