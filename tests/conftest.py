"""Real servers for every test, started once, and names of its own for each."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import uvloop
from pymongo import MongoClient

from persistence.embedded_mongod import mongod_path, start_replica_set
from persistence.embedded_process import ServerGuard
from persistence.embedded_redis import RedisServer, redis_server_path

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

# A disk of memory, and what must be free there: a MongoDB takes 200 MB, and twelve run at once.
_MEMORY = Path("/dev/shm")
_ENOUGH_BYTES = 4 << 30
_NO_REDIS = "there is no redis-server, neither on PATH nor in a wheel"

# Shared machines pause a process at any moment: a slow example is no failure.
hypothesis.settings.register_profile("duet", deadline=None, print_blob=True)
hypothesis.settings.load_profile("duet")


def pytest_configure() -> None:
    """Lets the servers of tests keep their data in memory, if there is room.

    Each commit waits for its disk, and a killed server finds there what it wrote all the same.
    What pytest keeps for a look at what failed stays where it was.
    """
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ENOUGH_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        os.environ["TMPDIR"] = tempfile.tempdir = str(_MEMORY)


def pytest_collection_finish() -> None:
    """What lives as long as the run is not looked at by each collection of what does not."""
    gc.collect()
    gc.freeze()


def require(part_present: object, reason: str) -> None:
    """Skips the test that lacks a real part; on CI, where all parts must be there, fails it."""
    if part_present:
        return
    if os.environ.get("DUET_REQUIRE_REAL_PARTS") == "1":
        pytest.fail(f"a real part is missing: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def closed_when_cancelled() -> Iterator[None]:
    """Closes the socket of a connect that is cancelled.

    PyMongo leaves it to the collector, whose complaint hits whatever test runs at that moment.
    """
    with pytest.MonkeyPatch.context() as patch:
        for loop_class in (asyncio.SelectorEventLoop, uvloop.Loop):
            closing = _closing_when_cancelled(loop_class.sock_connect)
            patch.setattr(loop_class, "sock_connect", closing)
        yield


def _closing_when_cancelled(connect: Any) -> Any:
    async def sock_connect(
        loop: asyncio.AbstractEventLoop, sock: socket.socket, address: Any
    ) -> None:
        try:
            await connect(loop, sock, address)
        except asyncio.CancelledError:
            sock.close()
            raise

    return sock_connect


@pytest.fixture(scope="session")
def server_guard() -> Iterator[ServerGuard]:
    """What servers of this test run are started under: they end with it."""
    with ServerGuard() as guard:
        yield guard


@pytest.fixture(scope="session")
def mongodb_url(server_guard: ServerGuard) -> str:
    """A replica set of one: DUET_TEST_MONGODB_URL, else an embedded one."""
    if url := os.environ.get("DUET_TEST_MONGODB_URL"):
        return url
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    return start_replica_set(server_guard).url


@pytest.fixture(scope="session")
def redis_url(server_guard: ServerGuard) -> str:
    """A Redis of this test run alone, never one that the machine runs."""
    require(redis_server_path(), _NO_REDIS)
    return RedisServer(server_guard).start().url


@pytest.fixture
def own_redis(server_guard: ServerGuard) -> Iterator[RedisServer]:
    """A Redis of this test alone, which may stop, kill, freeze and fill it."""
    require(redis_server_path(), _NO_REDIS)
    server = RedisServer(server_guard, name=f"redis-{secrets.token_hex(3)}").start()
    yield server
    server.process.stop()


@pytest.fixture(scope="session")
def mongodb_client(mongodb_url: str) -> Iterator[MongoClient[dict[str, Any]]]:
    """A blocking client, for what tests arrange and look at behind the code's back."""
    with MongoClient[dict[str, Any]](mongodb_url, tz_aware=True) as client:
        yield client


@pytest.fixture
def mongodb_database_name(mongodb_client: MongoClient[dict[str, Any]]) -> Iterator[str]:
    """A database of this test alone, dropped after it."""
    name = f"test_{secrets.token_hex(6)}"
    yield name
    mongodb_client.drop_database(name)


@pytest.fixture
def redis_prefix() -> str:
    """What the Redis names of this test begin with."""
    return f"test-{secrets.token_hex(6)}"
