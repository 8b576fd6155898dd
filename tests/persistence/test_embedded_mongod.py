"""mongod: found, started, alone and in company."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient, WriteConcern

from persistence.embedded import start_embedded
from persistence.embedded_mongod import Mongod, mongod_path, start_replica_set
from persistence.embedded_process import EmbeddedError, PortLostError, ServerGuard, free_port
from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def guard() -> Iterator[ServerGuard]:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    with ServerGuard() as guard:
        yield guard


def test_the_mongod_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mongod"
    program.touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert mongod_path() == program


def test_without_any_mongod_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "fiftyone", None)

    assert mongod_path() is None
    with pytest.raises(EmbeddedError) as raised:
        start_embedded(redis_url="redis://127.0.0.1:1")
    assert str(raised.value) == (
        "there is no mongod: install MongoDB so that mongod is on PATH, or set DUET_MONGODB_URL"
    )


def test_a_port_that_is_lost_to_another_mongod_is_given_up(
    guard: ServerGuard, mongodb_client: MongoClient[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = mongodb_client.address
    assert address is not None
    ports = iter([address[1], free_port()])
    monkeypatch.setattr("persistence.embedded_mongod.free_port", lambda: next(ports))
    mongod = Mongod(guard)

    mongod.start()

    assert mongod.host != f"{address[0]}:{address[1]}"
    with mongod.client() as client:
        assert client.admin.command("serverStatus")["pid"] == mongod.process.pid


def test_a_port_that_was_asked_for_and_is_taken_is_an_error(
    guard: ServerGuard, mongodb_client: MongoClient[dict[str, Any]]
) -> None:
    address = mongodb_client.address
    assert address is not None

    with pytest.raises(PortLostError, match="its port is taken"):
        Mongod(guard, port=address[1]).start()


def test_three_members_elect_another_primary_and_take_the_old_one_back(guard: ServerGuard) -> None:
    replica_set = start_replica_set(guard, 3)
    first = replica_set.primary()
    assert first is not None
    with MongoClient[dict[str, Any]](replica_set.url, w="majority") as client:
        notes = client["notes"]["note"]
        notes.insert_one({"_id": 1})

        first.process.kill()
        notes.insert_one({"_id": 2})  # waits for the election
        second = replica_set.primary()
        assert second is not None
        assert second is not first
        first.start()
        of_all = WriteConcern(w=3)  # the old primary has caught up
        notes.with_options(write_concern=of_all).insert_one({"_id": 3})

    with first.client() as client:
        ids = sorted(document["_id"] for document in client["notes"]["note"].find())
    assert ids == [1, 2, 3]
