"""The connection: its deadline, its transactions, and faults as one kind of error."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import pymongo
import pytest
from pymongo import MongoClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    AutoReconnect,
    DuplicateKeyError,
    ExecutionTimeout,
    OperationFailure,
    ServerSelectionTimeoutError,
)

from persistence.abandoned import AbandonedTransactions
from persistence.clock import Clock
from persistence.embedded_process import free_port
from persistence.errors import Conflict, StoreOverloaded, StoreUnavailable
from persistence.store import Store, StoreOptions, application_name
from statemachine.goal import CommandName
from tests.persistence.world import World, code_of


async def test_a_store_answers(world: World) -> None:
    await world.node.store.ping()


def test_where_nothing_listens_the_store_says_so_in_one_line() -> None:
    url = f"mongodb://127.0.0.1:{free_port()}"

    with pytest.raises(StoreUnavailable) as raised:
        asyncio.run(Store.open(url, "duet", Clock(), StoreOptions(deadline_s=0.1)))

    text = str(raised.value)
    assert text.startswith("MongoDB can't be used: ")
    assert "\n" not in text


async def test_an_address_that_is_none_is_unavailable_too() -> None:
    with pytest.raises(StoreUnavailable, match="MongoDB can't be used"):
        await Store.open("mongodb://", "duet", Clock(), StoreOptions(deadline_s=0.1))


async def test_a_store_that_was_closed_is_unavailable(world: World) -> None:
    node = await world.add_node()
    await node.store.close()

    with pytest.raises(StoreUnavailable):
        await node.store.ping()


@pytest.mark.parametrize(
    "fault",
    [
        AutoReconnect("connection closed"),
        ServerSelectionTimeoutError("nobody there, Timeout: 30s, Topology: …\nmore"),
        ExecutionTimeout("too slow", 50, {}),
        OperationFailure("not primary", 10107, {}),
    ],
)
async def test_the_drivers_errors_become_one(world: World, fault: Exception) -> None:
    with pytest.raises(StoreUnavailable) as raised:
        async with world.node.store.reading():
            raise fault

    assert raised.value.__cause__ is fault
    assert "Topology" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "outcome", [DuplicateKeyError("taken", 11000, {}), Conflict(), StoreOverloaded("full")]
)
async def test_outcomes_that_the_code_asks_for_pass_as_they_are(
    world: World, outcome: Exception
) -> None:
    with pytest.raises(type(outcome)) as raised:
        async with world.node.store.reading():
            raise outcome

    assert raised.value is outcome


async def test_what_does_not_answer_in_time_is_unavailable(world: World) -> None:
    hasty = await world.add_node(deadline_s=0.3)

    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            async with hasty.store.reading():
                await asyncio.Event().wait()


async def test_a_slow_query_is_ended_at_the_deadline(world: World) -> None:
    hasty = await world.add_node(deadline_s=0.4)
    await world.session()

    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            async with hasty.store.reading():
                await hasty.store.sessions.find_one(
                    {"$where": "const end = Date.now() + 3000; while (Date.now() < end) {}"}
                )

    await world.node.store.ping()


# Transactions


async def test_a_transaction_is_written_as_a_whole_or_not_at_all(world: World) -> None:
    store = world.node.store

    async def body(fails: bool) -> str:
        await store.requests.insert_one({"_id": "one"})
        await store.goal_records.insert_one({"_id": "two"})
        if fails:
            raise Conflict
        return "written"

    with pytest.raises(Conflict):
        await store.transact(lambda: body(fails=True))
    assert world.documents()["requests"] == world.documents()["goal_records"] == []

    assert await store.transact(lambda: body(fails=False)) == "written"
    assert len(world.documents()["requests"]) == len(world.documents()["goal_records"]) == 1


async def test_nobody_sees_a_transaction_before_its_commit(world: World) -> None:
    store = world.node.store
    seen: list[Any] = []

    async def body() -> None:
        await store.requests.insert_one({"_id": "one"})
        seen.append(world.documents()["requests"])
        seen.append(await store.requests.find_one({"_id": "one"}))

    await store.transact(body)

    assert seen == [[], {"_id": "one"}]


async def test_a_write_outside_joins_no_transaction_and_waits_for_the_majority(
    world: World,
) -> None:
    store = world.node.store
    inside: list[Any] = []

    async def body() -> None:
        inside.append(store.goals.write_concern.document)

    await store.transact(body)

    assert inside == [{}]
    assert store.goals.write_concern.document == {"w": "majority"}


async def test_tasks_beside_a_transaction_do_not_join_it(world: World) -> None:
    store = world.node.store
    started, written = asyncio.Event(), asyncio.Event()

    async def body() -> None:
        started.set()
        await written.wait()
        raise Conflict

    async def beside() -> None:
        await started.wait()
        await store.requests.insert_one({"_id": "beside"})
        written.set()

    await asyncio.gather(store.transact(body), beside(), return_exceptions=True)

    assert world.documents()["requests"] == [{"_id": "beside"}]


async def test_each_process_has_an_owner_of_its_own_under_its_nodes_name(world: World) -> None:
    again = await world.add_node(node_name="node0")

    assert world.node.store.owner.startswith("node0/")
    assert again.store.owner.startswith("node0/")
    assert again.store.owner != world.node.store.owner


async def assert_free(world: World) -> None:
    """The document is as it was, and nothing keeps others from writing it.

    A write from elsewhere would wait for an open transaction, and run into its own limit.
    """
    changed = await asyncio.to_thread(
        world.raw.command,
        "update",
        "goal_records",
        updates=[{"q": {"_id": "one"}, "u": {"$inc": {"count": 10}}}],
        maxTimeMS=2000,
    )
    assert changed["n"] == 1
    assert world.documents()["goal_records"] == [{"_id": "one", "count": 10}]


async def test_a_transaction_that_runs_out_of_time_leaves_no_document_locked(
    world: World,
) -> None:
    hasty = (await world.add_node(deadline_s=0.5)).store
    world.raw["goal_records"].insert_one({"_id": "one", "count": 0})
    never = asyncio.Event()

    async def body() -> None:
        await hasty.goal_records.update_one({"_id": "one"}, {"$inc": {"count": 1}})
        await never.wait()

    with pytest.raises(StoreUnavailable):
        async with hasty.reading():
            await hasty.transact(body)

    await assert_free(world)


async def conflict_out_of_time(store: Store) -> None:
    """A transaction that has written when it finds its conflict, and its time is over."""

    async def body() -> None:
        await store.goal_records.update_one({"_id": "one"}, {"$inc": {"count": 1}})
        await asyncio.sleep(0.4)
        raise Conflict

    with pytest.raises(Conflict), pymongo.timeout(0.3):
        await store.transact(body)


async def test_a_conflict_that_comes_when_the_time_is_over_leaves_no_document_locked(
    world: World,
) -> None:
    """The driver sends no abort any more."""
    store = world.node.store
    world.raw["goal_records"].insert_one({"_id": "one", "count": 0})

    await conflict_out_of_time(store)

    await assert_free(world)


async def test_what_ran_out_of_time_is_ended_when_mongodb_can_be_reached_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection broke amid it, and to find the server again takes longer than anyone waits."""
    store = world.node.store
    world.raw["goal_records"].insert_one({"_id": "one", "count": 0})
    ask, reachable_at_s = AsyncDatabase.command, time.monotonic() + 1.0

    async def command(database: Any, what: Any, *arguments: Any, **named: Any) -> Any:
        if what == "killSessions" and time.monotonic() < reachable_at_s:
            raise AutoReconnect("connection closed")
        return await ask(database, what, *arguments, **named)

    monkeypatch.setattr(AsyncDatabase, "command", command)

    await conflict_out_of_time(store)

    await assert_free(world)


