"""When a loop looks again: in time for what is known to fall due, else after the poll interval.

What other processes have written since is found after the interval; what this one knows of, it
looks for in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

    from persistence.clock import Clock

# Two looks for what nobody hurries for are at least so far apart.
PAUSE_S: Final = 0.25
# Nodes that wait for the same instant come spread over this time; the first takes it over.
_SPREAD_S: Final = 0.25


class Lookout:
    """The next look of one loop; the first is at once."""

    __slots__ = ("_at_s", "_clock", "_interval_s", "_sooner")

    def __init__(self, clock: Clock, interval_s: float) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._at_s = clock.monotonic_s()
        self._sooner = asyncio.Event()

    def within(self, seconds: float) -> None:
        """Has the next look come no later than that; of the loop's own look, the one after it."""
        at_s = self._clock.monotonic_s() + seconds
        if at_s < self._at_s:
            self._at_s = at_s
            self._sooner.set()

    def is_due(self, next_at: datetime | None) -> bool:
        """Tells whether what falls due next is due; if not yet, the next look is for it."""
        if next_at is None:
            return False
        left_s = (next_at - self._clock.now()).total_seconds()
        if left_s <= 0:
            return True
        self.within(max(PAUSE_S, left_s + random.uniform(0, _SPREAD_S)))  # noqa: S311 - it guards nothing
        return False

    async def wait(self) -> None:
        """Returns when it is time to look."""
        self.within(self._interval_s)
        while (left_s := self._at_s - self._clock.monotonic_s()) > 0:
            self._sooner.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._sooner.wait()
        self._at_s = math.inf
