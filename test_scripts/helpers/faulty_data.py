"""Recordings, word timings and manifests with one fault each, and odd ones that are right; made by code."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sphn

from audio_helpers import write_flac
from faulty_lines import LINES, ODD_LINES

RATE, SEC = 24000, 0.5
NUM_SAMPLES = int(RATE * SEC)
WORDS = [["Hello", [0.05, 0.2], "SPEAKER_MAIN"], ["hi", [0.25, 0.4], "SPEAKER_USER"]]


@dataclass(frozen=True)
class Case:
    """One recording of the corpus.

    Attributes:
        name: of the case, and the stem of its files.
        code: what the check must report, None where the recording is right.
        line: of the manifest, without its line feed.
        by_header: whether a look at the files without decoding finds it.
    """

    name: str
    code: str | None
    line: bytes
    by_header: bool = field(default=True)


def voices(name: str, num_samples: int = NUM_SAMPLES, channels: int = 2) -> np.ndarray:
    """Noise that only the recording of this name has, float32 `[channels, n]`."""
    random = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))
    return random.uniform(-0.4, 0.4, (channels, num_samples)).astype(np.float32)


def wav(
    samples: np.ndarray,
    *,
    rate: int = RATE,
    bits: int = 16,
    form: int = 1,
    channels: int | None = None,
    data_size: int | None = None,
    consistent: bool = True,
    before_data: bytes = b"",
    magic: tuple[bytes, bytes] = (b"RIFF", b"WAVE"),
) -> bytes:
    """A wav file of `[channels, n]`; the rest may lie, and RIFF's size with it if `consistent`."""
    count = len(samples) if channels is None else channels
    if form == 3:
        data = samples.T.astype("<f4" if bits == 32 else "<f8").tobytes()
    else:
        pcm = np.round(samples.T * (2 ** (min(bits, 32) - 1) - 1)).astype("<i4")
        used = max(1, min(bits, 32) // 8)
        data = pcm.reshape(-1, 1).view(np.uint8)[:, :used].tobytes()
    block = count * max(bits // 8, 1)
    head = struct.pack("<HHIIHH", form, count, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    if form == 0xFFFE:
        guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
        head += struct.pack("<HHI", 22, bits, 3) + guid
    chunks = b"fmt " + struct.pack("<I", len(head)) + head + before_data
    claimed = len(data) if data_size is None else data_size
    chunks += b"data" + struct.pack("<I", claimed) + data
    size = len(chunks) + 4 + (claimed - len(data) if consistent else 0)
    return magic[0] + struct.pack("<I", min(size, 2**32 - 1)) + magic[1] + chunks


def _cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def _damaged(content: bytes, start: float, stop: float) -> bytes:
    first, last = int(len(content) * start), int(len(content) * stop)
    return content[:first] + bytes(byte ^ 0xA5 for byte in content[first:last]) + content[last:]


def _with(samples: np.ndarray, value: float) -> np.ndarray:
    samples[1, 77] = value
    return samples


def _clipped(samples: np.ndarray) -> np.ndarray:
    samples[0, ::50] = 1.0
    return samples


def _silent(samples: np.ndarray, channel: int) -> np.ndarray:
    samples[channel] = 0
    return samples


def flac(folder: Path, name: str) -> bytes:
    """A good flac file."""
    path = folder / ".scratch.flac"
    write_flac(path, voices(name), RATE, frame_samples=1152)
    return path.read_bytes()


def opus(folder: Path, name: str) -> bytes:
    """A good Ogg-Opus file."""
    path = folder / ".scratch.opus"
    sphn.write_opus(str(path), voices(name), RATE)
    return path.read_bytes()


def mp3() -> bytes:
    """Frames of silence, 0.52 s at 44.1 kHz."""
    return (b"\xff\xfb\x90\x00" + bytes(413)) * 20


# name: (code, samples -> bytes, whether it shows without decoding)
Sound = tuple[str | None, Callable[[np.ndarray], bytes], bool]
WAVS: dict[str, Sound] = {
    "wrong-magic": ("unreadable", lambda x: wav(x, magic=(b"RIFX", b"WAVE")), True),
    "not-wave": ("unreadable", lambda x: wav(x, magic=(b"RIFF", b"AVI ")), True),
    "no-magic": ("unreadable", lambda x: wav(x)[8:], True),
    "zero-rate": ("sample-rate", lambda x: wav(x, rate=0), True),
    "tiny-rate": ("sample-rate", lambda x: wav(x, rate=1), True),
    "huge-rate": ("sample-rate", lambda x: wav(x, rate=2**32 - 1), True),
    "high-rate": ("sample-rate", lambda x: wav(x, rate=800_000), True),
    "zero-channels": ("unreadable", lambda x: wav(x, channels=0), True),
    "mono": ("mono", lambda x: wav(x[:1]), True),
    "three-channels": ("channels", lambda x: wav(np.concatenate([x, x[:1]])), True),
    "six-channels": ("channels", lambda x: wav(np.concatenate([x, x, x])), True),
    "many-channels": ("unreadable", lambda x: wav(x, channels=65535), True),
    "data-size-too-large": ("truncated", lambda x: wav(x, data_size=4 * NUM_SAMPLES + 4000), True),
    "data-size-10-hours": ("truncated", lambda x: wav(x, data_size=RATE * 4 * 36000), True),
    "data-size-beyond-riff": ("truncated", lambda x: wav(x, data_size=10**6, consistent=False), True),
    "data-size-too-small": ("duration", lambda x: wav(x, data_size=400), True),
    "zero-bits": ("unreadable", lambda x: wav(x, bits=0), True),
    "seven-bits": ("unreadable", lambda x: wav(x, bits=7), True),
    "seventeen-bits": ("unreadable", lambda x: wav(x, bits=17), True),
    "64-bit-pcm": ("unreadable", lambda x: wav(x, bits=64), True),
    "unknown-form": ("unreadable", lambda x: wav(x, form=0x1234), True),
    "adpcm": ("unreadable", lambda x: wav(x, form=2), True),
    "form-zero": ("unreadable", lambda x: wav(x, form=0), True),
    "no-samples": ("empty", lambda x: wav(x[:, :0]), True),
    "cut-in-half": ("truncated", lambda x: _cut(wav(x), 0.5), True),
    "cut-at-the-end": ("truncated", lambda x: wav(x)[:-8], True),
    "cut-in-the-header": ("unreadable", lambda x: wav(x)[:30], True),
    "header-only": ("truncated", lambda x: wav(x)[:44], True),
    "chunk-too-long": (
        "unreadable",
        lambda x: wav(x, before_data=b"LIST" + struct.pack("<I", 2**31)),
        True,
    ),
    "empty-file": ("unreadable", lambda _: b"", True),
    "one-byte": ("unreadable", lambda _: b"R", True),
    "zeros": ("unreadable", lambda _: bytes(5000), True),
    "text-named-wav": ("unreadable", lambda _: b"see the other folder\n" * 40, True),
    "html-named-wav": ("unreadable", lambda _: b"<!DOCTYPE html><title>404</title>" * 40, True),
    "lfs-pointer": ("unreadable", lambda _: b"version https://git-lfs.github.com/spec/v1\n", True),
    "noise-named-wav": ("unreadable", lambda x: x.tobytes(), True),
    "zip-named-wav": ("unreadable", lambda x: b"PK\x03\x04" + zlib.compress(x.tobytes()), True),
    "nan": ("not-finite", lambda x: wav(_with(x, np.nan), form=3, bits=32), False),
    "infinite": ("not-finite", lambda x: wav(_with(x, np.inf), form=3, bits=32), False),
    "minus-infinite-64": ("not-finite", lambda x: wav(_with(x, -np.inf), form=3, bits=64), False),
    "clipped": ("clipping", lambda x: wav(_clipped(x)), False),
    "float-as-16-bit": ("clipping", lambda x: wav(x * 32768, form=3, bits=32), False),
    "silent-left": ("silent-channel", lambda x: wav(_silent(x, 0)), False),
    "silent-right": ("silent-channel", lambda x: wav(_silent(x, 1)), False),
    "one-sample": ("duration", lambda x: wav(x[:, :1]), True),
    "too-short": ("duration", lambda x: wav(x[:, :2000]), True),
    "longer-than-said": ("duration", lambda x: wav(np.tile(x, 4)), True),
    "good": (None, wav, True),
    "good-data-size-unset": (None, lambda x: wav(x, data_size=2**32 - 1), True),
    "good-data-size-zero": (None, lambda x: wav(x, data_size=0), True),
    "good-24-bit": (None, lambda x: wav(x, bits=24), True),
    "good-32-bit": (None, lambda x: wav(x, bits=32), True),
    "good-float": (None, lambda x: wav(x, form=3, bits=32), True),
    "good-double": (None, lambda x: wav(x, form=3, bits=64), True),
    "good-extensible": (None, lambda x: wav(x, form=0xFFFE), True),
    "good-extra-chunk": (
        None,
        lambda x: wav(x, before_data=b"LIST" + struct.pack("<I", 8) + b"INFOabcd"),
        True,
    ),
    "good-tail": (None, lambda x: wav(x) + b"LIST" + struct.pack("<I", 4) + b"INFO", True),
    "good-8-kHz": (None, lambda x: wav(x[:, :4000], rate=8000), True),
    "good-48-kHz": (None, lambda x: wav(np.tile(x, 2), rate=48000), True),
    "good-a-little-short": (None, lambda x: wav(x[:, : NUM_SAMPLES - 2000]), True),
    "good-a-little-long": (None, lambda x: wav(np.tile(x, 2)), True),
}
# The fault is in the compressed stream; name: (code, suffix, good bytes -> bytes, shows without decoding)
STREAMS: dict[str, tuple[str | None, str, Callable[[bytes], bytes], bool]] = {
    "flac-good": (None, ".flac", bytes, True),
    "flac-cut": ("truncated", ".flac", lambda b: _cut(b, 0.5), False),
    "flac-damaged": ("truncated", ".flac", lambda b: _damaged(b, 0.4, 0.6), False),
    "flac-header-only": ("unreadable", ".flac", lambda b: b[:42], True),
    "flac-magic-only": ("unreadable", ".flac", lambda b: b[:4], True),
    "flac-header-damaged": ("unreadable", ".flac", lambda b: _damaged(b, 0, 0.001), True),
    "opus-good": (None, ".opus", bytes, True),
    "opus-cut": ("unreadable", ".opus", lambda b: _cut(b, 0.6), False),
    "opus-damaged": ("unreadable", ".opus", lambda b: _damaged(b, 0.4, 0.6), False),
    "opus-head-only": ("empty", ".opus", lambda b: b[:47], True),
    "opus-magic-only": ("unreadable", ".opus", lambda b: b[:4], True),
    "mp3-silent": ("silent-channel", ".mp3", bytes, False),
    "mp3-noise": ("unreadable", ".mp3", lambda b: bytes(b[:4]) + bytes(range(256)) * 8, True),
    "mp3-one-frame-cut": ("unreadable", ".mp3", lambda b: b[:100], True),
}
NESTED = b"[" * 100_000 + b"]" * 100_000


def _words(*words: object) -> bytes:
    return json.dumps({"alignments": list(words)}).encode()


def _main(text: object, start: object, end: object, speaker: object = "SPEAKER_MAIN") -> list:
    return [text, [start, end], speaker]


TIMINGS: dict[str, tuple[str | None, bytes]] = {
    "json-not-json": ("malformed-timings", b"Hello 0.1 0.2"),
    "json-empty-file": ("malformed-timings", b""),
    "json-cut": ("malformed-timings", _words(*WORDS)[:-20]),
    "json-list-at-top": ("malformed-timings", json.dumps(WORDS).encode()),
    "json-number-at-top": ("malformed-timings", b"3"),
    "json-null": ("malformed-timings", b"null"),
    "json-empty-object": ("malformed-timings", b"{}"),
    "json-object-of-words": ("malformed-timings", b'{"alignments": {}}'),
    "json-null-words": ("malformed-timings", b'{"alignments": null}'),
    "json-word-is-text": ("malformed-timings", _words("abc")),
    "json-word-too-short": ("malformed-timings", _words(["Hello", [0.1, 0.2]])),
    "json-word-is-number": ("malformed-timings", _words(_main(3, 0.1, 0.2))),
    "json-times-are-text": ("malformed-timings", _words(_main("a", "0.1", "0.2"))),
    "json-times-are-bools": ("malformed-timings", _words(_main("a", False, True))),
    "json-times-missing": ("malformed-timings", _words(["a", [], "SPEAKER_MAIN"])),
    "json-three-times": ("malformed-timings", _words(["a", [0.1, 0.2, 0.3], "SPEAKER_MAIN"])),
    "json-speaker-null": ("malformed-timings", _words(_main("a", 0.1, 0.2, None))),
    "json-nan": ("malformed-timings", b'{"alignments": [["a", [NaN, 0.2], "SPEAKER_MAIN"]]}'),
    "json-infinite": ("malformed-timings", b'{"alignments": [["a", [0.1, Infinity], "SPEAKER_MAIN"]]}'),
    "json-1e999": ("malformed-timings", b'{"alignments": [["a", [0.1, 1e999], "SPEAKER_MAIN"]]}'),
    "json-negative": ("malformed-timings", _words(_main("a", -0.1, 0.2))),
    "json-huge-integer": ("malformed-timings", _words(_main("a", 0.1, 10**400))),
    "json-endless-integer": (
        "malformed-timings",
        b'{"alignments": [["a", [0.1, ' + b"9" * 9999 + b'], "SPEAKER_MAIN"]]}',
    ),
    "json-nested": ("malformed-timings", NESTED),
    "json-null-byte": ("malformed-timings", _words(_main("a\0b", 0.1, 0.2))),
    "json-raw-null-byte": ("malformed-timings", _words(_main("a", 0.1, 0.2)).replace(b'"a"', b'"a\0"')),
    "json-lone-surrogate": ("malformed-timings", _words(_main("a\ud800", 0.1, 0.2))),
    "json-not-utf-8": ("malformed-timings", b'{"alignments": [["\xff\xfe", [0.1, 0.2], "SPEAKER_MAIN"]]}'),
    "json-utf-16": ("malformed-timings", _words(*WORDS).decode().encode("utf-16")),
    "word-after-the-end": ("word-outside", _words(_main("a", 7.0, 7.2))),
    "word-ends-late": ("word-outside", _words(_main("a", 0.4, 7.2))),
    "word-far-away": ("word-outside", _words(_main("a", 1e300, 1.1e300))),
    "words-over-each-other": ("word-overlap", _words(_main("a", 0.1, 0.4), _main("b", 0.2, 0.45))),
    "word-without-text": ("empty-word", _words(_main("  ", 0.1, 0.2))),
    "word-backwards": ("word-length", _words(_main("a", 0.3, 0.1))),
    "word-of-a-stranger": ("unknown-speaker", _words(_main("a", 0.1, 0.2, "SPEAKER_00"))),
    "good-no-words": (None, _words()),
    "good-word-without-length": (None, _words(_main("a", 0.1, 0.1))),
    "good-whole-seconds": (None, _words(_main("a", 0, 0.2))),
    "good-unicode-words": (None, '{"alignments": [["naïve 😀", [0.1, 0.2], "SPEAKER_MAIN"]]}'.encode()),
    "good-escaped-pair": (None, _words(_main("😀", 0.1, 0.2))),
    "good-bom": (None, b"\xef\xbb\xbf" + _words(*WORDS)),
    "good-crlf": (None, json.dumps({"alignments": WORDS}, indent=1).replace("\n", "\r\n").encode()),
    "good-unsorted": (None, _words(*reversed(WORDS))),
    "good-both-at-once": (None, _words(_main("a", 0.1, 0.4), _main("b", 0.2, 0.4, "SPEAKER_USER"))),
    "good-further-keys": (None, json.dumps({"alignments": WORDS, "model": "x"}).encode()),
}
_DECODED_ONLY = {"words-over-each-other", "word-without-text", "word-backwards"}


def line_of(name: str, suffix: str = ".wav", duration_sec: float = SEC) -> bytes:
    """A good line of a manifest."""
    return json.dumps({"path": name + suffix, "duration": duration_sec}).encode()


def write_good(folder: Path, name: str, suffix: str = ".wav") -> Path:
    """Write a good recording with word timings; returns the audio file."""
    path = folder / f"{name}{suffix}"
    path.write_bytes(wav(voices(name)))
    path.with_suffix(".json").write_bytes(_words(*WORDS))
    return path


def write_corpus(folder: Path) -> list[Case]:
    """Write all recordings into a folder; the manifest is left to the caller."""
    cases = []
    for name, (code, make, by_header) in WAVS.items():
        write_good(folder, name).write_bytes(make(voices(name)))
        cases.append(Case(name, code, line_of(name), by_header))
    for name, (code, suffix, change, by_header) in STREAMS.items():
        good = {".flac": flac, ".opus": opus}.get(suffix)
        content = mp3() if good is None else good(folder, name)
        write_good(folder, name, suffix).write_bytes(change(content))
        cases.append(Case(name, code, line_of(name, suffix), by_header))
    for name, (code, content) in TIMINGS.items():
        write_good(folder, name).with_suffix(".json").write_bytes(content)
        by_header = name not in _DECODED_ONLY | {"word-of-a-stranger"}
        cases.append(Case(name, code, line_of(name), by_header))
    for name, (code, line) in {**LINES, **ODD_LINES}.items():
        write_good(folder, name)
        cases.append(Case(name, code, line))
    return cases + list(_file_system(folder))


def _file_system(folder: Path) -> list[Case]:
    """Faults and oddities of files themselves."""
    cases = [Case("missing", "missing", line_of("missing"))]
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    for name, code in [
        ("folder", "not-a-file"),
        ("pipe", "not-a-file"),
        ("device", "not-a-file"),
        ("loop", "missing"),
        ("dangling", "missing"),
        ("n" * 300, "missing"),
    ]:
        cases.append(Case(name, code, line_of(name)))
    for name, make in [("json-is-a-folder", os.mkdir), ("json-is-a-pipe", os.mkfifo)]:
        path = write_good(folder, name).with_suffix(".json")
        path.unlink()
        make(path)
        cases.append(Case(name, "malformed-timings", line_of(name)))
    write_good(folder, "no-json").with_suffix(".json").unlink()
    cases.append(Case("no-json", "no-timings", line_of("no-json")))
    if os.geteuid():
        write_good(folder, "forbidden").chmod(0)
        cases.append(Case("forbidden", "unreadable", line_of("forbidden")))
    same = write_good(folder, "same-1").read_bytes()
    write_good(folder, "same-2").write_bytes(same)
    cases += [Case("same-1", None, line_of("same-1")), Case("same-2", "same-audio", line_of("same-2"), False)]
    (folder / "shared.flac").write_bytes(flac(folder, "shared"))
    write_good(folder, "shared")
    cases += [Case("shared", None, line_of("shared"))]
    cases += [Case("shared", "shared-timings", line_of("shared", ".flac"), False)]
    odd = [
        "with space",
        "ünïcode 語 😀",
        "e\u0301 NFD",
        "\u00e9 NFC",
        "new\nline",
        "$(rm) ; 'q\"",
        "\udcff\udcfe",
    ]
    for name in [*odd, "n" * 250]:
        write_good(folder, name)
        cases.append(Case(name, None, line_of(name)))
    (folder / "inner").mkdir()
    cases.append(
        Case(str(write_good(folder, "absolute").with_suffix("")), None, line_of(str(folder / "absolute")))
    )
    write_good(folder, "above")
    cases.append(Case("above", None, line_of("inner/../above")))
    (folder / "linked.wav").symlink_to(write_good(folder, ".target"))
    (folder / "linked.json").write_bytes(_words())
    cases.append(Case("linked", None, line_of("linked")))
    return cases
