"""Properties of the web page, in a real browser that talks to a small server with Moshi's protocol."""

import asyncio
import base64
import contextlib
import json
import math
import struct
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sphn
from aiohttp import WSCloseCode, WSMsgType, web

from page_probe import PageProbe, find_browser

pytestmark = [
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
TALK_SEC = 4.0

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


@dataclass
class Talk:
    """One conversation of `TALK_SEC`, seen from both sides."""

    heard: Heard
    stats: dict[str, Any]
    stopped_stats: dict[str, Any]
    transcript: str
    legend: str
    frame_time: str
    played: list[tuple[float, int, int]]
    played_wave: np.ndarray
    colours_in_plot: int
    colours_in_empty_plot: int
    console_errors: list[str]


COUNT_PLOT_COLOURS = """(() => {
  const canvas = document.getElementById("plot");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const opaque = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) opaque.add(data.slice(i, i + 3).join());
  return ["--line-1", "--line-2"].filter((name) => {
    const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return opaque.has([1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)).join());
  }).length;
})()"""


# What the page gives to the browser to play: when, how many samples, at which rate, and the samples.
RECORD_PLAYBACK = """
  window.played = [];
  window.playedSamples = [];
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (when) {
    played.push([when, this.buffer.length, this.buffer.sampleRate]);
    playedSamples.push(...this.buffer.getChannelData(0));
    return start.call(this, when);
  };
"""


async def talk(beeps: Path) -> Talk:
    heard = Heard()
    async with served(echoing_server(heard)) as url, PageProbe(beeps) as page:
        await page.command("Page.addScriptToEvaluateOnNewDocument", source=RECORD_PLAYBACK)
        await page.open(url)
        colours_in_empty_plot = await page.evaluate(COUNT_PLOT_COLOURS)
        await page.click("#start")
        await page.wait_for("conversationStats.state === 'talking'")
        await asyncio.sleep(TALK_SEC)
        stats = await page.evaluate("({ ...conversationStats })")
        colours_in_plot = await page.evaluate(COUNT_PLOT_COLOURS)
        await page.click("#start")
        await asyncio.wait_for(heard.is_closed.wait(), 5)
        return Talk(
            heard=heard,
            stats=stats,
            stopped_stats=await page.evaluate("({ ...conversationStats })"),
            transcript=await page.evaluate("document.getElementById('transcript').textContent"),
            legend=await page.evaluate("document.getElementById('legend').innerText"),
            frame_time=await page.evaluate("document.getElementById('frame-time').textContent"),
            played=await page.evaluate("played"),
            played_wave=np.asarray(await page.evaluate("playedSamples")),
            colours_in_plot=colours_in_plot,
            colours_in_empty_plot=colours_in_empty_plot,
            console_errors=page.console_errors,
        )


@pytest.fixture(scope="module")
def conversation(beeps: Path) -> Talk:
    return asyncio.run(talk(beeps))


def dominant_frequency(samples: np.ndarray, rate: int = RATE) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))


def test_the_server_hears_the_microphone(conversation: Talk) -> None:
    samples = conversation.heard.samples()
    assert dominant_frequency(samples) == pytest.approx(MICROPHONE_HZ, abs=3)
    assert len(samples) / RATE == pytest.approx(TALK_SEC, abs=0.8)


