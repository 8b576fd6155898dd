"""The one transaction of a command: all that a decision changes, or nothing of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pymongo import UpdateOne
from pymongo.errors import BulkWriteError

from persistence.damage import readable
from persistence.documents import Goal
from persistence.errors import Conflict, StoreDamaged
from persistence.faults import Step, reached
from persistence.goal_writes import GoalWrite, Writer, facts_of, keeps_sources
from persistence.intents import Delivery, Done, Intent
from persistence.occurrences import show_of
from persistence.rows import goal_row
from persistence.store import DUPLICATE
from persistence.transactions import Lengths, Transactions, Writes
from persistence.views import goal_view
from statemachine.goal import Command, CommandName, Decision, GoalState, Limits, Role, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from bson import ObjectId
    from pymongo.errors import DuplicateKeyError

    from persistence.documents import Session
    from persistence.requests import RequestRecords
    from persistence.store import Row, Store
    from statemachine.receivers import Effect, Registry


class Commits:
    """Writes decisions on goals that exist.

    Attributes:
        writer: what builds the writes.
        transactions: in which they are written.
    """

    def __init__(
        self, store: Store, registry: Registry, limits: Limits, requests: RequestRecords
    ) -> None:
        self._store = store
        self._limits = limits
        self._requests = requests
        self.transactions = Transactions(store)
        self.writer = Writer(registry, limits, store.owner, store.options.lease_s)

    async def commit(
        self, intent: Intent, goal: Goal, session: Session, decision: Decision, now: datetime
    ) -> Done:
        """Writes all that a decision changes, or raises and writes nothing."""
        write, effects = self.writer.goal_write(goal, decision, now, intent.client_id)
        session_write = self.writer.session_write(session, write.after, decision, effects)
        done = Done(goal=goal_view(write.after), session_id=str(session.id))
        writes = Writes(
            intent.command,
            goals=[(write.guard, write.update())],
            ledger=write.ledger,
            calls=write.calls,
            requests=self._requests.kept(intent, done, now),
            # Only what raises the version adds to an outbox: one that was empty is so still.
            outbox_of=goal.id if goal.outbox else None,
        )
        if session_write is not None:
            writes.sessions.append((session_write.guard, session_write.pipeline()))
        _add_show(writes, write.after, session, decision, effects, now)

        if session_write is not None and session_write.cleans_up:
            deliveries = await self.transactions.alone(
                writes, partial(self._with_the_others, write, session, now)
            )
        else:
            deliveries = _deliveries(write, await self.transactions.commit(writes))
        reached(Step.AFTER_COMMIT, intent.command)
        return Done(done.goal, done.session_id, tuple(deliveries))

    async def _with_the_others(
        self, write: GoalWrite, session: Session, now: datetime, lengths: Lengths
    ) -> list[Delivery]:
        """Supersedes the other invitations of the Session in the same transaction."""
        return _deliveries(write, lengths) + await self._supersede_others(session, now)

    async def _supersede_others(self, session: Session, now: datetime) -> list[Delivery]:
        """Unsets the other pairs of the Session and declines their invitations.

        Source: requirements, `cleanup_expired_exclusive_goal_pairs`; the aggregation is theirs.
        """
        pairs = await (
            await self._store.sessions.aggregate(
                [
                    {"$match": {"_id": session.id}},
                    {"$project": {"pairs": {"$objectToArray": "$exclusive_goal_pairs"}}},
                    {"$unwind": "$pairs"},
                    {
                        "$match": {
                            "$or": [
                                {"pairs.v.exclusive_goal_ended": {"$ne": None}},
                                {
                                    "$and": [
                                        {"pairs.v.exclusive_goal": None},
                                        {"pairs.v.trigger_exclusive_goal_agreed": None},
                                        {"pairs.v.trigger_exclusive_goal_ended": None},
                                    ]
                                },
                            ]
                        }
                    },
                    {
                        "$project": {
                            "_id": False,
                            "user_id": "$pairs.k",
                            "goal_id": "$pairs.v.trigger_exclusive_goal",
                        }
                    },
                ]
            )
        ).to_list()
        if not pairs:
            return []
        paths = {f"exclusive_goal_pairs.{pair['user_id']}": pair["goal_id"] for pair in pairs}
        unset = await self._store.sessions.update_one(
            {"_id": session.id}
            | {f"{path}.trigger_exclusive_goal": goal_id for path, goal_id in paths.items()},
            {"$unset": dict.fromkeys(paths, "")},
        )
        if unset.matched_count == 0:
            raise Conflict
        # What the declined goals' receivers would mark on their pairs went with the pairs.
        deliveries, _ = await self.decline_all(
            list(paths.values()), CommandName.SUPERSEDE, session, now
        )
        return deliveries

    async def decline_all(
        self, goal_ids: Iterable[ObjectId], command: CommandName, session: Session, now: datetime
    ) -> tuple[list[Delivery], list[Effect]]:
        """Declines, inside a transaction, those of the goals that are still invited.

        Returns:
            What is left to deliver, and what the commit-phase receivers want of the Session.
        """
        rows = await self._store.goals.find(
            {"_id": {"$in": list(goal_ids)}, "state": GoalState.INVITED.value}
        ).to_list()
        deliveries: list[Delivery] = []
        effects: list[Effect] = []
        updates: list[UpdateOne] = []
        ledger: list[Row] = []
        calls: list[Row] = []
        # One that can't be read keeps the Session's others from nothing; mended, it expires.
        for goal in readable(Goal, "goals", rows):
            decision = decide(
                facts_of(goal, session), Command(command, Role.SYSTEM), now, self._limits
            )
            assert isinstance(decision, Decision)
            write, wanted = self.writer.goal_write(goal, decision, now, None)
            effects += wanted
            updates.append(UpdateOne(write.guard, write.update()))
            ledger += write.ledger
            calls += write.calls
            deliveries += write.deliveries(len(goal.outbox))
        if updates:
            written = await self._store.goals.bulk_write(updates, ordered=False)
            if written.matched_count != len(updates):
                raise Conflict
            reached(Step.IN_TRANSACTION, command)
            await self._post(ledger)
            if calls:
                await self._store.escrow_calls.insert_many(calls)
        return deliveries, effects

    async def _post(self, rows: list[Row]) -> None:
        """Writes postings into the ledger.

        Raises:
            StoreDamaged: one is there already, although its goal says that it can't be.
        """
        try:
            await self._store.escrow.insert_many(rows)
        except BulkWriteError as error:
            if any(each["code"] == DUPLICATE for each in error.details["writeErrors"]):
                raise StoreDamaged(f"the ledger has this posting already: {error}") from error
            raise


def _deliveries(write: GoalWrite, lengths: Lengths) -> list[Delivery]:
    added = len(write.entries)
    return write.deliveries(lengths.get(write.goal_id, added) - added)


def _add_show(
    writes: Writes,
    goal: Goal,
    session: Session,
    decision: Decision,
    effects: Sequence[Effect],
    now: datetime,
) -> None:
    """Creates the ExclusiveGoal when a show starts, deactivates it when it ends."""
    if decision.command is CommandName.START:
        assert decision.due is not None
        writes.new_goals.append(goal_row(show_of(goal, decision.due.at, now)))
    elif decision.command is CommandName.FINISH:
        changes: Row = {
            "active": False,
            "state": GoalState.ENDED.value,
            "outcome": goal.outcome.value if goal.outcome else None,
        }
        if keeps_sources(effects):
            changes["rtc_sources"] = session.rtc_sources
        ended = {"$set": changes, "$min": {"exp": now}, "$inc": {"version": 1}}
        writes.goals.append(({"_id": goal.exclusive_goal, "active": True}, ended))


def damaged(error: DuplicateKeyError) -> StoreDamaged:
    """A key that no command may meet twice is there already: somebody has to look."""
    return StoreDamaged(str(error).partition(", full error")[0])
