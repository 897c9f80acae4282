"""Audio files whose header says something else than they hold: read to the end, or refused in time."""

import json
import struct

import numpy as np
import pytest
import sphn

from audio_helpers import noise, write_flac
from faulty_data import NUM_SAMPLES, RATE, line_of, mp3, voices, wav, write_good
from finetune.data.audio import read as read_module
from finetune.data.audio.read import read_audio_header, read_pieces
from finetune.data.audio.wav import open_wav
from finetune.data.check.command import check
from finetune.data.manifest import write_manifest
from finetune.data.recordings.lengths import measure_file
from finetune.errors import DataError
from finetune.training.run import run_training
from run_helpers import run_args

SIZE = 4 * NUM_SAMPLES
UNKNOWN = {
    "ffmpeg": (0xFFFFFFFF, 0xFFFFFFFF),
    "zero": (0, 0),
    "zero-and-36": (0, 36),
    "sox": (0x7FFFF000, 0x7FFFF024),
    "largest-signed": (0x7FFFFFFF, 0x7FFFFFFF),
    "arecord": (0x80000000, 0x80000024),
    "near-the-largest": (0xFFFFFFFF - 36, 0xFFFFFFFF),
    "unknown-and-zero": (0xFFFFFFFF, 0),
    "only-riff-is-wrong": (None, 0),
}


def piped(name, **form):
    """A wav file with these sizes."""
    data_size, riff_size = UNKNOWN[name]
    content = bytearray(wav(voices("piped"), data_size=data_size, **form))
    content[4:8] = struct.pack("<I", riff_size)
    return bytes(content)


def read(path):
    return np.concatenate(list(read_pieces(path, sample_rate=read_audio_header(path).sample_rate)), axis=1)


@pytest.mark.parametrize("form", [{}, {"bits": 24}, {"bits": 32}, {"form": 3, "bits": 32}, {"form": 0xFFFE}])
@pytest.mark.parametrize("name", UNKNOWN)
def test_wav_files_that_were_written_to_a_pipe_are_read_to_the_end(tmp_path, name, form):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(voices("piped"), **form))
    expected = np.asarray(sphn.read(str(path))[0])
    path.write_bytes(piped(name, **form))
    assert read_audio_header(path).num_samples == NUM_SAMPLES
    assert np.array_equal(read(path), expected)


@pytest.mark.parametrize("bits, form", [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3), (16, 0xFFFE)])
@pytest.mark.parametrize("rate", [5000, 8000])
def test_wav_files_have_the_samples_that_sphn_finds(tmp_path, monkeypatch, bits, form, rate):
    monkeypatch.setattr(read_module, "BLOCK_SEC", 1)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(voices("same"), bits=bits, form=form, rate=rate))
    assert np.array_equal(read(path), np.asarray(sphn.read(str(path))[0]))


@pytest.mark.parametrize("name", UNKNOWN)
def test_manifest_check_and_training_agree_on_a_piped_file(tmp_path, demo, command, name):
    write_good(tmp_path, "a").write_bytes(piped(name))
    assert command(write_manifest, tmp_path)[0] == 0
    manifest = tmp_path / "manifest.jsonl"
    assert json.loads(manifest.read_text())["duration"] == 0.5
    status, output, _ = command(check, manifest)
    assert (status, "0 errors, 0 warnings" in output) == (0, True), output
    data = {"train_data": str(manifest), "num_workers": 0}
    run_training(run_args(demo, tmp_path / "run", "lora", data=data, max_steps=1, do_ckpt=False))


def test_a_file_without_samples_before_other_chunks_stays_empty(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(voices("none")[:, :0]) + b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert read_audio_header(path).num_samples == 0


def test_a_file_that_is_cut_is_refused_with_one_reason_everywhere(tmp_path, command):
    path = write_good(tmp_path, "a")
    path.write_bytes(path.read_bytes()[:-4000])
    reason = "truncated, the header claims 12000 samples and the file holds 11000"
    assert reason in measure_file(path).reason
    (tmp_path / "m.jsonl").write_bytes(line_of("a"))
    status, output, _ = command(check, tmp_path / "m.jsonl")
    assert status == 1 and reason in output
    assert output.count("export it again") == 1
    with pytest.raises(DataError, match=reason):
        read(path)


def test_long_wav_files_say_their_length_elsewhere(tmp_path):
    path = tmp_path / "a.wav"
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 0, SIZE, 0, 0)
    content = bytearray(wav(voices("long"), data_size=0xFFFFFFFF, before_data=sizes))
    content[:4] = b"RF64"
    path.write_bytes(content + b"junk at the end")
    assert open_wav(path).header.num_samples == NUM_SAMPLES
    assert np.abs(read(path) - voices("long")).max() < 1e-4


