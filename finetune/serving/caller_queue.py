"""One conversation at a time: who talks, who waits, who is turned away."""

import asyncio
from collections import deque


class Turns:
    """First come, first served.

    Args:
        max_waiting: how many may wait; 0 turns everybody away who finds the model busy.
    """

    def __init__(self, max_waiting: int = 0) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.busy = False

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def ask(self) -> "asyncio.Future[None] | None":
        """A future that is done when it is one's turn; None when there is no room to wait.

        Whoever got a future calls `give_back` with it in the end, served or not.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self.busy:
            self.busy = True
            turn.set_result(None)
            return turn
        if len(self._waiting) >= self._max_waiting:
            return None
        self._waiting.append(turn)
        return turn

    def position(self, turn: "asyncio.Future[None]") -> int:
        """How many turns there are before it: 1 is next, 0 has its turn."""
        return self._waiting.index(turn) + 1 if turn in self._waiting else 0

    def give_back(self, turn: "asyncio.Future[None]") -> None:
        """End a turn, or stop waiting for it."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.busy = False
