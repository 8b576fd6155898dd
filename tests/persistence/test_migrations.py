"""Migrations on a real MongoDB: in order, in batches, resumable, by one runner at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.documents import SCHEMA_VERSION
from persistence.migrations import MIGRATIONS, Migration, MigrationRefused, Migrator, Progress

if TYPE_CHECKING:
    from pymongo.database import Database

    from tests.persistence.world import Node, World

NUMBERS = "numbers"

DOUBLE = Migration(
    name="0001_numbers_are_doubled",
    collection=NUMBERS,
    version=2,
    update=({"$set": {"number": {"$multiply": ["$number", 2]}}},),
)
RENAME = Migration(
    name="0002_number_is_called_count",
    collection=NUMBERS,
    version=3,
    update=({"$set": {"count": "$number"}}, {"$unset": ["number"]}),
)


class Stopped(BaseException):
    """Ends a run as a signal would."""


@pytest.fixture
def numbers(world: World) -> Database[dict[str, Any]]:
    """Ten documents of the oldest schema, half of them from before there was a version."""
    world.raw[NUMBERS].drop()
    world.raw["migrations"].delete_many({})
    world.raw[NUMBERS].insert_many(
        {"_id": number, "number": number} | ({"schema_version": 1} if number % 2 else {})
        for number in range(10)
    )
    return world.raw


def migrator(node: Node, *migrations: Migration, **options: Any) -> Migrator:
    return Migrator(node.store, migrations or (DOUBLE, RENAME), batch_size=3, **options)


async def finish(migrator: Migrator) -> list[Progress]:
    return [progress async for progress in migrator.run()]


async def stop_after(migrator: Migrator, batches: int) -> None:
    """Runs some batches, and is then killed: nothing is tidied up."""
    seen = 0
    run = migrator._run_one(DOUBLE)
    await migrator._take_lease()
    async for _ in run:
        if seen == batches:
            break
        seen += 1


def rows(database: Database[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(database[NUMBERS].find().sort("_id"))


MIGRATED = [{"_id": number, "count": number * 2, "schema_version": 3} for number in range(10)]


def test_the_newest_migration_leads_to_the_schema_of_this_version() -> None:
    newest = max((migration.version for migration in MIGRATIONS), default=1)

    assert newest == SCHEMA_VERSION


async def test_migrations_run_in_order_and_change_each_document_once(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    await finish(migrator(world.node))
    await finish(migrator(world.node))

    assert rows(numbers) == MIGRATED


async def test_the_progress_is_told_after_each_batch(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    told = await finish(migrator(world.node, DOUBLE))

    assert [(progress.done, progress.total) for progress in told] == [
        (0, 10),
        (3, 10),
        (6, 10),
        (9, 10),
        (10, 10),
    ]


async def test_a_plan_tells_what_waits_and_changes_nothing(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    before = rows(numbers)

    plan = await migrator(world.node).plan()

    assert [(each.migration.name, each.total) for each in plan] == [
        (DOUBLE.name, 10),
        (RENAME.name, 10),
    ]
    assert rows(numbers) == before
    assert numbers["migrations"].count_documents({}) == 0


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
async def test_a_run_that_was_killed_is_gone_on_with_where_it_stopped(
    world: World, numbers: Database[dict[str, Any]], batches: int
) -> None:
    other = await world.add_node()
    await stop_after(migrator(world.node), batches)
    changed = numbers[NUMBERS].count_documents({"schema_version": 2})
    world.clock.shift(30.0)

    told = await finish(migrator(other))

    assert changed == batches * 3
    assert told[0].total == 10 - changed
    assert rows(numbers) == MIGRATED
    record = numbers["migrations"].find_one({"_id": DOUBLE.name})
    assert record is not None
    assert record["migrated"] == 10
    assert "last_id" not in record


async def test_two_runners_do_not_collide(world: World, numbers: Database[dict[str, Any]]) -> None:
    other = await world.add_node()
    await stop_after(migrator(world.node), 1)

    with pytest.raises(MigrationRefused, match=world.node.store.owner):
        await finish(migrator(other))
    world.clock.shift(30.0)
    await finish(migrator(other))

    assert rows(numbers) == MIGRATED


async def test_who_has_lost_the_lease_stops(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    other = await world.add_node()
    first = migrator(world.node).run()
    await anext(first)
    world.clock.shift(30.0)
    second = migrator(other).run()
    await anext(second)

    with pytest.raises(MigrationRefused):
        await anext(first)
    async for _ in second:
        pass

    assert rows(numbers) == MIGRATED


async def test_a_finished_run_gives_the_lease_back(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    other = await world.add_node()
    await finish(migrator(world.node))

    await finish(migrator(other))

    lease = numbers["migrations"].find_one({"_id": "lease"})
    assert lease == {"_id": "lease"}


async def test_what_an_old_gateway_writes_behind_the_run_is_found_by_it_and_by_the_next(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    run = migrator(world.node, DOUBLE).run()
    for _ in range(3):
        await anext(run)
    numbers[NUMBERS].insert_one({"_id": -1, "number": 7, "schema_version": 1})
    async for _ in run:
        pass
    numbers[NUMBERS].insert_one({"_id": -2, "number": 8, "schema_version": 1})
    await finish(migrator(world.node, DOUBLE))

    assert numbers[NUMBERS].find_one({"_id": -1}) == {"_id": -1, "number": 14, "schema_version": 2}
    assert numbers[NUMBERS].find_one({"_id": -2}) == {"_id": -2, "number": 16, "schema_version": 2}


async def test_a_document_that_comes_behind_a_migration_is_not_led_past_it(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    """An old gateway writes while the second of two migrations runs."""
    async for progress in migrator(world.node).run():
        if progress.migration is RENAME and progress.done == 0:
            numbers[NUMBERS].insert_one({"_id": 10, "number": 7, "schema_version": 1})
    left = numbers[NUMBERS].find_one({"_id": 10})

    await finish(migrator(world.node))

    assert left == {"_id": 10, "number": 7, "schema_version": 1}
    assert rows(numbers) == [*MIGRATED, {"_id": 10, "count": 14, "schema_version": 3}]


async def test_a_document_that_an_update_does_not_fit_is_told_of_and_keeps_no_other_waiting(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    for number in (1, 5):
        numbers[NUMBERS].update_one({"_id": number}, {"$set": {"number": "many"}})
    runner = migrator(world.node, DOUBLE)

    told = await finish(runner)

    left = {one.document_id: one for one in runner.unfit.values()}
    assert left.keys() == {1, 5}
    assert "$multiply only supports numeric types" in left[1].why
    assert told[-1].done == 8
    assert rows(numbers)[:3] == [
        {"_id": 0, "number": 0, "schema_version": 2},
        {"_id": 1, "number": "many", "schema_version": 1},
        {"_id": 2, "number": 4, "schema_version": 2},
    ]
    assert numbers[NUMBERS].count_documents({"schema_version": 2}) == 8


async def test_what_an_update_did_not_fit_is_taken_up_when_it_was_mended(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    numbers[NUMBERS].update_one({"_id": 5}, {"$set": {"number": "many"}})
    await finish(migrator(world.node))
    numbers[NUMBERS].update_one({"_id": 5}, {"$set": {"number": 5}})

    runner = migrator(world.node)
    await finish(runner)

    assert runner.unfit == {}
    assert rows(numbers) == MIGRATED


async def test_ids_of_any_type_are_passed_in_their_order(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    """More than a batch of the first type that can't be changed hides nothing behind them."""
    numbers[NUMBERS].update_many({}, {"$set": {"number": "many"}})
    others: list[Any] = ["text", {"sub": 1}, ObjectId()]
    numbers[NUMBERS].insert_many({"_id": one, "number": 1} for one in others)
    numbers[NUMBERS].insert_one({"_id": "null", "number": 1, "schema_version": None})

    await finish(migrator(world.node, DOUBLE))

    changed = numbers[NUMBERS].find({"schema_version": 2})
    assert {(repr(row["_id"]), row["number"]) for row in changed} == {
        (repr(one), 2) for one in [*others, "null"]
    }


async def test_the_migrations_of_a_newer_version_are_named(
    world: World, numbers: Database[dict[str, Any]]
) -> None:
    await finish(migrator(world.node, DOUBLE, RENAME))

    assert await migrator(world.node, DOUBLE).strangers() == [RENAME.name]
    assert await migrator(world.node).strangers() == []


@pytest.mark.parametrize(
    "migrations",
    [
        (DOUBLE, DOUBLE),
        (RENAME, DOUBLE),
        (Migration("0003", NUMBERS, 1, ()),),
        (Migration("lease", NUMBERS, 2, ()),),
    ],
)
async def test_a_list_in_which_one_would_be_skipped_is_refused(
    world: World, migrations: tuple[Migration, ...]
) -> None:
    with pytest.raises(ValueError, match=r"000|lease"):
        Migrator(world.node.store, migrations)
