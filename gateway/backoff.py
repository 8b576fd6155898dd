"""How long one waits who tries until it works."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Pauses between attempts: each twice the one before, up to a limit, and spread.

    The spread keeps a cluster of gateways from coming back in one beat.
    """

    __slots__ = ("_least_s", "_most_s", "_next_s")

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._next_s = least_s

    def begin_again(self) -> None:
        """An attempt has succeeded: the next pause is the shortest."""
        self._next_s = self._least_s

    def next_s(self) -> float:
        """How long to wait after one more attempt in vain."""
        whole_s, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        return whole_s * random.uniform(0.5, 1.0)  # noqa: S311  only a spread

    async def pause(self) -> None:
        """Waits before the next attempt."""
        await asyncio.sleep(self.next_s())
