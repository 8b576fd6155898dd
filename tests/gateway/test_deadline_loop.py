"""Deadlines are met at their instant, on a real MongoDB and by a clock that a test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from bson import ObjectId

from gateway import deadline_loop
from gateway.deadline_loop import DeadlineLoop
from gateway.tasks import Tasks
from persistence.deadlines import Deadlines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from persistence.deadlines import DueGoal
    from tests.persistence.world import World

PATIENCE_S = 30.0
AT_ONCE = 64


class WatchedDeadlines(Deadlines):
    """Counts the looks and what they claim, and tells when one is over."""

    looks = 0
    claimed = 0
    looked: asyncio.Condition

    async def claim_due(self, limit: int, ahead_s: float = 0.0) -> list[DueGoal]:
        found = await super().claim_due(limit, ahead_s)
        async with self.looked:
            self.looks += 1
            self.claimed += len(found)
            self.looked.notify_all()
        return found

    async def until_looked(self, times: int = 1) -> None:
        """Waits for so many more looks."""
        wanted = self.looks + times
        async with asyncio.timeout(PATIENCE_S), self.looked:
            await self.looked.wait_for(lambda: self.looks >= wanted)


@dataclass
class Bench:
    """A loop whose fired goals are written down, and their number at a time."""

    world: World
    deadlines: WatchedDeadlines
    tasks: Tasks = field(default_factory=Tasks)
    fired: list[str] = field(default_factory=list)
    most_at_once: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def start(self, interval_s: float) -> DeadlineLoop:
        loop = DeadlineLoop(
            deadlines=self.deadlines,
            clock=self.world.clock,
            interval_s=interval_s,
            spawn=self.tasks.spawn,
            fire=self._fire,
        )
        self.tasks.spawn(loop.run(), "deadlines")
        return loop

    async def _fire(self, due: DueGoal) -> None:
        await self.deadlines.fire(due)
        async with self.changed:
            at_once = self.deadlines.claimed - len(self.fired)
            self.most_at_once = max(self.most_at_once, at_once)
            self.fired.append(str(due.goal_id))
            self.changed.notify_all()

    async def until_fired(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: len(self.fired) >= count)


@pytest.fixture
async def bench(world: World) -> AsyncIterator[Bench]:
    deadlines = WatchedDeadlines(world.node.store, world.node.goals)
    deadlines.looked = asyncio.Condition()
    bench = Bench(world, deadlines)
    yield bench
    await bench.tasks.stop()


@pytest.fixture
def rare_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look comes by itself while the test lasts."""
    monkeypatch.setattr(deadline_loop, "_AHEAD_MAX_S", 3600.0)


async def test_a_goal_is_claimed_ahead_and_fired_at_its_instant_and_not_before(
    bench: Bench,
) -> None:
    goal_id = await bench.world.invited(await bench.world.session())
    bench.world.clock.shift(59.999)

    bench.start(interval_s=0.02)
    await bench.deadlines.until_looked(10)
    assert bench.deadlines.claimed == 1
    assert bench.fired == []
    bench.world.clock.shift(0.001)
    await bench.until_fired(1)

    assert bench.fired == [goal_id]
    assert bench.world.goal_row(goal_id)["reason"] == "expired"


async def test_a_deadline_that_another_process_wrote_is_met_however_long_the_interval(
    bench: Bench,
) -> None:
    bench.start(interval_s=60)
    await bench.deadlines.until_looked()
    goal_id = await bench.world.invited(await bench.world.session())

    bench.world.clock.shift(59.5)
    await bench.deadlines.until_looked(2)
    bench.world.clock.shift(0.5)
    await bench.until_fired(1)

    assert bench.fired == [goal_id]


async def test_a_deadline_that_this_process_wrote_is_met_long_before_the_next_look(
    bench: Bench, rare_looks: None
) -> None:
    loop = bench.start(interval_s=3600)
    await bench.deadlines.until_looked()
    goal_id = await bench.world.invited(await bench.world.session())

    bench.world.clock.shift(59.9)
    loop.note(bench.world.clock.now())
    await bench.deadlines.until_looked()
    bench.world.clock.shift(0.1)
    await bench.until_fired(1)

    assert bench.fired == [goal_id]


async def test_goals_whose_time_was_set_back_keep_none_waiting_that_are_due(bench: Bench) -> None:
    world = bench.world
    session = await world.session()
    for number in range(AT_ONCE):
        await world.invited(session, f"viewer{number}")
    world.clock.shift(59.99)
    due_id = await world.invited(session, "due")
    bench.start(interval_s=0.02)
    await bench.deadlines.until_looked()
    assert bench.deadlines.claimed == AT_ONCE

    world.clock.shift(-30)
    now = world.clock.now()
    world.raw["goals"].update_one({"_id": ObjectId(due_id)}, {"$set": {"due_at": now, "exp": now}})
    await bench.until_fired(1)

    assert bench.fired == [due_id]


async def test_all_of_a_crowd_are_fired_and_no_more_claimed_than_there_is_room_for(
    bench: Bench,
) -> None:
    session = await bench.world.session()
    goal_ids = [
        await bench.world.invited(session, f"viewer{number}") for number in range(AT_ONCE + 20)
    ]
    bench.world.clock.shift(59.99)
    bench.start(interval_s=0.02)
    await bench.deadlines.until_looked()
    assert bench.deadlines.claimed == AT_ONCE

    bench.world.clock.shift(0.01)
    await bench.until_fired(len(goal_ids))

    assert sorted(bench.fired) == sorted(goal_ids)
    assert bench.most_at_once <= AT_ONCE


async def test_a_crowd_is_not_kept_waiting_for_the_interval(bench: Bench, rare_looks: None) -> None:
    session = await bench.world.session()
    for number in range(AT_ONCE + 20):
        await bench.world.invited(session, f"viewer{number}")
    bench.world.clock.shift(60)

    bench.start(interval_s=3600)
    await bench.until_fired(AT_ONCE + 20)

    assert bench.deadlines.looks <= 4
