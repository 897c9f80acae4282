"""The server among clients that mean no good: whoever talks goes on talking, and nothing of them is left."""

import asyncio
import logging
import os
import re
import resource
import shutil
import ssl
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import aiohttp
import hostile_clients
import pytest
import torch
from hostile_clients import BINARY, HANDSHAKE, KINDS, PING, attack, frame, opus_of_silence

from finetune.inference.speech_model import load_speech_model
from finetune.serving.access import Access
from finetune.serving.app import Server
from finetune.serving.door import serving as served
from finetune.serving.limits import ConnectionLimits, Limits
from finetune.serving.server_log import FloodFilter
from finetune.serving.voice import MemoryFiles, Voice
from project_root import ROOT
from serving_helpers import Client, converse, run_server

IMPATIENT = ConnectionLimits(
    in_all=64, per_address=64, request_sec=0.5, answer_sec=1.0, send_sec=0.5, closing_sec=0.5, linger_sec=0.2
)


@pytest.fixture(scope="module")
def speech(untrained_run):
    return load_speech_model(str(untrained_run("lora_ttt")), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def serving(speech):
    """Run a test's coroutine against a server; the options are those of `run_server`."""
    return partial(run_server, speech)


async def _until_empty(running, seconds=15.0):
    end = time.monotonic() + seconds
    while running.door.num_connections and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return running.door.num_connections == 0


def test_no_hostile_connection_stays_and_none_is_in_the_way(serving):
    async def test(running):
        attackers = [asyncio.create_task(attack(kind, running.door.port, 60.0)) for kind in KINDS * 2]
        await asyncio.sleep(0.5)
        assert await running.status("/health") == 200
        assert await _until_empty(running)
        for attacker in attackers:
            attacker.cancel()
        await running.until_free()
        async with running.client() as client:
            await converse(client, 0.4)

    limits = Limits(idle_sec=1.0, conversation_sec=3.0, send_sec=0.5, wrong_messages=5)
    serving(test, connections=IMPATIENT, limits=limits)


def test_silent_connections_make_room_for_callers(serving):
    async def test(running):
        silent = [await asyncio.open_connection("127.0.0.1", running.door.port) for _ in range(40)]
        assert running.door.num_connections <= 12
        async with running.client() as client:
            await converse(client, 0.4)
            more = [await asyncio.open_connection("127.0.0.1", running.door.port) for _ in range(40)]
            await client.say(0.4)
            assert await client.hear(lambda c: c.samples > 0.6 * 24000), "whoever talks is not put out"
        for _, writer in (*silent, *more):
            writer.close()

    serving(test, connections=ConnectionLimits(in_all=24, per_address=12))


def test_the_limit_of_an_address_is_for_all_that_are_busy_too(serving):
    async def test(running):
        async with running.client() as first, running.client() as second:
            assert await first.hear(lambda c: c.began)
            with pytest.raises(aiohttp.ClientError):
                await running.status("/health")
            await second.ws.close()
            for _ in range(100):
                if running.door.num_connections == 1:
                    break
                await asyncio.sleep(0.05)
            assert await running.status("/health") == 200

    serving(test, connections=ConnectionLimits(per_address=2), max_waiting=1)


def test_messages_of_nothing_are_not_read_in_advance(serving):
    """Each costs its sender six bytes, and the server some hundred once it is in memory."""

    async def test(running):
        async with running.client() as first:
            assert await first.hear(lambda c: c.began)
            for opcode in (PING, BINARY):
                reader, writer = await asyncio.open_connection("127.0.0.1", running.door.port)
                writer.write(HANDSHAKE)
                assert b"101" in await reader.readline()
                writer.write(frame(opcode) * 2_000_000)
                await asyncio.sleep(1.0)
                assert writer.transport.get_write_buffer_size() > 4_000_000
                writer.transport.abort()

    serving(test, max_waiting=2, limits=Limits(wrong_messages=10**6))


def test_audio_is_unpacked_piece_by_piece(serving):
    stream = opus_of_silence(8_000)  # half a minute

    async def test(running):
        async with running.client() as first, running.client() as second:
            assert await first.hear(lambda c: c.began)
            longest = 0.0
            for client in (second, first):  # one that waits for its turn, and the one that talks
                await client.ws.send_bytes(b"\x01" + stream)
            for _ in range(10):
                await asyncio.sleep(0.05)
                longest = max([longest, *(chat._inbox.waiting_sec for chat in running.server._chats)])
                start = time.monotonic()
                await running.health()
                assert time.monotonic() - start < 1.0
            for client in (first, second):
                client.ws._response.connection.transport.abort()
            assert 1 < longest < 15

    serving(test, max_waiting=1)


def test_a_request_that_is_none_is_one_line_of_the_log(serving, caplog):
    async def test(running):
        for kind in (hostile_clients.garbage, hostile_clients.tls_hello, hostile_clients.long_head):
            await attack(kind, running.door.port, 0.3)
        for data in (
            b"GET / HTTP/9.9\r\n\r\n",
            b"G\x1bT /\x07 HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nA\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.door.port)
            writer.write(data)
            assert b"400" in await reader.readline()
            writer.close()

    with caplog.at_level("INFO"):
        serving(test)
    told = [record for record in caplog.records if record.getMessage().startswith("not a request")]
    assert len(told) == 2, "what is no HTTP at all is not worth a line"
    assert not any(record.exc_info for record in caplog.records)


def test_a_stranger_cannot_fill_the_log():
    flood, lines = FloodFilter(num_lines=5, period_sec=0.2), []
    for period in range(2):
        for number in range(1000):
            record = logging.LogRecord("a", logging.WARNING, "", 0, "refused %d", (number,), None)
            if flood.filter(record):
                lines.append(record.getMessage())
        other = logging.LogRecord("a", logging.WARNING, "", 0, f"another kind {period}", (), None)
        assert flood.filter(other)
        time.sleep(0.3)
    assert len(lines) == 10
    assert lines[5] == "refused 0 (and 995 lines like this were left out)"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_with_https_silent_handshakes_end_too(speech, tmp_path, caplog):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(cert, key)
    theirs = ssl.create_default_context(cafile=str(cert))
    theirs.check_hostname = False

    async def main():
        server = Server(Voice(speech, files=MemoryFiles()), Access("127.0.0.1"))
        app = server.application()
        async with (
            served(app, "127.0.0.1", 0, limits=IMPATIENT, ssl_context=ours) as door,
            aiohttp.ClientSession() as session,
        ):
            url = f"https://127.0.0.1:{door.port}"
            kinds = (hostile_clients.silent, hostile_clients.garbage, hostile_clients.part_of_a_line)
            attackers = [asyncio.create_task(attack(kind, door.port, 20.0)) for kind in kinds * 8]
            await asyncio.sleep(0.1)
            async with session.ws_connect(f"{url}/api/chat", ssl=theirs) as ws:
                await converse(Client(ws), 0.4)
            end = time.monotonic() + 10
            while door.num_connections and time.monotonic() < end:
                await asyncio.sleep(0.05)
            assert door.num_connections == 0
            for attacker in attackers:
                attacker.cancel()

    with caplog.at_level("INFO"):
        asyncio.run(asyncio.wait_for(main(), 60))
    assert not any(record.exc_info for record in caplog.records)


@pytest.fixture
def server_process(untrained_run, tmp_path):
    """Start serve.py with few descriptors; returns the process, its port and its log."""
    started = []

    def start(descriptors, *options):
        log = tmp_path / "serve.log"
        command = [sys.executable, str(ROOT / "serve.py"), "--checkpoint", str(untrained_run("lora_ttt"))]
        process = subprocess.Popen(
            [*command, "--port", "0", "--static", "own", *options],
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)),
        )
        started.append(process)
        for _ in range(600):
            found = re.search(r"listening on http://localhost:(\d+)/", log.read_text())
            if found:
                return process, int(found[1]), log
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for process in started:
        process.kill()
        process.wait()


