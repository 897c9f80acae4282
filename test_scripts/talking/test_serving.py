"""The server: Moshi's protocol with a real client, one conversation at a time, limits, memory."""

import asyncio
import contextlib
import os
import socket
import struct
from functools import partial

import aiohttp
import numpy as np
import pytest
import sphn
import torch

from finetune.inference.speech_model import load_speech_model
from finetune.serving import chat
from finetune.serving.access import Access
from finetune.serving.app import Server
from finetune.serving.door import serving as serving_door
from finetune.serving.limits import Limits
from finetune.serving.voice import MemoryFiles, Voice
from moshi_ttt.memory import inspect_ttt_states
from serving_helpers import RATE, Client, converse, run_server


@pytest.fixture(scope="module")
def speech(untrained_run):
    return load_speech_model(str(untrained_run("lora_ttt")), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def serving(speech):
    """Run a test's coroutine against a server; the options are those of `run_server`."""
    return partial(run_server, speech)


def test_a_conversation_brings_audio_text_and_memory_back(serving):
    async def test(running):
        async with running.client("/api/chat?memory=1") as client:
            await converse(client, 2.4)
            assert client.text
            memory = client.metadata[-1]["memory"]
            assert memory["layers"] == [1, 3]
            assert all(0 < value < 10 for value in memory["activity"])
            assert client.metadata[-1]["frame_ms"] > 0
        await running.until_free()
        async with running.client() as plain:
            await converse(plain)
            assert plain.metadata == [], "stock clients know no metadata"

    serving(test)


def test_each_conversation_starts_anew(serving, speech):
    async def test(running):
        for _ in range(2):
            async with running.client() as client:
                await converse(client)
                state = speech.lm.transformer.layers[1].ttt._streaming_state
                assert 0 < state.num_tokens.item() <= 12
            await running.until_free()

    serving(test)


def test_a_client_killed_in_mid_word_frees_the_model(serving, caplog):
    async def test(running):
        for _ in range(3):
            async with running.client() as client:
                await converse(client)
                client.ws._response.connection.transport.abort()
            await running.until_free()
        async with running.client() as client:
            await converse(client)

    with caplog.at_level("INFO", logger="finetune"):
        serving(test)
    assert sum("ended after" in line for line in caplog.messages) == 4


def test_a_second_caller_is_told_that_the_model_is_busy(serving):
    async def test(running):
        async with running.client() as first:
            await converse(first)
            async with running.client() as second:
                assert not await second.hear()
                assert second.errors == ["the model is in another conversation, try again later"]
                assert second.ws.close_code == 1013 and not second.began
            await first.say(0.4)
            before = first.samples
            assert await first.hear(lambda c: c.samples > before)

    serving(test)


def test_with_a_queue_callers_wait_their_turn_and_may_leave(serving):
    async def test(running):
        async with running.client() as first, running.client("/api/chat?memory=1") as second:
            await converse(first)
            assert await second.hear(lambda c: c.metadata)
            assert second.metadata == [{"waiting": 1}]
            await second.say(0.4)  # the head of the stream, before its turn
            async with running.client("/api/chat?memory=1") as third:
                assert await third.hear(lambda c: c.metadata)
                assert third.metadata == [{"waiting": 2}]
                async with running.client() as fourth:
                    assert not await fourth.hear() and fourth.ws.close_code == 1013
            assert not second.began
            await first.ws.close()
            await converse(second)
        await running.until_free()
        assert (await running.health())["waiting"] == 0

    serving(test, max_waiting=2)


def test_garbage_ends_the_connection_and_nothing_else(serving, caplog):
    async def test(running):
        for payload in (os.urandom(1000), b"OggS" + os.urandom(500), b"\x00" * 50):
            async with running.client() as client:
                assert await client.hear(lambda c: c.began)
                await client.ws.send_bytes(b"\x01" + payload)
                await client.hear(timeout=5)
                assert client.ws.close_code == 1007
                assert "not an Ogg-Opus stream" in client.errors[0]
            await running.until_free()
        async with running.client() as client:
            assert await client.hear(lambda c: c.began)
            for wrong in (b"", b"\x09abc", b"\xff" * 100):
                await client.ws.send_bytes(wrong)
            await client.ws.send_str("hello")
            for harmless in (b"\x03\x00", b"\x06", b"\x04{}"):
                await client.ws.send_bytes(harmless)
            await converse(client)  # a few wrong messages are passed over, as the stock server does
            for _ in range(30):
                await client.ws.send_bytes(b"\x09")
            assert not await client.hear()
            assert client.errors == ["too many messages of unknown kinds"], (
                client.ws.exception(),
                client.ws.close_code,
                client.samples,
            )
            assert client.ws.close_code == 1008, client.ws.exception()
        await running.until_free()
        async with running.client() as client:
            await converse(client)

    with caplog.at_level("INFO", logger="finetune"):
        serving(test)
    assert any("message of unknown kind (TEXT)" in line for line in caplog.messages)
    assert not any("Traceback" in line for line in caplog.messages)


def test_oversized_messages_close_the_connection(serving):
    async def test(running):
        async with running.client() as client:
            assert await client.hear(lambda c: c.began)
            await client.ws.send_bytes(b"\x01" + bytes(70_000))
            assert not await client.hear()
            assert client.ws.close_code == 1009
        await running.until_free()

    serving(test)


def test_who_sends_faster_than_speech_waits_instead_of_filling_memory(serving):
    async def test(running):
        async with running.client() as client:
            assert await client.hear(lambda c: c.began)
            sender = asyncio.create_task(client.say(8.0))
            longest = 0.0
            chat = next(iter(running.server._chats))
            while not await client.hear(lambda c: True) or client.samples < 7.8 * RATE:
                longest = max(longest, chat._inbox.waiting_sec)
                received = client.samples
                assert await client.hear(lambda c, received=received: c.samples > received)
            await sender
            assert 0.5 < longest < 1.5

    serving(test, limits=Limits(buffered_sec=1.0))


def test_silent_and_endless_conversations_end(serving):
    async def test(running):
        async with running.client() as client:
            assert not await client.hear()
            assert client.errors == ["no audio for 0.3 s"]
        await running.until_free()
        async with running.client() as client:
            assert await client.hear(lambda c: c.began)
            await client.say(2.0)
            assert not await client.hear()
            assert client.errors == ["conversations last 0.02 minutes at most"]
            assert client.ws.close_code == 1000

    serving(test, limits=Limits(idle_sec=0.3, conversation_sec=1.2))


def test_a_client_that_does_not_read_is_dropped(serving, caplog, monkeypatch):
    """The socket's buffers are small and the server's messages large, so that it shows within seconds."""

    async def test(running):
        with monkeypatch.context() as patch:
            patch.setattr(chat, "message", lambda kind, payload=b"": bytes([kind]) + payload + bytes(20_000))
            _, writer = await _raw_websocket(running.base, receive_buffer=2048)
            opus = sphn.OpusStreamWriter(RATE)
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    writer.write(_frame(b"\x01" + opus.append_pcm(np.zeros(1920, np.float32))))
                    await asyncio.sleep(0.02)
                    if any("does not take" in line for line in caplog.messages):
                        break
            await running.until_free()
            writer.close()
        async with running.client() as client:
            await converse(client)

    with caplog.at_level("INFO", logger="finetune"):
        serving(test, limits=Limits(send_sec=0.5, send_buffer_bytes=4096))
    assert any("the client does not take what it is sent" in line for line in caplog.messages)


async def _raw_websocket(base, *, receive_buffer):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((base.host, base.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    head = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    writer.write(f"GET /api/chat HTTP/1.1\r\nHost: {base.host}:{base.port}\r\n{head}{key}\r\n".encode())
    assert b"101" in await reader.readline()
    return reader, writer


def _frame(payload):
    head = bytes([0x82, 0x80 | 126]) + struct.pack(">H", len(payload))
    return head + bytes(4) + payload  # masked with zeros


def test_fifty_connects_and_disconnects(serving):
    async def test(running):
        for number in range(50):
            async with running.client() as client:
                if number % 3 == 0:
                    await client.say(0.16)
                if number % 2:
                    client.ws._response.connection.transport.abort()
        await running.until_free()
        async with running.client() as client:
            await converse(client)
        assert (await running.health())["connections"] == 51

    serving(test)


def test_memory_goes_from_one_conversation_to_the_next(serving, tmp_path, speech):
    path = tmp_path / "memory.safetensors"

    async def test(running):
        frames = []
        for query in ("", "", "?fresh=1"):
            async with running.client(f"/api/chat{query}") as client:
                await converse(client)
            await running.until_free()
            frames.append(inspect_ttt_states(path).num_frames[0])
        assert 8 <= frames[0] <= 13 and frames[1] >= frames[0] + 8
        assert frames[2] < frames[1], "a fresh conversation starts without the memory"
        path.write_bytes(b"damaged")
        async with running.client() as client:
            assert not await client.hear()
            assert client.errors == ["the memory of the server cannot be read"]
        assert path.read_bytes() == b"damaged"

    serving(test, files=MemoryFiles(path, path))


def test_shutting_down_ends_the_conversation_and_saves_its_memory(speech, tmp_path):
    path = tmp_path / "memory.safetensors"

    async def main():
        server = Server(Voice(speech, files=MemoryFiles(None, path)), Access("127.0.0.1"))
        async with contextlib.AsyncExitStack() as stack, aiohttp.ClientSession() as session:
            door = await stack.enter_async_context(serving_door(server.application(), "127.0.0.1", 0))
            async with session.ws_connect(f"http://127.0.0.1:{door.port}/api/chat") as ws:
                client = Client(ws)
                await converse(client)
                ending = asyncio.create_task(stack.aclose())
                assert not await client.hear()
                assert ws.close_code == 1001
            await ending

    asyncio.run(asyncio.wait_for(main(), 60))
    assert inspect_ttt_states(path).num_frames[0] >= 8
