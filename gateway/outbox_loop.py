"""Finishes the deliveries that a crash or a fault left behind, as soon as their lease is over.

No more are taken over than are at work: their lease runs, and who has no time for them would only
keep them from others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import structlog

from gateway.lookout import PAUSE_S, Lookout
from gateway.outage import Outage
from persistence.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from persistence.clock import Clock
    from persistence.intents import Delivery
    from persistence.outbox import Outbox

_log = structlog.get_logger(__name__)

_AT_ONCE: Final = 16


class OutboxLoop:
    """The outboxes that this process takes over."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        clock: Clock,
        interval_s: float,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        deliver: Callable[[Delivery], Awaitable[bool]],
    ) -> None:
        """Takes what the loop needs; `deliver` tells whether all of an outbox is delivered."""
        self._outbox = outbox
        self._clock = clock
        self._outage = Outage(_log, "outboxes_not_read", "outboxes_read_again")
        self._spawn = spawn
        self._deliver = deliver
        self._looks = Lookout(clock, interval_s)
        self._at_work = 0
        # Whether the last look took all that there was room for, so that there may be more.
        self._more = False
        # Whether anything that the last looks took was delivered.
        self._gets_on = False

    def soon(self) -> None:
        """Has the loop look for a delivery of this process that was postponed."""
        self._looks.within(PAUSE_S)

    async def run(self) -> None:
        """Takes over what falls due, and has it delivered, until it is cancelled."""
        while True:
            await self._looks.wait()
            room = _AT_ONCE - self._at_work
            if not room:
                continue
            try:
                is_due = self._looks.is_due(await self._outbox.next_due_at())
                taken = await self._outbox.claim_due(room) if is_due else []
            except StoreError as error:
                self._outage.failed(self._clock.monotonic_s(), error)
                self.soon()
                continue
            self._outage.worked(self._clock.monotonic_s())
            if not is_due:
                continue
            self._more = len(taken) == room
            self._gets_on = False
            self._at_work += len(taken)
            for delivery in taken:
                self._spawn(self._finish(delivery), "taken over")
            # What fell due behind these, or is locked at present.
            self.soon()

    async def _finish(self, delivery: Delivery) -> None:
        try:
            self._gets_on |= await self._deliver(delivery)
        finally:
            self._at_work -= 1
            # Where all fail, as without Redis, the next look comes after a pause: a backlog that is
            # tried again as fast as it fails would take all of the CPU.
            if self._more and self._at_work <= _AT_ONCE // 2:
                self._looks.within(0 if self._gets_on else PAUSE_S)
