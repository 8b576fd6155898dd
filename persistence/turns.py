"""Who uses the database next: in order of arrival, and on one Session turn after turn.

The driver's pool is not fair, and transactions on one hot Session only cost each other attempts.
So what people ask for, and what is due, comes to the pool through lanes, which together have fewer
places than it has connections (of a pool of five or more): a flood in one of them takes nothing
from the others. Refusals, deliveries and looks go past. All lines are bounded: who finds his full
is refused at once, and may ask again. They only save work: between processes the database decides.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakValueDictionary

from persistence.errors import StoreOverloaded
from persistence.sharing import Shared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from persistence.documents import Session

Item = TypeVar("Item")
Result = TypeVar("Result")

# What those who wait for one Session may take of the queue. Of 1,000 places it leaves one Session
# 250, and it is served as many within the time that one may wait; others find the rest.
_SESSION_SHARE: Final = 0.25

# A timer waits longer than commands do: who stands before it has had his turn or given up by then.
_TIMER_PATIENCE: Final = 1.25


class Lane(StrEnum):
    """What goes to the pool by itself."""

    COMMANDS = "commands"
    VIEWS = "views"
    """Goals, Sessions and snapshots, as they are shown to people."""
    TIMERS = "timers"
    """Due commands and what the payment service has settled: never more than looks have claimed."""


# Places, for each of those of commands. All together are fewer than the pool has connections; some
# are left for refusals, which ask a majority when the next in line has the turn, and deliveries.
_SHARE_OF: Final = {
    Lane.COMMANDS: 1.0,
    Lane.VIEWS: 0.5,
    Lane.TIMERS: 0.25,
}


class _Queue:
    """The places of a lane, given in order of arrival, and how many wait for one."""

    __slots__ = ("most", "patience_s", "places", "waiting")

    def __init__(self, places: int, most: float, patience_s: float) -> None:
        self.places = asyncio.Semaphore(places)
        self.most = most
        self.patience_s = patience_s
        self.waiting = 0

    @asynccontextmanager
    async def bounded_wait(self) -> AsyncIterator[None]:
        """Bounds how many wait, and leaves who has waited the time to be carried out."""
        if self.waiting >= self.most:
            raise StoreOverloaded("too many commands wait for the database")
        self.waiting += 1
        try:
            async with asyncio.timeout(self.patience_s):
                yield
        except TimeoutError:
            raise StoreOverloaded("too many commands wait for the database") from None
        finally:
            self.waiting -= 1


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
    """The queues in front of the pool, and one in front of each Session."""

    def __init__(self, concurrency: int, queue_size: int, patience_s: float) -> None:
        """Bounds the queues.

        Args:
            concurrency: commands that use the database at the same time; as many connections are
                for everything else.
            queue_size: commands that may wait, for a place or for their Session; as many views.
            patience_s: how long one may wait for each; the rest of a deadline is for the work.
        """
        self._queues = {
            lane: _Queue(max(1, int(concurrency * share)), queue_size, patience_s)
            for lane, share in _SHARE_OF.items()
        }
        timers = self._queues[Lane.TIMERS]
        timers.most, timers.patience_s = math.inf, patience_s * _TIMER_PATIENCE
        self._session_queue_size = max(1, int(queue_size * _SESSION_SHARE))
        self._lines: WeakValueDictionary[object, Line] = WeakValueDictionary()
        self._shared: WeakValueDictionary[object, Shared[Any, Any]] = WeakValueDictionary()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(queue.waiting for queue in self._queues.values())

    async def share(
        self,
        session_id: object,
        item: Item,
        together: Callable[[Sequence[Item]], Awaitable[Result]],
    ) -> Result:
        """Does the item with those of others who want the same of the Session.

        Args:
            session_id: whose.
            item: what is to be done.
            together: as for `Shared`, the same for all; it takes the turn for them, `admitted`.

        Raises:
            StoreOverloaded: too many wait, or for too long; nothing was done.
        """
        self._check_room(session_id)
        shared = self._shared.get(session_id)
        if shared is None:
            queue = self._queues[Lane.COMMANDS]
            # One at a time has the Session anyway.
            shared = self._shared[session_id] = Shared(together, at_once=1, queue=queue)
        result: Result = await shared.do(item)
        return result

    def _check_room(self, session_id: object) -> None:
        line, shared = self._lines.get(session_id), self._shared.get(session_id)
        waiting = (line.waiting if line else 0) + (shared.waiting if shared else 0)
        if waiting >= self._session_queue_size:
            raise StoreOverloaded("too many commands wait for this session")

    def session_busy(self, session_id: object) -> bool:
        """Whether a command of this process is at work on the Session."""
        line = self._lines.get(session_id)
        return line is not None and line.lock.locked()

    @asynccontextmanager
    async def turn(
        self, lane: Lane = Lane.COMMANDS, *, patient: bool = False
    ) -> AsyncIterator[None]:
        """Waits for a place in front of the pool, in order of arrival.

        Args:
            lane: in which.
            patient: never one too many, for whom there is a bound already, such as one's socket.

        Raises:
            StoreOverloaded: the queue is full, or the turn does not come in time.
        """
        queue = self._queues[lane]
        if patient or not queue.places.locked():
            # A place that is free is taken without a turn of the loop, and without a timer.
            await queue.places.acquire()
        else:
            async with queue.bounded_wait():
                await queue.places.acquire()
        try:
            yield
        finally:
            queue.places.release()

    @asynccontextmanager
    async def session_turn(
        self, session_id: object, lane: Lane = Lane.COMMANDS, *, admitted: bool = False
    ) -> AsyncIterator[Line]:
        """Waits for the Session, then for a place in front of the pool.

        Args:
            session_id: which.
            lane: of the place.
            admitted: who comes for those who `share` has let in.

        Raises:
            StoreOverloaded: one of the two queues is full, or the turn does not come in time.
        """
        if not admitted and lane is not Lane.TIMERS:
            self._check_room(session_id)
        line = self._lines.get(session_id)
        if line is None:
            line = self._lines[session_id] = Line()
        # One who waits is next when it is released, though it is nobody's for a moment.
        if line.lock.locked() or line.waiting:
            line.waiting += 1
            try:
                async with self._queues[lane].bounded_wait():
                    await line.lock.acquire()
            finally:
                line.waiting -= 1
        else:
            await line.lock.acquire()
        try:
            async with self.turn(lane):
                yield line
        finally:
            line.lock.release()
