"""The audio of spoken benchmarks becomes tokens: channels, rates, what cannot be used."""

import numpy as np
import pytest
import soxr
import sphn
import torch

from audio_helpers import noise, write_flac
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.encode_audio import encode_recording
from finetune.errors import ConfigError, DataError
from finetune.evaluation.spoken.encoding import encode_items
from finetune.evaluation.spoken.items import Item
from finetune.inference.speech_model import load_speech_model

K = 8


FRAME = 1920


@pytest.fixture(scope="module")
def speech(untrained_run):
    return load_speech_model(str(untrained_run("ttt")), device=torch.device("cpu"), dtype=torch.float32)


def write(path, *, num_samples=5 * FRAME, channels=1, rate=24000, seed=0):
    samples = noise(num_samples, channels, seed=seed)
    if path.suffix == ".flac":
        write_flac(path, samples, rate)
    else:
        sphn.write_wav(str(path), samples, rate)
    return Item(path.stem, path)


def test_audio_goes_into_the_own_stream(tmp_path, speech):
    item = write(tmp_path / "a.wav", num_samples=5 * FRAME + 7)
    (codes,), failures = encode_items([item], speech, cache_dir=str(tmp_path / "codes"))
    samples, _ = sphn.read(str(item.path))
    expected = encode_recording(speech.mimi, np.asarray(samples))
    assert not failures and codes.dtype == torch.int64 and codes.shape == (17, 6)
    assert torch.equal(codes[1 : 1 + K], expected[0])
    assert (codes[0] == -1).all() and (codes[1 + K :] == -1).all()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_any_sample_rate_is_resampled(tmp_path, speech, rate, suffix):
    item = write(tmp_path / f"a{suffix}", num_samples=rate // 2, rate=rate)
    (codes,), failures = encode_items([item], speech)
    samples = np.asarray(sphn.FileReader(str(item.path)).decode_all(), np.float32)
    resampled = soxr.resample(samples.T, rate, 24000).T
    assert not failures and codes.shape[1] == 7  # 6.25 frames
    expected = encode_recording(speech.mimi, np.ascontiguousarray(resampled))
    # soxr has the same samples in one piece and as a stream up to rounding.
    assert (codes[1 : 1 + K] == expected[0]).float().mean() > 0.95


def test_of_stereo_files_the_left_channel_is_taken_and_that_is_said(tmp_path, speech, caplog):
    stereo = write(tmp_path / "stereo.wav", channels=2)
    samples = np.asarray(sphn.read(str(stereo.path))[0])
    sphn.write_wav(str(tmp_path / "left.wav"), samples[0], 24000)
    left = Item("left", tmp_path / "left.wav")
    (of_stereo, of_left), failures = encode_items([stereo, left], speech)
    assert not failures and torch.equal(of_stereo, of_left)
    assert "1 of 2 files are stereo; their left channels are used" in caplog.text


def test_silent_user_and_own_text_fill_their_rows(tmp_path, speech):
    items = [write(tmp_path / "a.wav"), write(tmp_path / "b.wav", num_samples=9 * FRAME)]
    codes, _ = encode_items(items, speech, user="silent", text="own")
    silence = encode_recording(speech.mimi, np.zeros((1, 9 * FRAME), np.float32))[0]
    for row, length in zip(codes, (5, 9), strict=True):
        assert torch.equal(row[1 + K :], silence[:, :length])
        assert (row[0] == speech.lm.ungenerated_token_id).all()
    for options in ({"user": "real"}, {"text": "given"}):
        with pytest.raises(ConfigError, match="is unknown; it is one of"):
            encode_items(items, speech, **options)


def test_files_that_cannot_be_used_are_failures_by_name(tmp_path, speech):
    good = write(tmp_path / "good.wav")
    cut = write(tmp_path / "cut.wav")
    cut.path.write_bytes(cut.path.read_bytes()[:-4000])
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF and nothing else")
    (tmp_path / "zero.wav").touch()
    empty = write(tmp_path / "empty.wav", num_samples=0)
    surround = write(tmp_path / "surround.flac", channels=3)
    short = write(tmp_path / "short.wav", num_samples=1, rate=48000)
    others = [Item(name, tmp_path / f"{name}.wav") for name in ("corrupt", "zero", "missing")]
    items = [cut, *others, good, empty, surround, short]
    codes, failures = encode_items(items, speech)
    assert [row is not None for row in codes] == [item is good for item in items]
    assert set(failures) == {"cut", "corrupt", "zero", "missing", "empty", "surround", "short"}
    texts = {"cut": "truncated", "missing": "does not exist", "surround": "3 channels", "short": "too short"}
    for name, text in texts.items():
        assert text in failures[name]
    assert all(str(tmp_path) in reason and "\n" not in reason for reason in failures.values())


def test_files_are_encoded_once(tmp_path, speech, monkeypatch):
    item = write(tmp_path / "a.wav")
    first = encode_items([item], speech, cache_dir=str(tmp_path / "codes"))[0][0]
    monkeypatch.setattr(CodeCache, "_write", None)
    assert torch.equal(encode_items([item], speech, cache_dir=str(tmp_path / "codes"))[0][0], first)
    assert not (tmp_path / ".moshi_ttt_codes").exists()


def test_a_cache_that_cannot_be_written_ends_the_run(tmp_path, speech):
    (tmp_path / "codes").touch()
    with pytest.raises(DataError, match="--cache-dir: cannot write"):
        encode_items([write(tmp_path / "a.wav")], speech, cache_dir=str(tmp_path / "codes"))
