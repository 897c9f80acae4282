"""Reading audio: exact lengths, and every fault of a file named."""

import struct

import numpy as np
import pytest
import sphn

from finetune.data.audio.read import read_audio, read_pieces
from finetune.errors import DataError


def write_wav(path, num_samples, *, rate=24000):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (2, num_samples)).astype(np.float32)
    sphn.write_wav(str(path), samples, rate)
    return samples


def write_float_wav(path, samples):
    body = samples.T.astype("<f4").tobytes()
    channels = len(samples)
    audio_format = struct.pack("<HHIIHH", 3, channels, 24000, 24000 * 4 * channels, 4 * channels, 32)
    content = (
        b"WAVEfmt " + struct.pack("<I", 16) + audio_format + b"data" + struct.pack("<I", len(body)) + body
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", len(content)) + content)


def test_file_at_the_wanted_rate_is_returned_as_it_is(tmp_path):
    samples = write_wav(tmp_path / "a.wav", 2401)
    read = read_audio(tmp_path / "a.wav", sample_rate=24000)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, samples, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("num_samples", [1001, 1002, 1003])
def test_resampled_length_is_exact(tmp_path, rate, num_samples):
    write_wav(tmp_path / "a.wav", num_samples, rate=rate)
    read = read_audio(tmp_path / "a.wav", sample_rate=24000)
    assert read.shape == (2, round(num_samples * 24000 / rate))


def test_resampling_keeps_a_tone_and_the_channels_apart(tmp_path):
    def tone(rate):
        return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)

    sphn.write_wav(
        str(tmp_path / "a.wav"), np.stack([tone(44100), 0 * tone(44100)]).astype(np.float32), 44100
    )
    left, right = read_audio(tmp_path / "a.wav", sample_rate=24000)
    np.testing.assert_allclose(left[500:-500], tone(24000)[500:-500], atol=1e-3)
    assert np.abs(right).max() < 1e-4


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (1, r"a\.wav: mono, which trains 9 streams instead of 17; make it a stereo file"),
        (3, r"a\.wav: has 3 channels; make it mono or stereo"),
    ],
)
def test_other_than_two_channels_is_refused(tmp_path, channels, message):
    write_float_wav(tmp_path / "a.wav", np.zeros((channels, 100)))
    with pytest.raises(DataError, match=message):
        read_audio(tmp_path / "a.wav", sample_rate=24000)


@pytest.mark.parametrize("missing_bytes", [4, 2000])
def test_truncated_wav_is_refused(tmp_path, missing_bytes):
    path = tmp_path / "a.wav"
    write_wav(path, 1000)
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    present = 1000 - missing_bytes // 4
    with pytest.raises(DataError, match=rf"a\.wav: truncated, .* claims 1000 .* holds {present}"):
        read_audio(path, sample_rate=24000)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"no audio at all" * 100, None])
def test_file_that_is_no_audio_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"a\.wav: cannot (be read as audio|read the audio file) \("
    ) as caught:
        read_audio(path, sample_rate=24000)
    assert "\n" not in str(caught.value)


def test_empty_wav_is_refused(tmp_path):
    write_wav(tmp_path / "a.wav", 0)
    with pytest.raises(DataError, match=r"a\.wav: holds no samples"):
        read_audio(tmp_path / "a.wav", sample_rate=24000)


def test_wav_of_which_resampling_leaves_nothing_is_refused(tmp_path):
    write_wav(tmp_path / "a.wav", 1, rate=48000)
    with pytest.raises(DataError, match=r"a\.wav: too short, 1 samples at 48000 Hz are none at 24000 Hz"):
        read_audio(tmp_path / "a.wav", sample_rate=24000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, value):
    samples = np.zeros((2, 100))
    samples[1, 7] = value
    write_float_wav(tmp_path / "a.wav", samples)
    with pytest.raises(DataError, match=r"a\.wav: holds NaN or infinite samples"):
        read_audio(tmp_path / "a.wav", sample_rate=24000)


@pytest.mark.parametrize(
    ("expected_sec", "relation"), [(2.05, None), (1.05, None), (2.15, "shorter"), (0.95, "longer")]
)
def test_length_must_agree_with_the_manifest(tmp_path, expected_sec, relation):
    write_wav(tmp_path / "a.wav", 16000, rate=8000)
    if relation is None:
        list(read_pieces(tmp_path / "a.wav", sample_rate=24000, expected_duration_sec=expected_sec))
        return
    with pytest.raises(
        DataError, match=rf"lasts 2\.00 s, {relation} than the manifest's {expected_sec:.2f} s"
    ):
        list(read_pieces(tmp_path / "a.wav", sample_rate=24000, expected_duration_sec=expected_sec))