def opus_page(packets, *, granule, number, flags=0):
    table = b"".join(bytes([255] * (len(packet) // 255) + [len(packet) % 255]) for packet in packets)
    head = b"OggS" + struct.pack("<BBqIIIB", 0, flags, granule, 7, number, 0, len(table))
    page = head + table + b"".join(packets)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1
        crc &= 0xFFFFFFFF
    return page[:22] + struct.pack("<I", crc) + page[26:]


def write_opus(path, *, num_packets, claimed, packet=b"\xfb\x06"):
    """Packets of 120 ms of silence, and a last page that claims so many samples."""
    head = b"OpusHead" + struct.pack("<BBHIHB", 1, 2, 0, 48000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", 0)
    pages = [opus_page([head], granule=0, number=0, flags=2), opus_page([tags], granule=0, number=1)]
    for number, first in enumerate(range(0, num_packets, 250)):
        count = min(250, num_packets - first)
        is_last = first + count == num_packets
        granule = claimed if is_last else min(claimed, (first + count) * 5760)
        pages.append(opus_page([packet] * count, granule=granule, number=number + 2, flags=4 * is_last))
    path.write_bytes(b"".join(pages))


def test_opus_that_holds_what_it_claims_is_read(tmp_path):
    path = tmp_path / "a.opus"
    sphn.write_opus(str(path), voices("opus"), RATE)
    assert read(path).shape[1] == read_audio_header(path).num_samples
    write_opus(path, num_packets=20, claimed=20 * 5760 - 9000)  # the end of the last page is cut off
    assert read(path).shape[1] == 20 * 5760 - 9000


def test_opus_that_would_decode_to_more_than_it_claims_is_refused_before(tmp_path, command, monkeypatch):
    path = write_good(tmp_path, "a", ".opus")
    write_opus(path, num_packets=5000, claimed=6 * 48000)
    monkeypatch.setattr(sphn, "read_opus", None)
    with pytest.raises(DataError, match=r"the header claims 6\.00 s and the file holds 600\.00 s or more"):
        read(path)
    (tmp_path / "m.jsonl").write_bytes(line_of("a", ".opus", duration_sec=6))
    status, output, _ = command(check, tmp_path / "m.jsonl")
    assert status == 1 and "contradiction" in output
    assert "claims 6.00 s" in measure_file(path).reason


def flac(path, *, claimed):
    write_flac(path, noise(2 * RATE, 2), RATE)
    content = bytearray(path.read_bytes())
    packed = int.from_bytes(content[18:26], "big") >> 36 << 36 | claimed
    content[18:26] = packed.to_bytes(8, "big")
    path.write_bytes(content)


def test_flac_that_holds_more_than_it_claims_is_refused(tmp_path):
    flac(tmp_path / "a.flac", claimed=RATE)
    with pytest.raises(DataError, match=r"claims 1\.00 s and the file holds 2\.00 s"):
        read(tmp_path / "a.flac")


def test_flac_that_was_written_to_a_pipe_has_one_reason(tmp_path):
    flac(tmp_path / "a.flac", claimed=0)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="does not say how long it is"):
        read(tmp_path / "a.flac")
    assert "does not say how long it is" in measure_file(tmp_path / "a.flac").reason


def xing(frames):
    first = bytearray(mp3()[:417])
    first[36:52] = b"Xing" + struct.pack(">III", 3, frames, 417 * (frames % 2**20))
    return bytes(first) + mp3() * 20


def test_mp3_is_decoded_no_further_than_it_claims(tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3() * 20)  # its length is guessed, and may be wrong
    assert read(path).shape[1] == 400 * 1152
    path.write_bytes(xing(400))
    assert read(path).shape[1] == 400 * 1152
    path.write_bytes(xing(40))
    with pytest.raises(DataError, match=r"claims 1\.04 s and the file holds 3\."):
        read(path)
    path.write_bytes(xing(2**31))
    with pytest.raises(DataError, match="truncated"):
        read(path)
