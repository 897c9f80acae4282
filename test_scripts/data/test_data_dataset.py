"""Chunks and loaders: the right tokens, the same batches however they are loaded."""

import json
from itertools import islice

import pytest
import torch

from conftest import LetterTokenizer
from finetune.data.batches import dataset as dataset_module
from finetune.data.batches.chunks import build_index
from finetune.data.batches.dataset import Batch, ChunkDataset
from finetune.data.batches.loader import build_eval_loader, build_train_loader
from finetune.data.batches.shuffled_sampler import GlobalBatchSampler, eval_rows
from finetune.data.recordings.lines import Recording
from finetune.errors import DataError

K = 2
LENGTHS = [7, 4, 9]
CHUNK_FRAMES = 4


class CountingCache:
    """Codes 1000 * recording + 100 * row + frame."""

    def load(self, recording, start_frame=0, num_frames=None):
        i = int(recording.path.stem)
        frames = torch.arange(start_frame, start_frame + num_frames)
        return 1000 * i + 100 * torch.arange(2 * K)[:, None] + frames


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path)


def make_dataset(tmp_path, *, context_frames=0):
    recordings = []
    for i, length in enumerate(LENGTHS):
        path = tmp_path / f"{i}.wav"
        words = [["abc", [0.17, 0.3], "SPEAKER_MAIN"], ["d", [0.40, 0.5], "SPEAKER_MAIN"]]
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
        recordings.append(Recording(path, length * 0.08, path.with_suffix(".json")))
    return ChunkDataset(
        recordings,
        build_index(LENGTHS, chunk_frames=CHUNK_FRAMES),
        CountingCache(),
        chunk_frames=CHUNK_FRAMES,
        context_frames=context_frames,
        frame_rate=12.5,
        tokenizer=LetterTokenizer(),
        text_padding_id=3,
        end_of_text_padding_id=0,
    )


