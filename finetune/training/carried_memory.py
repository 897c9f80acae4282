"""Memory of the recordings in training: fast weights carried from one chunk to the next.

Each row of each micro-batch of each process is a lane, numbered as in `ContiguousBatchSampler`; a lane
follows one recording after the other and has a memory of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.data.batches.dataset import Batch
from finetune.errors import CheckpointError
from moshi_ttt.carry import NewFrames, TTTCarry, empty_carry, row_of_carry, stack_carries
from moshi_ttt.hybrid_model import ttt_layers
from moshi_ttt.inner_loop import compute_dtype


@dataclass(frozen=True)
class LaneMemory:
    """What a lane remembers.

    Attributes:
        recording: index of the recording that it is about.
        next_frame: of that recording, where the next chunk must start.
        carries: by layer, of one row.
    """

    recording: int
    next_frame: int
    carries: dict[int, TTTCarry]


class CarriedMemory:
    """The memories of this process's lanes; without TTT layers there is nothing to remember.

    Args:
        model: a prepared model.
        device: of the memories.
        chunk_frames: frames of a chunk, its context not counted.
    """

    def __init__(self, model: LMModel, device: torch.device, *, chunk_frames: int) -> None:
        self._layers = ttt_layers(model)
        self._chunk_frames = chunk_frames
        self._device = device
        self.lanes: dict[int, LaneMemory] = {}
        self._staged: dict[int, LaneMemory] = {}

    @contextmanager
    def carried(self, lanes: Sequence[int], batch: Batch) -> Iterator[None]:
        """Let the passes inside go on from these lanes' memories; backward belongs inside as well.

        What they remember afterwards counts from `commit` on, so a step that is rejected changes nothing. The
        context of a chunk is read with the memory and not learned again.

        Args:
            lanes: of the batch's rows.
            batch: a row whose chunk starts a recording starts at `W0`.
        """
        rows = list(zip(lanes, batch.recording.tolist(), batch.start_frame.tolist(), strict=True))
        new_frames = None
        if batch.codes.shape[2] > self._chunk_frames:
            new_frames = NewFrames(tuple(batch.context.tolist()), self._chunk_frames)
        after: dict[int, TTTCarry] = {}
        with ExitStack() as stack:
            for index, layer in self._layers.items():
                carry = stack_carries([self._carry(index, *row) for row in rows])
                keep = partial(after.__setitem__, index)
                stack.enter_context(layer.passing(carry=carry, new_frames=new_frames, keep_carry=keep))
            yield
        for row, (lane, recording, start_frame) in enumerate(rows):
            carries = {index: row_of_carry(after[index], row) for index in self._layers}
            self._staged[lane] = LaneMemory(recording, start_frame + self._chunk_frames, carries)

    def commit(self) -> None:
        """Make what was learned since the last commit the memory that the next chunks start from."""
        self.lanes |= self._staged
        self._staged.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of every lane, by a name that is unique among all processes."""
        return {
            f"{lane}.{index}.{name}": tensor
            for lane, memory in self.lanes.items()
            for index, carry in memory.carries.items()
            for name, tensor in _named_tensors(carry)
        }

    def places(self) -> dict[int, tuple[int, int]]:
        """Recording and next frame of each lane."""
        return {lane: (memory.recording, memory.next_frame) for lane, memory in self.lanes.items()}

    def restore(self, places: dict[int, tuple[int, int]]) -> None:
        """Make room for memories that `tensors` then names, to be copied into.

        Args:
            places: what `places` returned, of the lanes of this process.
        """
        self.lanes = {}
        for lane, (recording, next_frame) in places.items():
            carries = {}
            for index in self._layers:
                carry = self._empty(index)
                num_pending = next_frame % self._layers[index].config.mini_batch_size
                carries[index] = carry._replace(num_pending=(num_pending,))
            self.lanes[lane] = LaneMemory(recording, next_frame, carries)

    def _carry(self, index: int, lane: int, recording: int, start_frame: int) -> TTTCarry:
        if start_frame == 0:
            return self._empty(index)
        memory = self.lanes.get(lane)
        if memory is None or (memory.recording, memory.next_frame) != (recording, start_frame):
            # The samplers and we agree, unless a checkpoint was changed after it was written.
            raise CheckpointError(f"resume: the memory of row {lane} is not of this place in the data.")
        return memory.carries[index]

    def _empty(self, index: int) -> TTTCarry:
        layer = self._layers[index]
        dtype = compute_dtype(layer.ttt_norm_weight)
        return empty_carry(layer.config, batch_size=1, device=self._device, dtype=dtype)


def _named_tensors(carry: TTTCarry) -> Iterator[tuple[str, Tensor]]:
    for name, value in carry._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
        elif name != "num_pending" and value is not None:
            yield from ((f"{name}.{i}", tensor) for i, tensor in enumerate(value))
