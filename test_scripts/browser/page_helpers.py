"""A small server with Moshi's protocol, and the page in a real browser that talks to it."""

import asyncio
import contextlib
import json
import math
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sphn
from aiohttp import WSMsgType, web

from page_probe import PageProbe, find_browser

BROWSER_MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed"),
]

PAGE_FOLDER = Path(__file__).parents[2] / "finetune" / "serving" / "page"
RATE = 24000
FRAME = 1920
MICROPHONE_HZ = 440.0
VOICE_HZ = 660.0
WORDS = [" Hello", " from", " the", " tes", "t", " ser", "ver", "."]
LAYERS = [1, 3]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Heard:
    """What the server has got from the page."""

    query: dict[str, str] = field(default_factory=dict)
    pcm: list[np.ndarray] = field(default_factory=list)
    audio_before_handshake: int = 0
    is_closed: asyncio.Event = field(default_factory=asyncio.Event)

    def samples(self) -> np.ndarray:
        return np.concatenate(self.pcm) if self.pcm else np.zeros(0, np.float32)


async def accept(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    return socket


async def send_metadata(socket: web.WebSocketResponse, **metadata: Any) -> None:
    await socket.send_bytes(b"\x04" + json.dumps(metadata).encode())


def echoing_server(heard: Heard, *, waiting_sec: float = 0.0, forgotten: int = 0) -> Handler:
    """For each frame of the user's voice one of a tone, with words and the memory's activity."""

    async def chat(request: web.Request) -> web.WebSocketResponse:
        heard.query = dict(request.query)
        socket = await accept(request)
        if waiting_sec:
            await send_metadata(socket, waiting=2)
            with contextlib.suppress(asyncio.TimeoutError):
                await socket.receive(timeout=waiting_sec)
                heard.audio_before_handshake += 1
        await socket.send_bytes(b"\x00")
        if forgotten:
            await send_metadata(socket, forgotten=forgotten)
        reader, writer = sphn.OpusStreamReader(RATE), sphn.OpusStreamWriter(RATE)
        answered = 0
        async for message in socket:
            if message.type != WSMsgType.BINARY or message.data[0] != 1:
                continue
            heard.pcm.append(reader.append_bytes(message.data[1:]))
            while len(heard.samples()) >= (answered + 1) * FRAME:
                await answer_frame(socket, writer, answered)
                answered += 1
        heard.is_closed.set()
        return socket

    return chat


async def answer_frame(socket: web.WebSocketResponse, writer: Any, frame: int) -> None:
    opus = writer.append_pcm(tone(VOICE_HZ, FRAME, start=frame * FRAME))
    # Pages cut anywhere: the page has to put them together again.
    for piece in (opus[:50], opus[50:51], opus[51:]):
        await socket.send_bytes(b"\x01" + piece)
    if frame % 3 == 0 and frame // 3 < len(WORDS):
        await socket.send_bytes(b"\x02" + WORDS[frame // 3].encode())
    if frame % 4 == 0:
        activity = [0.02 + 0.01 * math.sin(frame / 6), 0.05 + 0.02 * math.cos(frame / 9)]
        memory = {"layers": LAYERS, "activity": activity}
        await send_metadata(socket, memory=memory, frame_ms=23.1, lag_sec=0.0)


def closing_server(code: int, reason: str, error: str | None = None) -> Handler:
    async def chat(request: web.Request) -> web.WebSocketResponse:
        socket = await accept(request)
        if error is not None:
            await socket.send_bytes(b"\x05" + error.encode())
        await socket.close(code=code, message=reason.encode())
        return socket

    return chat


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPServiceUnavailable


def tone(frequency: float, count: int, *, start: int = 0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(start, start + count) / RATE)).astype(np.float32)


def write_beeps(path: Path) -> Path:
    """Beeps of half a second with pauses: noise suppression would take a steady tone for noise."""
    samples = tone(MICROPHONE_HZ, 8 * RATE) * (np.arange(8 * RATE) % RATE < RATE // 2)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


@contextlib.asynccontextmanager
async def served(chat: Handler) -> AsyncIterator[str]:
    """Serves the page with a content security policy that allows nothing from elsewhere."""

    async def add_policy(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["Content-Security-Policy"] = "default-src 'self'"

    async def index(_: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE_FOLDER / "index.html")

    app = web.Application()
    app.on_response_prepare.append(add_policy)
    app.router.add_get("/api/chat", chat)
    app.router.add_get("/", index)
    app.router.add_static("/", PAGE_FOLDER)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def beeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beeps(tmp_path_factory.mktemp("microphone") / "beeps.wav")


def on_page(
    chat: Handler,
    look: Callable[[PageProbe], Awaitable[None]],
    microphone: Path | None = None,
    before_load: str | None = None,
    host: str | None = None,
) -> list[str]:
    """Open the page, look at it and return the console's errors."""

    async def run() -> list[str]:
        options = (f"--host-resolver-rules=MAP {host} 127.0.0.1",) if host else ()
        async with served(chat) as url, PageProbe(microphone, options) as page:
            if before_load is not None:
                await page.command("Page.addScriptToEvaluateOnNewDocument", source=before_load)
            await page.open(url.replace("127.0.0.1", host) if host else url)
            await look(page)
            return page.console_errors

    return asyncio.run(run())


async def shown_error(page: PageProbe) -> str:
    await page.wait_for("!document.getElementById('error').hidden")
    return await page.evaluate("document.getElementById('error').innerText")
