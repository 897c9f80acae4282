"""A conversation on the web page, seen from the page and from the server."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import page_helpers
from page_helpers import FRAME, LAYERS, MICROPHONE_HZ, RATE, VOICE_HZ, WORDS, Heard, echoing_server, served
from page_probe import PageProbe

pytestmark = page_helpers.BROWSER_MARKS
beeps = page_helpers.beeps

TALK_SEC = 4.0


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
