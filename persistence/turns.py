"""Who uses the database next: in order of arrival, and on one Session one after the other.

The driver's pool is not fair, and transactions on one hot Session only cost each other attempts.
Both lines are bounded: who finds his full is refused at once, and may ask again.
They only save work: between processes the database decides.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from persistence.errors import StoreOverloaded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from persistence.documents import Session

# What those who wait for one Session may take of the queue. Of 1,000 places it leaves one Session
# 250, which is about what it is served within the time that one may wait; others find the rest.
_SESSION_SHARE: Final = 0.25


class Line:
    """Those who want one Session: one has it, the others wait.

    Attributes:
        known: the Session as who had it last leaves it to the next; gone when nobody waits.
    """

    __slots__ = ("__weakref__", "known", "lock", "waiting")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0
        self.known: Session | None = None


class Turns:
    """The queue in front of the pool, and one in front of each Session."""

    def __init__(self, concurrency: int, queue_size: int, patience_s: float) -> None:
        """Bounds the queues.

        Args:
            concurrency: commands that use the database at the same time.
            queue_size: commands that may wait, for a place or for their Session.
            patience_s: how long one may wait for each; the rest of a deadline is for the work.
        """
        self._places = asyncio.Semaphore(concurrency)
        self._queue_size = queue_size
        self._session_queue_size = max(1, int(queue_size * _SESSION_SHARE))
        self._patience_s = patience_s
        self._waiting = 0
        self._lines: WeakValueDictionary[object, Line] = WeakValueDictionary()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def session_busy(self, session_id: object) -> bool:
        """Whether a command of this process is at work on the Session."""
        line = self._lines.get(session_id)
        return line is not None and line.lock.locked()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a place in front of the pool, in order of arrival.

        Raises:
            StoreOverloaded: the queue is full, or the turn does not come in time.
        """
        async with self._bounded_wait():
            await self._places.acquire()
        try:
            yield
        finally:
            self._places.release()

    @asynccontextmanager
    async def session_turn(self, session_id: object) -> AsyncIterator[Line]:
        """Waits for the Session, then for a place in front of the pool.

        Raises:
            StoreOverloaded: one of the two queues is full, or the turn does not come in time.
        """
        line = self._lines.get(session_id)
        if line is None:
            line = self._lines[session_id] = Line()
        if line.waiting >= self._session_queue_size:
            raise StoreOverloaded("too many commands wait for this session")
        line.waiting += 1
        try:
            async with self._bounded_wait():
                await line.lock.acquire()
        finally:
            line.waiting -= 1
        try:
            async with self.turn():
                yield line
        finally:
            line.lock.release()

    @asynccontextmanager
    async def _bounded_wait(self) -> AsyncIterator[None]:
        """Bounds how many wait, and leaves who has waited the time to be carried out."""
        if self._waiting >= self._queue_size:
            raise StoreOverloaded("too many commands wait for the database")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience_s):
                yield
        except TimeoutError:
            raise StoreOverloaded("too many commands wait for the database") from None
        finally:
            self._waiting -= 1
