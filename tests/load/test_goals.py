"""Figures of the unit of work in one process: printed (`pytest -m load -s`), not asserted.

What is asserted holds on any machine: each command and each deadline is carried out.
"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId
from pymongo import AsyncMongoClient, UpdateOne

from gateway.deadline_loop import DeadlineLoop
from gateway.tasks import Tasks
from persistence.clock import Clock
from statemachine.goal import CommandName, Limits
from tests.persistence.world import World, code_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from pymongo import MongoClient
    from pymongo.asynchronous.client_session import AsyncClientSession

    from persistence.deadlines import DueGoal
    from tests.persistence.world import Node

DISTINCT = 3_000
CALLERS = 64
HOT_PER_CALLER = 15
PENDING = 20_000
# Fifty a second, each of a Session of its own.
DUE = 500
DUE_WITHIN_S = 10.0
IDLE_POLLS = 200
POLL_INTERVAL_S = 1.0
CLAIM_LIMIT = 64

pytestmark = [pytest.mark.load, pytest.mark.timeout(900)]


def tell(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")


def p99(figures: Iterable[float]) -> float:
    ordered = sorted(figures)
    return ordered[int(len(ordered) * 0.99)]


@pytest.fixture
async def world(
    mongodb_url: str, mongodb_client: MongoClient[dict[str, Any]], mongodb_database_name: str
) -> AsyncIterator[World]:
    database = mongodb_client[mongodb_database_name]
    world = World(mongodb_url, database, Limits(invitation_ttl_s=86_400.0))
    await world.add_node(clock=Clock())
    yield world
    await world.close()


async def in_parallel(count: int, calls: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Makes the calls, so many at a time."""
    left = iter(calls)

    async def caller() -> None:
        for call in left:
            await call()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(caller())


@pytest.mark.parametrize("callers", [16, 32, 64])
async def test_agreements_a_second_on_distinct_sessions(world: World, callers: int) -> None:
    invited: list[tuple[str, str]] = []

    async def invite(streamer: str) -> None:
        # Delivered, as it is long before anybody agrees.
        invited.append((streamer, await world.invited(await world.session(streamer))))

    async def agree(streamer: str, goal_id: str) -> None:
        answer = await world.ask(CommandName.AGREE, goal_id, by=streamer, request_id="agree")
        assert code_of(answer) == "ok"

    await in_parallel(16, (lambda n=n: invite(f"s{n}") for n in range(DISTINCT)))  # type: ignore[misc]
    began_at_s, cpu_s = time.monotonic(), time.process_time()
    await in_parallel(callers, (lambda pair=pair: agree(*pair) for pair in invited))  # type: ignore[misc]
    took_s, cpu_s = time.monotonic() - began_at_s, time.process_time() - cpu_s

    each_ms = cpu_s / DISTINCT * 1000
    tell(f"agreements, {callers} callers: {DISTINCT / took_s:.0f}/s, {each_ms:.2f} ms CPU each")


async def test_what_the_driver_alone_makes_of_three_writes(
    mongodb_url: str, mongodb_database_name: str
) -> None:
    """A yardstick for the day of the machine: a transaction each, nothing of Duet's."""
    pairs = [(ObjectId(), ObjectId()) for _ in range(DISTINCT)]
    async with AsyncMongoClient[dict[str, Any]](mongodb_url, w="majority") as client:
        database = client[mongodb_database_name]
        await database["goals"].insert_many([{"_id": goal, "version": 1} for goal, _ in pairs])
        await database["sessions"].insert_many([{"_id": own, "version": 1} for _, own in pairs])

        async def agree(goal: ObjectId, own: ObjectId) -> None:
            async def body(within: AsyncClientSession) -> None:
                for name, key in (("goals", goal), ("sessions", own)):
                    written = await database[name].update_one(
                        {"_id": key, "version": 1}, {"$inc": {"version": 1}}, session=within
                    )
                    assert written.modified_count == 1
                await database["outbox"].insert_one({"goal": goal}, session=within)

            async with client.start_session() as session:
                await session.with_transaction(body)

        began_at_s, cpu_s = time.monotonic(), time.process_time()
        await in_parallel(16, (lambda pair=pair: agree(*pair) for pair in pairs))  # type: ignore[misc]
        took_s, cpu_s = time.monotonic() - began_at_s, time.process_time() - cpu_s

    each_ms = cpu_s / DISTINCT * 1000
    tell(f"the driver alone, 16 callers: {DISTINCT / took_s:.0f}/s, {each_ms:.2f} ms CPU each")


