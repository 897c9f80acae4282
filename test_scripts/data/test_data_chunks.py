"""The index covers what it should, once."""

import pytest

from finetune.data.batches.chunks import Chunk, build_index


def test_chunks_of_a_recording_are_consecutive_and_the_last_may_be_shorter():
    assert build_index([5, 2], chunk_frames=2) == [
        Chunk(0, 0, 2),
        Chunk(0, 2, 2),
        Chunk(0, 4, 1),
        Chunk(1, 0, 2),
    ]


@pytest.mark.parametrize("chunk_frames", [1, 3, 7, 100])
def test_every_frame_is_covered_once_in_order(chunk_frames):
    lengths = [7, 1, 30, 21]
    covered = [
        (chunk.recording, chunk.start_frame + frame)
        for chunk in build_index(lengths, chunk_frames=chunk_frames)
        for frame in range(chunk.num_frames)
    ]
    assert covered == [(recording, frame) for recording, n in enumerate(lengths) for frame in range(n)]
