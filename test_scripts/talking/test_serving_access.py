"""Who is let in: origins, host names, tokens, cookies, odd addresses."""

import re
from functools import partial
from urllib.parse import urljoin

import aiohttp
import pytest
import torch
from yarl import URL

from finetune.distributed import set_up_logging
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


@pytest.mark.parametrize(
    "path",
    [
        "/%09/evil.example",
        "/%0A/evil.example",
        "/%0D%0A/evil.example",
        "//evil.example",
        "/%5Cevil.example",
        "/memory",
        "/%5C%09/evil.example",
        "/%2F/evil.example",
        "/%2Fevil.example",
        "/memory/..//evil.example",
        "/%20//evil.example",
        "/http:%2F%2Fevil.example",
        "/.%2F/evil.example",
        "/%00/evil.example",
    ],
)
def test_no_redirect_leads_to_another_server(serving, path):
    async def test(running):
        async with running.session.get(
            URL(f"{running.base.origin()}{path}?token=x", encoded=True), allow_redirects=False
        ) as response:
            if path == "/%00/evil.example" and response.status == 400:
                return
            assert response.status == 302
            # As browsers read an address: tabs and line breaks go, backslashes are slashes.
            target = re.sub(r"[\t\r\n]", "", response.headers["Location"]).replace("\\", "/").strip()
            assert urljoin("http://good.example/", target).startswith("http://good.example/")

    serving(test)


def test_what_a_stranger_asks_for_cannot_forge_a_line_of_the_log(serving, capfd):
    set_up_logging(lines_to_stdout=False)
    forged = "23:59:59 refused nobody"

    async def test(running):
        for path in (f"/x%0A{forged}", f"/x%0D{forged}", "/%1B[2J%1B]0;title%07", "/%E2%80%AE%C2%85"):
            url = URL(f"{running.base.origin()}{path.replace(' ', '%20')}", encoded=True)
            async with running.session.get(url, headers={"Origin": "http://evil.example"}) as response:
                assert response.status == 403
        assert await running.status("/", headers={"Host": "evil\x1b[31m", "Origin": "x\x1b[1m"}) in (400, 403)

    serving(test)
    lines = capfd.readouterr().err.splitlines()
    assert sum("refused" in line for line in lines) >= 4
    assert not any(line.startswith(forged) for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    "path", ["/", "/memory/", "/app.js", "/memory/app.js", "/nowhere", "/health", "/memory"]
)
def test_every_response_says_that_its_type_is_no_guess(serving, path):
    async def test(running):
        async with running.session.get(running.base.join(URL(path)), allow_redirects=False) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["X-Frame-Options"] == "DENY"
            assert response.headers["Referrer-Policy"] == "no-referrer"

    serving(test)
