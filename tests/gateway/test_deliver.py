"""What happens between a commit and its reply, on a real MongoDB and a real Redis."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from gateway.deliver import Deliverer
from gateway.redis_passes import PassCache
from gateway.telemetry import Telemetry
from persistence.intents import Done
from statemachine.goal import CommandName
from tests.persistence.world import World, goal_id_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from pymongo import MongoClient

    from gateway.broker import Publication


@dataclass
class Recording:
    """A node that publishes to nobody and keeps its tasks."""

    published: list[str] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def publish(self, publications: Sequence[Publication]) -> None:
        self.published += [publication.channel for publication in publications]

    async def drop_channel_data(self, streamer_id: str) -> None:
        pass

    async def presence_user_ids(self, app_id: str, channel: str) -> list[str]:
        return []

    def spawn(self, coroutine: Coroutine[object, object, None], name: str) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))


@pytest.fixture
async def world(
    mongodb_url: str, mongodb_client: MongoClient[dict[str, Any]], mongodb_database_name: str
) -> AsyncIterator[World]:
    world = World(mongodb_url, mongodb_client[mongodb_database_name])
    await world.add_node()
    yield world
    await world.close()


@pytest.fixture
async def passes(redis_url: str, redis_prefix: str) -> AsyncIterator[PassCache]:
    redis = Redis.from_url(redis_url)
    yield PassCache(redis, redis_prefix, ttl_s=60)
    await redis.aclose()


@pytest.fixture
async def deliverer(world: World, passes: PassCache) -> AsyncIterator[Deliverer]:
    node = Recording()
    yield Deliverer(
        store=world.node.store,
        registry=world.node.registry,
        deadlines=world.node.deadlines,
        passes=passes,
        publisher=node,
        telemetry=Telemetry(),
        app_id="1",
        poll_interval_s=0.25,
        room_pass_s=60.0,
        cache_deadline_s=5.0,
    )
    await asyncio.gather(*node.tasks)


async def cache_a_pass(passes: PassCache, session_id: str) -> None:
    _, generation = await passes.read(session_id, "ben")
    assert await passes.store(session_id, "ben", b"pass", generation)


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

    view, _ = await passes.read(str(session.id), "ben")
    assert view is None


async def test_a_session_that_ends_without_an_invitation_drops_its_passes(
    world: World, passes: PassCache, deliverer: Deliverer
) -> None:
    session = await world.session()
    await cache_a_pass(passes, str(session.id))

    _, deliveries = await world.node.sessions.end(session)
    await deliverer.after_commit(Done({}, str(session.id), deliveries))

    assert deliveries == ()
    view, _ = await passes.read(str(session.id), "ben")
    assert view is None


async def test_what_a_commit_left_to_do_is_delivered_behind_the_reply(
    world: World, passes: PassCache, deliverer: Deliverer
) -> None:
    session = await world.session()
    answer = await world.invite(session)
    assert isinstance(answer, Done)

    await deliverer.after_commit(answer)
    node = deliverer._publisher
    assert isinstance(node, Recording)
    assert node.published == []
    await asyncio.gather(*node.tasks)

    assert node.published == ["private-stream@anna", "private-user@anna", "private-user@ben"]
    assert world.goal_row(goal_id_of(answer))["outbox"] == []
