"""The loop that says what is due to the payment service, and the one that counts what waits.

No more calls are claimed than are said at once: each has its place until it has its answer, so one
that hangs keeps the others from nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from gateway.lookout import PAUSE_S
from gateway.outage import Outage
from persistence.errors import StoreError
from persistence.escrow_port import Verdict
from persistence.repeated import Repeated

if TYPE_CHECKING:
    from gateway.lookout import Lookout
    from gateway.telemetry import Telemetry
    from persistence.clock import Clock
    from persistence.documents import EscrowCall
    from persistence.escrow_calls import EscrowBook, EscrowCalls
    from persistence.escrow_port import EscrowAnswer

_log = structlog.get_logger(__name__)

_AT_ONCE: Final = 32
_COUNT_EVERY_S: Final = 10.0


class EscrowWorker:
    """Asks the payment service in this process; every process of an installation has one."""

    def __init__(self, calls: EscrowCalls, clock: Clock, looks: Lookout) -> None:
        self._calls = calls
        self._clock = clock
        self._looks = looks
        self._at_work = 0
        # Down to how many at work the next look waits when the last one took all that it had room
        # for, so that there may be more.
        self._room_from = -1
        # Whether any of what the last look took was answered.
        self._gets_on = False
        self._outage = Outage(_log, "escrow_calls_not_read", "escrow_calls_read_again")
        self._unacknowledged = Repeated(_log, "escrow_call_not_acknowledged")

    async def run(self) -> None:
        """Claims and says what is due until it is cancelled."""
        self._at_work = 0
        async with asyncio.TaskGroup() as group:
            while True:
                await self._looks.wait()
                room = _AT_ONCE - self._at_work
                if not room:
                    # It is made up for when the first of these has ended.
                    self._room_from = _AT_ONCE - 1
                    continue
                try:
                    is_due = self._looks.is_due(await self._calls.next_due_at())
                    due = await self._calls.claim_due(room) if is_due else []
                except StoreError as error:
                    self._outage.failed(self._clock.monotonic_s(), error)
                    self._looks.within(PAUSE_S)
                    continue
                self._outage.worked(self._clock.monotonic_s())
                if not is_due:
                    continue
                self._gets_on = False
                self._at_work += len(due)
                self._room_from = self._at_work - len(due) // 2 if len(due) == room else -1
                for call in due:
                    group.create_task(self._say(call))
                # What fell due behind these, or is locked at present.
                self._looks.within(PAUSE_S)

    async def _say(self, call: EscrowCall) -> None:
        try:
            self._note(call, await self._calls.say(call))
        except StoreError as error:
            # The claim's lease runs out, and it is said again with the same key.
            _log.warning("escrow_answer_not_recorded", key=call.id, why=str(error))
        except Exception:  # noqa: BLE001 - once per task, logged with the key
            # One call that can't be said must not keep the others waiting.
            _log.exception("escrow_call_failed", key=call.id, call=call.call.value)
        finally:
            self._at_work -= 1
            # While the service is away the next look comes after a pause: a backlog that is tried
            # again as fast as it fails would take all of the CPU.
            if self._at_work <= self._room_from:
                self._looks.within(0 if self._gets_on else PAUSE_S)

    def _note(self, call: EscrowCall, answer: EscrowAnswer) -> None:
        """Tells of an answer that is no yes; of many alike, now and then of one."""
        self._gets_on |= answer.verdict is not Verdict.UNKNOWN
        if answer.verdict is not Verdict.ACKNOWLEDGED:
            self._unacknowledged.met(
                answer.verdict.value,
                key=call.id,
                call=call.call.value,
                verdict=answer.verdict.value,
                why=answer.why,
                attempts=call.attempts + 1,
            )


class EscrowCounter:
    """Counts what waits for the payment service, also in a process that is not told of one.

    Calls of goals whose money a service holds are written down there too; the metrics would say
    that nothing waits.
    """

    def __init__(self, book: EscrowBook, telemetry: Telemetry, *, has_service: bool) -> None:
        self._book = book
        self._telemetry = telemetry
        self._has_service = has_service
        self._has_warned = False

    async def run(self) -> None:
        """Counts now and then until it is cancelled."""
        while True:
            try:
                await self.count()
            except StoreError as error:
                _log.warning("escrow_calls_not_counted", why=str(error))
            await asyncio.sleep(_COUNT_EVERY_S)

    async def count(self) -> None:
        """Sets the metrics; warns once of calls that this process can't say.

        Raises:
            StoreError: MongoDB did not answer in time.
        """
        backlog = await self._book.backlog()
        self._telemetry.escrow_pending.set(backlog.pending)
        self._telemetry.escrow_dead.set(backlog.dead)
        self._telemetry.escrow_oldest.set(backlog.oldest_s)
        if self._has_service:
            return
        waits = bool(backlog.pending or backlog.dead)
        if waits and not self._has_warned:
            _log.warning(
                "escrow_calls_without_service",
                pending=backlog.pending,
                dead=backlog.dead,
                remedy="set DUET_ESCROW_URL",
            )
        self._has_warned = waits
