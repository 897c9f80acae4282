"""A client of the server's protocol and a server in this process."""

import asyncio
import contextlib
import json

import aiohttp
import numpy as np
import sphn
from yarl import URL

from finetune.serving.access import Access
from finetune.serving.app import Server
from finetune.serving.door import serving
from finetune.serving.voice import MemoryFiles, Voice

RATE = 24000


class Client:
    """A client of the protocol, as moshi.client is one: sends Opus, keeps what comes back."""

    def __init__(self, ws):
        self.ws = ws
        self.writer = sphn.OpusStreamWriter(RATE)
        self.reader = sphn.OpusStreamReader(RATE)
        self.began = False
        self.samples, self.text, self.metadata, self.errors = 0, "", [], []

    async def say(self, seconds, *, real_time=False):
        """Send a tone in frames of 80 ms."""
        for number in range(round(seconds * 12.5)):
            samples = np.sin(np.arange(1920) * 0.1 + number).astype(np.float32) * 0.1
            await self.ws.send_bytes(b"\x01" + self.writer.append_pcm(samples))
            await asyncio.sleep(0.08 if real_time else 0)

    async def hear(self, until=lambda client: False, timeout=60.0):
        """Take messages until the condition holds or the server closes; returns whether it held."""
        while not until(self):
            received = await self.ws.receive(timeout=timeout)
            if received.type != aiohttp.WSMsgType.BINARY:
                return False
            kind, payload = received.data[0], received.data[1:]
            if kind == 0:
                self.began = True
            elif kind == 1:
                self.samples += len(self.reader.append_bytes(payload))
            elif kind == 2:
                self.text += payload.decode()
            elif kind == 4:
                self.metadata.append(json.loads(payload))
            elif kind == 5:
                self.errors.append(payload.decode())
        return True


class Running:
    """A server in this process."""

    def __init__(self, server, session, door):
        self.server, self.session, self.door = server, session, door
        self.base = URL(f"http://127.0.0.1:{door.port}/")

    @contextlib.asynccontextmanager
    async def client(self, path="/api/chat", **options):
        async with self.session.ws_connect(self.base.join(URL(path)), **options) as ws:
            yield Client(ws)

    async def status(self, path, **options):
        async with self.session.get(self.base.join(URL(path)), allow_redirects=False, **options) as r:
            return r.status

    async def health(self):
        async with self.session.get(self.base / "health") as response:
            return await response.json()

    async def until_free(self):
        for _ in range(200):
            if not (await self.health())["busy"]:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the model was never given back")


async def converse(client, seconds=0.8):
    assert await client.hear(lambda c: c.began)
    await client.say(seconds)
    assert await client.hear(lambda c: c.samples >= (seconds - 0.1) * RATE), client.errors


def run_server(speech, test, *, token=None, files=None, limits=None, max_waiting=0, connections=None):
    """Run a test's coroutine against a server; the options are those of `Server` and of `serving`."""

    async def main():
        voice = Voice(speech, files=files or MemoryFiles())
        access = Access("127.0.0.1", token=token)
        server = Server(voice, access, limits=limits, max_waiting=max_waiting)
        async with (
            serving(server.application(), "127.0.0.1", 0, limits=connections) as door,
            aiohttp.ClientSession() as session,
        ):
            await asyncio.wait_for(test(Running(server, session, door)), 120)

    asyncio.run(main())
