"""A gateway in this event loop, on real servers, and people who call it.

One gateway serves all tests of a module, which must run in the module's loop
(`pytestmark = pytest.mark.asyncio(loop_scope="module")`) and use users of their own.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx
import jwt
import pytest
import pytest_asyncio

from gateway.apps import App, Apps
from gateway.server import RunningGateway, running_gateway
from gateway.settings import Settings
from tests.persistence.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pymongo import MongoClient

JWT_SECRET = "the-tests-secret-is-longer-than-32-bytes"


@pytest.fixture(scope="session")
def apps() -> Apps:
    """The first carries invitations; the second is disabled, the third is changing its secret."""
    return Apps(
        [
            App(id="1", key="app-key", secret="app-s3cret"),
            App(id="2", key="off-key", secret="off-s3cret", enabled=False),
            App(id="3", key="new-key", secret="new-s3cret", previous_secret="old-s3cret"),
        ]
    )


@pytest.fixture(scope="module")
def settings(
    mongodb_url: str, mongodb_client: MongoClient[dict[str, Any]], redis_url: str
) -> Iterator[Settings]:
    name = f"test_{secrets.token_hex(6)}"
    yield Settings(
        port=0,
        mongodb_url=mongodb_url,
        mongodb_database=name,
        redis_url=redis_url,
        redis_prefix=name,
        jwt_secret=JWT_SECRET,
        drain_s=0.05,
    )
    mongodb_client.drop_database(name)


@pytest.fixture
async def world(
    mongodb_url: str, mongodb_client: MongoClient[dict[str, Any]], mongodb_database_name: str
) -> AsyncIterator[World]:
    """A node's persistence without a gateway, on a database of its own."""
    world = World(mongodb_url, mongodb_client[mongodb_database_name])
    await world.add_node()
    yield world
    await world.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(settings: Settings, apps: Apps) -> AsyncIterator[RunningGateway]:
    async with running_gateway(settings, apps) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(gateway: RunningGateway) -> AsyncIterator[httpx.AsyncClient]:
    """Nobody in particular."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=10, verify=False) as client:
        yield client


@pytest.fixture(scope="module")
def bearer(gateway: RunningGateway) -> Callable[..., dict[str, str]]:
    """bearer(user, role, **claims) are the headers of that user's calls."""

    def make(user: str, role: str, **claims: Any) -> dict[str, str]:
        expires = gateway.parts.clock.now() + timedelta(minutes=5)
        body = {"sub": user, "role": role, "exp": expires, **claims}
        return {"Authorization": f"Bearer {jwt.encode(body, JWT_SECRET, algorithm='HS256')}"}

    return make


@pytest.fixture
def user() -> Callable[[str], str]:
    """user("ada") is an id that no other test uses."""
    suffix = secrets.token_hex(4)
    return lambda name: f"{name}-{suffix}"