async def test_to_end_a_transaction_late_ends_no_other_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver lends the id of a session that has ended to the next one."""
    store = world.node.store
    world.raw["goal_records"].insert_one({"_id": "one", "count": 0})
    ask, may_kill, killed = AsyncDatabase.command, asyncio.Event(), asyncio.Event()

    async def command(database: Any, what: Any, *arguments: Any, **named: Any) -> Any:
        if what == "killSessions":
            await may_kill.wait()
        answer = await ask(database, what, *arguments, **named)
        if what == "killSessions":
            killed.set()
        return answer

    monkeypatch.setattr(AsyncDatabase, "command", command)
    await conflict_out_of_time(store)
    attempts = 0

    async def body() -> None:
        nonlocal attempts
        attempts += 1
        await store.requests.insert_one({"_id": "of another"})
        may_kill.set()
        await killed.wait()

    await store.transact(body)

    assert attempts == 1
    assert world.documents()["requests"] == [{"_id": "of another"}]


async def test_survivors_end_what_a_killed_process_left_open(world: World) -> None:
    killed = (await world.add_node()).store
    survivor = (await world.add_node(deadline_s=0.5)).store
    world.raw["goal_records"].insert_one({"_id": "one", "count": 0})
    async with killed.admin.client.start_session() as session:
        await session.start_transaction()
        in_transaction = killed.admin.client[world.raw.name]["goal_records"]
        await in_transaction.update_one({"_id": "one"}, {"$inc": {"count": 1}}, session=session)
        # As after a kill: nobody says another word about this transaction.
        while not await AbandonedTransactions(survivor).free_left():
            pass

        await assert_free(world)


async def test_what_a_process_left_open_that_is_gone_is_ended_within_a_moment(
    world: World,
) -> None:
    """Its connections are closed by its system; the one that lives on keeps its transaction."""
    survivor = (await world.add_node(deadline_s=30.0)).store
    alive = (await world.add_node()).store
    name = application_name(world.raw.name, "node9/dead")
    gone = MongoClient[dict[str, Any]](world.url, appname=name)
    world.raw["goal_records"].insert_many([{"_id": "gone"}, {"_id": "alive"}])
    left = gone.start_session()
    left.start_transaction()
    gone[world.raw.name]["goal_records"].update_one(
        {"_id": "gone"}, {"$set": {"by": "gone"}}, session=left
    )

    async with alive.admin.client.start_session() as session:
        await session.start_transaction()
        in_transaction = alive.admin.client[world.raw.name]["goal_records"]
        await in_transaction.update_one(
            {"_id": "alive"}, {"$set": {"by": "alive"}}, session=session
        )
        abandoned = AbandonedTransactions(survivor)
        looked_at_s = time.monotonic()
        while time.monotonic() < looked_at_s + 0.4:
            # Both rest, and both are connected.
            assert await abandoned.free_left() == 0

        gone.close()
        async with asyncio.timeout(10):
            while await abandoned.free_left() == 0:
                pass
        await session.commit_transaction()

    assert world.documents()["goal_records"] == [{"_id": "alive", "by": "alive"}, {"_id": "gone"}]


async def test_reads_go_to_the_primary_whatever_the_address_prefers(
    mongodb_url: str, mongodb_database_name: str, mongodb_client: MongoClient[dict[str, Any]]
) -> None:
    """There is no secondary here; where there are, each refusal and delivery would fail there."""
    preferred = "readPreference=secondary&readConcernLevel=majority"
    url = f"{mongodb_url}{'&' if '?' in mongodb_url else '/?'}{preferred}"
    world = World(url, mongodb_client[mongodb_database_name])
    node = await world.add_node()

    agreed = await world.ask(CommandName.AGREE, await world.invited(await world.session()))
    freed = await AbandonedTransactions(node.store).free_left()
    await world.close()

    assert code_of(agreed) == "ok"
    assert freed == 0


# A flood


async def test_a_flood_is_refused_in_time_and_harms_nobody_else(world: World) -> None:
    """One hot Session and more commands than fit: each answered in time, none half done."""
    deadline_s = 2.0
    node = await world.add_node(deadline_s=deadline_s, concurrency=4, queue_size=20)
    hot = await world.invited(await world.session("hot"))
    calm = [await world.invited(await world.session(f"calm{number}")) for number in range(5)]
    took_s: list[float] = []

    async def ask(goal_id: str, by: str) -> str:
        asked_at_s = time.monotonic()
        try:
            answer = await world.ask(
                CommandName.AGREE, goal_id, by=by, node=node, request_id=secrets.token_hex(8)
            )
        except StoreOverloaded:
            took_s.append(time.monotonic() - asked_at_s)
            return "overloaded"
        took_s.append(time.monotonic() - asked_at_s)
        return code_of(answer)

    async def insist(goal_id: str, by: str) -> str:
        while (answer := await ask(goal_id, by)) == "overloaded":
            await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        return answer

    flood = [asyncio.ensure_future(ask(hot, "hot")) for _ in range(300)]
    await asyncio.sleep(0)
    calm_answers = await asyncio.gather(
        *(insist(goal_id, f"calm{number}") for number, goal_id in enumerate(calm))
    )
    answers = await asyncio.gather(*flood)

    assert set(answers) == {"ok", "goal_already_agreed", "overloaded"}
    assert answers.count("ok") == 1
    assert answers.count("overloaded") >= 300 - 100
    assert max(took_s) < deadline_s
    assert calm_answers == ["ok"] * 5
    assert world.goal_row(hot)["version"] == 2
