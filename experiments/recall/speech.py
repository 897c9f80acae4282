"""The speech task: some seconds of synthetic speech, heard again after several attention windows.

Shapes: B sequences, K codebooks, T frames, N frames of a voice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.models.loaders import FRAME_RATE
from torch import Tensor

from experiments.recall.tasks import transformer_settings
from finetune.data.codes.cache import CodeCache
from finetune.data.recordings.lines import load_manifest
from finetune.data.words import load_alignments
from finetune.demo.assets import DemoAssets, find_demo_assets
from finetune.demo.model_folder import open_repository
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.tiny_mimi import NUM_BINS
from finetune.errors import UserError
from finetune.loss import audio_targets

NUM_TRAIN, NUM_EVAL = 160, 8  # dialogues; of the demo's own 16 a model knows every passage by heart


@dataclass
class SpeechTask:
    """A passage of a speaker, then the same passage again and again, in Moshi's own stream of Mimi codes.

    Attributes:
        demo: folder of recordings and codec that `python -m finetune.demo` made.
        num_codebooks: of Mimi's, the first ones.
        period: length of the passage, frames of 80 ms.
        num_frames: length of a sequence.
        window: see `Task`.
        dim, num_heads, num_layers: of the transformer.
    """

    demo: Path = Path("runs/recall/dialogues")
    num_codebooks: int = 2
    period: int = 32
    num_frames: int = 96
    window: int = 8
    dim: int = 64
    num_heads: int = 4
    num_layers: int = 3
    name: str = "speech"
    _voices: dict[bool, list[Tensor]] = field(default_factory=dict, repr=False)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Task`; with what the recordings were made from.

        Raises:
            UserError: there are no demo assets.
        """
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, (int, str))}
        return numbers | {"demo": _assets(self.demo).settings}

    @property
    def scored(self) -> Tensor:
        """All frames after the first time."""
        return torch.arange(self.num_frames) >= self.period

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """Moshi with one voice, delayed as those of Moshi 7B, and no text."""
        return {
            "n_q": self.num_codebooks,
            "dep_q": self.num_codebooks,
            "delays": [0, 0, *(1 for _ in range(self.num_codebooks - 1))],
            "card": NUM_BINS,
            "text_card": 4,
            **transformer_settings(self.dim, self.num_heads, self.num_layers),
            "depformer_dim": 32,
            "depformer_dim_feedforward": 132,
            "depformer_num_heads": 2,
            "depformer_num_layers": 1,
            "depformer_layer_scale": None,
            "depformer_multi_linear": True,
            "depformer_context": self.num_codebooks,
            "depformer_gating": "silu",
            "depformer_pos_emb": "none",
            "depformer_weights_per_step": True,
        }

    def batch(self, size: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """See `Task`; passages of the demo's training dialogues, or of those it holds out."""
        if held_out not in self._voices:
            voices = _read_voices(self.demo, held_out=held_out)
            self._voices[held_out] = [
                voice[: self.num_codebooks] for voice in voices if voice.shape[1] >= self.period
            ]
        voices = self._voices[held_out]
        chosen = torch.randint(len(voices), (size,), generator=generator).tolist()
        passages = []
        for voice in (voices[index] for index in chosen):
            first = int(torch.randint(voice.shape[1] - self.period + 1, (), generator=generator))
            passages.append(voice[:, first : first + self.period])
        repeats = -(-self.num_frames // self.period)
        audio = torch.stack(passages).repeat(1, 1, repeats)[:, :, : self.num_frames]
        return torch.cat([torch.full_like(audio[:, :1], -1), audio], 1)

    def losses(self, lm: LMModel, codes: Tensor) -> Tensor:
        """See `Task`; means over the codebooks. The last frame's delayed codebooks are never predicted."""
        targets = audio_targets(codes, lm)  # [B, K, T]
        logits = lm(codes).logits
        losses = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), reduction="none")
        valid = torch.ones_like(targets, dtype=torch.bool)
        valid[:, 1:, -1] = False
        losses = torch.where(valid, losses.view_as(targets), 0)
        return losses.sum(1) / valid.sum(1)


def _read_voices(demo: Path, *, held_out: bool) -> list[Tensor]:
    """Codes of each speaker of each dialogue, only frames in which the speaker speaks, `[K, N]`.

    Raises:
        UserError: there are no demo assets.
    """
    assets = _assets(demo)
    info = open_repository(assets.model_dir)
    mimi = info.get_mimi()
    cache = CodeCache.of_model(info, num_codebooks=mimi.num_codebooks)
    recordings = load_manifest(assets.eval_jsonl if held_out else assets.train_jsonl, key="--demo")
    cache.fill(recordings, mimi, progress=False)
    voices = []
    for recording in recordings:
        codes = cache.load(recording).view(2, mimi.num_codebooks, -1)
        words = load_alignments(recording.alignment_path)
        for channel, speaker in zip(codes, (MAIN, USER), strict=True):
            middles_sec = (torch.arange(codes.shape[2]) + 0.5) / FRAME_RATE
            speaks = torch.zeros(codes.shape[2], dtype=torch.bool)
            for word in words:
                if word.speaker == speaker:
                    speaks |= (word.start_sec <= middles_sec) & (middles_sec < word.end_sec)
            voices.append(channel[:, speaks])
    return voices


def _assets(demo: Path) -> DemoAssets:
    assets = find_demo_assets(demo)
    if assets is None:
        raise UserError(
            f"{demo}: no demo recordings here; make them with python -m finetune.demo --out {demo} "
            f"--num-train {NUM_TRAIN} --num-eval {NUM_EVAL}."
        )
    return assets
