"""What the web page's controls do: start, stop, mute, and a start without memory."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

import page_helpers
from page_helpers import RATE, Heard, echoing_server, on_page, refuse
from page_probe import PageProbe

pytestmark = page_helpers.BROWSER_MARKS
beeps = page_helpers.beeps


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


def test_a_conversation_can_be_started_by_keyboard(beeps: Path) -> None:
    async def look(page: PageProbe) -> None:
        await page.press("Tab")
        assert await page.evaluate("document.activeElement.id") == "start"
        await page.press("Enter")
        await page.wait_for("conversationStats.state === 'talking'")
        await page.press(" ")
        await page.wait_for("conversationStats.state === 'ended'")

    assert on_page(echoing_server(Heard()), look, beeps) == []
