"""Cutting recordings into chunks of equal length."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive frames of one recording.

    Attributes:
        recording: index of the recording in the data set.
        start_frame: first frame.
        num_frames: frames with data; the last chunk of a recording may have fewer than the others.
    """

    recording: int
    start_frame: int
    num_frames: int


def build_index(
    num_frames_per_recording: Sequence[int], *, chunk_frames: int, min_frames: int = 1
) -> list[Chunk]:
    """List the chunks of all recordings, in order; together they hold every frame once.

    Args:
        num_frames_per_recording: length of each recording in frames.
        chunk_frames: length of a chunk in frames.
        min_frames: shorter rests at the end of a recording are left out.

    Returns:
        The chunks by recording, then by time.

    Raises:
        ValueError: `min_frames` is not within 1 to `chunk_frames`.
    """
    if not 1 <= min_frames <= chunk_frames:
        raise ValueError(f"min_frames is {min_frames}, it must be 1 to chunk_frames = {chunk_frames}.")
    return [
        Chunk(recording=recording, start_frame=start, num_frames=min(chunk_frames, num_frames - start))
        for recording, num_frames in enumerate(num_frames_per_recording)
        for start in range(0, num_frames - min_frames + 1, chunk_frames)
    ]
