"""serve.py as a process, the stock client against it, and a user's mistakes."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import types

import aiohttp
import numpy as np
import pytest
from test_serving import Client, converse

from finetune.commands import run_command
from finetune.serving import static
from finetune.serving.command import serve
from project_root import ROOT


@pytest.fixture
def running(untrained_run):
    """Start the command; returns the process and its port. Ended by the test, or killed after it."""
    started = []

    def start(*options):
        command = [sys.executable, str(ROOT / "serve.py"), "--checkpoint", str(untrained_run("lora_ttt"))]
        process = subprocess.Popen(
            [*command, "--port", "0", "--static", "own", *map(str, options)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        for line in process.stderr:
            found = re.search(r"listening on http://localhost:(\d+)/", line)
            if found:
                return process, int(found[1])
        raise AssertionError("the server did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_server_in_mid_conversation_and_keeps_the_memory(running, tmp_path, number):
    process, port = running("--save-memory", tmp_path / "memory.safetensors")

    async def talk():
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://localhost:{port}/") as response:
                assert "<title>" in await response.text()
            async with session.ws_connect(f"http://localhost:{port}/api/chat") as ws:
                client = Client(ws)
                await converse(client)
                process.send_signal(number)
                assert not await client.hear()
                assert ws.close_code == 1001

    asyncio.run(asyncio.wait_for(talk(), 60))
    log = process.stderr.read()
    assert process.wait(20) == 0
    assert "memory of 0." in log and "shutting down" in log and "Traceback" not in log
    assert (tmp_path / "memory.safetensors").is_file()


def _sound_card(played):
    """The part of sounddevice that moshi.client uses; what it plays comes into the list."""

    class FakeStream:
        def __init__(self, *, blocksize, callback, **_):
            self.blocksize, self.callback = blocksize, callback
            self.done = threading.Event()

        def __exit__(self, *_):
            self.done.set()

    class Microphone(FakeStream):
        def __enter__(self):
            threading.Thread(target=self.run, daemon=True).start()

        def run(self):
            for number in range(25):
                tone = np.sin(np.arange(self.blocksize) * 0.1 + number).astype(np.float32)
                self.callback(0.1 * tone[:, None], self.blocksize, None, None)
                self.done.wait(0.04)

    class Speaker(FakeStream):
        def __enter__(self):
            threading.Thread(target=self.run, daemon=True).start()

        def run(self):
            while not self.done.wait(0.02):
                out = np.zeros((self.blocksize, 1), np.float32)
                self.callback(out, self.blocksize, None, None)
                if out.any():
                    played.append(out)

    return types.SimpleNamespace(InputStream=Microphone, OutputStream=Speaker)


def test_the_stock_client_talks_to_it(running, monkeypatch):
    """moshi.client itself, with a sound card that exists in memory only."""
    _, port = running()
    played, printed, problems = [], [], []
    monkeypatch.setitem(sys.modules, "sounddevice", _sound_card(played))
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    from moshi import client

    printer = types.SimpleNamespace(
        log=lambda level, text: printed.append(f"{level}: {text}"),
        print_token=printed.append,
        print_header=lambda: None,
        print_pending=lambda: None,
        print_lag=lambda: None,
    )
    options = types.SimpleNamespace(url=None, https=False, host="localhost", port=port)

    async def talk():
        task = asyncio.create_task(client.run(printer, options))
        for _ in range(300):
            await asyncio.sleep(0.1)
            if len(played) >= 15:
                break
        problems.extend(line for line in printed if line.startswith(("warning", "error")))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(talk())
    assert len(played) >= 15
    assert "info: connected!" in printed
    assert problems == ["warning: unknown message kind 0"], "it says so of the stock server's handshake too"
    assert len(printed) > len(problems) + 2, "text comes back"


@pytest.fixture
def fails(monkeypatch, capfd, untrained_run):
    """Run the command with a mistake in this process; return its one line."""

    def run(*options, mode="lora_ttt"):
        arguments = ["--checkpoint", str(untrained_run(mode)), "--static", "own", *map(str, options)]
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: serve(arguments))
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert (exit_.value.code, len(errors)) == (2, 1), errors
        return errors[0]

    return run


def test_mistakes_are_one_line(fails, tmp_path, monkeypatch):
    token = "0123456789abcdef"
    assert "that needs --token and --ssl" in fails("--host", "0.0.0.0")
    assert "that needs --token and --ssl" in fails("--host", "0.0.0.0", "--token", token)
    assert "needs at least 16 characters" in fails("--token", "short")
    assert "needs valid cert.pem and key.pem" in fails("--ssl", tmp_path)
    assert "--port: 70000 is not allowed" in fails("--port", 70000)
    assert "--queue: -1 is not allowed" in fails("--queue", -1)
    assert "index.html does not exist" in fails("--static", tmp_path)
    assert "cannot be written: No such file" in fails("--save-memory", tmp_path / "nowhere" / "m")
    (tmp_path / "notes.txt").write_text("kept")
    assert "exists and is not moshi-ttt memory 1" in fails("--save-memory", tmp_path / "notes.txt")
    assert "--token: may hold printable ASCII" in fails("--token", "ü" * 20)
    assert "--idle-sec: 9999999999 is not allowed" in fails("--idle-sec", 9999999999)
    assert "--max-connections: 0 is not allowed" in fails("--max-connections", 0)
    assert "nowhere: does not exist" in fails("--load-memory", tmp_path / "nowhere")
    assert "has no TTT layers, so there is no memory" in fails("--save-memory", tmp_path / "m", mode="lora")
    assert "with --ttt off the memory does not learn" in fails("--ttt", "off", "--load-memory", "m")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in fails("--host", "127.0.0.1", "--port", port)
    monkeypatch.setattr("finetune.serving.static.hf_hub_download", _unreachable)
    assert "--static stock: Moshi's web client cannot be had" in fails("--static", "stock")


def _unreachable(*_, **__):
    raise OSError("offline")


def test_the_stock_page_is_served_where_it_was_downloaded_before(monkeypatch, tmp_path):
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.html").write_text("stock")
    asked = []

    def download(*name, local_files_only):
        asked.append(local_files_only)
        if local_files_only and not (tmp_path / "dist.tgz").exists():
            raise FileNotFoundError
        with tarfile.open(tmp_path / "dist.tgz", "w:gz") as tar:
            tar.add(tmp_path / "dist", "dist")
        return str(tmp_path / "dist.tgz")

    monkeypatch.setattr(static, "hf_hub_download", download)
    assert static.find_page("auto") == static.PAGE_DIR
    assert static.find_page("stock") == tmp_path / "dist"
    assert static.find_page("auto") == tmp_path / "dist"
    assert asked == [True, False, True], "no network unless it is asked for"
    assert static.find_page("none") is None
