"""Finishes what a commit left to do: runs the deliver-phase receivers of a goal's outbox.

Right after a commit the process that made it delivers. The outbox only serves what a crash or a
fault left behind: once its lease has run out, any process takes it over. A goal's entries are
delivered in order, by one process at a time. Receivers run at least once; what they cause carries
the entry's event id, the same each time.

The whole outbox of a commit is removed by one write when all its receivers have run. What has run
is written down on its own only when a later receiver fails (docs/decisions.md).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import structlog
from pydantic import TypeAdapter, ValidationError
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError

from persistence.claims import ANY_INSTANT, claim, skipping_locked
from persistence.damage import damage
from persistence.documents import OutboxEntry
from persistence.escrow_port import SERVICE
from persistence.faults import Step, reached
from persistence.intents import Delivery
from persistence.occurrences import occurrence_of
from persistence.repeated import Repeated
from persistence.sharing import Apart, Shared
from persistence.store import DUPLICATE
from statemachine.goal import RULES, CommandName
from statemachine.receivers import Registry, Settle, Track

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from bson import ObjectId

    from persistence.store import Row, Store
    from statemachine.receivers import Effect, Occurrence

_log = structlog.get_logger(__name__)

# After a failure the outbox is tried again 0.25 s later, then after twice that, up to 2 s: soon
# when Redis is back, and a receiver that always fails does not keep the others waiting.
_FAILURES: dict[str, Any] = {"$ifNull": ["$outbox_failures", 0]}
_RETRY_MS: dict[str, Any] = {
    "$min": [2000, {"$multiply": [250, {"$pow": [2, {"$min": [_FAILURES, 10]}]}]}]
}

# Outboxes that are read to find the oldest.
_OLDEST_OF: Final = 1000

_ENTRIES: Final = TypeAdapter(list[OutboxEntry])

_SETTLE = next(rule for rule in RULES if rule.command is CommandName.SETTLE)


class Performer(Protocol):
    """What a shell does with the effects of the deliver phase."""

    async def perform(self, occurrence: Occurrence, effects: Sequence[Effect]) -> None:
        """Performs the effects of one receiver, or raises and has them tried again."""


class DeliveryFailed(Exception):
    """A receiver's effects could not be performed now."""


@dataclass(slots=True)
class _Progress:
    """How far one run through an outbox has come."""

    done_entries: list[str]
    settles: bool
    failed: OutboxEntry | None = None
    left: tuple[str, ...] = ()


class _Ran(NamedTuple):
    """How far a goal's outbox has come."""

    goal_id: ObjectId
    progress: _Progress


