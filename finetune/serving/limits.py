"""What connections and conversations may ask of the server."""

import asyncio
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections, whatever they are for; sizes in bytes, times in seconds.

    Attributes:
        in_all: open at once.
        per_address: open at once from one address (IPv6: from one network of 64 bits).
        request_sec: in which the whole head of a request, and a TLS handshake before it, must have come.
        request_bytes: of a request's head.
        message_bytes: that may come without making up a message of a websocket.
        answer_sec: a connection without a websocket lasts at most, so that slow readers end too.
        send_sec: in which a client must take something, where data wait for it.
        closing_sec: for the rest of the data, once a connection is being closed.
        linger_sec: in which a client that sends a body may read its answer.
    """

    in_all: int = 256
    per_address: int = 32
    request_sec: float = 10.0
    request_bytes: int = 32 * 1024
    message_bytes: int = 128 * 1024
    answer_sec: float = 60.0
    send_sec: float = 10.0
    closing_sec: float = 5.0
    linger_sec: float = 1.0


@dataclass(frozen=True)
class Limits:
    """Limits of a websocket; sizes in bytes, times in seconds.

    Attributes:
        message_bytes: of one message; 64 KiB hold more than 10 s of Opus.
        messages_per_sec: of audio that are read on average, of others a tenth; whoever sends faster waits.
        burst_messages: that may come at once.
        wrong_messages: of unknown kinds before the connection is closed.
        buffered_sec: audio that waits for the model; whoever sends more waits.
        idle_sec: without audio before the conversation ends.
        conversation_sec: length of a conversation.
        send_sec: in which a client must take a message.
        send_buffer_bytes: of the socket; together with `send_sec` it notices a client that does not read.
        heartbeat_sec: between two pings, to notice a client that is gone.
        unheard_sec_per_sec: audio that is unpacked before the conversation begins; whoever sends more waits.
    """

    message_bytes: int = 64 * 1024
    messages_per_sec: float = 200.0
    burst_messages: int = 400
    wrong_messages: int = 20
    buffered_sec: float = 10.0
    idle_sec: float = 60.0
    conversation_sec: float = 4 * 3600.0
    send_sec: float = 10.0
    send_buffer_bytes: int = 64 * 1024
    heartbeat_sec: float = 20.0
    unheard_sec_per_sec: float = 10.0


class Throttle:
    """Lets messages, or what else is counted, through at a limited rate (token bucket); the rest waits.

    Args:
        per_sec: rate on average.
        burst: how many may come at once.
    """

    def __init__(self, per_sec: float, burst: float) -> None:
        self._per_sec = per_sec
        self._burst = burst
        self._tokens = burst
        self._last = time.monotonic()

    async def wait(self, count: float = 1.0) -> None:
        """Take a share of the rate, by default that of one message, waiting for it where there is none."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._per_sec)
        self._last = now
        self._tokens -= count
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._per_sec)
