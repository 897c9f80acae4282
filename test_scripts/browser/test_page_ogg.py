"""The web page's Ogg pages, against sphn's and against the standard."""

import base64
import json
import struct
from typing import Any

import numpy as np
import sphn

import page_helpers
from page_helpers import FRAME, RATE, on_page, refuse, tone
from page_probe import PageProbe

pytestmark = page_helpers.BROWSER_MARKS


REMUX = """(async () => {
  const { OggOpusReader, OggOpusWriter, concatBytes } = await import("./ogg_opus.js");
  const bytes = Uint8Array.from(atob(%(stream)s), (letter) => letter.charCodeAt(0));
  const reader = new OggOpusReader();
  const packets = [];
  const size = %(piece)d;
  for (let i = 0; i < bytes.length; i += size) packets.push(...reader.push(bytes.subarray(i, i + size)));
  const writer = new OggOpusWriter({ serial: 7, preSkip: 0 });
  const pages = [writer.headerPages()];
  for (let i = 0; i < packets.length; i += %(per_page)d) {
    pages.push(writer.audioPage(packets.slice(i, i + %(per_page)d)));
  }
  const remuxed = concatBytes(...pages).reduce((text, byte) => text + String.fromCharCode(byte), "");
  const { skippedBytes: skipped } = reader;
  return { packets: packets.length, skipped, remuxed: btoa(remuxed), granule: writer.granule };
})()"""


def remux(streams: dict[str, bytes], *, piece: int, per_page: int = 3) -> dict[str, dict[str, Any]]:
    """Each Ogg stream's packets, read in pieces and written again by the page's own code."""
    results = {}

    async def look(page: PageProbe) -> None:
        for name, stream in streams.items():
            text = json.dumps(base64.b64encode(stream).decode())
            results[name] = await page.evaluate(
                REMUX % {"stream": text, "piece": piece, "per_page": per_page}
            )

    assert on_page(refuse, look) == []
    return results


def encode(samples: np.ndarray) -> list[bytes]:
    writer = sphn.OpusStreamWriter(RATE)
    return [writer.append_pcm(samples[i : i + FRAME]) for i in range(0, len(samples), FRAME)]


def decode(stream: bytes) -> np.ndarray:
    return sphn.OpusStreamReader(RATE).append_bytes(stream)


def test_ogg_pages_are_read_and_written_as_sphn_does_it() -> None:
    generator = np.random.default_rng(0)
    loud = (0.3 * generator.standard_normal(FRAME * 12)).astype(np.float32)
    streams = {"noise": b"".join(encode(loud)), "tone": b"".join(encode(tone(440, FRAME * 12)))}
    for name, result in remux(streams, piece=7).items():
        remuxed = base64.b64decode(result["remuxed"])
        assert result["packets"] == streams[name].count(b"OggS") - 2
        assert result["skipped"] == 0
        assert result["granule"] == 12 * FRAME * 2
        np.testing.assert_array_equal(decode(remuxed), decode(streams[name]))


def ogg_page(sequence: int, lacing: list[int], body: bytes, *, flags: int = 0, granule: int = 0) -> bytes:
    """One page by the words of RFC 3533, section 6."""
    fields = struct.pack("<4sBBqIII", b"OggS", 0, flags, granule, 7, sequence, 0)
    page = bytearray(fields + bytes([len(lacing), *lacing]) + body)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
    page[22:26] = struct.pack("<I", crc)
    return bytes(page)


def lacing_of(packet: bytes) -> list[int]:
    return [255] * (len(packet) // 255) + [len(packet) % 255]


def header_pages() -> bytes:
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, RATE, 0, 0)
    tags = b"OpusTags" + struct.pack("<I9sI", 9, b"moshi-ttt", 0)
    return ogg_page(0, [len(head)], head, flags=2) + ogg_page(1, [len(tags)], tags)


def packets_of_many_lengths() -> list[bytes]:
    generator = np.random.default_rng(0)
    lengths = [1, 2, 254, 255, 256, 509, 510, 511, 3000]
    return [b"\x08" + generator.bytes(length - 1) for length in lengths]  # 0x08: one frame of 20 ms


def stream_with_whole_packets(packets: list[bytes]) -> bytes:
    pages = [
        ogg_page(i + 2, lacing_of(packet), packet, granule=960 * (i + 1)) for i, packet in enumerate(packets)
    ]
    return header_pages() + b"".join(pages)


def pages_cut_after_three_segments(packets: list[bytes]) -> list[bytes]:
    """Many of these pages end in the midst of a packet."""
    lacing = [size for packet in packets for size in lacing_of(packet)]
    body, pages, is_continued = b"".join(packets), [], False
    for i in range(0, len(lacing), 3):
        sizes = lacing[i : i + 3]
        pages.append(ogg_page(i // 3 + 2, sizes, body[: sum(sizes)], flags=int(is_continued)))
        body, is_continued = body[sum(sizes) :], sizes[-1] == 255
    return pages


def test_packets_of_any_length_get_pages_by_the_standard() -> None:
    packets = packets_of_many_lengths()
    whole = stream_with_whole_packets(packets)
    cut = header_pages() + b"".join(pages_cut_after_three_segments(packets))
    for result in remux({"whole": whole, "cut": cut}, piece=100, per_page=1).values():
        assert base64.b64decode(result["remuxed"]) == whole


def test_a_lost_page_costs_only_its_own_packets() -> None:
    packets = packets_of_many_lengths()
    pages = pages_cut_after_three_segments(packets)
    # The second page has packet 3 and the start of packet 4; the seventh is the middle of packet 8.
    remaining = header_pages() + b"".join(pages[:1] + pages[2:6] + pages[7:])
    result = remux({"remaining": remaining}, piece=100, per_page=1)["remaining"]
    assert base64.b64decode(result["remuxed"]) == stream_with_whole_packets(packets[:3] + packets[5:8])


def test_garbage_between_ogg_pages_is_skipped() -> None:
    first, *rest = encode(tone(440, FRAME * 8))
    clean = b"".join([first, *rest])
    damaged = b"noise OggS" + b"\x01" * 40 + first + b"Ogg" + b"\xff" * 9 + b"".join(rest)
    flipped = bytearray(clean)
    flipped[-5] ^= 1
    results = remux({"clean": clean, "damaged": damaged, "flipped": bytes(flipped)}, piece=1000)
    assert results["damaged"]["remuxed"] == results["clean"]["remuxed"]
    assert results["damaged"]["skipped"] == len(damaged) - len(clean)
    assert results["flipped"]["packets"] == results["clean"]["packets"] - 1
