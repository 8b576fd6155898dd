"""Claims due goals with a lease and sends them their timer command.

A deadline is a field of the goal, written with its state. No timer is only in memory: after any
restart what is due is found at once, by whichever process looks first.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from persistence.claims import claim
from persistence.damage import damage
from persistence.errors import StoreDamaged
from persistence.intents import Intent
from statemachine.goal import CommandName, Role

if TYPE_CHECKING:
    from datetime import datetime

    from bson import ObjectId

    from persistence.goals import Goals
    from persistence.intents import Answer
    from persistence.store import Row, Store

_CLAIMED: Final = {"due_at": True, "due_command": True}
# A deadline that is met at all is met before it is so late.
_OVERDUE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class DueGoal:
    """A goal whose deadline this process has claimed."""

    goal_id: ObjectId
    command: CommandName
    due_at: datetime


class Deadlines:
    """The deadlines of all goals: expiry, refund check, end of the show."""

    def __init__(self, store: Store, goals: Goals) -> None:
        self._store = store
        self._goals = goals

    async def claim_due(self, limit: int, ahead_s: float = 0.0) -> list[DueGoal]:
        """Claims up to `limit` goals that are due or fall due within `ahead_s`, the earliest first.

        A claim lasts for its lease, counted from the instant at which the goal is due.
        """
        goals = self._store.goals
        async with self._store.reading():
            now = self._store.clock.now()
            free = {
                "due_at": {"$lte": now + timedelta(seconds=ahead_s)},
                "$or": [
                    {"due_lease_until": {"$exists": False}},
                    {"due_lease_until": {"$lte": now}},
                ],
            }
            found = await goals.find(free, {"_id": True}).sort("due_at").limit(limit).to_list()
            if not found:
                return []
            ids = [row["_id"] for row in found]
            await claim(goals, ids, free, [{"$set": self._lease(now)}])
            mine = {"_id": {"$in": ids}, "due_owner": self._store.owner}
            rows = await (
                goals.find(mine | {"due_lease_until": {"$gt": now}}, _CLAIMED)
                .sort("due_at")
                .to_list()
            )
        return _due_goals(rows)

    async def overdue(self) -> int:
        """How many goals have a deadline that was not met in time, and still is not."""
        async with self._store.reading():
            late = self._store.clock.now() - timedelta(seconds=_OVERDUE_S)
            return await self._store.goals.count_documents({"due_at": {"$lt": late}})

    async def fire(self, due: DueGoal) -> Answer:
        """Sends a claimed goal its timer command.

        `check_trigger_exclusive_goal_refundable` of the requirements is the refund command here:
        the table allows it only while no ExclusiveGoal exists.

        Raises:
            StoreDamaged: the goal can't be read; it is found again when the claim's lease is over.
        """
        intent = Intent(due.command, Role.TIMER, user_id=None, goal_id=str(due.goal_id))
        try:
            return await self._goals.execute(intent)
        except ValidationError as error:
            damage.met("goals", due.goal_id, error)
            raise StoreDamaged("the goal can't be read") from error

    def _lease(self, now: datetime) -> Row:
        lease_ms = round(self._store.options.lease_s * 1000)
        return {
            "due_lease_until": {"$add": [{"$max": ["$due_at", now]}, lease_ms]},
            "due_owner": {"$literal": self._store.owner},
        }


def _due_goals(rows: list[Row]) -> list[DueGoal]:
    due = []
    for row in rows:
        try:
            command = CommandName(row.get("due_command", ""))
        except ValueError as error:
            damage.met("goals", row["_id"], error)
            continue
        due.append(DueGoal(row["_id"], command, row["due_at"]))
    return due
