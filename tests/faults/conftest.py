"""Gateways as for the end-to-end tests, and stores of a test's own that it may kill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient

from persistence.embedded_mongod import mongod_path, start_replica_set
from persistence.embedded_process import ServerGuard
from persistence.embedded_redis import RedisServer, redis_server_path
from tests.conftest import require
from tests.e2e.fixtures import (  # noqa: F401  pytest finds fixtures by name
    apps_file,
    books,
    gateway_with,
    shared_gateway,
    stage_with,
    stores,
)
from tests.faults.failpoints import DEADLINE_S
from tests.faults.judged_stage import stage  # noqa: F401
from tests.faults.judged_world import JudgedWorld

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from persistence.embedded_mongod import ReplicaSet


@pytest.fixture
def victim_guard() -> Iterator[ServerGuard]:
    with ServerGuard() as guard:
        yield guard


@pytest.fixture
def victim_mongodb(victim_guard: ServerGuard) -> ReplicaSet:
    """A MongoDB of this test alone, to be paused and killed."""
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    return start_replica_set(victim_guard)


@pytest.fixture
def victim_redis(victim_guard: ServerGuard, tmp_path: Path) -> RedisServer:
    """A Redis of this test alone, to be paused and killed."""
    require(redis_server_path(), "there is no redis-server, neither on PATH nor in a wheel")
    return RedisServer(victim_guard).start()


@pytest.fixture(scope="session")
def failing_mongodb(server_guard: ServerGuard) -> Iterator[MongoClient[dict[str, Any]]]:
    """A MongoDB that can be told to fail."""
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    servers = start_replica_set(
        server_guard, name="failing", extra_args=["--setParameter=enableTestCommands=1"]
    )
    with MongoClient[dict[str, Any]](servers.url, tz_aware=True) as client:
        yield client


@pytest.fixture
async def world(failing_mongodb: MongoClient[dict[str, Any]]) -> AsyncIterator[JudgedWorld]:
    """One node on a MongoDB that can be told to fail, left with the checker's consent."""
    address = failing_mongodb.address
    assert address is not None
    world = JudgedWorld(
        f"mongodb://{address[0]}:{address[1]}/?replicaSet=rs0", failing_mongodb["failing"]
    )
    for name in world.raw.list_collection_names():
        world.raw[name].delete_many({})
    await world.add_node(deadline_s=DEADLINE_S)
    yield world
    assert await world.verdict() == []
    await world.close()
