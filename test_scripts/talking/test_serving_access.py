"""Who is let in: origins, host names, tokens, cookies, odd addresses."""

from functools import partial

import aiohttp
import pytest
import torch
from yarl import URL

from finetune.inference.speech_model import load_speech_model
from serving_helpers import Client, converse, run_server

TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def speech(untrained_run):
    return load_speech_model(str(untrained_run("lora_ttt")), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def serving(speech):
    """Run a test's coroutine against a server; the options are those of `run_server`."""
    return partial(run_server, speech)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost"}, 200),
    ],
    ids=str,
)
def test_foreign_pages_and_names_are_kept_out(serving, headers, status, caplog):
    async def test(running):
        assert await running.status("/", headers=headers) == status
        if status == 403:
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                async with running.client(headers=headers):
                    pass
            assert error.value.status == 403
        own = {"Origin": f"http://{running.base.host}:{running.base.port}"}
        async with running.client(headers=own) as client:
            await converse(client)

    serving(test)
    if status == 403:
        assert any(line.startswith("refused /api/chat from 127.0.0.1: foreign") for line in caplog.messages)


def test_without_the_token_nobody_comes_in(serving, caplog):
    async def test(running):
        for path in ("/", "/memory/", "/app.js", "/api/chat", "/api/chat?token=wrong", f"/?token={TOKEN}x"):
            assert await running.status(path) == 401, path
        assert await running.status("/", headers={"Authorization": "Bearer \udcff"}) == 401
        assert await running.status("/", cookies={"moshi_ttt": TOKEN}) == 401
        for options in ({}, {"headers": {"Authorization": "Bearer wrong"}}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                async with running.client(**options):
                    pass
            assert error.value.status == 401
        assert await running.status("/health") == 200
        assert not (await running.health())["busy"]
        for path, options in (
            (f"/api/chat?token={TOKEN}", {}),
            ("/api/chat", {"headers": {"Authorization": f"Bearer {TOKEN}"}}),
        ):
            async with running.client(path, **options) as client:
                await converse(client)
            await running.until_free()

    serving(test, token=TOKEN)
    assert TOKEN not in "\n".join(caplog.messages), "the log must not hold the token"


def test_old_and_odd_addresses_are_answered(serving):
    async def test(running):
        assert await running.status("/?token=of-yesterday") == 302
        assert await running.status("/" + "a" * 300) == 404
        async with running.session.get(
            URL(f"{running.base}//evil.example/?token=x", encoded=True), allow_redirects=False
        ) as response:
            assert response.headers["Location"].startswith("/") and "//" not in response.headers["Location"]

    serving(test)


def test_the_own_page_is_found_without_its_slash_too(serving):
    async def test(running):
        async with running.session.get(running.base / "memory") as response:
            assert (response.status, response.url.path) == (200, "/memory/")

    serving(test)


def test_a_browser_gets_a_cookie_for_the_token(serving):
    async def test(running):
        jar = aiohttp.CookieJar(unsafe=True)  # keeps cookies of addresses
        async with aiohttp.ClientSession(cookie_jar=jar) as browser:
            url = running.base / "memory/"
            async with browser.get(url.with_query(token=TOKEN), allow_redirects=False) as response:
                assert (response.status, response.headers["Location"]) == (302, "/memory/")
                cookie = response.headers["Set-Cookie"]
                assert TOKEN not in cookie and "HttpOnly" in cookie and "SameSite=Lax" in cookie
            async with browser.get(url) as response:
                assert response.status == 200
                assert "default-src 'self'" in response.headers["Content-Security-Policy"]
            async with browser.get(running.base / "memory/app.js") as response:
                assert response.status == 200
            async with browser.ws_connect(running.base / "memory/api/chat") as ws:
                await converse(Client(ws))

    serving(test, token=TOKEN)