class Outbox:
    """The outboxes of all goals."""

    def __init__(self, store: Store, registry: Registry, performer: Performer) -> None:
        self._store = store
        self._registry = registry
        self._performer = performer
        self._tracking = Shared(self._track, store.options.at_once)
        self._removing = Shared(self._remove_all, store.options.at_once)
        self._failures = Repeated(_log, "receiver_failed")

    async def deliver(self, delivery: Delivery, ran: frozenset[str] = frozenset()) -> bool:
        """Runs the receivers of a goal's entries, and of those that are added meanwhile.

        Args:
            delivery: the goal and its entries, oldest first.
            ran: receivers that the caller has already run for the first entries.

        Returns:
            Whether all have run; what has not is tried again, here or elsewhere.
        """
        entries = list(delivery.entries)
        while entries:
            over_at_s = self._store.clock.monotonic_s() + self._store.options.lease_s
            progress = await self._run(entries, ran, over_at_s)
            reached(Step.BEFORE_OUTBOX_REMOVAL)
            entries = await self._record(delivery.goal_id, progress)
            reached(Step.AFTER_OUTBOX_REMOVAL)
            if progress.failed is not None:
                return False
            ran = frozenset()
        return True

    async def next_due_at(self) -> datetime | None:
        """When the first outbox may be taken over; none when each has been delivered."""
        async with self._store.reading():
            row = await self._store.goals.find_one(
                {"outbox_due_at": ANY_INSTANT},
                {"_id": False, "outbox_due_at": True},
                sort=[("outbox_due_at", 1)],
            )
        due_at: datetime | None = row["outbox_due_at"] if row else None
        return due_at

    async def claim_due(self, limit: int) -> list[Delivery]:
        """Takes over up to `limit` outboxes whose lease has run out, the first first."""
        goals = self._store.goals
        async with self._store.reading():
            now = self._store.clock.now()
            due: Row = {"outbox_due_at": {"$lte": now}}
            found = (
                await goals.find(due, {"_id": True}).sort("outbox_due_at").limit(limit).to_list()
            )
            if not found:
                return []
            ids = [row["_id"] for row in found]
            lease = self._lease(now)
            await claim(goals, ids, due, {"$set": lease})
            # What a primary has written that has lost its majority is told to nobody.
            mine: Row = {"_id": {"$in": ids}, **lease}
            rows = await self._store.certain_goals.find(mine, {"outbox": True}).to_list()
        return _deliveries(sorted(rows, key=lambda row: ids.index(row["_id"])))

    async def take_over(self) -> int:
        """Makes due at once what an earlier process of this node's name left behind.

        Returns:
            How many outboxes and deadlines that were.
        """
        name = self._store.options.node_name
        mine = {"$regex": f"^{_escaped(name)}/", "$ne": self._store.owner}
        async with self._store.reading():
            now = self._store.clock.now()
            outboxes = await self._store.goals.update_many(
                {"outbox_due_at": {"$exists": True}, "outbox_owner": mine},
                {"$set": {"outbox_due_at": now}},
            )
            deadlines = await self._store.goals.update_many(
                {"due_at": {"$exists": True}, "due_owner": mine},
                {"$unset": {"due_lease_until": "", "due_owner": ""}},
            )
        return outboxes.modified_count + deadlines.modified_count

    async def pending(self) -> int:
        """How many goals have an outbox that is not empty."""
        async with self._store.reading():
            return await self._store.goals.count_documents({"outbox_due_at": {"$exists": True}})

    async def oldest_at(self) -> datetime | None:
        """When what waits longest happened, of the thousand outboxes that are due next."""
        async with self._store.reading():
            cursor = await self._store.goals.aggregate(
                [
                    {"$match": {"outbox_due_at": ANY_INSTANT}},
                    {"$sort": {"outbox_due_at": 1}},
                    {"$limit": _OLDEST_OF},
                    {"$group": {"_id": None, "at": {"$min": {"$first": "$outbox.occurrence.at"}}}},
                ]
            )
            rows = await cursor.to_list()
        oldest_at: datetime | None = rows[0]["at"] if rows else None
        return oldest_at

    async def track(self, effect: Track) -> bool:
        """Writes an analytics record; tells whether it is the first time."""
        async with self._store.reading():
            known = await self._tracking.do({"_id": effect.event_id, **effect.record})
        return effect.event_id not in known

    async def _track(self, records: Sequence[Row]) -> set[str]:
        """Writes records; tells the ids of those that were there already."""
        try:
            await self._store.goal_records.insert_many(records, ordered=False)
        except BulkWriteError as error:
            refused = error.details["writeErrors"]
            if any(each["code"] != DUPLICATE for each in refused):
                raise
            return {each["keyValue"]["_id"] for each in refused}
        return set()

    async def _run(
        self, entries: Sequence[OutboxEntry], ran: frozenset[str], over_at_s: float
    ) -> _Progress:
        """Runs receivers until one fails, or the lease is over and others may be at it."""
        progress = _Progress(done_entries=[], settles=False)
        for entry in entries:
            occurrence = occurrence_of(entry)
            for position, name in enumerate(entry.pending):
                if name in ran:
                    continue
                reached(Step.BEFORE_RECEIVER, name)
                try:
                    progress.settles |= await self._receive(name, occurrence, over_at_s)
                except DeliveryFailed as error:
                    progress.failed = entry
                    progress.left = tuple(entry.pending[position:])
                    self._failures.met(name, event_id=entry.event_id, receiver=name, why=str(error))
                    return progress
                reached(Step.AFTER_RECEIVER, name)
            progress.done_entries.append(entry.event_id)
        return progress

    async def _receive(self, name: str, occurrence: Occurrence, over_at_s: float) -> bool:
        """Runs one receiver; tells whether it settles the goal."""
        if self._store.clock.monotonic_s() >= over_at_s:
            raise DeliveryFailed("the lease is over")
        receiver = self._registry.named(name, occurrence.signal, occurrence.goal_type)
        if receiver is None:
            # A newer node knows it; until one runs, the entry waits.
            raise DeliveryFailed(f"no receiver {name} of {occurrence.signal} in this process")
        effects = receiver.react(occurrence)
        await self._performer.perform(
            occurrence, [effect for effect in effects if not isinstance(effect, Settle)]
        )
        return any(isinstance(effect, Settle) for effect in effects)

    async def _record(self, goal_id: ObjectId, progress: _Progress) -> list[OutboxEntry]:
        """Removes what has run and settles; returns what else lies in the outbox by now.

        If another process has taken the outbox over meanwhile, it is left to that one.
        """
        ran = _Ran(goal_id, progress)
        async with self._store.reading():
            if progress.failed is not None:
                await self._remove(ran)
                return []
            removed = await self._removing.do(ran)
            return [] if removed is None else list(_delivery(removed).entries)

    async def _remove_all(self, shared: Sequence[_Ran]) -> Row | None:
        """Empties outboxes; of a lone one it tells what has come in meanwhile.

        Where something has, another process is at work, somebody's transaction holds one of the
        goals or one is damaged, each is looked at alone; of those that are emptied by then nothing
        is found.
        """
        if len(shared) == 1:
            return await self._remove(shared[0])
        now = self._store.clock.now()
        updates = [
            UpdateOne(
                {**self._mine(ran), "outbox": {"$size": len(ran.progress.done_entries)}},
                self._recording(ran.progress, now),
            )
            for ran in shared
        ]
        emptied = 0
        with skipping_locked(), contextlib.suppress(BulkWriteError):
            emptied = (await self._store.goals.bulk_write(updates, ordered=False)).matched_count
        if emptied < len(shared):
            raise Apart
        return None

    async def _remove(self, ran: _Ran) -> Row | None:
        return await self._store.goals.find_one_and_update(
            self._mine(ran),
            self._recording(ran.progress, self._store.clock.now()),
            projection={"outbox": True},
            return_document=ReturnDocument.AFTER,
        )

    def _mine(self, ran: _Ran) -> Row:
        """An outbox that this process delivers, with what it has delivered in it still."""
        mine: Row = {"_id": ran.goal_id, "outbox_owner": self._store.owner}
        if ran.progress.done_entries:
            mine["outbox.event_id"] = ran.progress.done_entries[0]
        return mine

    def _recording(self, progress: _Progress, now: datetime) -> list[Row]:
        """The update: one pipeline, so that entries that come meanwhile are kept."""
        changes: Row = {
            "outbox": {
                "$filter": {
                    "input": "$outbox",
                    "cond": {
                        "$not": {"$in": ["$$this.event_id", {"$literal": progress.done_entries}]}
                    },
                }
            }
        }
        stages: list[Row] = [{"$set": changes}]
        if progress.failed is not None:
            stages.append(_trimmed(progress.failed.event_id, progress.left))
        if progress.settles:
            stages.append(_settled())
        lease: Row = {name: {"$literal": value} for name, value in self._lease(now).items()}
        lease["outbox_failures"] = {"$literal": 0}
        if progress.failed is not None:
            lease["outbox_due_at"] = {"$add": [{"$literal": now}, _RETRY_MS]}
            lease["outbox_failures"] = {"$add": [_FAILURES, 1]}
        empty = {"$eq": [{"$size": "$outbox"}, 0]}
        stages.append(
            {"$set": {name: {"$cond": [empty, "$$REMOVE", value]} for name, value in lease.items()}}
        )
        return stages

    def _lease(self, now: datetime) -> Row:
        return {
            "outbox_due_at": now + timedelta(seconds=self._store.options.lease_s),
            "outbox_owner": self._store.owner,
        }


