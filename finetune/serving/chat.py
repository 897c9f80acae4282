"""One websocket connection, from its first byte to its close."""

import asyncio
import logging
import socket
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sphn
from aiohttp import WebSocketError, WSMessage, WSMsgType, web
from moshi.models.loaders import FRAME_RATE

from finetune.errors import StateError
from finetune.files import finite_or_null
from finetune.serving.caller_queue import Turns
from finetune.serving.connection import Connection, connection_of
from finetune.serving.limits import Limits, Throttle
from finetune.serving.protocol import IGNORED_KINDS, CloseCode, MessageKind, message, metadata
from finetune.serving.voice import SpokenFrame, Voice

logger = logging.getLogger(__name__)

_ENDS = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)
_LAST_BYTES = 8192  # in which a client's goodbye should come, a second of Opus
_COST_OF_OTHERS = 10  # messages without audio, which nobody sends often
_OPUS_PIECE = 512  # bytes that are unpacked at once
_FRAMES_BETWEEN_METADATA = 3
_LAG_SEC = 2.0  # audio waiting for the model that is worth a line
_SEC_BETWEEN_LAG_LINES = 10.0


@dataclass
class Ended(Exception):
    """The connection ends, for a reason that the log and the client are told."""

    code: CloseCode
    reason: str

    def __str__(self) -> str:
        return self.reason


