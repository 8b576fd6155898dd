"""The loop that says what is due to the payment service, on a real MongoDB."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId
from structlog.testing import capture_logs

from gateway.escrow_client import EscrowClient
from gateway.escrow_worker import EscrowCounter, EscrowWorker
from gateway.lookout import PAUSE_S, Lookout
from gateway.telemetry import Telemetry
from persistence.escrow_calls import EscrowBook, EscrowCalls
from persistence.escrow_port import EscrowAnswer, Verdict
from tests.payment_service import SECRET, Fault, PaymentService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from persistence.documents import EscrowCall
    from persistence.escrow_port import EscrowPort
    from tests.persistence.world import World

PATIENCE_S = 30.0
# Longer than any test waits for anything.
HANGS_S = 600.0
AT_ONCE = 32


def due(world: World, number: int, **more: Any) -> dict[str, Any]:
    """A release that is to be said."""
    now = world.clock.now()
    goal_id = ObjectId(f"{number:024x}")
    return {
        "_id": f"{goal_id}:close",
        "call": "release",
        "goal_id": goal_id,
        "session_id": ObjectId(),
        "viewer_id": f"viewer{number}",
        "streamer_id": "anna",
        "amount": 500,
        "reason": "no_invitation",
        "at": now,
        "status": "pending",
        "since": now,
        "due_at": now,
        "attempts": 0,
        **more,
    }


def worker_of(world: World, port: EscrowPort, timeout_s: float) -> EscrowWorker:
    node = world.nodes[-1]
    calls = EscrowCalls(node.store, node.goals, port, timeout_s=timeout_s, give_up_s=3600)
    return EscrowWorker(calls, world.clock, Lookout(world.clock, 1.0))


@contextlib.asynccontextmanager
async def at_work(worker: EscrowWorker) -> AsyncIterator[None]:
    running = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


@dataclass
class Away:
    """A service that is not there: it is known at once that nobody answers."""

    asked_at_s: list[float] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def ask(self, call: EscrowCall, within_s: float) -> EscrowAnswer:
        del call, within_s
        async with self.changed:
            self.asked_at_s.append(time.monotonic())
            self.changed.notify_all()
        return EscrowAnswer(Verdict.UNKNOWN, "nobody is there")

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: len(self.asked_at_s) >= times)


async def test_a_call_that_hangs_keeps_the_others_from_nothing(world: World) -> None:
    calls = world.raw["escrow_calls"]
    with PaymentService() as service:
        client = EscrowClient(service.url, SECRET, HANGS_S, world.clock, Telemetry())
        await world.add_node(port=client)
        service.plan("release", Fault.HANG)
        first, second = due(world, 1), due(world, 2)
        for row in (first, second):
            service.accounts[str(row["goal_id"])].held = row["amount"]
        calls.insert_one(first)
        async with at_work(worker_of(world, client, HANGS_S)):
            await service.until("the first is asked", lambda: len(service.asked) == 1)

            calls.insert_one(second)
            await service.until("the second is done", lambda: service.times("release") == 1)

        await client.close()
        assert service.done == [("release", second["_id"])]


async def test_a_backlog_that_nobody_answers_is_not_said_as_fast_as_it_fails(world: World) -> None:
    away = Away()
    await world.add_node(port=away)
    world.raw["escrow_calls"].insert_many(due(world, number) for number in range(2 * AT_ONCE))

    with capture_logs() as logs:
        async with at_work(worker_of(world, away, 1.0)):
            await away.until_asked(2 * AT_ONCE)

    assert away.asked_at_s[AT_ONCE] - away.asked_at_s[0] > 0.8 * PAUSE_S
    # A line for each would bury all others.
    told = [log for log in logs if log["log_level"] != "debug"]
    (line,) = [log for log in told if log["event"] == "escrow_call_not_acknowledged"]
    assert (line["verdict"], line["why"]) == ("unknown", "nobody is there")


async def test_a_process_without_a_service_counts_what_waits_and_says_once_that_it_does(
    world: World,
) -> None:
    telemetry = Telemetry()
    counter = EscrowCounter(EscrowBook(world.node.store), telemetry, has_service=False)
    with capture_logs() as before:
        await counter.count()

    world.raw["escrow_calls"].insert_many(
        [due(world, 1), due(world, 2), due(world, 3, status="dead")]
    )
    world.clock.shift(7)
    with capture_logs() as after:
        await counter.count()
        await counter.count()

    assert before == []
    (line,) = after
    assert line["event"] == "escrow_calls_without_service"
    text = telemetry.exposition().decode()
    for name, value in (("pending", 2), ("dead", 1)):
        assert f"duet_escrow_calls_{name} {value}.0" in text
    assert "duet_escrow_oldest_call_seconds 7.0" in text


@pytest.mark.parametrize("has_service", [True, False])
async def test_while_nothing_waits_nobody_is_warned(world: World, *, has_service: bool) -> None:
    counter = EscrowCounter(EscrowBook(world.node.store), Telemetry(), has_service=has_service)

    with capture_logs() as logs:
        await counter.count()

    assert logs == []