def _trimmed(event_id: str, left: Sequence[str]) -> Row:
    """Leaves of one entry the receivers that have not run."""
    return {
        "$set": {
            "outbox": {
                "$map": {
                    "input": "$outbox",
                    "in": {
                        "$cond": [
                            {"$eq": ["$$this.event_id", event_id]},
                            {"$mergeObjects": ["$$this", {"pending": {"$literal": list(left)}}]},
                            "$$this",
                        ]
                    },
                }
            }
        }
    }


def _settled() -> Row:
    """The table's line `declined, settle -> ended`, for a goal that is declined still.

    What the payment service holds is settled by its acknowledgement (`persistence.escrow_calls`).
    """
    declined = {"$and": [{"$eq": ["$state", _SETTLE.source.value]}, {"$ne": ["$held_by", SERVICE]}]}
    assert _SETTLE.outcome is not None
    return {
        "$set": {
            "state": {"$cond": [declined, _SETTLE.target.value, "$state"]},
            "outcome": {"$cond": [declined, _SETTLE.outcome.value, "$outcome"]},
            "version": {"$cond": [declined, {"$add": ["$version", 1]}, "$version"]},
        }
    }


def _deliveries(rows: Sequence[Row]) -> list[Delivery]:
    deliveries: list[Delivery] = []
    for row in rows:
        try:
            deliveries.append(_delivery(row))
        except ValidationError as error:
            damage.met("goals", row["_id"], error)
    return deliveries


def _delivery(row: Row) -> Delivery:
    """Reads an outbox; raises `ValidationError` for one that is damaged."""
    return Delivery(row["_id"], tuple(_ENTRIES.validate_python(row.get("outbox"))))


def _escaped(name: str) -> str:
    return "".join(f"\\{letter}" if not letter.isalnum() else letter for letter in name)
