"""The loop that says what is due to the payment service, and counts what waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from gateway.lookout import PAUSE_S
from gateway.outage import Outage
from persistence.errors import StoreError
from persistence.escrow_calls import EscrowBook, EscrowCalls
from persistence.escrow_port import Verdict
from persistence.repeated import Repeated

if TYPE_CHECKING:
    from gateway.lookout import Lookout
    from gateway.telemetry import Telemetry
    from persistence.clock import Clock
    from persistence.documents import EscrowCall
    from persistence.store import Store

_log = structlog.get_logger(__name__)

_CLAIM_LIMIT: Final = 32
_COUNT_EVERY_S: Final = 10.0


class EscrowWorker:
    """Asks the payment service in this process; every process of an installation has one."""

    def __init__(
        self,
        *,
        calls: EscrowCalls,
        book: EscrowBook,
        clock: Clock,
        telemetry: Telemetry,
        looks: Lookout,
    ) -> None:
        self._calls = calls
        self._book = book
        self._clock = clock
        self._telemetry = telemetry
        self._looks = looks
        self._outage = Outage(_log, "escrow_calls_not_read", "escrow_calls_read_again")
        self._unacknowledged = Repeated(_log, "escrow_call_not_acknowledged")

    async def run(self) -> None:
        """Claims and says what is due until it is cancelled."""
        count_at_s = 0.0
        while True:
            await self._looks.wait()
            due: list[EscrowCall] = []
            try:
                if self._clock.monotonic_s() >= count_at_s:
                    await self._count()
                    count_at_s = self._clock.monotonic_s() + _COUNT_EVERY_S
                is_due = self._looks.is_due(await self._calls.next_due_at())
                due = await self._calls.claim_due(_CLAIM_LIMIT) if is_due else []
            except StoreError as error:
                self._outage.failed(self._clock.monotonic_s(), error)
            else:
                self._outage.worked(self._clock.monotonic_s())
                if not is_due:
                    continue
            if due:
                async with asyncio.TaskGroup() as group:
                    for call in due:
                        group.create_task(self._say(call))
            self._looks.within(0 if len(due) == _CLAIM_LIMIT else PAUSE_S)

    async def _say(self, call: EscrowCall) -> None:
        try:
            answer = await self._calls.say(call)
        except StoreError as error:
            # The claim's lease runs out, and it is said again with the same key.
            _log.warning("escrow_answer_not_recorded", key=call.id, why=str(error))
            return
        except Exception:  # noqa: BLE001 - once per task, logged with the key
            # One call that can't be said must not keep the others waiting.
            _log.exception("escrow_call_failed", key=call.id, call=call.call.value)
            return
        if answer.verdict is not Verdict.ACKNOWLEDGED:
            self._unacknowledged.met(
                answer.verdict.value,
                key=call.id,
                call=call.call.value,
                verdict=answer.verdict.value,
                why=answer.why,
                attempts=call.attempts + 1,
            )

    async def _count(self) -> None:
        backlog = await self._book.backlog()
        self._telemetry.escrow_pending.set(backlog.pending)
        self._telemetry.escrow_dead.set(backlog.dead)
        self._telemetry.escrow_oldest.set(backlog.oldest_s)


async def warn_of_waiting_calls(store: Store) -> None:
    """Logs that calls wait for a service that this process is not told of."""
    try:
        backlog = await EscrowBook(store).backlog()
    except StoreError as error:
        _log.warning("escrow_calls_not_read", why=str(error))
        return
    if backlog.pending or backlog.dead:
        _log.warning(
            "escrow_calls_without_service",
            pending=backlog.pending,
            dead=backlog.dead,
            remedy="set DUET_ESCROW_URL",
        )