def train_batches(dataset, count, **changes):
    num_workers = changes.pop("num_workers", 0)
    settings = {"batch_size": 2, "rank": 0, "world_size": 1, "seed": 0, "shuffle": True} | changes
    sampler = GlobalBatchSampler(len(dataset), **settings)
    return list(islice(build_train_loader(dataset, sampler, num_workers=num_workers), count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a.conditions == b.conditions


def test_item_has_text_then_left_then_right(dataset):
    item = dataset[0]
    assert item.dtype == torch.int64
    assert item.tolist() == [
        [3, 0, 11, 12],  # the word starts at 0.17 s, in frame 2, and goes on in the next chunk
        [0, 1, 2, 3],
        [100, 101, 102, 103],
        [200, 201, 202, 203],
        [300, 301, 302, 303],
    ]


def test_frames_after_the_end_are_minus_one_in_all_rows(dataset):
    item = dataset[1]  # frames 4 to 6; "d" starts at 0.40 s, in frame 5 of the recording
    assert item[:, 3].tolist() == [-1] * 5
    assert item[0].tolist() == [13, 14, 3, -1]
    assert item[1].tolist() == [4, 5, 6, -1]


def test_context_is_in_front_of_the_chunk_and_the_rest_is_filled_up(tmp_path):
    dataset = make_dataset(tmp_path, context_frames=3)
    batch = dataset.batch([3, 4, 5])  # the third recording has 9 frames
    assert batch.context.tolist() == [0, 3, 3]
    assert batch.codes[0, 1].tolist() == [2000, 2001, 2002, 2003, -1, -1, -1]
    assert batch.codes[1, 1].tolist() == [2001, 2002, 2003, 2004, 2005, 2006, 2007]
    assert batch.codes[2, 1].tolist() == [2005, 2006, 2007, 2008, -1, -1, -1]
    assert batch.codes[1, 0].tolist() == [0, 11, 12, 13, 14, 3, 3]


def test_context_longer_than_a_chunk_is_what_the_recording_has(tmp_path):
    dataset = make_dataset(tmp_path, context_frames=6)
    batch = dataset.batch([4, 5])
    assert batch.context.tolist() == [4, 6]
    assert batch.codes[0, 1].tolist() == [*range(2000, 2008), -1, -1]


def test_words_at_frame_boundaries_keep_their_frame_in_every_chunk(dataset, tmp_path):
    words = [["e", [round(0.08 * frame, 2), 99], "SPEAKER_MAIN"] for frame in range(9)]
    (tmp_path / "2.json").write_text(json.dumps({"alignments": words}))
    text = torch.cat([dataset[i][0] for i in range(3, 6)])
    assert text.tolist() == [15] * 9 + [-1] * 3


def test_batch_says_where_its_chunks_come_from(dataset):
    batch = train_batches(dataset, 1, batch_size=6, shuffle=False)[0]
    assert isinstance(batch, Batch)
    assert {field.dtype for field in batch[:4]} == {torch.int64}
    assert batch.codes.shape == (6, 1 + 2 * K, CHUNK_FRAMES)
    assert batch.recording.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.start_frame.tolist() == [0, 4, 0, 0, 4, 8]
    assert torch.equal(batch.codes[:, 1, 0], 1000 * batch.recording + batch.start_frame)


def test_workers_do_not_change_the_batches(dataset):
    assert_same(train_batches(dataset, 7, num_workers=2), train_batches(dataset, 7))


def test_restart_continues_where_it_stopped(dataset):
    assert_same(train_batches(dataset, 4, start_sample=6), train_batches(dataset, 7)[3:])


def test_ranks_together_have_the_batches_of_one_rank(dataset):
    whole = train_batches(dataset, 5, batch_size=4)
    ranks = [train_batches(dataset, 5, rank=rank, world_size=2) for rank in range(2)]
    joined = [
        Batch(*(torch.cat(fields) for fields in zip(*(part[:4] for part in parts), strict=True)))
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole)


def test_data_set_smaller_than_a_batch_repeats(dataset):
    batch = train_batches(dataset, 1, batch_size=13)[0]
    assert len(batch.codes) == 13
    places = list(zip(batch.recording.tolist(), batch.start_frame.tolist(), strict=True))
    assert len(set(places[:6])) == len(set(places[6:12])) == 6


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_evaluation_has_every_chunk_once(dataset, world_size, batch_size):
    places = []
    for rank in range(world_size):
        rows = eval_rows(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
        assert len(rows) == -(-len(dataset) // (batch_size * world_size))
        for batch in build_eval_loader(dataset, [indices for indices in rows if indices]):
            assert 1 <= len(batch.codes) <= batch_size
            places += zip(batch.recording.tolist(), batch.start_frame.tolist(), strict=True)
    assert sorted(places) == [(chunk.recording, chunk.start_frame) for chunk in dataset.chunks]


def test_evaluation_is_in_order_and_can_be_repeated(dataset):
    loader = build_eval_loader(dataset, eval_rows(len(dataset), batch_size=4, rank=0, world_size=1))
    first = list(loader)
    assert torch.cat([batch.start_frame for batch in first]).tolist() == [0, 4, 0, 0, 4, 8]
    assert_same(list(loader), first)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_error_reaches_the_user_as_one_line(dataset, tmp_path, num_workers):
    (tmp_path / "1.json").write_text("{}")
    with pytest.raises(DataError, match=r"1\.json: expected") as caught:
        train_batches(dataset, 6, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_word_timings_are_read_once_while_they_fit(dataset, monkeypatch):
    reads = []
    load = dataset_module.load_alignments
    monkeypatch.setattr(dataset_module, "load_alignments", lambda path: reads.append(path.stem) or load(path))
    for _ in range(2):
        for i in range(len(dataset)):
            dataset[i]
    assert reads == ["0", "1", "2"]

    monkeypatch.setattr(dataset_module, "MAX_CACHED_TEXTS", 1)
    dataset[0]
    assert reads == ["0", "1", "2"]  # still there from before
    dataset._texts.clear()
    for i in (0, 2, 0):
        dataset[i]
    assert reads[3:] == ["0", "1", "0"]
