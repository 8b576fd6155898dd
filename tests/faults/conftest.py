"""Gateways as for the end-to-end tests, and stores of a test's own that it may kill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from persistence.embedded_mongod import mongod_path, start_replica_set
from persistence.embedded_process import ServerGuard
from persistence.embedded_redis import RedisServer, redis_server_path
from tests.conftest import require
from tests.e2e.fixtures import (  # noqa: F401  pytest finds fixtures by name
    apps_file,
    books,
    gateway_with,
    shared_gateway,
    stores,
)
from tests.faults.judged_stage import stage  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Iterator
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
