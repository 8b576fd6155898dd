"""One timing wheel for every deadline of every connection: no timer per socket.

An item sits in one bucket; `advance` hands out the items whose time has come. Deadlines are met
within one tick, never early. Pure: `now` is a monotonic second count handed in.
"""

from __future__ import annotations

import math
from typing import Generic, Protocol, TypeVar

BUCKETS = 512


class Timed(Protocol):
    """An item of the wheel; it remembers its bucket so that removing it costs nothing."""

    bucket: int


T = TypeVar("T", bound=Timed)


class Wheel(Generic[T]):
    """Buckets of `tick_s` each, in a ring.

    A deadline beyond the ring's end is handed out when the ring has turned once; its owner looks
    at the clock and puts the item in again. That keeps the rule for callers simple: whoever is
    handed out checks what is due.
    """

    __slots__ = ("_buckets", "_position", "_tick_s")

    def __init__(self, tick_s: float, now: float) -> None:
        """Begins at `now`.

        Args:
            tick_s: How late a deadline may be met.
            now: Monotonic seconds.
        """
        self._tick_s = tick_s
        self._buckets: list[set[T]] = [set() for _ in range(BUCKETS)]
        self._position = math.floor(now / tick_s)

    @property
    def tick_s(self) -> float:
        """The time between two buckets."""
        return self._tick_s

    def put(self, item: T, due: float) -> None:
        """Sets the item's deadline, in place of the one it may have."""
        self.remove(item)
        ticks = math.ceil(due / self._tick_s) - self._position
        item.bucket = (self._position + min(max(ticks, 1), BUCKETS - 1)) % BUCKETS
        self._buckets[item.bucket].add(item)

    def remove(self, item: T) -> None:
        """Forgets the item; harmless when it has no deadline (`bucket` is -1)."""
        if item.bucket >= 0:
            self._buckets[item.bucket].discard(item)
            item.bucket = -1

    def advance(self, now: float) -> list[T]:
        """The items whose deadline lies before `now`, each without a deadline from here on."""
        target = math.floor(now / self._tick_s)
        if target <= self._position:
            return []
        due: list[T] = []
        # After a long stall every bucket is due; going round once is enough.
        for position in range(max(self._position + 1, target - BUCKETS + 1), target + 1):
            bucket = self._buckets[position % BUCKETS]
            if bucket:
                due.extend(bucket)
                bucket.clear()
        self._position = target
        for item in due:
            item.bucket = -1
        return due
