"""What a lease says in the log; what it does is shown by the contracts of its tenants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from gateway.redis_broker import RedisBroker
from gateway.redis_lease import RedisLease
from gateway.redis_presence import RedisPresence
from tests.gateway.harness import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from persistence.embedded_redis import RedisServer


@pytest.fixture
async def lease(own_redis: RedisServer) -> AsyncIterator[RedisLease]:
    """One that renews itself when the test asks for it."""
    broker = RedisBroker(own_redis.url, "p", "n1", 1.0)
    await broker.start(lambda *_: None, lambda _: None, lambda: None)
    lease = RedisLease(broker.commands, "p", "n1", 300.0)
    tenant = RedisPresence(broker.commands, "p", lease, 3)
    await tenant.start()
    yield lease
    await tenant.stop()
    await broker.stop()


async def until_refused(lease: RedisLease, times: int) -> None:
    """Has it try once more, and waits for the outcome."""
    lease.look()
    await until(lambda: lease._outage._attempts >= times)


async def test_that_redis_refuses_is_told_once_when_it_begins_and_once_when_it_ends(
    own_redis: RedisServer, lease: RedisLease
) -> None:
    async with redis.asyncio.Redis.from_url(own_redis.url) as admin:
        with capture_logs() as logs:
            await admin.acl_setuser("default", enabled=True, commands=["-zadd"])
            for times in range(1, 21):
                await until_refused(lease, times)
            await admin.acl_setuser("default", enabled=True, commands=["+zadd"])
            lease.look()
            await until(lambda: lease._outage._attempts == 0)

    told = [line for line in logs if str(line["event"]).startswith("lease_")]
    assert [line["event"] for line in told] == ["lease_not_renewed", "lease_renewed_again"]
    assert told[0]["error"].startswith("Redis refused lease_renew:")
    assert told[1]["attempts"] >= 20


async def test_a_redis_that_is_full_still_renews_leases(
    own_redis: RedisServer, lease: RedisLease
) -> None:
    """Else who came when there was a little room would bury those who came when there was none."""
    async with redis.asyncio.Redis.from_url(own_redis.url) as admin:
        await admin.zincrby("p:nodes", -1_000, "n1")
        before_ms = await admin.zscore("p:nodes", "n1")
        await admin.config_set("maxmemory", 1)

        await lease.renew()

        after_ms = await admin.zscore("p:nodes", "n1")
    assert before_ms is not None
    assert after_ms is not None
    assert after_ms >= before_ms + 1_000
