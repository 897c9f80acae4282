"""Word timings are written whole or not at all; shares of the work."""

import json
import os
import signal
import time
from itertools import chain
from pathlib import Path

import pytest

from finetune.annotation.annotate_file import write_alignments
from finetune.annotation.recordings import AudioRecording, take_shard
from finetune.data.words import Word


def test_killed_it_leaves_no_half_written_file(tmp_path):
    words = {"left": [Word("word", index / 10, index / 10 + 0.1) for index in range(30_000)]}
    for delay_sec in (0.0, 0.03, 0.05, 0.07):
        process = os.fork()
        if process == 0:
            try:
                for index in range(1_000_000):
                    write_alignments(tmp_path / f"{index % 3}.json", words)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 60
        while not (tmp_path / "0.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay_sec)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        for path in tmp_path.glob("*.json"):
            assert len(json.loads(path.read_text())["alignments"]) == 30_000
            path.unlink()


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_alignments(path, {"left": [Word("old", 0.0, 1.0)]})
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_alignments(path, {"left": [Word("new", 0.0, 1.0)]})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_shards_partition_the_recordings(count):
    recordings = [AudioRecording(Path(f"{index}.wav")) for index in range(11)]
    shards = [take_shard(recordings, f"{index}/{count}") for index in range(1, count + 1)]
    assert sorted(chain(*shards), key=recordings.index) == recordings
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
