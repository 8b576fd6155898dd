"""Money is held by the payment service before an invitation stands, and for nothing else.

A hold is written down before the service is asked. From then on exactly one of two writes can
close it: the invitation's transaction, or the one that gives it back. Whatever dies in between,
the record falls due and a worker finds out and gives it back.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from persistence.documents import EscrowCall
from persistence.errors import EscrowUnavailable, StoreOverloaded
from persistence.escrow_port import (
    NO_INVITATION,
    CallStatus,
    EscrowAnswer,
    EscrowPort,
    Verdict,
    backoff_s,
    closing_calls,
)
from persistence.intents import Refused
from persistence.requests import REUSED
from statemachine.escrow import posting
from statemachine.goal import Movement

if TYPE_CHECKING:
    from datetime import datetime

    from bson import ObjectId

    from persistence.documents import Goal
    from persistence.intents import Answer, Intent
    from persistence.requests import RequestRecords
    from persistence.store import Row, Store

# Of a command's time, what the payment service may take; the rest is for the transaction.
_SHARE: Final = 0.6
_FIRST_RETRY_S: Final = 0.05
# A command's whole time for it, and once more for a caller who asks again with his request_id.
_GRACE: Final = 2.0
_OPEN_ATTEMPTS: Final = 3

_CLOSED: Final = {"due_at": "", "request_key": "", "fingerprint": ""}


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold that is under way, and the id that its invitation will have."""

    goal_id: ObjectId
    call: EscrowCall


class _Answered(Exception):
    """The request was answered before; ends the transaction."""


class Holds:
    """The holds of invitations, from the first word to the service to the commit."""

    def __init__(self, store: Store, requests: RequestRecords, port: EscrowPort) -> None:
        self._store = store
        self._requests = requests
        self._port = port
        self._asking = 0

    async def open(self, intent: Intent, goal: Goal, now: datetime) -> Hold | Answer:
        """Writes down what will be asked, or finds the hold that this request began before.

        The same request goes on with the same goal id and key, so the service holds once.

        Returns:
            The hold; or the answer, when the request has one.

        Raises:
            EscrowUnavailable: the request's earlier hold is still to be given back.
        """
        call = _call(intent, goal, now, self._due(now))
        for _ in range(_OPEN_ATTEMPTS):
            try:
                await self._begin(intent, call)
            except _Answered:
                # Found inside a transaction, so on this primary alone, perhaps: asked for again
                # as a majority has it.
                if (answer := await self._requests.answer_of(intent)) is not None:
                    return answer
                continue
            except DuplicateKeyError:
                found = await self._store.escrow_calls.find_one_and_update(
                    {"request_key": intent.request_key, "status": CallStatus.PENDING.value},
                    {"$set": {"due_at": self._due(now)}},
                    return_document=ReturnDocument.AFTER,
                )
                if found is None:
                    await self._await_release(intent)
                    continue
                if found["fingerprint"] != intent.fingerprint:
                    return Refused(REUSED, "This request_id was used for another command.")
                call = EscrowCall.model_validate(found)
            return Hold(call.goal_id, call)
        raise EscrowUnavailable("the request's hold was opened and closed by others")

    async def ask(self, hold: Hold, began_at_s: float) -> EscrowAnswer:
        """Asks the service, again with the same key while it says neither yes nor no.

        Args:
            hold: what is asked.
            began_at_s: when the command began, on the monotonic clock.

        Raises:
            EscrowUnavailable: no answer within the command's time; a worker finds out.
            StoreOverloaded: too many invitations wait for the service.
        """
        if self._asking >= self._store.options.queue_size:
            raise StoreOverloaded("too many invitations wait for the payment service")
        self._asking += 1
        try:
            return await self._ask(hold, began_at_s + self._store.options.deadline_s * _SHARE)
        finally:
            self._asking -= 1

    async def stands(self, hold: Hold) -> None:
        """Closes the hold inside the invitation's transaction.

        Raises:
            EscrowUnavailable: it is given back already, or is another attempt's.
        """
        closed = await self._store.escrow_calls.update_one(
            {"_id": hold.call.id, "status": CallStatus.PENDING.value},
            {"$set": {"status": CallStatus.ACKNOWLEDGED.value}, "$unset": _CLOSED},
        )
        if closed.matched_count == 0:
            raise EscrowUnavailable("the hold was given back meanwhile")

    async def refused(self, call: EscrowCall, why: str) -> None:
        """Closes a hold that the service refused: there is nothing to give back."""
        await self._store.escrow_calls.update_one(
            {"_id": call.id, "status": CallStatus.PENDING.value},
            {"$set": {"status": CallStatus.REFUSED.value, "answer": why}, "$unset": _CLOSED},
        )

    async def abandon(self, call: EscrowCall) -> bool:
        """Gives a hold back that no invitation came of; tells whether it was still open.

        The request keeps its hold until the release is acknowledged, so that no second one begins.
        """
        now = self._store.clock.now()
        release = _release_of(call, now)

        async def body() -> bool:
            closed = await self._store.escrow_calls.update_one(
                {"_id": call.id, "status": CallStatus.PENDING.value},
                {"$set": {"status": CallStatus.ABANDONED.value}, "$unset": {"due_at": ""}},
            )
            if closed.matched_count == 0:
                return False
            await self._store.escrow_calls.insert_one(release)
            return True

        return await self._store.transact(body)

    async def _begin(self, intent: Intent, call: EscrowCall) -> None:
        """Inserts the record unless the request has been answered.

        One transaction: an answer that is committed meanwhile conflicts with the insert, since it
        takes the request's key off the hold that it closes.
        """

        async def body() -> None:
            await self._store.escrow_calls.insert_one(_row(call))
            if await self._requests.answer_of(intent) is not None:
                raise _Answered

        await self._store.transact(body)

    async def _await_release(self, intent: Intent) -> None:
        """Returns when the request's hold is closed by now; waits for no one."""
        key = {"request_key": intent.request_key}
        if await self._store.escrow_calls.find_one(key, {"_id": True}) is not None:
            raise EscrowUnavailable("the request's earlier hold is being given back")

    async def _ask(self, hold: Hold, until_s: float) -> EscrowAnswer:
        attempts = 0
        why = "there was no time to ask"
        while (left_s := until_s - self._store.clock.monotonic_s()) > 0:
            answer = await self._port.ask(hold.call, left_s)
            if answer.verdict is not Verdict.UNKNOWN:
                return answer
            why = answer.why
            attempts += 1
            left_s = until_s - self._store.clock.monotonic_s()
            await asyncio.sleep(max(0.0, min(left_s, backoff_s(attempts, _FIRST_RETRY_S))))
        raise EscrowUnavailable(f"the payment service has not answered: {why}")

    def _due(self, now: datetime) -> datetime:
        return now + timedelta(seconds=self._store.options.deadline_s * _GRACE)


