"""What happens between a commit and its reply, on a real MongoDB and a real Redis."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from gateway.broker import BrokerUnavailable
from gateway.deliver import Deliverer
from gateway.lookout import Lookout
from gateway.redis_passes import PassCache
from gateway.telemetry import Telemetry
from persistence.intents import Done
from statemachine.goal import CommandName
from tests.gateway.harness import until
from tests.persistence.world import World, goal_id_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence
    from datetime import datetime

    from gateway.broker import Publication


PATIENCE_S = 30.0
LONG_S = 3600.0


@dataclass
class Recording:
    """A node that publishes to nobody and keeps its tasks."""

    published: list[str] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    unreachable_times: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def publish(self, publications: Sequence[Publication]) -> None:
        if self.unreachable_times:
            self.unreachable_times -= 1
            raise BrokerUnavailable("the test says so")
        async with self.changed:
            self.published += [publication.channel for publication in publications]
            self.changed.notify_all()

    async def until_published(self, channel: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: self.published.count(channel) >= times)

    async def drop_channel_data(self, streamer_id: str) -> None:
        pass

    async def presence_user_ids(self, app_id: str, channel: str) -> list[str]:
        return []

    def spawn(self, coroutine: Coroutine[object, object, None], name: str) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))


@pytest.fixture
async def passes(redis_url: str, redis_prefix: str) -> AsyncIterator[PassCache]:
    redis = Redis.from_url(redis_url)
    yield PassCache(redis, redis_prefix, ttl_s=60)
    await redis.aclose()


@pytest.fixture
async def node() -> AsyncIterator[Recording]:
    node = Recording()
    yield node
    for task in node.tasks:
        task.cancel()
    await asyncio.gather(*node.tasks, return_exceptions=True)


@pytest.fixture
def escrow_looks(world: World) -> Lookout:
    return Lookout(world.clock, LONG_S)


@pytest.fixture
def deliverer(world: World, passes: PassCache, node: Recording, escrow_looks: Lookout) -> Deliverer:
    """One that looks but once an hour, unless it knows better."""
    return Deliverer(
        store=world.node.store,
        registry=world.node.registry,
        deadlines=world.node.deadlines,
        passes=passes,
        publisher=node,
        telemetry=Telemetry(),
        app_id="1",
        poll_interval_s=LONG_S,
        room_pass_s=60.0,
        cache_deadline_s=5.0,
        escrow_looks=escrow_looks,
    )


async def cache_a_pass(passes: PassCache, session_id: str) -> None:
    _, generation = await passes.read(session_id, "ben")
    assert await passes.store(session_id, "ben", b"pass", generation)


async def cached_pass(passes: PassCache, session_id: str) -> bytes | None:
    view, _ = await passes.read(session_id, "ben")
    return view


async def test_a_commit_that_another_process_delivers_still_drops_the_passes_before_its_reply(
    world: World, passes: PassCache, deliverer: Deliverer
) -> None:
    """The invitation's own events are still on their way elsewhere, and the agree's behind them."""
    session = await world.session()
    goal_id = goal_id_of(await world.invite(session))
    await cache_a_pass(passes, str(session.id))

    answer = await world.ask(CommandName.AGREE, goal_id)
    assert isinstance(answer, Done)
    assert answer.deliveries == ()
    await deliverer.after_commit(answer)

    assert await cached_pass(passes, str(session.id)) is None


async def test_a_session_that_ends_without_an_invitation_drops_its_passes(
    world: World, passes: PassCache, deliverer: Deliverer
) -> None:
    session = await world.session()
    await cache_a_pass(passes, str(session.id))

    _, deliveries = await world.node.sessions.end(session)
    await deliverer.after_commit(Done({}, str(session.id), deliveries))

    assert deliveries == ()
    assert await cached_pass(passes, str(session.id)) is None


async def test_passes_that_could_not_be_dropped_before_the_reply_are_dropped_behind_it(
    world: World,
    passes: PassCache,
    deliverer: Deliverer,
    node: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    await cache_a_pass(passes, str(session.id))
    answer = await world.ask(CommandName.AGREE, goal_id)
    assert isinstance(answer, Done)

    async def unreachable_once(_passes: PassCache, _session_id: str) -> None:
        monkeypatch.undo()
        raise BrokerUnavailable("the test says so")

    monkeypatch.setattr(PassCache, "drop", unreachable_once)
    await deliverer.after_commit(answer)
    await asyncio.gather(*node.tasks)

    assert await cached_pass(passes, str(session.id)) is None
    assert world.goal_row(goal_id)["outbox"] == []


async def test_what_a_commit_left_to_do_is_delivered_behind_the_reply(
    world: World, deliverer: Deliverer, node: Recording
) -> None:
    session = await world.session()
    answer = await world.invite(session)
    assert isinstance(answer, Done)

    await deliverer.after_commit(answer)
    assert node.published == []
    await asyncio.gather(*node.tasks)

    assert node.published == ["private-stream@anna", "private-user@anna", "private-user@ben"]
    assert world.goal_row(goal_id_of(answer))["outbox"] == []


async def test_what_could_not_be_delivered_is_tried_again_long_before_the_next_look(
    world: World, deliverer: Deliverer, node: Recording
) -> None:
    await deliverer.start()
    answer = await world.invite(await world.session())
    assert isinstance(answer, Done)
    node.unreachable_times = 1

    await deliverer.after_commit(answer)
    await node.tasks[-1]
    assert node.published == []
    world.clock.shift(0.25)
    await node.until_published("private-stream@anna")

    assert node.unreachable_times == 0


async def test_what_is_left_to_do_and_whether_mongodb_answers_is_in_the_metrics(
    world: World, deliverer: Deliverer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.deliver._LOOK_AT_MONGODB_EVERY_S", 0.01)
    other = await world.add_node()
    session = await world.session()
    await world.invite(session, node=other)
    await world.invite(session, "cleo", node=other)
    world.clock.shift(2)

    await deliverer.start()
    await until(lambda: metric(deliverer, "outbox_pending") == 2)

    assert 2 <= metric(deliverer, "outbox_oldest_seconds") < 60
    assert metric(deliverer, "deadlines_overdue") == 0
    assert metric(deliverer, "mongodb_alive") == 1
    await world.node.store.close()
    await until(lambda: metric(deliverer, "mongodb_alive") == 0)


def metric(deliverer: Deliverer, name: str) -> float:
    registry = deliverer._telemetry.registry
    value = registry.get_sample_value(f"duet_{name}")
    assert value is not None, f"there is no metric {name}"
    return value


async def test_what_a_dead_process_left_is_taken_over_when_its_lease_ends(
    world: World, deliverer: Deliverer, node: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asyncio.Event()
    next_due_at = deliverer.outbox.next_due_at

    async def look() -> datetime | None:
        found = await next_due_at()
        looked.set()
        return found

    monkeypatch.setattr(deliverer.outbox, "next_due_at", look)
    other = await world.add_node()
    await world.invite(await world.session(), node=other)
    world.clock.shift(4.9)

    await deliverer.start()
    await looked.wait()
    assert node.published == []
    world.clock.shift(0.1)
    await node.until_published("private-stream@anna")

    assert node.published.count("private-stream@anna") == 1


async def test_a_deadline_that_a_commit_sets_is_met_long_before_the_next_look(
    world: World, deliverer: Deliverer, node: Recording
) -> None:
    """The show is started when its time is nearly over."""
    await deliverer.start()
    goal_id = await world.agreed(await world.session())
    world.clock.shift(89.9)
    started = await world.ask(CommandName.START, goal_id)
    assert isinstance(started, Done)

    await deliverer.after_commit(started)
    world.clock.shift(0.2)
    await node.until_published("presence-stream@anna", times=2)

    assert world.goal_row(goal_id)["state"] == "ended"


async def test_a_commit_that_may_have_moved_money_has_the_payment_service_told(
    world: World, deliverer: Deliverer, escrow_looks: Lookout
) -> None:
    invited = await world.invite(await world.session())
    assert isinstance(invited, Done)
    await escrow_looks.wait()  # the first, at once

    await deliverer.after_commit(invited)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await escrow_looks.wait()
    declined = await world.ask(CommandName.DISAGREE, goal_id_of(invited))
    assert isinstance(declined, Done)
    await deliverer.after_commit(declined)

    async with asyncio.timeout(PATIENCE_S):
        await escrow_looks.wait()
