"""A world of nodes on the test run's real MongoDB, in an empty database."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest

from persistence import faults
from tests.persistence.world import Steps, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pymongo import MongoClient
    from pymongo.database import Database


@pytest.fixture(scope="session")
def worlds_database(mongodb_client: MongoClient[dict[str, Any]]) -> Iterator[Database[Any]]:
    """One database for all of these tests: making the indexes of a new one takes a second."""
    database = mongodb_client[f"test_worlds_{secrets.token_hex(6)}"]
    yield database
    mongodb_client.drop_database(database)


@pytest.fixture
def empty_database(worlds_database: Database[Any]) -> Database[Any]:
    """The database without a document; its indexes stay."""
    for name in worlds_database.list_collection_names():
        worlds_database[name].delete_many({})
    return worlds_database


@pytest.fixture
async def world(mongodb_url: str, empty_database: Database[Any]) -> AsyncIterator[World]:
    """One node; a test adds others."""
    world = World(mongodb_url, empty_database)
    await world.add_node()
    yield world
    await world.close()


@pytest.fixture
def steps() -> Iterator[Steps]:
    """Hears of every step that the code reaches while the test runs."""
    steps = Steps()
    faults.install(steps)
    yield steps
    faults.install(None)
