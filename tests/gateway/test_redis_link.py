"""Links to a Redis that won't have them, and what the log says of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from gateway.broker import BrokerUnavailable, Publication
from gateway.redis_broker import RedisBroker
from gateway.redis_link import RedisAddress, Supervisor
from persistence.embedded_redis import RedisServer
from tests.gateway.harness import until, until_yes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from gateway.redis_link import RedisLink
    from persistence.embedded_process import ServerGuard

# Attempts, and the least that the pauses between them are long by then.
ATTEMPTS = 6
PAUSED_S = 0.7


@pytest.fixture
def redis_that_cant_save(server_guard: ServerGuard, tmp_path: Path) -> RedisServer:
    """A Redis in whose place for its data something else is."""
    server = RedisServer(
        server_guard,
        name="unsaved",
        data_directory=tmp_path,
        config={"save": "3600 1", "appendonly": "no"},
    )
    server.start()
    (tmp_path / "unsaved" / "dump.rdb" / "in-the-way").mkdir(parents=True)
    return server


@contextlib.asynccontextmanager
async def supervised(supervisor: Supervisor) -> AsyncIterator[None]:
    """Keeps its link until the end."""
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(supervisor.run())
        yield
        running.cancel()


async def test_a_redis_that_cant_save_takes_links_and_carries_publications(
    redis_that_cant_save: RedisServer,
) -> None:
    """It refuses the PING by which a link is tried as it refuses writes."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    async with redis.asyncio.Redis.from_url(redis_that_cant_save.url) as admin:

        async def refuses_writes() -> bool:
            try:
                await admin.set("k", "v")
            except redis.asyncio.RedisError as error:
                return str(error).startswith("MISCONF")
            return False

        await admin.bgsave()
        await until_yes(refuses_writes)
    broker = RedisBroker(redis_that_cant_save.url, "p", "n", 1.0)

    await broker.start(
        lambda _app, _channel, body, _except: heard.put_nowait(body),
        lambda _: None,
        lambda: None,
    )

    try:
        await broker.subscribe("1", "c")
        await broker.publish([Publication("1", "c", b"x")])
        assert await asyncio.wait_for(heard.get(), 10) == b"x"
        with pytest.raises(BrokerUnavailable, match="MISCONF"):
            await broker.publish([Publication("1", "cache-c", b"kept")])
    finally:
        await broker.stop()
        redis_that_cant_save.process.kill()


async def test_a_link_that_is_ended_whenever_it_stands_is_made_again_ever_more_slowly(
    redis_url: str,
) -> None:
    """As Redis does it with a user who may not subscribe, twenty times a second."""
    made_at_s: list[float] = []

    def end(link: RedisLink) -> None:
        made_at_s.append(asyncio.get_running_loop().time())
        link.abort()

    supervisor = Supervisor(
        RedisAddress.of(redis_url), "test", 1.0, lambda _: None, end, lambda: None
    )

    async with supervised(supervisor):
        await until(lambda: len(made_at_s) >= ATTEMPTS)

    assert made_at_s[ATTEMPTS - 1] - made_at_s[0] >= PAUSED_S


async def test_a_redis_that_is_not_there_is_told_of_once_and_so_is_its_return(
    own_redis: RedisServer,
) -> None:
    own_redis.process.stop()
    supervisor = Supervisor(
        RedisAddress.of(own_redis.url), "test", 1.0, lambda _: None, lambda _: None, lambda: None
    )

    with capture_logs() as logs:
        async with supervised(supervisor):
            await until(lambda: supervisor._outage._attempts >= 3)
            own_redis.start()
            await until(lambda: supervisor.link is not None)

    told = [line for line in logs if str(line["event"]).startswith("redis_")]
    assert [line["event"] for line in told] == [
        "redis_unreachable",
        "redis_reachable_again",
        "redis_connected",
    ]
    assert {line["purpose"] for line in told} == {"test"}
    assert told[1]["attempts"] >= 3
