"""Says to the payment service what it has not acknowledged yet, until it has.

A call falls due, a worker claims it by moving `due_at` on by the lease, asks with the call's key
and records the answer. After the give-up time a call is parked as a dead letter; nothing is lost
by it, and an operator has it said again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from persistence.claims import ANY_INSTANT, claim
from persistence.damage import readable
from persistence.documents import EscrowCall
from persistence.escrow_port import NO_INVITATION, CallStatus, EscrowAnswer, Verdict, backoff_s
from persistence.intents import Intent
from statemachine.goal import CommandName, Movement, Role

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from persistence.escrow_port import EscrowPort
    from persistence.goals import Goals
    from persistence.store import Row, Store

_FIRST_RETRY_S: Final = 0.5
_PENDING: Final = CallStatus.PENDING.value
_DEAD: Final = CallStatus.DEAD.value


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many calls wait for an answer, for an operator, and since when the oldest one waits."""

    pending: int
    dead: int
    oldest_s: float


class EscrowCalls:
    """The calls that are due."""

    def __init__(
        self,
        store: Store,
        goals: Goals,
        port: EscrowPort,
        *,
        timeout_s: float,
        give_up_s: float,
    ) -> None:
        self._store = store
        self._goals = goals
        assert goals.holds is not None
        self._holds = goals.holds
        self._port = port
        self._timeout_s = timeout_s
        self._give_up_s = give_up_s
        # Longer than one call and its record take, or a slow call would be said twice at a time.
        self._lease_s = max(store.options.lease_s, timeout_s + 2 * store.options.deadline_s)

    async def next_due_at(self) -> datetime | None:
        """When the first call is to be said; none when each has its answer."""
        async with self._store.reading():
            row = await self._store.escrow_calls.find_one(
                {"status": _PENDING, "due_at": ANY_INSTANT},
                {"due_at": True},
                sort=[("due_at", 1)],
            )
        due_at: datetime | None = row["due_at"] if row else None
        return due_at

    async def claim_due(self, limit: int) -> list[EscrowCall]:
        """Claims up to `limit` calls, those that fell due first."""
        calls = self._store.escrow_calls
        async with self._store.reading():
            now = self._store.clock.now()
            due: Row = {"status": _PENDING, "due_at": {"$lte": now}}
            found = await calls.find(due, {"_id": True}).sort("due_at").limit(limit).to_list()
            if not found:
                return []
            ids = [row["_id"] for row in found]
            lease: Row = {
                "due_at": now + timedelta(seconds=self._lease_s),
                "due_owner": self._store.owner,
            }
            await claim(calls, ids, due, {"$set": lease})
            # What was claimed is read, not taken from the answers: while a majority is slow they
            # come too late, each time. What only a primary has that has lost its majority is not
            # said: nobody may be charged for what did not happen.
            mine: Row = {"_id": {"$in": ids}, "status": _PENDING, **lease}
            claimed = await self._store.certain_escrow_calls.find(mine).to_list()
        return readable(
            EscrowCall, "escrow_calls", sorted(claimed, key=lambda row: ids.index(row["_id"]))
        )

    async def say(self, call: EscrowCall) -> EscrowAnswer:
        """Says one claimed call and records what came of it.

        Raises:
            StoreError: it could not be recorded; the claim's lease runs out and it is said again.
        """
        answer = await self._port.ask(call, self._timeout_s)
        match answer.verdict:
            case Verdict.ACKNOWLEDGED:
                await self._acknowledged(call)
            case Verdict.REFUSED if call.call is Movement.HOLD:
                async with self._store.reading():
                    await self._holds.refused(call, answer.why)
            case Verdict.REFUSED:
                await self._bury(call, answer.why)
            case Verdict.UNKNOWN:
                await self._postpone(call, answer.why)
        return answer

    async def _acknowledged(self, call: EscrowCall) -> None:
        """Draws the consequence first: dying before the record is closed only repeats it."""
        match call.call:
            case Movement.HOLD:
                # It fell due, so no invitation came of it, or none will: one write decides.
                async with self._store.reading():
                    await self._holds.abandon(call)
                return
            case Movement.RELEASE if call.reason != NO_INVITATION:
                await self._settle(call)
            case _:
                pass
        async with self._store.reading():
            await self._store.escrow_calls.update_one(
                {"_id": call.id, "status": {"$in": [_PENDING, _DEAD]}},
                {
                    "$set": {"status": CallStatus.ACKNOWLEDGED.value},
                    "$unset": {"due_at": "", "answer": ""},
                },
            )
            if call.reason == NO_INVITATION:
                # Now the request may begin a new hold.
                await self._store.escrow_calls.update_one(
                    {"goal_id": call.goal_id, "_id": f"{call.goal_id}:hold"},
                    {"$unset": {"request_key": "", "fingerprint": ""}},
                )

    async def _settle(self, call: EscrowCall) -> None:
        """Ends the declined goal; one that a refund has ended refuses, which is as good."""
        await self._goals.execute(
            Intent(CommandName.SETTLE, Role.SYSTEM, user_id=None, goal_id=str(call.goal_id))
        )

    async def _bury(self, call: EscrowCall, why: str) -> None:
        async with self._store.reading():
            await self._store.escrow_calls.update_one(
                {"_id": call.id, "status": _PENDING},
                {
                    "$set": {"status": _DEAD, "answer": why},
                    "$unset": {"due_at": ""},
                    "$inc": {"attempts": 1},
                },
            )

    async def _postpone(self, call: EscrowCall, why: str) -> None:
        now = self._store.clock.now()
        if now - call.since >= timedelta(seconds=self._give_up_s):
            await self._bury(call, why)
            return
        attempts = call.attempts + 1
        due_at = now + timedelta(seconds=backoff_s(attempts, _FIRST_RETRY_S))
        async with self._store.reading():
            await self._store.escrow_calls.update_one(
                {"_id": call.id, "status": _PENDING},
                {"$set": {"due_at": due_at, "answer": why, "attempts": attempts}},
            )


