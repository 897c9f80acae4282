"""Drives a headless Chromium by the DevTools Protocol, with a sound file in place of the microphone."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--remote-debugging-port=0",
)
START_TIMEOUT_SEC = 30.0
COMMAND_TIMEOUT_SEC = 30.0
EXIT_TIMEOUT_SEC = 10.0


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in BROWSER_NAMES if (path := shutil.which(name))), None)


class PageProbe:
    """A page in a browser of its own, which lives as long as the context.

    Attributes:
        console_errors: messages of level error and uncaught exceptions since the start, in order.
    """

    def __init__(self, microphone: Path | None = None, extra_options: tuple[str, ...] = ()) -> None:
        """Prepares a browser.

        Args:
            microphone: WAV file that the page hears as the microphone, again and again.
            extra_options: further options on the browser's command line.
        """
        self.console_errors: list[str] = []
        self._microphone = microphone
        self._extra_options = extra_options
        self._stack = contextlib.AsyncExitStack()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._load_event = asyncio.Event()

    async def __aenter__(self) -> "PageProbe":
        async with contextlib.AsyncExitStack() as stack:
            await self._launch(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _launch(self, stack: contextlib.AsyncExitStack) -> None:
        browser = find_browser()
        if browser is None:
            raise RuntimeError("no Chromium is installed")
        # A browser that ends may still write into its profile.
        profile = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="page_probe_", ignore_cleanup_errors=True)
        )
        command = [browser, *BROWSER_OPTIONS, f"--user-data-dir={profile}", *self._extra_options]
        if self._microphone is not None:
            command.append(f"--use-file-for-fake-audio-capture={self._microphone}")
        process = await asyncio.create_subprocess_exec(
            *command,
            "about:blank",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        stack.push_async_callback(_end_process, process)
        port = await _read_port(Path(profile) / "DevToolsActivePort", process)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        address = await _page_address(session, port)
        self._socket = await stack.enter_async_context(session.ws_connect(address, max_msg_size=0))
        listener = asyncio.create_task(self._listen())
        stack.push_async_callback(_cancel, listener)
        # Runs before everything above: the browser closes its own windows and helper processes.
        stack.push_async_callback(self._ask_to_close)
        for domain in ("Page", "Runtime", "Log"):
            await self.command(f"{domain}.enable")

    async def _ask_to_close(self) -> None:
        with contextlib.suppress(Exception):
            await self.command("Browser.close")

    async def _listen(self) -> None:
        async for message in self._socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            content = json.loads(message.data)
            if "id" in content:
                answer = self._answers.pop(content["id"], None)
                if answer is not None and not answer.done():
                    answer.set_result(content)
            else:
                self._take_event(content["method"], content["params"])
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the browser has closed the connection"))

    def _take_event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._load_event.set()
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console_errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            arguments = [str(item.get("value", item.get("description", ""))) for item in params["args"]]
            self.console_errors.append(" ".join(arguments))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.console_errors.append(f"{entry['text']} {entry.get('url', '')}".strip())

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one DevTools command and returns its result.

        Raises:
            RuntimeError: the browser reports an error.
        """
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        await self._socket.send_json({"id": number, "method": method, "params": params})
        content = await asyncio.wait_for(answer, COMMAND_TIMEOUT_SEC)
        if "error" in content:
            raise RuntimeError(f"{method}: {content['error']['message']}")
        return content["result"]

    async def open(self, url: str) -> None:
        """Open an address and wait until the page has loaded."""
        self._load_event.clear()
        result = await self.command("Page.navigate", url=url)
        if result.get("errorText"):
            raise RuntimeError(f"{url}: {result['errorText']}")
        await asyncio.wait_for(self._load_event.wait(), COMMAND_TIMEOUT_SEC)

    async def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited.

        Raises:
            RuntimeError: the expression throws.
        """
        result = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    async def click(self, selector: str) -> None:
        """Clicks with the mouse into the middle of the first element that a CSS selector finds."""
        place = await self.evaluate(
            f"""(() => {{
              const found = document.querySelector({json.dumps(selector)});
              found.scrollIntoView({{ block: "center", behavior: "instant" }});
              const box = found.getBoundingClientRect();
              return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.command(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    async def press(self, key: str) -> None:
        """Presses and releases a key by its DOM name, for instance Tab or Enter."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": codes[key]}
        await self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    async def wait_for(self, condition: str, timeout_sec: float = 10.0) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: it stays false; the message has the page's text.
        """
        deadline = time.monotonic() + timeout_sec
        while not await self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                text = await self.evaluate("document.body.innerText")
                raise TimeoutError(
                    f"not within {timeout_sec:g} s: {condition}\nconsole: {self.console_errors}\n{text}"
                )
            await asyncio.sleep(0.05)

    async def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the page's window and its colour scheme."""
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG file."""
        result = await self.command("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(result["data"]))


async def _read_port(path: Path, process: asyncio.subprocess.Process) -> int:
    """The browser writes the port that it has chosen into its profile."""
    deadline = time.monotonic() + START_TIMEOUT_SEC
    while time.monotonic() < deadline:
        if process.returncode is not None:
            raise RuntimeError(f"the browser has ended with status {process.returncode}")
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= 2:
            return int(lines[0])
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the browser has not started within {START_TIMEOUT_SEC:g} s")


async def _page_address(session: aiohttp.ClientSession, port: int) -> str:
    """Websocket address of the browser's first page."""
    deadline = time.monotonic() + START_TIMEOUT_SEC
    while time.monotonic() < deadline:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
            targets = await response.json(content_type=None)
        for target in targets:
            if target["type"] == "page":
                return target["webSocketDebuggerUrl"]
        await asyncio.sleep(0.05)
    raise TimeoutError("the browser has no page")


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _end_process(process: asyncio.subprocess.Process) -> None:
    """Wait for the browser, and end it with its helpers where it does not go by itself.

    The browser is the leader of a session of its own, so its process group has no other processes.
    """
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), EXIT_TIMEOUT_SEC)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