class Inbox:
    """Audio on its way from the connection to the model.

    Args:
        sample_rate: of the audio.
        max_sec: how much may wait.
    """

    def __init__(self, *, sample_rate: int, max_sec: float) -> None:
        self._max_samples = int(max_sec * sample_rate)
        self._sample_rate = sample_rate
        self._audio: np.ndarray = np.zeros(0, np.float32)
        self._changed = asyncio.Condition()
        self.open = False  # audio before the conversation has begun is not kept

    @property
    def waiting_sec(self) -> float:
        """Audio that waits, in seconds."""
        return len(self._audio) / self._sample_rate

    async def put(self, audio: np.ndarray) -> None:
        """Add audio, once there is room."""
        if not self.open or not len(audio):
            return
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._audio) < self._max_samples)
            self._audio = np.concatenate([self._audio, audio])
            self._changed.notify_all()

    async def take(self, num_samples: int) -> np.ndarray:
        """The next audio, once there is as much."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._audio) >= num_samples)
            taken, self._audio = self._audio[:num_samples], self._audio[num_samples:]
            self._changed.notify_all()
        return taken


class Chat:
    """A connection that talks to the model, or waits for its turn.

    Args:
        request: that asked for the websocket, already let in.
        voice: the model.
        turns: of all connections.
        limits: of this one.
        number: of the connection, for the log.
    """

    def __init__(
        self, request: web.Request, voice: Voice, turns: Turns, *, limits: Limits, number: int
    ) -> None:
        # Pings are answered here: aiohttp would answer them without any limit.
        self.ws = web.WebSocketResponse(
            max_msg_size=limits.message_bytes,
            heartbeat=limits.heartbeat_sec,
            compress=False,
            timeout=2.0,
            autoping=False,
        )
        self._request = request
        self._voice = voice
        self._turns = turns
        self._limits = limits
        self._name = f"connection {number} ({request.remote})"
        self._wants_metadata = request.query.get("memory") == "1"
        self._fresh = request.query.get("fresh") == "1"
        self._inbox = Inbox(sample_rate=voice.sample_rate, max_sec=limits.buffered_sec)
        self._opus = sphn.OpusStreamReader(voice.sample_rate)
        self._unheard = Throttle(limits.unheard_sec_per_sec, limits.buffered_sec)
        self._last_lag_line = 0.0
        self._leaving: asyncio.Task[None] | None = None
        self._connection: Connection  # once there is a websocket
        self._closing = False

    async def run(self) -> web.WebSocketResponse:
        """Serve the connection until it ends; says in the log how it did."""
        self._limit_send_buffer()
        await self.ws.prepare(self._request)
        self._connection = connection_of(self._request)
        self._connection.became_websocket()
        start = time.monotonic()
        logger.info("%s: accepted", self._name)
        # Read from the beginning: to notice who leaves while waiting, and to keep the head of the stream.
        reader = asyncio.create_task(self._read())
        work = asyncio.create_task(self._converse())
        ended: Ended | None = None
        try:
            await asyncio.wait({reader, work}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await asyncio.gather(_stop(reader), _stop(work))
            if self._leaving is not None:
                await self._leaving
            # The one that did not end by being cancelled knows why.
            ended = self._reason(await asyncio.gather(reader, work, return_exceptions=True))
            seconds = time.monotonic() - start
            logger.info("%s: ended after %.1f s: %s", self._name, seconds, ended or "client left")
        await self._close(ended)
        return self.ws

    def _reason(self, results: Iterable[BaseException | None]) -> Ended | None:
        error = next((error for error in results if isinstance(error, Exception)), None)
        if error is None or isinstance(error, Ended):
            return error
        logger.error("%s: failed", self._name, exc_info=error)
        return Ended(CloseCode.INTERNAL_ERROR, "internal error of the server")

    async def _read(self) -> None:
        """Messages of the client into the inbox, until it closes."""
        limits = self._limits
        throttle = Throttle(limits.messages_per_sec, limits.burst_messages)
        num_wrong = 0
        while (received := await self._receive()).type not in _ENDS:
            is_audio = received.type == WSMsgType.BINARY and received.data[:1] == bytes([MessageKind.AUDIO])
            await throttle.wait(1 if is_audio else _COST_OF_OTHERS)
            if is_audio:
                await self._hear(received.data[1:])
            elif received.type == WSMsgType.PING:
                await self._write(self.ws.pong(received.data))
            elif received.type == WSMsgType.PONG:
                continue
            elif not (received.type == WSMsgType.BINARY and set(received.data[:1]) & IGNORED_KINDS):
                num_wrong += 1
                what = received.type.name if received.type != WSMsgType.BINARY else received.data[:1].hex()
                logger.warning("%s: message of unknown kind (%s)", self._name, what or "empty")
                if num_wrong > limits.wrong_messages:
                    raise Ended(CloseCode.POLICY, "too many messages of unknown kinds")
        if isinstance(self.ws.exception(), WebSocketError):
            raise Ended(CloseCode.POLICY, f"refused: {self.ws.exception()}")

    async def _receive(self) -> WSMessage:
        """The next message of the client."""
        # Runs where no message is left, so that this one waits.
        hungry = asyncio.get_running_loop().call_soon(self._connection.want, True)
        try:
            return await self.ws.receive()
        finally:
            hungry.cancel()
            if not self._closing:
                self._connection.want(False)

    async def _hear(self, data: bytes) -> None:
        """The next bytes of the stream, in pieces: a byte of Opus may be a twentieth of a second."""
        for begin in range(0, len(data), _OPUS_PIECE):
            audio = _decode(self._opus, data[begin : begin + _OPUS_PIECE])
            if self._inbox.open:
                await self._inbox.put(audio)
            else:
                await self._unheard.wait(len(audio) / self._voice.sample_rate)

    async def _converse(self) -> None:
        """Wait for the turn, talk, give the turn back."""
        turn = self._turns.ask()
        if turn is None:
            raise Ended(CloseCode.BUSY, "the model is in another conversation, try again later")
        began = False
        try:
            await self._wait(turn)
            await self._voice.begin(fresh=self._fresh)
            began = True
            await self._talk()
        except StateError as error:
            logger.error("%s: %s", self._name, error)
            raise Ended(CloseCode.POLICY, "the memory of the server cannot be read") from None
        finally:
            # A task of its own: however the conversation ends, the next one begins with the model free.
            self._leaving = asyncio.create_task(self._leave(turn, began))

    async def _leave(self, turn: "asyncio.Future[None]", began: bool) -> None:
        try:
            if began:
                await self._voice.end()
        finally:
            self._turns.give_back(turn)

    async def _wait(self, turn: "asyncio.Future[None]") -> None:
        told = None
        while not turn.done():
            position = self._turns.position(turn)
            if position != told:
                told = position
                logger.info("%s: waits, %d before it", self._name, position)
                if self._wants_metadata:
                    await self._send(metadata({"waiting": position}))
            await asyncio.wait({turn}, timeout=0.5)

    async def _talk(self) -> None:
        limits, voice = self._limits, self._voice
        opus = sphn.OpusStreamWriter(voice.sample_rate)
        self._inbox.open = True
        await self._send(message(MessageKind.HANDSHAKE))
        logger.info("%s: conversation begins", self._name)
        for number in range(int(limits.conversation_sec * FRAME_RATE)):
            try:
                frame = await asyncio.wait_for(self._inbox.take(voice.frame_size), limits.idle_sec)
            except asyncio.TimeoutError:
                raise Ended(CloseCode.POLICY, f"no audio for {limits.idle_sec:g} s") from None
            spoken = await voice.answer(frame)
            await self._speak(spoken, opus, number)
            self._report_lag()
        raise Ended(CloseCode.NORMAL, f"conversations last {limits.conversation_sec / 60:g} minutes at most")

    async def _speak(self, spoken: SpokenFrame, opus: sphn.OpusStreamWriter, number: int) -> None:
        audio = b"" if spoken.audio is None else opus.append_pcm(spoken.audio)
        if audio:
            await self._send(message(MessageKind.AUDIO, audio))
        if spoken.text:
            await self._send(message(MessageKind.TEXT, spoken.text.encode()))
        if self._wants_metadata and number % _FRAMES_BETWEEN_METADATA == 0:
            activity = [finite_or_null(value) for value in spoken.activity.values()]
            values = {
                "memory": {"layers": list(spoken.activity), "activity": activity},
                "frame_ms": round(spoken.frame_ms, 2),
                "lag_sec": round(self._inbox.waiting_sec, 3),
            }
            if spoken.num_resets:
                values["forgotten"] = spoken.num_resets
            await self._send(metadata(values))

    async def _send(self, data: bytes) -> None:
        await self._write(self.ws.send_bytes(data))

    async def _write(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            await asyncio.wait_for(writing, self._limits.send_sec)
        except asyncio.TimeoutError:
            raise Ended(CloseCode.POLICY, "the client does not take what it is sent") from None
        except ConnectionError:
            raise Ended(CloseCode.GOING_AWAY, "client left") from None

    async def close(self, *, code: CloseCode, reason: str) -> None:
        """Close the websocket; the client has a moment to agree."""
        self._closing = True
        self._connection.want(True, at_most=_LAST_BYTES)
        short = reason.encode()[:120].decode(errors="ignore").encode()  # no part of a character
        await self.ws.close(code=code, message=short)

    async def _close(self, ended: Ended | None) -> None:
        transport = self._request.transport
        gone = ended is not None and ended.code == CloseCode.GOING_AWAY
        if ended is not None and not gone and not self.ws.closed:
            error = message(MessageKind.ERROR, str(ended).encode())
            try:
                await asyncio.wait_for(self.ws.send_bytes(error), 1.0)
                await asyncio.wait_for(self.close(code=ended.code, reason=str(ended)), 3.0)
            except (asyncio.TimeoutError, ConnectionError):
                gone = True
        if gone and transport is not None:
            transport.abort()

    def _limit_send_buffer(self) -> None:
        transport = self._request.transport
        connection = transport.get_extra_info("socket") if transport is not None else None
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._limits.send_buffer_bytes)

    def _report_lag(self) -> None:
        now = time.monotonic()
        if self._inbox.waiting_sec > _LAG_SEC and now - self._last_lag_line > _SEC_BETWEEN_LAG_LINES:
            self._last_lag_line = now
            logger.warning(
                "%s: %.1f s of audio wait for the model; it takes %.0f ms for a frame of %.0f ms",
                self._name,
                self._inbox.waiting_sec,
                self._voice.median_frame_ms or 0.0,
                1000 / FRAME_RATE,
            )


async def _stop(task: "asyncio.Task[None]") -> None:
    """Cancel a task until it has ended.

    Once is not enough: up to Python 3.11, `asyncio.wait_for` loses a cancellation that arrives together with
    the result it waits for.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)


def _decode(opus: sphn.OpusStreamReader, data: bytes) -> np.ndarray:
    """The samples in the next bytes of the stream.

    Raises:
        Ended: the bytes are not Ogg-Opus.
    """
    try:
        return opus.append_bytes(data)
    except BaseException as error:
        # A panic of the decoder is a BaseException.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise Ended(CloseCode.INVALID_DATA, f"the audio is not an Ogg-Opus stream: {error}") from None
