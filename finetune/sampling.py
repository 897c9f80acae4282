"""Audio samples during training: what the model says to a user, as a stereo recording."""

import copy
from pathlib import Path

import numpy as np
import soxr
import sphn
import torch
from moshi.models import MimiModel
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from finetune.args import TrainArgs
from finetune.errors import ConfigError


class Sampler:
    """Lets a training model answer the prompts of the configuration.

    Args:
        args: `sample_prompts` (recordings; their last channel is the user), `sample_duration_sec`, `seed`.
        mimi: the codec, on the device of the model.

    Raises:
        ConfigError: a prompt does not exist or cannot be read.
    """

    def __init__(self, args: TrainArgs, mimi: MimiModel) -> None:
        self._args = args
        self._mimi = mimi
        self.sample_rate = int(mimi.sample_rate)
        num_samples = int(args.sample_duration_sec * mimi.sample_rate)
        self._prompts = [np.zeros(num_samples, np.float32)]
        if args.sample_prompts:
            self._prompts = [_read_user(path, mimi.sample_rate)[:num_samples] for path in args.sample_prompts]

    def sample(self, model: LMModel) -> Tensor:
        """One recording of all prompts in turn, left the model, right the user. `[2, num_samples]`."""
        device = next(model.parameters()).device
        speaker = _copy_to_speak(model, getattr(torch, self._args.param_dtype))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._args.seed)
            turns = [self._answer(speaker, torch.from_numpy(prompt).to(device)) for prompt in self._prompts]
        return torch.cat(turns, 1)

    @torch.no_grad()
    def _answer(self, model: LMModel, user: Tensor) -> Tensor:
        mimi = self._mimi
        generator = LMGen(model)
        heard = []
        with mimi.streaming(1), generator.streaming(1):
            for frame in user.split(mimi.frame_size):
                if len(frame) < mimi.frame_size:
                    break
                tokens = generator.step(mimi.encode(frame[None, None]))
                if tokens is not None:
                    heard.append(mimi.decode(tokens[:, 1 : model.dep_q + 1])[0, 0])
        answer = torch.cat(heard) if heard else user.new_zeros(0)
        # The model's first words come after its delays; silence before them keeps the channels in time.
        answer = torch.nn.functional.pad(answer, (len(user) - len(answer), 0))
        return torch.stack([answer, user]).float().cpu()


def _copy_to_speak(model: LMModel, dtype: torch.dtype) -> LMModel:
    """A copy in one dtype (the attention cache takes that of the first LoRA weight it finds).

    Frozen weights that have the dtype already are shared, not copied.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad and p.dtype == dtype}
    speaker = copy.deepcopy(model, shared).to(dtype).eval()
    speaker.transformer.checkpointing = speaker.depformer.checkpointing = False
    return speaker


def save_sample(audio: Tensor, path: Path, sample_rate: int) -> None:
    """Write `[2, num_samples]` as wav."""
    path.parent.mkdir(exist_ok=True)
    sphn.write_wav(str(path), audio.clamp(-1, 1).numpy(), sample_rate)


def _read_user(path: str, sample_rate: int) -> np.ndarray:
    """The last channel of a recording, mono or stereo."""
    if not Path(path).is_file():
        raise ConfigError(f"sample_prompts: {path} does not exist.")
    try:
        samples, file_rate = sphn.read(path)
    except ValueError as error:
        raise ConfigError(f"sample_prompts: {path} cannot be read as audio: {error}.") from None
    return soxr.resample(samples[-1], file_rate, sample_rate).astype(np.float32)
