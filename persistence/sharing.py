"""Work that many ask for at once, done together: each pays a share of the round trips.

While little is under way each is served at once. Those who come meanwhile wait for some of it to
end, and share the next go. Nobody waits for company.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from pymongo import _csot

from persistence.errors import StoreOverloaded, StoreUnavailable, in_short

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items that one go may always take. It takes more of many, so that each pays less; but all wait for
# the slowest, and what a process holds that is killed amid a transaction stays locked for a moment.
_ALWAYS: Final = 8
_AT_MOST: Final = 16
# Who has waited so long goes at once: what is under way may be stuck.
_PATIENCE_S: Final = 0.2

_TOO_MANY: Final = "too many commands wait for the database"


class Queue(Protocol):
    """Bounds of a line whose work is refused when it does not come to it in time.

    Attributes:
        waiting: how many wait, in this line and whatever else the bounds are for.
        most: how many may; one more is refused at once.
        patience_s: how long one may wait.
    """

    waiting: int
    most: float
    patience_s: float


class Apart(Exception):
    """These can't be done together; each is to be done alone, and nothing is done twice by it."""


class _Waiting(Generic[Item, Result]):
    """An item, and the future by which its caller is told what came of it, or to do it."""

    __slots__ = ("deadline_s", "item", "told")

    def __init__(self, item: Item, told: asyncio.Future[Result | _Yours[Item, Result]]) -> None:
        self.item = item
        self.told = told
        # That of the driver's calls, by the monotonic clock; infinite without one.
        self.deadline_s = _csot.get_deadline()


class _Yours(Generic[Item, Result]):
    """A go that the caller is to begin, with the items of these others."""

    __slots__ = ("others",)

    def __init__(self, others: list[_Waiting[Item, Result]]) -> None:
        self.others = others


class Shared(Generic[Item, Result]):
    """One kind of work."""

    def __init__(
        self,
        together: Callable[[Sequence[Item]], Awaitable[Result]],
        at_once: int,
        queue: Queue | None = None,
    ) -> None:
        """Bounds what is under way.

        Args:
            together: does one item or several, and returns what came of them all. Of several it
                may raise `Apart`. It runs in the task of one of the callers, so within that
                one's deadline.
            at_once: goes under way from which on others wait and share.
            queue: none where there are bounds already; then who has waited long goes at once,
                whatever is under way.
        """
        self._together = together
        self._at_once = at_once
        self._queue = queue
        self._goes_under_way = 0
        self._items_under_way = 0
        self._waiting: deque[_Waiting[Item, Result]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def do(self, item: Item) -> Result:
        """Does the item, with those of others when many are at work.

        Raises:
            StoreUnavailable: the go that it shared failed; whether it was done is not known.
            StoreOverloaded: too many wait, or for too long; nothing was done.
        """
        begins = not self._waiting and self._goes_under_way < self._at_once
        queue = None if begins else self._queue
        if queue is not None:
            if queue.waiting >= queue.most:
                raise StoreOverloaded(_TOO_MANY)
            queue.waiting += 1
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Item, Result] = _Waiting(item, loop.create_future())
        self._waiting.append(waiting)
        if begins:
            # After this turn of the loop: those who come in it, as after a go they shared, join.
            loop.call_soon(self._fill)
        patience_s = _PATIENCE_S if self._queue is None else self._queue.patience_s
        out_of_patience = loop.call_later(patience_s, self._out_of_patience, waiting)
        try:
            told = await waiting.told
        except asyncio.CancelledError:
            self._gone(waiting)
            raise
        finally:
            out_of_patience.cancel()
            if queue is not None:
                queue.waiting -= 1
        return await self._go(item, told.others) if isinstance(told, _Yours) else told

    async def _go(self, item: Item, others: Sequence[_Waiting[Item, Result]]) -> Result:
        """Does one's own item and those of others, and tells them what came of it."""
        try:
            if others:
                try:
                    result = await self._together([*(each.item for each in others), item])
                except Apart:
                    for each in others:
                        self._tell(each, [])
                except StoreOverloaded as error:
                    for each in _still_there(others):
                        each.told.set_exception(StoreOverloaded(str(error)))
                    raise
                except BaseException as error:
                    for each in _still_there(others):
                        why = f"the work that was shared failed: {in_short(error)}"
                        each.told.set_exception(StoreUnavailable(why))
                    raise
                else:
                    for each in _still_there(others):
                        each.told.set_result(result)
                    return result
            return await self._together([item])
        finally:
            self._ended(others)
            self._fill()

    def _fill(self) -> None:
        """Begins goes of those who wait, the first first."""
        while self._waiting and self._goes_under_way < self._at_once:
            self._next()

    def _next(self) -> None:
        # As many as each go would have of all that are here: one that took everybody would leave
        # the others of those that may be under way without work.
        share = math.ceil((len(self._waiting) + self._items_under_way) / self._at_once)
        count = min(len(self._waiting), max(_ALWAYS, min(share, _AT_MOST)))
        taken: list[_Waiting[Item, Result]] = []
        while self._waiting and len(taken) < count:
            if not (waiting := self._waiting.popleft()).told.done():
                taken.append(waiting)
        self._begin(taken)

    def _begin(self, items: list[_Waiting[Item, Result]]) -> None:
        """Lets one of them begin a go of all."""
        if items:
            # He who has the most of his time left, for the others depend on it.
            leader = max(reversed(items), key=attrgetter("deadline_s"))
            self._tell(leader, [each for each in items if each is not leader])

    def _tell(self, waiting: _Waiting[Item, Result], others: list[_Waiting[Item, Result]]) -> None:
        """Lets a caller begin a go."""
        if not waiting.told.done():
            self._goes_under_way += 1
            self._items_under_way += 1 + len(others)
            waiting.told.set_result(_Yours(others))

    def _ended(self, others: Sequence[_Waiting[Item, Result]]) -> None:
        self._goes_under_way -= 1
        self._items_under_way -= 1 + len(others)

    def _out_of_patience(self, waiting: _Waiting[Item, Result]) -> None:
        if waiting not in self._waiting:
            return
        if self._queue is None:
            self._next()
        elif not waiting.told.done():
            self._waiting.remove(waiting)
            waiting.told.set_exception(StoreOverloaded(_TOO_MANY))

    def _gone(self, waiting: _Waiting[Item, Result]) -> None:
        """Hands a go that its caller had been given, and did not begin, to another of it."""
        if waiting.told.cancelled() or waiting.told.exception() is not None:
            return
        told = waiting.told.result()
        if isinstance(told, _Yours):
            self._ended(told.others)
            self._begin(_still_there(told.others))
            self._fill()


def _still_there(waiting: Sequence[_Waiting[Item, Result]]) -> list[_Waiting[Item, Result]]:
    """Those whose callers have not been cancelled."""
    return [each for each in waiting if not each.told.done()]
