"""Clients that mean no good, each in a way of its own; as a process, many of them at once.

python hostile_clients.py PORT NUMBER SECONDS
"""

import asyncio
import gzip
import os
import random
import socket
import struct
import sys
from contextlib import suppress

HANDSHAKE = (
    b"GET /api/chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
BODY = b"POST /health HTTP/1.1\r\nHost: localhost\r\n"
TEXT, BINARY, PING, CONTINUATION = 1, 2, 9, 0


def frame(opcode, payload=b"", *, last=True):
    """A frame of a websocket, masked with zeros."""
    length = len(payload)
    if length < 126:
        size = bytes([0x80 | length])
    else:
        size = b"\xfe" + struct.pack(">H", length) if length < 65536 else b"\xff" + struct.pack(">Q", length)
    return bytes([opcode | (0x80 if last else 0)]) + size + bytes(4) + payload


def opus_of_silence(num_bytes):
    """An Ogg-Opus stream of packets of one byte, ten of them in a page and a fifth of a second."""
    head = b"OpusHead" + struct.pack("<BBHIHB", 1, 1, 0, 24000, 0, 0)
    tags = b"OpusTags" + struct.pack("<II", 0, 0)
    stream, number = _page([head], 0, 2) + _page([tags], 1), 2
    while len(stream) < num_bytes:
        stream += _page([b"\x08"] * 10, number, granule=(number - 1) * 10 * 960)
        number += 1
    return stream


def _page(packets, number, kind=0, granule=0):
    sizes = bytes(len(packet) for packet in packets)
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, kind, granule, 1, number, 0, len(sizes))
    page = head + sizes + b"".join(packets)
    return page[:22] + struct.pack("<I", _checksum(page)) + page[26:]


def _checksum(data):
    value = 0
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = ((value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


async def silent(_):
    """Nothing."""


async def part_of_a_line(writer):
    """A request line without its end."""
    writer.write(b"GET /hea")


async def slow_head(writer):
    """A header, one byte at a time."""
    writer.write(b"GET /health HTTP/1.1\r\nX: ")
    await _repeat(writer, b"x", seconds=0.2)


async def endless_body(writer):
    """A body without an end."""
    writer.write(BODY + b"Content-Length: 1000000000\r\n\r\n")
    await _repeat(writer, bytes(1000), seconds=0.2)


async def endless_chunks(writer):
    """The same in chunks."""
    writer.write(BODY + b"Transfer-Encoding: chunked\r\n\r\n")
    await _repeat(writer, b"1\r\nx\r\n", seconds=0.2)


async def gzip_body(writer):
    """A body that unpacks to 60 MB."""
    body = _sixty_megabytes()
    head = f"Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(BODY + head.encode() + body)


async def garbage(writer):
    """Noise."""
    writer.write(os.urandom(20_000) + b"\r\n\r\n")


async def tls_hello(writer):
    """Another protocol."""
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500))


async def long_head(writer):
    """A head that does not end, in lines of allowed length."""
    writer.write(b"GET /health HTTP/1.1\r\n")
    await _repeat(writer, b"X-Y: " + b"z" * 5000 + b"\r\n", seconds=0.01)


async def many_requests(writer):
    """Requests in advance, whose answers are not read."""
    await _repeat(writer, b"GET /memory/app.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500, seconds=0.01)


async def half_closed(writer):
    """A request, and no more to come."""
    writer.write(b"GET /memory/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    writer.write_eof()


async def vanishing(writer):
    """A request whose sender is gone."""
    writer.write(HANDSHAKE)
    writer.transport.abort()


async def websocket_silent(writer):
    """A websocket without a message."""
    writer.write(HANDSHAKE)


async def websocket_pings(writer):
    """Pings without a pause, whose answers are not read."""
    writer.write(HANDSHAKE)
    await _repeat(writer, frame(PING, bytes(125)) * 100, seconds=0.01)


async def websocket_empty_pings(writer):
    """The same, of six bytes each."""
    writer.write(HANDSHAKE)
    await _repeat(writer, frame(PING) * 2000, seconds=0.01)


async def websocket_empty_messages(writer):
    """Messages of nothing."""
    writer.write(HANDSHAKE)
    await _repeat(writer, frame(BINARY) * 2000, seconds=0.01)


async def websocket_fragments(writer):
    """One message in pieces of nothing, without an end."""
    writer.write(HANDSHAKE + frame(BINARY, b"\x01", last=False))
    await _repeat(writer, frame(CONTINUATION, last=False) * 2000, seconds=0.01)


async def websocket_oversized(writer):
    """A message that is too long."""
    writer.write(HANDSHAKE + frame(BINARY, b"\x01" + bytes(100_000)))


async def websocket_noise(writer):
    """Frames of noise."""
    writer.write(HANDSHAKE + os.urandom(1000))


async def websocket_no_opus(writer):
    """Audio that is none."""
    writer.write(HANDSHAKE + frame(BINARY, b"\x01" + os.urandom(1000)))


async def websocket_unknown(writer):
    """Messages of unknown kinds."""
    writer.write(HANDSHAKE + frame(BINARY, b"\x63abc") * 30 + frame(TEXT, b"hello") * 30)


async def websocket_opus_bomb(writer):
    """Audio that unpacks to a thousand times its size."""
    writer.write(HANDSHAKE)
    stream = opus_of_silence(60_000)
    await _repeat(writer, frame(BINARY, b"\x01" + stream), seconds=0.2)


KINDS = (
    silent,
    part_of_a_line,
    slow_head,
    endless_body,
    endless_chunks,
    gzip_body,
    garbage,
    tls_hello,
    long_head,
    many_requests,
    half_closed,
    vanishing,
    websocket_silent,
    websocket_pings,
    websocket_empty_pings,
    websocket_empty_messages,
    websocket_fragments,
    websocket_oversized,
    websocket_noise,
    websocket_no_opus,
    websocket_unknown,
    websocket_opus_bomb,
)
_packed = []


def _sixty_megabytes():
    if not _packed:
        _packed.append(gzip.compress(bytes(60_000_000)))
    return _packed[0]


async def _repeat(writer, data, *, seconds):
    while not writer.is_closing():
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(seconds)


async def attack(kind, port, seconds, *, local=None):
    """One connection that never reads, held for so many seconds unless the server ends it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    writer = None
    with suppress(OSError, asyncio.TimeoutError):
        if local is not None and sys.platform == "linux":
            connection.bind((local, 0))
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(connection, ("127.0.0.1", port)), seconds)
        # Not a StreamReader's transport alone: with a limit of one byte it stops reading at once.
        _, writer = await asyncio.open_connection(sock=connection, limit=1)
        await asyncio.wait_for(kind(writer), seconds)
        await asyncio.sleep(seconds)
    if writer is not None:
        writer.transport.abort()
    connection.close()


async def swarm(port, number, seconds):
    """So many connections of all kinds, from many addresses; they come within a third of the time."""
    draw = random.Random(1)

    async def one(kind):
        await asyncio.sleep(draw.random() * seconds / 3)
        address = f"127.0.{draw.randrange(1, 40)}.{draw.randrange(1, 5)}"
        await attack(kind, port, 2 * seconds / 3, local=address)

    await asyncio.gather(*(one(KINDS[index % len(KINDS)]) for index in range(number)))


if __name__ == "__main__":
    asyncio.run(swarm(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
