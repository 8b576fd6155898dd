"""Gateways as real processes and the parties in front of them, for e2e and fault tests."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.e2e.books import Books
from tests.e2e.gateway_process import APPS_TOML, DUET_SERVE, Gateway, Stores
from tests.e2e.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from pymongo import MongoClient

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Call, GatewayBuilder
    from tests.e2e.stage import StageBuilder


@pytest.fixture(scope="session")
def apps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gateway") / "apps.toml"
    path.write_text(APPS_TOML)
    return path


@pytest.fixture(scope="session")
def shared_gateway(
    server_guard: ServerGuard,
    apps_file: Path,
    mongodb_url: str,
    redis_url: str,
    mongodb_client: MongoClient[dict[str, Any]],
) -> Iterator[Gateway]:
    """One gateway with the default settings for all tests that need nothing else."""
    name = f"e2e_{secrets.token_hex(6)}"
    stores = Stores(mongodb_url, name, redis_url, name)
    gateway = Gateway(server_guard, stores, apps_file)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()
        mongodb_client.drop_database(name)
    assert not gateway.complaints()


@pytest.fixture
def stores(
    mongodb_url: str, mongodb_database_name: str, redis_url: str, redis_prefix: str
) -> Stores:
    """A database and a Redis prefix of this test alone."""
    return Stores(mongodb_url, mongodb_database_name, redis_url, redis_prefix)


@pytest_asyncio.fixture
async def gateway_with(
    server_guard: ServerGuard, apps_file: Path, stores: Stores
) -> AsyncIterator[GatewayBuilder]:
    """Starts gateways on this test's stores; a second one is a second node."""
    started: list[Gateway] = []
    calls: list[Call] = []

    async def build(*, argv: tuple[str, ...] = DUET_SERVE, **settings: str) -> Gateway:
        gateway = Gateway(server_guard, stores, apps_file, settings, argv, calls=calls)
        started.append(gateway)
        await asyncio.to_thread(gateway.start)
        return gateway

    yield build
    for gateway in started:
        await asyncio.to_thread(gateway.kill)
    assert not [gateway.complaints() for gateway in started if gateway.complaints()]


@pytest_asyncio.fixture
async def books(stores: Stores) -> AsyncIterator[Books]:
    """The database of this test."""
    async with Books(stores) as books:
        yield books


@pytest_asyncio.fixture
async def stage(shared_gateway: Gateway) -> AsyncIterator[Stage]:
    """Parties in front of the gateway with the default settings."""
    async with Books(shared_gateway.stores) as books, Stage(shared_gateway, books) as stage:
        yield stage


@pytest_asyncio.fixture
async def stage_with(gateway_with: GatewayBuilder) -> AsyncIterator[StageBuilder]:
    """Parties in front of a gateway of their own, with other settings."""
    async with AsyncExitStack() as stack:

        async def build(**settings: str) -> Stage:
            gateway = await gateway_with(argv=DUET_SERVE, **settings)
            books = await stack.enter_async_context(Books(gateway.stores))
            return await stack.enter_async_context(Stage(gateway, books))

        yield build