def test_the_server_hears_the_pauses_between_the_beeps(conversation: Talk) -> None:
    samples = conversation.heard.samples()
    blocks = samples[: len(samples) // 480 * 480].reshape(-1, 480)
    levels = np.sqrt((blocks**2).mean(1))
    loud = levels > levels.max() / 4
    assert 0.3 < loud.mean() < 0.7
    assert levels[~loud].mean() < levels[loud].mean() / 10


def test_the_microphone_is_sent_in_real_time(conversation: Talk) -> None:
    assert conversation.stats["packetsSent"] / 50 == pytest.approx(TALK_SEC, abs=0.8)


def test_the_model_is_played_as_it_comes(conversation: Talk) -> None:
    stats = conversation.stats
    answered_sec = len(conversation.heard.samples()) // FRAME * FRAME / RATE
    assert stats["secondsDecoded"] == pytest.approx(answered_sec, abs=0.5)
    assert stats["secondsScheduled"] == pytest.approx(stats["secondsDecoded"], abs=0.1)
    assert 0 <= stats["secondsScheduled"] - stats["secondsPlayed"] < 0.5
    assert stats["bytesSkipped"] == 0
    assert stats["packetsLeftOut"] == 0


def test_the_model_s_voice_has_no_gaps(conversation: Talk) -> None:
    ends = [when + count / rate for when, count, rate in conversation.played]
    starts = [when for when, _, _ in conversation.played]
    gaps = [abs(start - end) > 1e-6 for end, start in zip(ends, starts[1:], strict=False)]
    # On a busy machine the server's answers may come late; only then the voice is interrupted.
    assert sum(gaps) == conversation.stopped_stats["underruns"]


def test_the_model_s_voice_is_what_was_sent(conversation: Talk) -> None:
    rate = conversation.played[0][2]
    wave = conversation.played_wave[rate // 4 :]
    assert dominant_frequency(wave, rate) == pytest.approx(VOICE_HZ, abs=3)
    # The tone's second difference is small everywhere; a lost or doubled sample would make it jump.
    second = np.abs(np.diff(wave, 2)).max()
    assert second < 3 * 0.3 * (2 * np.pi * VOICE_HZ / rate) ** 2


def test_what_is_played_is_as_loud_as_what_was_sent(conversation: Talk) -> None:
    assert conversation.stats["loudestPlayed"] == pytest.approx(0.3 / math.sqrt(2), rel=0.2)


def test_the_transcript_has_the_model_s_words(conversation: Talk) -> None:
    assert conversation.transcript.strip() == "".join(WORDS).strip()


def test_the_plot_has_a_line_for_each_layer(conversation: Talk) -> None:
    assert conversation.colours_in_empty_plot == 0
    assert conversation.colours_in_plot == len(LAYERS)
    assert all(f"layer {layer}" in conversation.legend for layer in LAYERS)


def test_the_frame_time_is_shown_against_its_budget(conversation: Talk) -> None:
    assert conversation.frame_time == "23.1 of 80 ms"


def test_a_conversation_asks_for_memory(conversation: Talk) -> None:
    assert conversation.heard.query == {"memory": "1"}


def test_stop_ends_the_conversation(conversation: Talk) -> None:
    assert conversation.stopped_stats["state"] == "ended"


def test_a_conversation_leaves_no_console_errors(conversation: Talk) -> None:
    assert conversation.console_errors == []


def on_page(
    chat: Handler,
    look: Callable[[PageProbe], Awaitable[None]],
    microphone: Path | None = None,
    before_load: str | None = None,
    host: str | None = None,
) -> list[str]:
    """Opens the page, looks at it and returns the console's errors."""

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


def test_the_server_s_error_and_its_reason_to_close_are_shown(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.click("#start")
        await page.wait_for("conversationStats.closeCode !== null")
        text = await shown_error(page)
        assert "The model has run out of memory." in text
        assert "1013" in text
        assert "all places taken" in text
        assert await page.evaluate("document.getElementById('start').innerText") == "Start a conversation"

    error = "The model has run out of memory."
    assert on_page(closing_server(WSCloseCode.TRY_AGAIN_LATER, "all places taken", error), look, beeps) == []


def test_each_close_code_has_its_meaning(beeps: Path) -> None:
    meanings = {1001: "going away", 1008: "does not admit", 1009: "too big", 1013: "busy"}
    codes = iter(meanings)

    async def chat(request: web.Request) -> web.StreamResponse:
        return await closing_server(next(codes), "why")(request)

    async def look(page: PageProbe) -> None:
        for code, meaning in meanings.items():
            await page.click("#start")
            await page.wait_for(f"conversationStats.closeCode === {code}")
            text = await shown_error(page)
            assert meaning in text
            assert f"(code {code}: why)" in text

    assert on_page(chat, look, beeps) == []


def test_a_refused_connection_is_shown(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.click("#start")
        assert "refused" in await shown_error(page)
        assert await page.evaluate("conversationStats.state") == "ended"

    # The browser itself reports a failed handshake.
    errors = on_page(refuse, look, beeps)
    assert all("WebSocket connection to" in error for error in errors)


def test_no_audio_is_sent_while_waiting_for_a_place(beeps: Path) -> None:
    heard = Heard()

    async def look(page: PageProbe) -> None:
        await page.click("#start")
        await page.wait_for("conversationStats.state === 'waiting'")
        assert "number 2 in the queue" in await page.evaluate("document.getElementById('status').innerText")
        await page.wait_for("conversationStats.state === 'talking'")
        await page.wait_for("conversationStats.packetsSent > 10")

    assert on_page(echoing_server(heard, waiting_sec=1.0), look, beeps) == []
    assert heard.audio_before_handshake == 0


def test_a_reset_of_the_memory_is_shown(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.click("#start")
        await page.wait_for("!document.getElementById('notice').hidden")
        assert "reset once" in await page.evaluate("document.getElementById('notice').innerText")

    assert on_page(echoing_server(Heard(), forgotten=1), look, beeps) == []


def test_the_checkbox_asks_for_a_start_without_memory(beeps: Path) -> None:
    heard = Heard()

    async def look(page: PageProbe) -> None:
        await page.click("#fresh")
        await page.click("#start")
        await page.wait_for("conversationStats.state === 'talking'")

    on_page(echoing_server(heard), look, beeps)
    assert heard.query == {"memory": "1", "fresh": "1"}


def test_a_muted_microphone_sends_silence(beeps: Path) -> None:
    heard = Heard()

    async def look(page: PageProbe) -> None:
        await page.click("#start")
        await page.wait_for("conversationStats.state === 'talking'")
        await page.click("#mute")
        await asyncio.sleep(0.5)
        count = len(heard.pcm)
        await asyncio.sleep(1.5)
        silence = np.concatenate(heard.pcm[count:])
        assert len(silence) / RATE == pytest.approx(1.5, abs=0.5)
        assert np.abs(silence).max() < 0.01
        assert await page.evaluate("document.getElementById('mute').getAttribute('aria-pressed')") == "true"

    assert on_page(echoing_server(heard), look, beeps) == []


KEEP_TRACKS = """
  const original = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  window.grantedTracks = [];
  navigator.mediaDevices.getUserMedia = async (constraints) => {
    const stream = await original(constraints);
    grantedTracks.push(...stream.getTracks());
    return stream;
  };
"""


def test_stop_releases_the_microphone(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.click("#start")
        await page.wait_for("conversationStats.state === 'talking'")
        assert await page.evaluate("grantedTracks.map((track) => track.readyState)") == ["live"]
        await page.click("#start")
        assert await page.evaluate("grantedTracks.map((track) => track.readyState)") == ["ended"]

    assert on_page(echoing_server(Heard()), look, beeps, before_load=KEEP_TRACKS) == []


def test_a_stop_before_the_microphone_is_granted_releases_it(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.evaluate("(start => { start.click(); start.click(); })(document.getElementById('start'))")
        await page.wait_for(
            "grantedTracks.length && grantedTracks.every((track) => track.readyState === 'ended')"
        )
        assert await page.evaluate("conversationStats.state") == "ended"

    assert on_page(refuse, look, beeps, before_load=KEEP_TRACKS) == []


def test_leaving_the_page_closes_the_connection(beeps: Path) -> None:
    heard = Heard()

    async def look(page: PageProbe) -> None:
        await page.click("#start")
        await page.wait_for("conversationStats.state === 'talking'")
        await page.open("about:blank")
        await asyncio.wait_for(heard.is_closed.wait(), 5)

    assert on_page(echoing_server(heard), look, beeps) == []


def test_a_refused_microphone_is_explained() -> None:
    deny = """navigator.mediaDevices.getUserMedia =
        () => Promise.reject(new DOMException("denied", "NotAllowedError"));"""

    async def look(page: PageProbe) -> None:
        await page.click("#start")
        assert "may not use the microphone" in await shown_error(page)

    assert on_page(refuse, look, before_load=deny) == []


def test_an_insecure_page_is_explained() -> None:
    async def look(page: PageProbe) -> None:
        assert "https" in await shown_error(page)
        assert await page.evaluate("document.getElementById('start').disabled")

    on_page(refuse, look, host="moshi.test")


def test_a_browser_without_webcodecs_is_explained() -> None:
    async def look(page: PageProbe) -> None:
        assert "WebCodecs" in await shown_error(page)
        assert await page.evaluate("document.getElementById('start').disabled")

    assert on_page(refuse, look, before_load="delete window.AudioEncoder;") == []


def test_a_conversation_can_be_started_by_keyboard(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.press("Tab")
        assert await page.evaluate("document.activeElement.id") == "start"
        await page.press("Enter")
        await page.wait_for("conversationStats.state === 'talking'")
        await page.press(" ")
        await page.wait_for("conversationStats.state === 'ended'")

    assert on_page(echoing_server(Heard()), look, beeps) == []


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