class EscrowBook:
    """What an operator sees of the calls, and may do with those that are dead."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def backlog(self) -> Backlog:
        """Counts what waits."""
        async with self._store.reading():
            now = self._store.clock.now()
            pending = await self._store.escrow_calls.count_documents({"status": _PENDING})
            dead = await self._store.escrow_calls.count_documents({"status": _DEAD})
            oldest = await self._store.escrow_calls.find_one(
                {"status": _PENDING}, {"since": True}, sort=[("since", 1)]
            )
        oldest_s = (now - oldest["since"]).total_seconds() if oldest else 0.0
        return Backlog(pending, dead, max(0.0, oldest_s))

    async def waiting(self, statuses: Collection[CallStatus], limit: int) -> list[EscrowCall]:
        """The calls with one of these statuses, the oldest first."""
        async with self._store.reading():
            rows = await (
                self._store.escrow_calls.find(
                    {"status": {"$in": [each.value for each in statuses]}}
                )
                .sort("since")
                .limit(limit)
                .to_list()
            )
        return readable(EscrowCall, "escrow_calls", rows)

    async def call(self, key: str) -> EscrowCall | None:
        """One call by its key."""
        async with self._store.reading():
            row = await self._store.escrow_calls.find_one({"_id": key})
        return EscrowCall.model_validate(row) if row else None

    async def retry(self, key: str | None = None) -> int:
        """Has dead letters said again, all of them or the one with `key`; tells how many."""
        wanted: Row = {"status": _DEAD} | ({} if key is None else {"_id": key})
        async with self._store.reading():
            now = self._store.clock.now()
            changed = await self._store.escrow_calls.update_many(
                wanted, {"$set": {"status": _PENDING, "since": now, "due_at": now, "attempts": 0}}
            )
        return changed.modified_count
