"""The work of serve.py."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import ssl
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from finetune.commands import Parser
from finetune.distributed import set_up_logging
from finetune.errors import ConfigError
from finetune.inference.options import (
    add_model_options,
    add_sampling_options,
    check_memory_options,
    choose_checkpoint,
    load_from_options,
    positive_integer,
    sampling_from_options,
    seed,
)
from finetune.serving.access import MIN_TOKEN_LENGTH, Access, is_loopback
from finetune.serving.app import OWN_PAGE, Server
from finetune.serving.door import serving
from finetune.serving.limits import ConnectionLimits, Limits
from finetune.serving.server_log import FloodFilter
from finetune.serving.static import find_page
from finetune.serving.voice import MemoryFiles, Voice
from moshi_ttt.files.state_file import check_writable
from moshi_ttt.memory import KIND as MEMORY_KIND

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "MOSHI_TTT_TOKEN"


def serve(arguments: Sequence[str] | None = None) -> None:
    """Serve a model until SIGINT or SIGTERM, see `python serve.py --help`.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used, or the port is taken.
        StateError: the memory cannot be used.
    """
    options = _parse(arguments)
    set_up_logging(lines_to_stdout=False)
    context = _ssl_context(options.ssl)
    page = find_page(options.static)
    speech = load_from_options(options, must_speak=False)
    check_memory_options(options, speech.lm)
    logger.info("model: %s", speech.source)
    files = MemoryFiles(options.load_memory, options.save_memory)
    voice = Voice(speech, sampling=sampling_from_options(options), files=files, seed=options.seed)
    access = Access(options.host, token=options.token, secure=context is not None)
    limits = Limits(conversation_sec=60.0 * options.max_minutes, idle_sec=float(options.idle_sec))
    server = Server(voice, access, limits=limits, max_waiting=options.queue)
    connections = ConnectionLimits(
        in_all=options.max_connections, per_address=options.max_connections_per_address
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(FloodFilter())
    # What is loaded by now stays. Looking through it all for garbage would silence the caller for a second.
    gc.collect()
    gc.freeze()
    asyncio.run(_run(server.application(static=page), access, options.port, connections, context))


async def _run(
    app: web.Application,
    access: Access,
    port: int,
    limits: ConnectionLimits,
    context: ssl.SSLContext | None,
) -> None:
    stop = _stop_event()
    async with contextlib.AsyncExitStack() as stack:
        try:
            door = await stack.enter_async_context(
                serving(app, access.host, port, limits=limits, ssl_context=context)
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--host, --port: cannot listen on {access.host}:{port}: {reason}.") from None
        address = f"{'https' if access.secure else 'http'}://{access.host}:{door.port}"
        secret = "" if access.token is None else "?token=..."
        logger.info("listening on %s/%s", address, secret)
        logger.info("page with memory plot: %s%s%s", address, OWN_PAGE, secret)
        await stop.wait()
        logger.info("shutting down")


def _stop_event() -> asyncio.Event:
    """Set at the first SIGINT or SIGTERM, also while the model is opened; a second one acts as usual."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def handle() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, handle)
    return stop


def _ssl_context(folder: Path | None) -> ssl.SSLContext | None:
    if folder is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ssl: {folder} needs valid cert.pem and key.pem: {error}.") from None
    return context


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="serve.py",
        description="Talk to a trained model in a browser or with moshi.client.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--seed", type=seed, default=42424242, help="of the draws (%(default)s)")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="localhost", help="address to listen on (%(default)s)")
    group.add_argument("--port", type=int, default=8998, help="0 takes a free one (%(default)s)")
    group.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE),
        help=f"secret that clients must show, ?token=... ({TOKEN_VARIABLE}); needed unless host is localhost",
    )
    group.add_argument(
        "--ssl", type=Path, metavar="DIR", help="serve https with cert.pem and key.pem of this folder"
    )
    group.add_argument(
        "--queue",
        type=int,
        nargs="?",
        const=8,
        default=0,
        help="let this many callers wait while the model talks (8 without a number) instead of refusing them",
    )
    group.add_argument(
        "--static",
        default="auto",
        help="page at /: auto (Moshi's client where downloaded before, else ours), stock (downloads it), "
        "own, none or a folder",
    )
    group.add_argument(
        "--max-minutes", type=positive_integer, default=240, help="of a conversation (%(default)s)"
    )
    group.add_argument(
        "--idle-sec", type=positive_integer, default=60, help="without audio, then it ends (%(default)s)"
    )
    group.add_argument(
        "--max-connections",
        type=positive_integer,
        default=ConnectionLimits.in_all,
        help="open at once; then those without a request yet make room (%(default)s)",
    )
    group.add_argument(
        "--max-connections-per-address",
        type=positive_integer,
        default=ConnectionLimits.per_address,
        help="the same for one address; all callers behind a proxy share it (%(default)s)",
    )
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--load-memory", type=Path, metavar="FILE", help="memory that every conversation begins with"
    )
    group.add_argument(
        "--save-memory",
        type=Path,
        metavar="FILE",
        help="where the memory goes when a conversation ends; the same file to remember from one to the next",
    )
    options = parser.parse_args(arguments)
    choose_checkpoint(options)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port: {options.port} is not allowed, must be between 0 and 65535.")
    if options.queue < 0:
        raise ConfigError(f"--queue: {options.queue} is not allowed, must be at least 0.")
    if not is_loopback(options.host) and (options.token is None or options.ssl is None):
        raise ConfigError(
            f"--host: {options.host} can be reached from other machines; that needs --token and --ssl. "
            "From elsewhere, an SSH tunnel to localhost works without."
        )
    if options.token is not None and len(options.token) < MIN_TOKEN_LENGTH:
        raise ConfigError(f"--token: needs at least {MIN_TOKEN_LENGTH} characters.")
    if options.token is not None and not (options.token.isascii() and options.token.isprintable()):
        raise ConfigError("--token: may hold printable ASCII characters only.")
    if options.save_memory is not None:
        check_writable(options.save_memory, kind=MEMORY_KIND)
