"""Audio samples during training: what the model says to a user, as a stereo recording."""

from pathlib import Path

import numpy as np
import sphn
import torch
from moshi.models import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.args import TrainArgs
from finetune.data.audio.read import read_voice
from finetune.errors import ConfigError, DataError
from finetune.files import writing_to
from finetune.inference.conversation import Conversation


class Sampler:
    """Lets a training model answer the prompts of the configuration.

    Args:
        args: `sample_prompts` (recordings; their last channel is the user), `sample_conditions`,
            `sample_duration_sec`, `seed`.
        mimi: the codec, on the device of the model.

    Raises:
        ConfigError: a prompt does not exist or cannot be read.
    """

    def __init__(self, args: TrainArgs, mimi: MimiModel) -> None:
        self._args = args
        self._mimi = mimi
        self.sample_rate = int(mimi.sample_rate)
        num_samples = int(args.sample_duration_sec * mimi.sample_rate)
        self._prompts: list[np.ndarray] = [np.zeros(num_samples, np.float32)]
        if args.sample_prompts:
            self._prompts = [_read_user(path, mimi.sample_rate)[:num_samples] for path in args.sample_prompts]

    def sample(self, speaker: LMModel) -> Tensor:
        """One recording of all prompts in turn, left the model, right the user. `[2, num_samples]`."""
        device = next(speaker.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._args.seed)
            turns = [self._answer(speaker, torch.from_numpy(prompt)) for prompt in self._prompts]
        return torch.cat(turns, 1)

    def _answer(self, model: LMModel, user: Tensor) -> Tensor:
        frames = [frame for frame in user.split(self._mimi.frame_size) if len(frame) == self._mimi.frame_size]
        conditions = self._args.sample_conditions
        with Conversation(model, self._mimi, conditions=conditions) as conversation:
            answer = [conversation.listen(frame[None]).audio[0] for frame in frames]
        heard = user[: len(frames) * self._mimi.frame_size]
        return torch.stack([torch.cat(answer), heard]) if frames else user.new_zeros(2, 0)


def save_sample(audio: Tensor, path: Path, sample_rate: int) -> None:
    """Write `[2, num_samples]` as wav; raises UserError where it cannot be written."""
    with writing_to(path, errors=(OSError, ValueError)):  # sphn raises the latter
        path.parent.mkdir(exist_ok=True)
        sphn.write_wav(str(path), audio.clamp(-1, 1).numpy(), sample_rate)


def _read_user(path: str, sample_rate: int) -> np.ndarray:
    try:
        return read_voice(Path(path), sample_rate=sample_rate)
    except DataError as error:
        raise ConfigError(f"sample_prompts: {error}") from None