async def test_one_hot_session_with_64_callers(world: World) -> None:
    session = await world.session()
    waited_s: list[float] = []

    async def call(number: int) -> None:
        asked_at_s = time.monotonic()
        answer = await world.invite(session, f"viewer{number}", request_id="invite")
        waited_s.append(time.monotonic() - asked_at_s)
        assert code_of(answer) == "ok"

    count = CALLERS * HOT_PER_CALLER
    began_at_s = time.monotonic()
    await in_parallel(CALLERS, (lambda n=n: call(n) for n in range(count)))  # type: ignore[misc]
    took_s = time.monotonic() - began_at_s

    tell(f"hot session: {count / took_s:.0f}/s, p99 {p99(waited_s) * 1000:.0f} ms")


async def test_late_timers_and_the_idle_poll_with_20_000_pending(world: World) -> None:
    session = await world.session()
    node = world.node
    template = world.goal_row(await world.invited(session))
    now = node.store.clock.now()
    rows = [
        template
        | {
            "_id": ObjectId(),
            "due_at": now + timedelta(days=1),
            "exp": now + timedelta(days=1),
            "conditions": {"session_id": session.id, "exclusive_to": f"viewer{number}"},
        }
        for number in range(PENDING)
    ]
    stream = world.session_row(session)
    for number, row in enumerate(rows[:DUE]):
        own = stream | {"_id": ObjectId(), "user": {"id": f"streamer{number}"}}
        world.raw["sessions"].insert_one(own)
        row["conditions"]["session_id"] = own["_id"]
    world.raw["goals"].insert_many(rows)

    cpu_s = time.process_time()
    for _ in range(IDLE_POLLS):
        assert await node.deadlines.claim_due(CLAIM_LIMIT, POLL_INTERVAL_S) == []
    cpu_s = (time.process_time() - cpu_s) / IDLE_POLLS
    tell(f"idle poll with {PENDING} pending: {cpu_s * 1000:.2f} ms CPU")

    began_at = node.store.clock.now()
    updates = []
    for number, row in enumerate(rows[:DUE]):
        due_at = began_at + timedelta(seconds=1 + DUE_WITHIN_S * number / DUE)
        updates.append(UpdateOne({"_id": row["_id"]}, {"$set": {"due_at": due_at, "exp": due_at}}))
    # At once: one by one on a busy machine, the first would be overdue before the last is written.
    world.raw["goals"].bulk_write(updates)
    late_s = await fire_all(node, DUE)
    tell(f"timers: p99 {p99(late_s) * 1000:.0f} ms late, {DUE / DUE_WITHIN_S:.0f} a second")


async def fire_all(node: Node, count: int) -> list[float]:
    """Meets so many deadlines as the gateway does; how late each was."""
    late_s: list[float] = []
    all_met = asyncio.Event()
    tasks = Tasks()

    async def fire(due: DueGoal) -> None:
        late_s.append((node.store.clock.now() - due.due_at).total_seconds())
        assert code_of(await node.deadlines.fire(due)) == "ok"
        if len(late_s) == count:
            all_met.set()

    loop = DeadlineLoop(
        deadlines=node.deadlines,
        clock=node.store.clock,
        interval_s=POLL_INTERVAL_S,
        spawn=tasks.spawn,
        fire=fire,
    )
    tasks.spawn(loop.run(), "deadlines")
    await all_met.wait()
    await tasks.stop()
    return late_s
