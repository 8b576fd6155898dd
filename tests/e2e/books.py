"""What MongoDB really holds, read past the gateway, and waiting until it holds something."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from bson import ObjectId
from pymongo import AsyncMongoClient
from pymongo.read_concern import ReadConcern

from tests.e2e.inbox import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.e2e.gateway_process import Stores

# How long the server itself waits for the next change; nothing is polled in between.
_AWAIT_MS = 250


class Books:
    """The database of one test.

    Attributes:
        moved: when the deadline of which goal was moved.
    """

    def __init__(self, stores: Stores) -> None:
        self.moved: list[tuple[float, str]] = []
        self._client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
            # An election takes long where everybody is busy.
            stores.mongodb_url,
            serverSelectionTimeoutMS=30_000,
            tz_aware=True,
        )
        self.database = self._client[stores.database]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def goal(self, goal_id: str) -> dict[str, Any]:
        goal = await self.database["goals"].find_one({"_id": ObjectId(goal_id)})
        assert goal is not None, goal_id
        return goal

    async def session(self, session_id: str) -> dict[str, Any]:
        session = await self.database["sessions"].find_one({"_id": ObjectId(session_id)})
        assert session is not None, session_id
        return session

    async def goals_of(self, session_id: str) -> list[dict[str, Any]]:
        """The invitations of a Session."""
        goals = self.database["goals"]
        return await goals.find(
            {"_cls": "TriggerExclusiveGoal", "conditions.session_id": ObjectId(session_id)}
        ).to_list()

    async def move_exp(self, goal_id: str, *, seconds: float) -> None:
        """Moves a goal's `exp` alone, and not what the timer waits for."""
        await self.database["goals"].update_one(
            {"_id": ObjectId(goal_id)},
            [
                {
                    "$set": {
                        "exp": {
                            "$dateAdd": {
                                "startDate": "$exp",
                                "unit": "millisecond",
                                "amount": int(seconds * 1000),
                            }
                        }
                    }
                }
            ],
        )

    async def move_deadline(self, goal_id: str, *, seconds: float) -> None:
        """Moves a goal's `exp` and what the timer waits for, if it still waits."""
        self.moved.append((time.monotonic(), goal_id))
        await self.move_exp(goal_id, seconds=seconds)
        await self.database["goals"].update_one(
            {"_id": ObjectId(goal_id), "due_at": {"$exists": True}}, [{"$set": {"due_at": "$exp"}}]
        )

    async def postings(self, goal_id: str) -> list[dict[str, Any]]:
        return await self.database["escrow"].find({"goal_id": ObjectId(goal_id)}).to_list()

    async def movements(self, goal_id: str) -> Counter[str]:
        """How often the escrow of a goal was held, captured, released."""
        return Counter(posting["movement"] for posting in await self.postings(goal_id))

    async def balances(self, session_id: str) -> dict[str, int]:
        """What each account has gained or lost through a Session, zeros left out."""
        accounts: Counter[str] = Counter()
        async for posting in self.database["escrow"].find({"session_id": ObjectId(session_id)}):
            assert posting["amount"] > 0
            accounts[posting["debit"]] -= posting["amount"]
            accounts[posting["credit"]] += posting["amount"]
        assert sum(accounts.values()) == 0
        return {account: amount for account, amount in accounts.items() if amount}

    async def records_of(self, goal_id: str) -> int:
        """How many analytics records `track_goals` has left for a goal."""
        return await self.database["goal_records"].count_documents({"goal_id": goal_id})

    async def until(
        self,
        what: str,
        holds: Callable[[], Awaitable[bool]],
        *,
        timeout_s: float = PATIENCE_S,
    ) -> None:
        """Waits until `holds`; looks again after each change, never by the clock."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                await self.database.watch(max_await_time_ms=_AWAIT_MS) as changes,
            ):
                while not await holds():
                    await changes.try_next()
        except TimeoutError:
            raise AssertionError(f"not in {timeout_s} s: {what}") from None

    async def until_state(
        self, goal_id: str, state: str, *, timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Waits until a goal is in `state`, and returns it."""

        async def holds() -> bool:
            return (await self.goal(goal_id))["state"] == state

        await self.until(f"goal {goal_id} is {state}", holds, timeout_s=timeout_s)
        return await self.goal(goal_id)

    async def until_delivered(self, *, timeout_s: float = PATIENCE_S) -> None:
        """Waits until no goal has an outbox entry: every push of every commit is out.

        As a majority has it, which is what a gateway shows from then on.
        """
        goals = self.database.get_collection("goals", read_concern=ReadConcern("majority"))

        async def holds() -> bool:
            waiting = await goals.count_documents({"outbox.0": {"$exists": True}})
            return waiting == 0

        await self.until("every outbox is empty", holds, timeout_s=timeout_s)

    async def pending(self, goal_id: str) -> list[str]:
        """The receivers that a goal's outbox still has to run."""
        goal = await self.goal(goal_id)
        return [name for entry in goal.get("outbox", []) for name in entry["pending"]]

    async def assert_money_conserved(self, session_id: str) -> None:
        """Every goal was held once; closed once if it has ended, and not before."""
        for goal in await self.goals_of(session_id):
            goal_id = str(goal["_id"])
            movements = await self.movements(goal_id)
            amounts = {posting["amount"] for posting in await self.postings(goal_id)}
            assert amounts == {goal["amount"]}
            closed = movements["capture"] + movements["release"]
            assert movements["hold"] == 1, (goal_id, movements)
            match goal["state"]:
                case "invited" | "agreed":
                    assert closed == 0, (goal_id, movements)
                case "live":
                    assert movements == {"hold": 1, "capture": 1}
                case "declined":
                    assert movements == {"hold": 1, "release": 1}
                case "ended":
                    closing = {"captured": "capture", "refunded": "release"}[goal["outcome"]]
                    assert movements == {"hold": 1, closing: 1}
                case other:
                    raise AssertionError(other)
