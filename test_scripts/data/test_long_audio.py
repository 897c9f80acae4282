"""Long recordings: pieces equal the whole, in every format, and every fault of a file is named."""

import os

import av
import numpy as np
import pytest
import soxr
import sphn

from audio_helpers import noise, write_flac
from finetune.data.audio import read as long_audio
from finetune.data.audio.read import read_audio, read_audio_header, read_pieces
from finetune.errors import DataError


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(long_audio, "BLOCK_SEC", 1)


def write(path, samples, rate):
    {
        ".wav": lambda: sphn.write_wav(str(path), samples, rate),
        ".flac": lambda: write_flac(path, samples, rate),
        ".opus": lambda: sphn.write_opus(str(path), samples, rate),
        ".mp3": lambda: write_mp3(path, samples, rate),
    }[path.suffix]()
    return path


def write_mp3(path, samples, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libmp3lame", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def read(path, **settings):
    return np.concatenate(list(read_pieces(path, sample_rate=24000, **settings)), axis=1)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("extra", [0, 1, 4321])  # around a block boundary
def test_pieces_are_exactly_what_reading_at_once_gives(tmp_path, suffix, rate, extra):
    path = write(tmp_path / f"a{suffix}", noise(2 * rate + extra, 2), rate)
    pieces = list(read_pieces(path, sample_rate=24000))
    assert len(pieces) == (2 if extra == 0 else 3)
    whole = np.asarray(sphn.FileReader(str(path)).decode_all(), np.float32)
    if rate != 24000:
        whole = soxr.resample(whole.T, rate, 24000).T
    joined = np.concatenate(pieces, axis=1)
    assert joined.shape[1] == round((2 * rate + extra) * 24000 / rate)
    length = min(joined.shape[1], whole.shape[1])
    np.testing.assert_allclose(joined[:, :length], whole[:, :length], atol=2e-6)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".opus", ".mp3"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000])
def test_every_format_and_rate_has_exactly_the_length_of_its_samples(tmp_path, suffix, rate):
    num_samples = 2 * rate + 1001
    path = write(tmp_path / f"a{suffix}", noise(num_samples, 2), 48000 if suffix == ".opus" else rate)
    if suffix == ".mp3":  # whose encoder adds some
        num_samples = np.asarray(sphn.FileReader(str(path)).decode_all()).shape[1]
        assert num_samples > 2 * rate
    elif suffix == ".opus":
        rate = 48000
        num_samples = read_audio_header(path).num_samples
    assert read(path).shape == (2, round(num_samples * 24000 / rate))
    assert read_audio(path, sample_rate=24000).shape == (2, round(num_samples * 24000 / rate))


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_mono_files_have_one_channel(tmp_path, suffix):
    samples = noise(30000)
    path = write(tmp_path / f"a{suffix}", samples, 24000)
    assert read_audio_header(path) == long_audio.AudioHeader(channels=1, sample_rate=24000, num_samples=30000)
    np.testing.assert_allclose(read(path), samples, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2])
def test_opus_is_read_whole_as_sphn_reads_it(tmp_path, channels):
    path = write(tmp_path / "a.opus", noise(96000, channels), 48000)
    (tmp_path / "b.ogg").write_bytes(path.read_bytes())  # the contents count, not the name
    assert read_audio_header(path) == long_audio.AudioHeader(channels, 48000, 96000)
    whole = sphn.read_opus(str(path))[0]
    for file in (path, tmp_path / "b.ogg"):
        pieces = list(read_pieces(file, sample_rate=48000))
        assert len(pieces) == 1 and np.array_equal(pieces[0], whole)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".opus"])
@pytest.mark.parametrize("missing_bytes", [2, 5000])
def test_truncated_file_is_refused(tmp_path, suffix, missing_bytes):
    path = write(tmp_path / f"a{suffix}", noise(96000), 48000)
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    with pytest.raises(DataError, match=rf"a{suffix}: (truncated|cannot be read)") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_file_of_which_resampling_leaves_nothing_is_refused(tmp_path):
    path = write(tmp_path / "a.wav", noise(1), 48000)
    with pytest.raises(DataError, match=r"a\.wav: too short, 1 samples at 48000 Hz are none at 24000 Hz"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no audio at all" * 100, b"OggS" + bytes(30) + b"OpusHead", None])
def test_file_that_is_no_audio_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.flac: cannot "):
        read_audio_header(tmp_path / "a.flac")


def test_pipes_and_devices_are_no_recordings(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    (tmp_path / "b.wav").symlink_to("/dev/zero")
    for name in ("a.wav", "b.wav"):  # to open a pipe would be to wait for ever
        with pytest.raises(DataError, match=rf"{name}: is a pipe or device"):
            read_audio_header(tmp_path / name)


@pytest.mark.parametrize("rate", [0, 1, 2**32 - 1])
def test_rates_that_no_recording_has_are_refused(tmp_path, capfd, rate):
    path = write(tmp_path / "a.wav", noise(2000), 24000)
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.wav: has .* samples per second, 1,000 to 768,000 are read"):
        read_audio_header(path)
    assert capfd.readouterr().err == ""  # sphn panics with a page of text


def test_length_must_agree_with_the_manifest(tmp_path):
    path = write(tmp_path / "a.flac", noise(3 * 16000), 16000)
    read(path, expected_duration_sec=3.05)
    with pytest.raises(DataError, match=r"a\.flac: lasts 3\.00 s, shorter than the manifest's 3\.20 s"):
        read(path, expected_duration_sec=3.2)


def test_reader_that_loses_its_place_is_noticed(tmp_path, monkeypatch):
    class Misplaced:
        def __init__(self, path):
            self.reader = Reader(path)
            self.sample_rate, self.channels = self.reader.sample_rate, self.reader.channels
            self.duration_sec = self.reader.duration_sec

        def decode(self, start_sec, duration_sec):
            return self.reader.decode(start_sec + (0.01 if start_sec else 0), duration_sec)

    Reader = sphn.FileReader
    path = write(tmp_path / "a.flac", noise(3 * 16000), 16000)
    monkeypatch.setattr(sphn, "FileReader", Misplaced)
    with pytest.raises(DataError, match=r"a\.flac: cannot be read in blocks"):
        read(path)