def _descriptors(process):
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def _megabytes(process, name):
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) / 1024


async def _talk_until(port, done):
    """A good caller, who talks in real time; returns the longest time without a sound, in seconds."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://127.0.0.1:{port}/api/chat") as ws,
    ):
        client, longest, last = Client(ws), 0.0, None
        assert await client.hear(lambda c: c.began)
        speaking = asyncio.create_task(client.say(600.0, real_time=True))
        while not done():
            before = client.samples
            assert await client.hear(lambda c, before=before: c.samples > before)
            now = time.monotonic()
            longest = longest if last is None else max(longest, now - last)
            last = now
        speaking.cancel()
        return longest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "seconds", "descriptors"),
    [(66, 6.0, 160), pytest.param(1000, 60.0, 1024, marks=pytest.mark.slow)],
    ids=["some", "a_thousand"],
)
def test_a_caller_is_heard_among_hostile_clients(server_process, number, seconds, descriptors):
    process, port, log = server_process(descriptors, "--queue")
    script = Path(hostile_clients.__file__)

    async def main():
        await _talk_until(port, iter([False] * 10 + [True]).__next__)  # everything is loaded now
        before = _descriptors(process), _megabytes(process, "VmRSS")
        swarm = subprocess.Popen([sys.executable, str(script), str(port), str(number), str(seconds)])
        try:
            longest = await _talk_until(port, lambda: swarm.poll() is not None)
            assert swarm.returncode == 0
        finally:
            swarm.kill()
            swarm.wait()
        peak, end = _megabytes(process, "VmHWM"), time.monotonic() + 60
        while _descriptors(process) > before[0] and time.monotonic() < end:
            await asyncio.sleep(0.2)
        return longest, before, peak, (_descriptors(process), _megabytes(process, "VmRSS"))

    longest, before, peak, after = asyncio.run(main())
    lines = log.read_text()
    print(
        f"{number} hostile connections: longest silence {longest:.2f} s; memory {before[1]:.0f} MB before, "
        f"{peak:.0f} at most, {after[1]:.0f} after; descriptors {before[0]} before, {after[0]} after; "
        f"{lines.count(chr(10))} lines of log"
    )
    assert longest < 1.0
    assert after[0] <= before[0]
    assert peak < before[1] + 300 and after[1] < before[1] + 200
    assert "Traceback" not in lines and lines.count("\n") < 50 * (seconds + 10)
