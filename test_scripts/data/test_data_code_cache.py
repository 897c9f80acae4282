"""The code cache: encoded once, never half written, never silently wrong."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sphn
import torch
from safetensors.torch import load_file, save_file

from finetune.data.codes import cache as code_cache
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.code_file import BLOCK_FRAMES, code_file_bytes
from finetune.data.recordings.lines import Recording
from finetune.errors import DataError

K = 2
MIMI = SimpleNamespace(num_codebooks=K, sample_rate=24000)


def add_recording(folder, name, num_frames=5, *, channels=2, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.wav"
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, num_frames * 1920))
    sphn.write_wav(str(path), samples.astype(np.float32).squeeze(), 24000)
    return Recording(path, num_frames * 0.08, path.with_suffix(".json"))


@pytest.fixture
def recordings(tmp_path):
    return [add_recording(tmp_path / "data", f"r{i}", num_frames=3 + i) for i in range(5)]


@pytest.fixture
def encoded(monkeypatch):
    """Replace the codec by counted-up codes; the list gets the frames of each call."""
    calls = []

    def encode(mimi, audio):
        channels, num_samples = np.concatenate(list(audio), axis=1).shape
        num_frames = num_samples // 1920
        calls.append(num_frames)
        return torch.arange(channels * K * num_frames).view(channels, K, num_frames)

    monkeypatch.setattr(code_cache, "encode_recording", encode)
    return calls


@pytest.fixture
def make_cache(tmp_path):
    (tmp_path / "mimi.safetensors").write_bytes(b"weights")

    def make(**changes):
        settings = {"mimi_weights": tmp_path / "mimi.safetensors", "mimi_config": None, "num_codebooks": K}
        return CodeCache(**(settings | changes))

    return make


def fill(cache, recordings, **changes):
    return cache.fill(recordings, MIMI, progress=False, **changes)


def test_second_fill_encodes_nothing(recordings, encoded, make_cache):
    assert make_cache().missing(recordings) == recordings
    assert fill(make_cache(), recordings) == 5
    assert fill(make_cache(), recordings) == 0
    assert sorted(encoded) == [3, 4, 5, 6, 7]
    assert make_cache().missing(recordings) == []


def test_codes_lie_beside_the_audio_in_int16(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings[:1])
    assert cache.path(recordings[0]).parent == recordings[0].path.parent / ".moshi_ttt_codes"
    codes = load_file(cache.path(recordings[0]))["codes"]
    assert (codes.dtype, codes.shape) == (torch.int16, (2, K, 3))


def test_loading_has_left_before_right_and_only_the_wanted_frames(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings[:1])
    whole = cache.load(recordings[0])
    assert whole.dtype == torch.int64
    assert torch.equal(whole, torch.arange(12).view(4, 3))
    assert torch.equal(cache.load(recordings[0], 1, 2), whole[:, 1:])
    assert torch.equal(cache.load(recordings[0], start_frame=2), whole[:, 2:])
    assert cache.num_frames(recordings[0]) == 3
    with pytest.raises(ValueError, match="frames 2 to 4 of 3"):
        cache.load(recordings[0], 2, 2)


def test_large_codes_survive(recordings, monkeypatch, make_cache):
    codes = torch.full((2, K, 3), 40_000)
    monkeypatch.setattr(code_cache, "encode_recording", lambda mimi, audio: codes)
    cache = make_cache()
    fill(cache, recordings[:1])
    assert torch.equal(cache.load(recordings[0]), codes.flatten(0, 1))


def test_changed_audio_is_encoded_again(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings)
    touched = recordings[1].path
    os.utime(touched, ns=(0, touched.stat().st_mtime_ns + 1))
    longer = add_recording(touched.parent, "r2", num_frames=9)
    assert cache.missing([*recordings[:2], longer]) == [recordings[1], longer]
    with pytest.raises(DataError, match=r"r1\.wav: no codes at .* the audio changed or was never encoded"):
        cache.load(recordings[1])


@pytest.mark.parametrize("change", ["weights", "config", "num_codebooks"])
def test_other_codec_encodes_again(tmp_path, recordings, encoded, make_cache, change):
    fill(make_cache(), recordings)
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    other = {
        "weights": {"mimi_weights": tmp_path / "other.safetensors"},
        "config": {"mimi_config": {"frame_rate": 25}},
        "num_codebooks": {"num_codebooks": K + 1},
    }[change]
    assert make_cache(**other).missing(recordings) == recordings


def test_same_weights_under_another_name_are_the_same_codec(tmp_path, recordings, encoded, make_cache):
    fill(make_cache(), recordings)
    (tmp_path / "copy.safetensors").write_bytes(b"weights")
    assert make_cache(mimi_weights=tmp_path / "copy.safetensors").missing(recordings) == []


def test_moved_data_set_keeps_its_codes(tmp_path, recordings, encoded, make_cache):
    fill(make_cache(), recordings)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = [Recording(tmp_path / "moved" / r.path.name, r.duration_sec, r.path) for r in recordings]
    assert make_cache().missing(moved) == []


def test_files_of_one_name_size_and_time_do_not_share_codes_in_cache_dir(tmp_path, encoded, make_cache):
    first, second = (add_recording(tmp_path / folder, "a") for folder in "xy")
    for recording in (first, second):
        os.utime(recording.path, ns=(0, 10**18))
    cache = make_cache(cache_dir=tmp_path / "codes")
    assert fill(cache, [first, second]) == 2
    assert cache.path(first) != cache.path(second)
    assert {cache.path(first).parent, cache.path(second).parent} == {tmp_path / "codes"}


def test_names_that_are_as_long_as_names_can_be_get_codes(tmp_path, encoded, make_cache):
    recordings = [add_recording(tmp_path / "data", f"{'ä' * 123}{i}") for i in range(2)]
    cache = make_cache()
    assert fill(cache, recordings) == 2
    assert cache.path(recordings[0]) != cache.path(recordings[1]) and cache.missing(recordings) == []


def test_names_that_are_not_utf8_get_codes(tmp_path, encoded, make_cache):
    recording = add_recording(tmp_path / "data", "a", num_frames=3)
    odd = recording.path.with_name(os.fsdecode(b"\xff.wav"))
    recording.path.rename(odd)
    cache = make_cache()
    fill(cache, [odd_one := Recording(odd, 0.24, odd.with_suffix(".json"))])
    assert cache.load(odd_one).shape == (2 * K, 3)


def test_mono_recordings_have_the_codes_of_one_channel_where_they_may(tmp_path, encoded, make_cache):
    mono = add_recording(tmp_path, "a", num_frames=3, channels=1)
    with pytest.raises(DataError, match=r"a\.wav: mono, which trains 9 streams .* data\.mono"):
        fill(make_cache(), [mono])
    assert fill(make_cache(), [mono], allow_mono=True) == 1
    assert torch.equal(make_cache().load(mono), torch.arange(K * 3).view(K, 3))
    assert make_cache().entry(mono).channels == 1


def test_the_same_bytes_of_another_time_are_not_encoded_again(recordings, encoded, make_cache):
    fill(make_cache(), recordings[:2])
    before = make_cache().load(recordings[0])
    for recording in recordings[:2]:
        os.utime(recording.path, ns=(0, recording.path.stat().st_mtime_ns + 1))
    add_recording(recordings[1].path.parent, "r1", num_frames=4, seed=1)  # of the same size, but other bytes
    assert make_cache().missing(recordings[:2]) == recordings[:2]
    assert fill(make_cache(), recordings[:2]) == 1
    assert sorted(encoded) == [3, 4, 4]
    assert torch.equal(make_cache().load(recordings[0]), before)


def test_no_bit_changes_unnoticed(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings[:1])
    path = cache.path(recordings[0])
    content, codes = path.read_bytes(), cache.load(recordings[0])
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert torch.equal(cache.load(recordings[0]), codes)  # a bit that says nothing
        except DataError as error:
            assert re.search(rf"{path.name}: unusable cache file \(.*\); delete it", str(error))
        else:
            assert place < len(content) - codes.numel() * 2, "a bit of the codes"


def test_a_chunk_checks_its_own_blocks_only(tmp_path, encoded, make_cache):
    recording = add_recording(tmp_path, "long", num_frames=3 * BLOCK_FRAMES)
    cache = make_cache()
    fill(cache, [recording])
    whole = cache.load(recording)
    path = cache.path(recording)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(cache.load(recording, 5, 2 * BLOCK_FRAMES - 5), whole[:, 5 : 2 * BLOCK_FRAMES])
    with pytest.raises(DataError, match="its checksum is wrong"):
        cache.load(recording, 5, 2 * BLOCK_FRAMES - 4)


def test_audio_that_changed_under_its_codes_is_found(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings[:1])
    cache.verify(recordings[0])
    time = recordings[0].path.stat().st_mtime_ns
    content = bytearray(recordings[0].path.read_bytes())
    content[-1] ^= 1
    recordings[0].path.write_bytes(content)
    os.utime(recordings[0].path, ns=(time, time))
    with pytest.raises(DataError, match=r"r0\.wav holds other bytes than when it was encoded"):
        cache.verify(recordings[0])


def test_two_ranks_share_the_work(recordings, encoded, make_cache):
    counts = [fill(make_cache(), recordings, rank=rank, world_size=2) for rank in range(2)]
    assert counts == [3, 2]
    assert sorted(encoded) == [3, 4, 5, 6, 7]
    assert make_cache().missing(recordings) == []


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


@pytest.mark.parametrize("moment", ["encode_recording", "code_file_bytes", "os.replace"])
def test_killed_fill_leaves_no_half_file_and_can_go_on(recordings, encoded, make_cache, monkeypatch, moment):
    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"finetune.data.codes.cache.{moment}", kill)
        with pytest.raises(Killed):
            fill(make_cache(), recordings[:1])
    folder = make_cache().path(recordings[0]).parent
    assert list(folder.iterdir()) == []
    assert fill(make_cache(), recordings[:1]) == 1
    assert list(folder.iterdir()) == [make_cache().path(recordings[0])]


def test_corrupt_cache_file_is_named(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings)
    path = cache.path(recordings[0])
    for content in (path.read_bytes()[:-3], b"", b"garbage" * 9):
        path.write_bytes(content)
        for use in (cache.load, cache.num_frames):
            with pytest.raises(DataError, match=rf"{path.name}: unusable cache file \(.*\); delete it"):
                use(recordings[0])


def test_codes_of_another_recording_are_refused(recordings, encoded, make_cache):
    cache = make_cache()
    fill(cache, recordings)
    os.replace(cache.path(recordings[1]), cache.path(recordings[0]))
    with pytest.raises(DataError, match=r"made from other audio or another codec.*delete it"):
        cache.load(recordings[0])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, K + 1, 3), "3 codebooks instead of 2"),
        (torch.full((2, K, 3), -1), "negative numbers, not codes"),
        (torch.zeros(3, K, 3), r"shape \[3, 2, 3\]"),
        (None, "unusable"),
    ],
)
def test_cache_file_with_other_contents_is_refused(recordings, make_cache, codes, message):
    cache = make_cache()
    path, key = cache.locate(recordings[0])
    path.parent.mkdir()
    if codes is None:
        save_file({"other": torch.zeros(1)}, path, metadata={"key": key})
    else:
        facts = {"key": key, "codec": cache.codec, "audio_bytes": 1, "audio_sha256": ""}
        path.write_bytes(code_file_bytes(codes.long(), **facts))
    with pytest.raises(DataError, match=rf"{message}.*delete it"):
        cache.load(recordings[0])


def test_unwritable_folder_names_the_key_before_anything_is_encoded(
    tmp_path, recordings, encoded, make_cache
):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^data\.cache_dir: cannot write Mimi codes to .*file/codes \(.+\)"):
        fill(make_cache(cache_dir=tmp_path / "file" / "codes"), recordings)
    assert encoded == []


def test_full_disk_names_the_key(recordings, encoded, make_cache, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(DataError, match=r"^data\.cache_dir: .*No space left on device"):
        fill(make_cache(), recordings)


def test_unusable_recording_stops_the_fill(tmp_path, encoded, make_cache):
    recording = add_recording(tmp_path, "a")
    with pytest.raises(DataError, match=r"a\.wav: lasts 0\.40 s, shorter"):
        fill(make_cache(), [Recording(recording.path, 9.0, recording.alignment_path)])


def test_missing_files_are_named(tmp_path, make_cache):
    gone = Recording(tmp_path / "gone.wav", 1.0, tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"gone\.wav: cannot read the audio file"):
        make_cache().missing([gone])
    with pytest.raises(DataError, match=r"none: cannot read the Mimi weights"):
        make_cache(mimi_weights=tmp_path / "none")


def test_codec_with_other_codebooks_is_refused(recordings, make_cache):
    with pytest.raises(ValueError, match="mimi has 2 codebooks, the cache 3"):
        fill(make_cache(num_codebooks=3), recordings)
