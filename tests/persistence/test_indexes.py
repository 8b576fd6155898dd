"""Every query has its index: MongoDB's own profiler watches a whole evening of commands.

And each index is made where it is missing, or it is said why not.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pymongo
import pytest
from bson import ObjectId
from pymongo import ASCENDING

from persistence.documents import DOCUMENTS
from persistence.errors import StoreUnavailable
from persistence.indexes import make_indexes, missing_indexes
from persistence.store import Store
from statemachine.goal import CommandName, Role
from tests.persistence.world import Row, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pymongo import MongoClient
    from pymongo.database import Database

PENDING = 2000


@pytest.fixture
async def profiled(
    mongodb_url: str, mongodb_client: MongoClient[Row], mongodb_database_name: str
) -> AsyncIterator[World]:
    """A world in a database of its own, whose every operation is written down."""
    world = World(mongodb_url, mongodb_client[mongodb_database_name])
    await world.add_node()
    world.raw.command("profile", 2)
    yield world
    world.raw.command("profile", 0)
    await world.close()


def operations(raw: Database[Any]) -> list[Row]:
    """What was read or changed, with the plan that was used for it."""
    return [
        row
        for row in raw["system.profile"].find({"planSummary": {"$exists": True}})
        if not row["ns"].endswith(".system.profile")
    ]


def without_index(raw: Database[Any]) -> list[tuple[str, Row]]:
    return [
        (row["ns"].partition(".")[2], row["command"])
        for row in operations(raw)
        if "COLLSCAN" in row["planSummary"]
    ]


async def an_evening(world: World) -> None:
    """Every command, timer, delivery and reading that there is."""
    node, session = world.node, await world.session()
    await world.session()
    await world.invite(session, "ben", request_id="r1")
    await world.invite(session, "ben", request_id="r1")
    for viewer in ("cleo", "dora"):
        await world.invited(session, viewer)
    [mine] = await node.goals.open_goals("ben")
    await world.ask(CommandName.AGREE, str(mine.id), request_id="r2")
    await node.goals.open_goals("anna")
    assert await node.goals.show_goal_id(str(session.id)) == str(mine.id)
    await world.ask(CommandName.START, str(mine.id))
    show = await node.goals.goal(str(mine.id))
    assert show is not None
    await world.ask(CommandName.FINISH, str(show.exclusive_goal), by="ben", role=Role.VIEWER)
    world.clock.shift(10)
    await node.deliver_due()
    await world.ask(CommandName.DISAGREE, await world.invited(session, "emil"))
    await world.withdraw(await world.invited(session, "finn"), by="finn")
    await world.invited(session, "gus")
    world.clock.shift(60)
    await node.fire_due()
    await world.agreed(session, "hal")
    world.clock.shift(65)
    await node.fire_due()
    await world.invited(session, "ida")
    await node.sessions.session(str(session.id))
    await node.sessions.live_session_of("anna")
    await node.sessions.end(session)
    await node.outbox.take_over()
    await node.outbox.pending()
    await node.outbox.oldest_at()
    await node.deadlines.overdue()
    world.clock.shift(3600)
    await node.deliver_due()
    await node.fire_due()


async def test_no_query_of_an_evening_scans_a_collection(profiled: World) -> None:
    await an_evening(profiled)

    seen = operations(profiled.raw)
    assert without_index(profiled.raw) == []
    assert len(seen) > 80
    assert {row["ns"].partition(".")[2] for row in seen} >= {"goals", "sessions", "requests"}


async def test_the_profiler_would_have_told(profiled: World) -> None:
    """The check above can fail: a query without an index is seen."""
    await profiled.session()

    await profiled.node.store.goals.find_one({"reason": "expired"})
    await profiled.node.store.sessions.update_many({"version": 7}, {"$set": {"version": 8}})

    found = {namespace for namespace, _ in without_index(profiled.raw)}
    assert found == {"goals", "sessions"}


async def test_the_clean_up_is_guarded_by_each_pairs_goal(profiled: World) -> None:
    """The requirements' filter, although the transaction would do without it."""
    session = await profiled.session()
    ours = await profiled.invited(session, "ben")
    others = {viewer: await profiled.invited(session, viewer) for viewer in ("cleo", "dora")}

    await profiled.ask(CommandName.AGREE, ours)

    [clean_up] = [
        row["command"]
        for row in operations(profiled.raw)
        if row["op"] == "update"
        and "$unset" in row["command"].get("u", ())
        and row["ns"].endswith(".sessions")
    ]
    assert clean_up["q"] == {"_id": session.id} | {
        f"exclusive_goal_pairs.{viewer}.trigger_exclusive_goal": ObjectId(goal_id)
        for viewer, goal_id in others.items()
    }
    assert set(clean_up["u"]["$unset"]) == {f"exclusive_goal_pairs.{viewer}" for viewer in others}


