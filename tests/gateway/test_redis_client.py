"""The pooled client of the pass cache."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
import redis.asyncio

from gateway.broker import BrokerUnavailable
from gateway.redis_client import redis_client
from gateway.redis_passes import PassCache
from persistence.embedded_redis import RedisServer

if TYPE_CHECKING:
    from persistence.embedded_process import ServerGuard


async def test_a_connection_that_leads_to_a_replica_is_left(
    server_guard: ServerGuard, redis_url: str
) -> None:
    """The address may lead to the new primary by now; the connection never will."""
    server = RedisServer(server_guard, name="redis-demoted").start()
    async with aclosing(redis_client(server.url, 5.0)) as client:
        passes = PassCache(client, "passes", ttl_s=60)
        await passes.drop("a")
        async with redis.asyncio.Redis.from_url(server.url) as admin:
            before = {one["id"] for one in await admin.client_list()}
            await admin.replicaof("127.0.0.1", "1")
            with pytest.raises(BrokerUnavailable):
                await passes.drop("a")
            after = {one["id"] for one in await admin.client_list()}
            await admin.replicaof("NO", "ONE")

        await passes.drop("a")
    server.process.stop()
    # The admin's own stays.
    assert len(before & after) == 1
