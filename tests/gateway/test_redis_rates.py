from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import redis.asyncio

from gateway.apps import App
from gateway.redis_commands import RedisCommands
from gateway.redis_link import RedisAddress
from gateway.redis_rates import ApiRates
from gateway.tasks import Tasks
from tests.gateway.harness import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

APP = App(id="1", key="k", secret="s", api_rate_per_s=10)
STEPS_PER_S = 20


@pytest.fixture
async def commands(redis_url: str) -> AsyncIterator[RedisCommands]:
    made, tasks = RedisCommands(RedisAddress.of(redis_url), 1.0), Tasks()
    await made.start(tasks)
    yield made
    await tasks.stop()


async def let_through(nodes: list[ApiRates], seconds: int, start: float = 0.0) -> int:
    """How many calls get through when each node is asked far too often; time is the test's."""
    count = 0
    for step in range(seconds * STEPS_PER_S):
        now = start + step / STEPS_PER_S
        count += sum(node.allow(APP, now)[0] for node in nodes for _ in range(5))
        if step % 5 == 0:
            for node in nodes:
                await node.share(now)
    return count


async def test_one_node_lets_through_the_rate_and_one_second_at_once(
    commands: RedisCommands, redis_prefix: str
) -> None:
    count = await let_through([ApiRates(commands, redis_prefix)], 20)

    assert 200 <= count <= 210


async def test_four_nodes_together_let_through_what_one_would_and_a_second_for_each(
    commands: RedisCommands, redis_prefix: str
) -> None:
    nodes = [ApiRates(commands, redis_prefix) for _ in range(4)]

    count = await let_through(nodes, 20)

    assert 190 <= count <= 200 + 4 * 10


async def test_a_node_that_is_called_alone_has_the_whole_rate(
    commands: RedisCommands, redis_prefix: str
) -> None:
    called, *others = (ApiRates(commands, redis_prefix) for _ in range(4))
    for other in others:
        assert other.allow(APP, 0.0) == (True, 9)
        await other.share(0.0)

    count = await let_through([called], 10)

    assert count >= 100


async def test_what_nodes_let_through_too_much_they_owe(
    commands: RedisCommands, redis_prefix: str
) -> None:
    one, other = (ApiRates(commands, redis_prefix) for _ in range(2))
    for node in (one, other):
        while node.allow(APP, 0.0)[0]:
            pass
        await node.share(0.0)
    for node in (one, other):
        await node.share(0.0)

    # Twenty instead of ten: it takes a second before the next one gets through.
    assert one._calls["1"].rate.left == 0
    assert one.allow(APP, 1.09) == (False, 0)
    assert one.allow(APP, 1.11) == (True, 0)


async def test_a_node_that_stood_still_owes_nothing_for_what_others_did_meanwhile(
    commands: RedisCommands, redis_prefix: str
) -> None:
    stopped, other = (ApiRates(commands, redis_prefix) for _ in range(2))
    for node in (stopped, other):
        node.allow(APP, 0.0)
        await node.share(0.0)
    await let_through([other], 30)

    assert stopped.allow(APP, 30.0)[0]
    await stopped.share(30.0)

    assert stopped.allow(APP, 30.0)[0]


async def test_a_redis_that_lost_its_data_costs_no_call(
    commands: RedisCommands, redis_prefix: str, redis_url: str
) -> None:
    node = ApiRates(commands, redis_prefix)
    await let_through([node], 2)
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        await admin.delete(f"{redis_prefix}:1:calls")

    count = await let_through([node], 10, start=2.0)

    assert 100 <= count <= 101


async def test_without_redis_a_node_holds_the_limit_by_itself(redis_prefix: str) -> None:
    unreachable = RedisCommands(RedisAddress.of("redis://127.0.0.1:9"), 0.1)

    count = await let_through([ApiRates(unreachable, redis_prefix)], 10)

    assert 100 <= count <= 110


async def test_an_app_that_rests_is_forgotten_and_leaves_nothing_in_redis_for_long(
    commands: RedisCommands, redis_prefix: str, redis_url: str
) -> None:
    node = ApiRates(commands, redis_prefix)
    node.allow(APP, 0.0)
    await node.share(0.0)
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        assert 0 < await admin.pttl(f"{redis_prefix}:1:calls") <= 120_000

    await node.share(61.0)

    assert node._calls == {}
    assert not node._someone_calls.is_set()


async def test_nodes_share_by_themselves_while_someone_calls(
    commands: RedisCommands, redis_prefix: str
) -> None:
    one, other = (ApiRates(commands, redis_prefix) for _ in range(2))
    at = asyncio.get_running_loop().time()
    for node in (one, other):
        node.start()
        node.allow(APP, at)
    await until(lambda: all(node._calls["1"].total is not None for node in (one, other)))
    before = other._calls["1"].rate.left

    for _ in range(4):
        one.allow(APP, at)
    await until(lambda: other._calls["1"].rate.left <= before - 4)

    for node in (one, other):
        await node.stop()
