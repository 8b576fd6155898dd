"""What a crash left behind is delivered in time, on a real MongoDB and a clock that is moved."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from gateway.lookout import PAUSE_S
from gateway.outbox_loop import OutboxLoop
from gateway.tasks import Tasks
from statemachine.goal import CommandName

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from persistence.intents import Delivery
    from tests.persistence.world import World

PATIENCE_S = 30.0
AT_ONCE = 16


@dataclass
class Bench:
    """A loop whose deliveries are begun as it says and end when the test lets them."""

    world: World
    tasks: Tasks = field(default_factory=Tasks)
    begun: list[str] = field(default_factory=list)
    begun_at_s: list[float] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def start(self, interval_s: float) -> OutboxLoop:
        loop = OutboxLoop(
            outbox=self.world.node.outbox,
            clock=self.world.clock,
            interval_s=interval_s,
            spawn=self.tasks.spawn,
            deliver=self._deliver,
        )
        self.tasks.spawn(loop.run(), "outboxes")
        return loop

    async def _deliver(self, delivery: Delivery) -> bool:
        goal_id = str(delivery.goal_id)
        async with self.changed:
            self.begun.append(goal_id)
            self.begun_at_s.append(time.monotonic())
            self.changed.notify_all()
            await self.changed.wait_for(lambda: goal_id not in self.held)
        delivered = await self.world.node.outbox.deliver(delivery)
        async with self.changed:
            self.finished.append(goal_id)
            self.changed.notify_all()
        return delivered

    async def let_go(self) -> None:
        async with self.changed:
            self.held.clear()
            self.changed.notify_all()

    async def until(self, met: Any) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(met)

    async def left_behind(self, count: int) -> list[str]:
        """Goals that were declined by a process that died before it could tell anyone."""
        session = await self.world.session()
        goal_ids = [await self.world.invited(session, f"viewer{n}") for n in range(count)]
        for goal_id in goal_ids:
            await self.world.ask(CommandName.DISAGREE, goal_id)
        return goal_ids


@pytest.fixture
async def bench(world: World) -> AsyncIterator[Bench]:
    bench = Bench(world)
    yield bench
    await bench.tasks.stop()


async def test_a_crowd_is_delivered_by_looks_that_follow_one_another_at_once(bench: Bench) -> None:
    goal_ids = await bench.left_behind(3 * AT_ONCE)
    bench.world.clock.shift(5)

    bench.start(interval_s=3600)
    await bench.until(lambda: len(bench.finished) == len(goal_ids))

    assert sorted(bench.finished) == sorted(goal_ids)
    assert all(bench.world.goal_row(goal_id)["outbox"] == [] for goal_id in goal_ids)


async def test_a_database_that_does_not_answer_is_told_of_once_and_not_at_each_look(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, looks = bench.world.node.outbox, 0
    look = outbox.next_due_at

    async def counted() -> Any:
        nonlocal looks
        async with bench.changed:
            looks += 1
            bench.changed.notify_all()
        return await look()

    monkeypatch.setattr(outbox, "next_due_at", counted)
    await bench.world.node.store.close()

    with capture_logs() as lines:
        bench.start(interval_s=3600)
        await bench.until(lambda: looks == 4)

    assert [line["event"] for line in lines] == ["outboxes_not_read"]


async def test_no_more_are_taken_over_than_are_at_work(bench: Bench) -> None:
    other = await bench.world.add_node()
    goal_ids = await bench.left_behind(AT_ONCE + 4)
    bench.world.clock.shift(5)
    bench.held = set(goal_ids)

    bench.start(interval_s=3600)
    await bench.until(lambda: len(bench.begun) == AT_ONCE)

    taken = await other.outbox.claim_due(100)
    assert len(taken) == 4
    assert not {str(delivery.goal_id) for delivery in taken} & set(bench.begun)


async def test_one_that_hangs_keeps_the_others_from_nothing(bench: Bench) -> None:
    goal_ids = await bench.left_behind(2 * AT_ONCE)
    bench.world.clock.shift(5)
    bench.held = {goal_ids[0]}

    bench.start(interval_s=3600)
    await bench.until(lambda: len(bench.finished) == len(goal_ids) - 1)
    assert goal_ids[0] not in bench.finished

    await bench.let_go()
    await bench.until(lambda: len(bench.finished) == len(goal_ids))


async def test_a_delivery_that_was_postponed_is_not_kept_waiting_for_the_interval(
    bench: Bench,
) -> None:
    loop = bench.start(interval_s=3600)
    [goal_id] = await bench.left_behind(1)
    bench.world.clock.shift(5)

    loop.soon()
    await bench.until(lambda: bench.finished == [goal_id])


async def test_a_backlog_that_can_not_be_delivered_is_not_tried_as_fast_as_it_fails(
    bench: Bench,
) -> None:
    """As while Redis is away: each look costs what the commands need."""
    await bench.left_behind(2 * AT_ONCE)
    bench.world.clock.shift(5)
    bench.world.node.recorder.fails = lambda *_: True

    bench.start(interval_s=3600)
    await bench.until(lambda: len(bench.finished) == 2 * AT_ONCE)

    first, second = bench.begun_at_s[0], bench.begun_at_s[AT_ONCE]
    assert second - first > 0.8 * PAUSE_S
