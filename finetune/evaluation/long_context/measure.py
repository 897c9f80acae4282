"""Measuring every recording in every arm, each kept on disk as soon as it is finished.

Shapes: N frames of a recording, K codebooks that Moshi predicts.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from tqdm import tqdm

from finetune.base_model.conditions import TextConditions
from finetune.errors import ConfigError, DataError, StateError
from finetune.evaluation.long_context.arms import Arm, enter_arm
from finetune.evaluation.long_context.stream_losses import CodeStream, StreamLosses, stream_losses
from finetune.inference.terminal import say
from finetune.monitoring.trajectories import StreamTrajectories, load_trajectories, save_trajectories
from moshi_ttt.files.state_file import StateFile, write_state_file

KIND = "moshi-ttt losses 1"
_DIGEST = "losses_sha256"  # safetensors would not notice a changed number
_BLOCK_FRAMES = 4096


@dataclass(frozen=True)
class LossFiles:
    """The losses of finished recordings, one file per recording and arm.

    Attributes:
        folder: with the files.
        weights: the model that they belong to, of `weights_key`.
        own_text: whether the model heard its own text.
    """

    folder: Path
    weights: Mapping[str, Any]
    own_text: bool

    def path(self, name: str, codes_sha256: str, arm: str) -> Path:
        """Named after the recording and its codes, not its place among others, which may change."""
        stem = re.sub(r"[^\w.-]+", "_", name)[-60:].strip("._") or "recording"
        # Recordings of several folders may share both.
        tag = hashlib.sha256(f"{name} {codes_sha256}".encode()).hexdigest()[:10]
        return self.folder / f"{stem}-{tag}.{arm}.safetensors"

    def read(self, path: Path, identity: Mapping[str, Any], *, num_codebooks: int) -> StreamLosses | None:
        """Losses that were measured before, None where there are none of exactly this."""
        try:
            file = StateFile(path, kind=KIND)
            stated = file.identity.pop(_DIGEST, None)
            if file.identity != self._full(identity):
                return None
            num_frames = identity["num_frames"]
            file.check_shapes({"text": (num_frames,), "audio": (num_codebooks, num_frames), "resets": ()})
            tensors = file.read()
        except StateError:
            return None
        if stated != _digest_of(tensors):
            return None
        return StreamLosses(tensors["text"], tensors["audio"], int(tensors["resets"]))

    def write(self, path: Path, identity: Mapping[str, Any], losses: StreamLosses) -> None:
        """Keep losses; what was there is of something else, or damaged.

        Raises:
            StateError: the file cannot be written.
        """
        with suppress(OSError):
            path.unlink()
        tensors = {
            "text": losses.text,
            "audio": losses.audio,
            "resets": torch.tensor(losses.memory_resets),
        }
        full = self._full(identity) | {_DIGEST: _digest_of(tensors)}
        write_state_file(path, tensors, kind=KIND, identity=full)

    def _full(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        full = {"weights": self.weights, "own_text": self.own_text, **identity}
        return dict(json.loads(json.dumps(full)))


@dataclass
class MeasuredRecording:
    """A measured recording.

    Attributes:
        name, num_frames, codes_sha256: what was measured.
        files: with the losses, by arm.
        trajectories: file with the inner losses, None where they are not recorded.
        losses: by arm.
    """

    name: str
    num_frames: int
    codes_sha256: str
    files: dict[str, Path] = field(default_factory=dict)
    trajectories: Path | None = None
    losses: dict[str, StreamLosses] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredRecordings:
    """What has been measured.

    Attributes:
        recordings: those with finite losses in every arm.
        failures: why others have none, by name.
        num_reused: recordings and arms that had been measured before.
    """

    recordings: list[MeasuredRecording]
    failures: dict[str, str]
    num_reused: int


def measure_recordings(
    lm: LMModel,
    streams: Sequence[CodeStream],
    *,
    arms: Sequence[Arm],
    files: LossFiles,
    chunk_frames: int,
    conditions: TextConditions | None = None,
    trajectories: Path | None = None,
) -> MeasuredRecordings:
    """Losses of all recordings in all arms, of which those in `files` are not computed again.

    Args:
        lm, chunk_frames, conditions: see `stream_losses`.
        streams: the recordings.
        arms: of `choose_arms`.
        files: where losses are and go.
        trajectories: folder that gets the inner losses of each recording, with the memory on; None: they are
            not recorded.

    Raises:
        ConfigError: a chunk does not fit into memory.
        StateError: the losses cannot be written.
    """
    num_steps = sum(stream.num_frames + max(lm.delays) for stream in streams)
    recordings, failures = [], {}
    with tqdm(total=len(arms) * num_steps, unit="frame", disable=None, leave=False) as bar:
        measurement = _Measurement(lm, arms, files, chunk_frames, conditions or {}, trajectories, bar)
        for stream in streams:
            try:
                recording = measurement.of_recording(stream)
            except DataError as error:
                failures[stream.name] = str(error)
                continue
            reason = _failure_of(recording)
            if reason is None:
                recordings.append(recording)
            else:
                failures[stream.name] = reason
    return MeasuredRecordings(recordings, failures, measurement.num_reused)


@dataclass
class _Measurement:
    """What the passes of a measurement share, see `measure`."""

    lm: LMModel
    arms: Sequence[Arm]
    files: LossFiles
    chunk_frames: int
    conditions: TextConditions
    trajectories: Path | None
    bar: tqdm
    num_reused: int = 0

    def of_recording(self, stream: CodeStream) -> MeasuredRecording:
        """A recording in all arms, each from its file or kept as one."""
        recording = MeasuredRecording(stream.name, stream.num_frames, codes_digest(stream))
        identity = {
            "name": recording.name,
            "num_frames": recording.num_frames,
            "codes_sha256": recording.codes_sha256,
        }
        for arm in self.arms:
            path = self.files.path(recording.name, recording.codes_sha256, arm)
            losses = self.files.read(path, identity | {"arm": arm}, num_codebooks=self.lm.dep_q)
            inner = self._trajectories_path(path) if arm == "on" else None
            if losses is None or (inner is not None and not _is_readable(inner)):
                losses = self._run(stream, arm, inner)
                self.files.write(path, identity | {"arm": arm}, losses)
            else:
                self.num_reused += 1
                self.bar.total -= stream.num_frames + max(self.lm.delays)
                self.bar.refresh()
            recording.files[arm], recording.losses[arm] = path, losses
            if inner is not None:
                recording.trajectories = inner
        return recording

    def _trajectories_path(self, path: Path) -> Path | None:
        return None if self.trajectories is None else self.trajectories / path.name

    def _run(self, stream: CodeStream, arm: Arm, inner: Path | None) -> StreamLosses:
        enter_arm(self.lm, arm)
        trajectories = StreamTrajectories(self.lm)
        self.bar.set_description(f"{stream.name[-30:]} [{arm}]")
        start = time.perf_counter()
        try:
            with nullcontext() if inner is None else trajectories.recording():
                losses = stream_losses(
                    self.lm,
                    stream,
                    chunk_frames=self.chunk_frames,
                    own_text=self.files.own_text,
                    conditions=self.conditions,
                    on_steps=self.bar.update,
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise ConfigError(
                f"--chunk-frames: {self.chunk_frames} frames at once do not fit into memory; take fewer."
            ) from None
        if inner is not None:
            inner.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                inner.unlink()  # what was there is damaged
            save_trajectories(inner, trajectories.losses(), facts={"recording": stream.name})
        seconds = time.perf_counter() - start
        mean = float(losses.audio.nanmean())
        with self.bar.external_write_mode():
            say(
                f"{stream.name} [{arm}]: {stream.num_frames:,} frames in {seconds:.1f} s, "
                f"audio loss {mean:.4f}"
            )
        return losses


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(tensors[name].cpu().numpy().tobytes())
    return hasher.hexdigest()


def _is_readable(trajectories: Path) -> bool:
    try:
        load_trajectories(trajectories)
    except StateError:
        return False
    return True


def _failure_of(recording: MeasuredRecording) -> str | None:
    for arm, losses in recording.losses.items():
        frame = losses.first_failure()
        if frame is not None:
            return f"the losses of arm {arm} are not finite from the chunk with frame {frame} on"
    return None


def codes_digest(stream: CodeStream) -> str:
    """SHA-256 of all codes of a recording.

    Raises:
        DataError: the stream cannot be read.
    """
    hasher = hashlib.sha256(str(stream.num_frames).encode())
    for start in range(0, stream.num_frames, _BLOCK_FRAMES):
        codes = stream.frames(start, min(start + _BLOCK_FRAMES, stream.num_frames))
        hasher.update(codes.cpu().T.contiguous().numpy().astype("<i4").tobytes())
    return hasher.hexdigest()