def _call(intent: Intent, goal: Goal, now: datetime, due_at: datetime) -> EscrowCall:
    entry = posting(
        Movement.HOLD,
        goal_id=str(goal.id),
        viewer_id=goal.conditions.exclusive_to,
        streamer_id=goal.metadata.user_id,
        amount_minor=goal.amount,
    )
    assert goal.id is not None
    return EscrowCall(
        id=entry.key,
        call=Movement.HOLD,
        goal_id=goal.id,
        session_id=goal.conditions.session_id,
        viewer_id=goal.conditions.exclusive_to,
        streamer_id=goal.metadata.user_id,
        amount=goal.amount,
        reason="invited",
        at=now,
        status=CallStatus.PENDING,
        since=now,
        due_at=due_at,
        request_key=intent.request_key,
        fingerprint=intent.fingerprint,
    )


def _row(call: EscrowCall) -> Row:
    row: Row = call.model_dump(exclude_none=True, mode="python")
    row["_id"] = row.pop("id")
    return row | {"call": call.call.value, "status": str(call.status)}


def _release_of(call: EscrowCall, now: datetime) -> Row:
    entry = posting(
        Movement.RELEASE,
        goal_id=str(call.goal_id),
        viewer_id=call.viewer_id,
        streamer_id=call.streamer_id,
        amount_minor=call.amount,
    )
    (release,) = closing_calls(
        [
            _row(call)
            | {
                "_id": entry.key,
                "movement": entry.movement.value,
                "reason": NO_INVITATION,
                "at": now,
            }
        ]
    )
    return release