def idle_goal(number: int, world: World, **fields: Any) -> Row:
    return {
        "_cls": "TriggerExclusiveGoal",
        "state": "invited",
        "number": number,
        "created_at": world.clock.now(),
        **fields,
    }


async def test_an_idle_look_for_deadlines_and_outboxes_reads_no_document(
    profiled: World,
) -> None:
    """However many goals wait for their time, nothing but the index's edge is touched."""
    later = profiled.clock.now() + timedelta(hours=1)
    profiled.raw.command("profile", 0)
    profiled.raw["goals"].insert_many(
        idle_goal(number, profiled, due_at=later, due_command="expire", outbox_due_at=later)
        for number in range(PENDING)
    )
    profiled.raw.command("profile", 2)

    assert await profiled.node.deadlines.claim_due(64, ahead_s=1.25) == []
    assert await profiled.node.outbox.next_due_at() == later

    finds = [row for row in operations(profiled.raw) if row["command"].get("find") == "goals"]
    assert [row["planSummary"] for row in finds] == [
        "IXSCAN { due_at: 1 }",
        "IXSCAN { outbox_due_at: 1 }",
    ]
    for row in finds:
        assert row["docsExamined"] == 0
        assert row["keysExamined"] <= 1


async def test_finished_goals_cost_the_workers_nothing(profiled: World) -> None:
    """The indexes of the two due fields are partial: what waits for nothing is not in them."""
    profiled.raw.command("profile", 0)
    profiled.raw["goals"].insert_many(idle_goal(number, profiled) for number in range(PENDING))
    profiled.raw.command("profile", 2)

    await profiled.node.outbox.pending()
    await profiled.node.outbox.oldest_at()
    await profiled.node.outbox.take_over()

    rows = operations(profiled.raw)
    assert rows
    for row in rows:
        assert (row["keysExamined"], row["docsExamined"]) == (0, 0), row["command"]


def test_every_collection_has_the_indexes_of_its_document(world: World) -> None:
    for document in DOCUMENTS:
        settings = document.Settings
        wanted = {index.document["name"] for index in getattr(settings, "indexes", ())}

        found = set(world.raw[settings.name].index_information())

        assert found - {"_id_"} == wanted


def test_two_agreed_goals_of_one_session_cant_be_stored(world: World) -> None:
    index = world.raw["goals"].index_information()["one_show_per_session"]

    assert index["unique"] is True
    assert index["key"] == [("conditions.session_id", 1)]
    assert index["partialFilterExpression"] == {
        "_cls": "TriggerExclusiveGoal",
        "state": {"$in": ["agreed", "live"]},
    }


async def test_a_missing_index_is_named_and_made(world: World) -> None:
    world.raw["goal_records"].drop_index("at_1")
    store = await Store.open(world.url, world.raw.name, world.clock, with_indexes=False)

    missing = await missing_indexes(store)
    await make_indexes(store)

    assert missing == ["goal_records.at_1"]
    assert await missing_indexes(store) == []
    await store.close()


async def test_an_index_that_takes_too_long_is_left_to_duet_migrate(world: World) -> None:
    with (
        pymongo.timeout(1e-6),
        pytest.raises(StoreUnavailable, match=r"indexes of goals .* `duet migrate` makes them"),
    ):
        await make_indexes(world.node.store)


async def test_another_index_in_the_place_of_duets_is_named(world: World) -> None:
    records = world.raw["goal_records"]
    records.drop_index("at_1")
    records.create_index([("goal_id", ASCENDING)], name="at_1")

    with pytest.raises(StoreUnavailable, match="goal_records has another index in the place"):
        await world.add_node()
    records.drop_index("at_1")
    await world.add_node()

    assert "at_1" in records.index_information()
