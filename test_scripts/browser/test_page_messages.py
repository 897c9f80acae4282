"""What the web page tells its user: errors, the queue, and why no conversation is possible."""

from pathlib import Path

from aiohttp import WSCloseCode, web

import page_helpers
from page_helpers import Heard, closing_server, echoing_server, on_page, refuse, shown_error
from page_probe import PageProbe

pytestmark = page_helpers.BROWSER_MARKS
beeps = page_helpers.beeps


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
