"""Meets deadlines in time: claims goals before they fall due and fires each at its instant.

A claim ahead of time costs what a claim at the time costs, and keeps every other process from
waking up for the same instant. What this process writes itself may fall due before it looks again;
it takes note of that. For what others write it looks once a second, however seldom other loops do.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog

from gateway.lookout import PAUSE_S, Lookout
from gateway.outage import Outage
from persistence.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from datetime import datetime

    from persistence.clock import Clock
    from persistence.deadlines import Deadlines, DueGoal

_log = structlog.get_logger(__name__)

# Goals that are claimed and not fired: few enough that those of one Session find a turn in time.
_CLAIM_LIMIT: Final = 64
# No goal is claimed longer before its time: a process that stops still fires what it has claimed,
# and what one that dies had claimed is late by the lease. So no two looks are further apart either,
# or what another process has written could fall due between them.
_AHEAD_MAX_S: Final = 1.0
# By which two looks overlap, for the time that a look takes.
_MARGIN_S: Final = 0.25


class DeadlineLoop:
    """The deadlines that this process meets."""

    def __init__(
        self,
        *,
        deadlines: Deadlines,
        clock: Clock,
        interval_s: float,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        fire: Callable[[DueGoal], Awaitable[None]],
    ) -> None:
        self._deadlines = deadlines
        self._clock = clock
        self._interval_s = min(interval_s, _AHEAD_MAX_S)
        self._ahead_s = self._interval_s + _MARGIN_S
        self._spawn = spawn
        self._fire = fire
        self._looks = Lookout(clock, self._interval_s)
        self._outage = Outage(_log, "deadlines_not_read", "deadlines_read_again")
        self._claimed = 0
        # Whether the last look took all that there was room for, so that there may be more.
        self._more = False

    def note(self, due_at: datetime) -> None:
        """Takes note of a deadline that this process has written."""
        self._looks.within((due_at - self._clock.now()).total_seconds())

    async def run(self) -> None:
        """Claims, and has fired what it has claimed, until it is cancelled."""
        while True:
            await self._looks.wait()
            room = _CLAIM_LIMIT - self._claimed
            if not room:
                continue
            try:
                due = await self._deadlines.claim_due(room, self._ahead_s)
            except StoreError as error:
                self._outage.failed(self._clock.monotonic_s(), error)
                self._looks.within(PAUSE_S)
                continue
            self._outage.worked(self._clock.monotonic_s())
            self._more = len(due) == room
            self._claimed += len(due)
            for goal in due:
                self._spawn(self._meet(goal), "deadline")

    async def _meet(self, due: DueGoal) -> None:
        try:
            if await self._until(due.due_at):
                await self._fire(due)
        finally:
            self._claimed -= 1
            if self._more and self._claimed <= _CLAIM_LIMIT // 2:
                self._looks.within(0)

    async def _until(self, due_at: datetime) -> bool:
        """Waits for an instant; false when the clock was set back and it is far away again."""
        while (left_s := (due_at - self._clock.now()).total_seconds()) > 0:
            if left_s > self._ahead_s:
                return False
            # A clock that is set forward is noticed within the interval.
            await asyncio.sleep(min(left_s, self._interval_s))
        return True
