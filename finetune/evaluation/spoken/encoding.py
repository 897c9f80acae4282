"""Audio files of a benchmark as the token streams that a model scores, encoded once and kept on disk.

Shapes: K codebooks of one voice, n_q audio codebooks in all, N frames of an item.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from torch import Tensor
from tqdm import tqdm

from finetune.data.audio.checks import AudioHeader
from finetune.data.audio.find import printable
from finetune.data.audio.read import read_audio_header
from finetune.data.codes.cache import UnwritableCacheError
from finetune.data.codes.encode_audio import encode_silence
from finetune.errors import ConfigError, DataError
from finetune.evaluation.audio_codes import CodeStore
from finetune.evaluation.sources import Source
from finetune.evaluation.spoken.items import Item

logger = logging.getLogger(__name__)

UserMode = Literal["empty", "silent"]
TextMode = Literal["none", "own"]


class SpokenModel(Protocol):
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
    def info(self) -> CheckpointInfo:
        """Files of the codec."""
        ...


def encode_items(
    items: Sequence[Item],
    speech: SpokenModel,
    *,
    user: UserMode = "empty",
    text: TextMode = "none",
    cache_dir: str | None = None,
    cache_key: str = "--cache-dir",
    progress: bool = False,
) -> tuple[list[Tensor | None], dict[str, str]]:
    """Put audio files into Moshi's own stream.

    A file of any sample rate is resampled to the codec's. Of a stereo file the left channel is taken, which
    is Moshi's everywhere here, and a warning says how many there are. Files are encoded one by one, so that
    the codes of a file do not depend on what else is encoded; the last frame is filled up with zeros.

    Args:
        items: the files.
        speech: codec and shape of the streams.
        user: the user's codebooks: `empty`, zero tokens, whose embedding is exactly zero; `silent`, encoded
            digital silence.
        text: the text row: `none`, zero tokens; `own`, Moshi's `ungenerated_token_id`, for which
            `finetune.evaluation.spoken.likelihood.score_items` puts in what the model says.
        cache_dir: one folder for all codes; by default `.moshi_ttt_codes` beside each audio file.
        cache_key: configuration key or option that held `cache_dir`, for messages.
        progress: show a progress bar.

    Returns:
        Codes of each item, int64 `[1 + n_q, N]` on the CPU, rows text, own codebooks, user's codebooks; None
        where the file cannot be used. And why not, by the item's name.

    Raises:
        ConfigError: an unknown `user` or `text`.
        DataError: the codec's weights cannot be read, or the cache cannot be written.
    """
    for key, value, modes in (("user", user, UserMode), ("text", text, TextMode)):
        if value not in get_args(modes):
            raise ConfigError(f"--{key}: {value} is unknown; it is one of {', '.join(get_args(modes))}.")
    store = CodeStore(speech.mimi, speech.info, cache_dir, key=cache_key)
    own: list[Tensor | None] = []
    failures: dict[str, str] = {}
    num_stereo = 0
    for item in tqdm(items, desc="Encoding audio", unit="file", disable=not progress):
        source = Source(item.name, item.path)
        try:
            header = _header(item.path)
            num_stereo += header.channels == 2
            store.encode(source)
            own.append(store.load(source, header)[0])
        except UnwritableCacheError:
            raise
        except DataError as error:
            own.append(None)
            failures[item.name] = printable(str(error))
    if num_stereo:
        logger.warning("%d of %d files are stereo; their left channels are used.", num_stereo, len(items))
    longest = max((codes.shape[1] for codes in own if codes is not None), default=0)
    silence = encode_silence(speech.mimi, longest) if user == "silent" and longest else None
    return [None if codes is None else _streams(codes, speech.lm, silence, text) for codes in own], failures


def _streams(own: Tensor, lm: LMModel, silence: Tensor | None, text: TextMode) -> Tensor:
    """Own codes `[K, N]` among the other rows, `[1 + n_q, N]`."""
    num_codebooks, num_frames = own.shape
    codes = torch.full((1 + lm.n_q, num_frames), lm.zero_token_id)
    if text == "own":
        codes[0] = lm.ungenerated_token_id
    codes[1 : 1 + num_codebooks] = own
    if silence is not None:
        codes[1 + num_codebooks :] = silence[:, :num_frames]
    return codes


def _header(path: Path) -> AudioHeader:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    header = read_audio_header(path)
    if header.num_samples == 0:
        raise DataError(f"{path}: holds no samples; export it again.")
    return header
