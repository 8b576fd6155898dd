"""A MongoDB that lets nobody in without a user: what he needs, and what is said if he lacks it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient

from gateway.preflight import check_servers
from gateway.settings import Settings
from persistence.abandoned import AbandonedTransactions
from persistence.clock import Clock
from persistence.embedded_mongod import Mongod, ReplicaSet, mongod_path, start_replica_set
from persistence.embedded_process import ServerGuard
from persistence.errors import StoreUnavailable
from persistence.store import Store, application_name
from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASE = "guarded"
PASSWORD = "hush"
ROLES = {
    "writer": [{"role": "readWrite", "db": DATABASE}],
    "reader": [{"role": "read", "db": DATABASE}],
    "stranger": [{"role": "readWrite", "db": "another"}],
    "root": ["root"],
}


class LockedMongod(Mongod):
    """One that its own client enters as root."""

    @contextmanager
    def client(self) -> Iterator[MongoClient[dict[str, Any]]]:
        with MongoClient[dict[str, Any]](
            self.url, username="root", password=PASSWORD, serverSelectionTimeoutMS=5_000
        ) as client:
            yield client


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it listens."""
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    data = tmp_path_factory.mktemp("locked")
    key = data / "key"
    key.write_text("members of one set know it")
    key.chmod(0o400)
    with ServerGuard() as guard:
        [open_one] = start_replica_set(guard, name="mongod", data_directory=data).members
        with open_one.client() as client:
            for name, roles in ROLES.items():
                client.admin.command("createUser", name, pwd=PASSWORD, roles=roles)
        open_one.process.stop()
        port = int(open_one.host.rpartition(":")[2])
        locked = LockedMongod(
            guard, data_directory=data, port=port, extra_args=[f"--keyFile={key}"]
        )
        ReplicaSet([locked]).start()
        yield locked.host
        # Nobody keeps its data.
        locked.process.kill()


def url_of(host: str, user: str | None) -> str:
    return f"mongodb://{f'{user}:{PASSWORD}@' if user else ''}{host}/?replicaSet=rs0"


WANTS_A_USER = "MongoDB lets nobody in without a user: mongodb://user:password@…"
LACKS = "its user may not {} in the database guarded; grant it the role readWrite there"


@pytest.mark.parametrize(
    ("user", "fault"),
    [
        (None, WANTS_A_USER),
        ("reader", LACKS.format("createIndex, insert, update")),
        ("stranger", LACKS.format("createIndex, find, insert, listIndexes, update")),
        ("nobody", "MongoDB can't be reached: Authentication failed."),
    ],
)
async def test_who_lacks_a_right_is_told_before_the_start(
    host: str, user: str | None, fault: str
) -> None:
    settings = Settings(mongodb_url=url_of(host, user), mongodb_database=DATABASE)

    finding, _ = await check_servers(settings)

    assert finding.fatal
    assert finding.text == fault


async def test_what_is_refused_is_told_without_what_was_sent(host: str) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        await Store.open(url_of(host, "reader"), DATABASE, Clock())

    why = "the indexes of goals can't be made: not authorized on guarded to run createIndexes"
    assert str(caught.value) == why


async def test_read_write_is_enough_also_to_end_what_a_killed_process_left_open(
    host: str,
) -> None:
    url = url_of(host, "writer")
    finding, _ = await check_servers(Settings(mongodb_url=url, mongodb_database=DATABASE))
    survivor = await Store.open(url, DATABASE, Clock())
    abandoned = AbandonedTransactions(survivor)
    gone = MongoClient[dict[str, Any]](url, appname=application_name(DATABASE, "node9/dead"))
    left = gone.start_session()
    left.start_transaction()
    gone[DATABASE]["goal_records"].insert_one({"_id": "one"}, session=left)
    gone.close()

    async with asyncio.timeout(10):
        while await abandoned.free_left() == 0:
            pass
    async with survivor.reading():
        await survivor.goal_records.insert_one({"_id": "one"})
    await survivor.close()

    assert not finding.fatal


async def test_who_is_dropped_and_created_again_is_let_in_without_a_restart(host: str) -> None:
    """As a password is changed by some; connections stayed nobody's for ever."""
    roles = ROLES["writer"]
    with MongoClient[dict[str, Any]](
        f"mongodb://root:{PASSWORD}@{host}/?directConnection=true"
    ) as root:
        root.admin.command("createUser", "rotated", pwd=PASSWORD, roles=roles)
        store = await Store.open(url_of(host, "rotated"), DATABASE, Clock())

        async def ask() -> bool:
            try:
                async with store.reading():
                    await store.goals.find_one({})
            except StoreUnavailable:
                return False
            return True

        assert await ask()
        root.admin.command("dropUser", "rotated")
        assert not await ask()
        root.admin.command("createUser", "rotated", pwd=PASSWORD, roles=roles)
        async with asyncio.timeout(10):
            while not await ask():
                pass
    await store.close()
