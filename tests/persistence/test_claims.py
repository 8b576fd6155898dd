"""What a dead process's open transaction holds is gone round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from statemachine.goal import CommandName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymongo import MongoClient
    from pymongo.client_session import ClientSession

    from tests.persistence.world import World


@pytest.fixture
def open_transaction(mongodb_client: MongoClient[dict[str, Any]]) -> Iterator[ClientSession]:
    """A transaction of somebody who will never commit it."""
    with mongodb_client.start_session() as session:
        session.start_transaction()
        yield session


def lock(world: World, goal_id: str, transaction: ClientSession) -> None:
    world.raw["goals"].update_one(
        {"_id": ObjectId(goal_id)}, {"$set": {"progress": 0}}, session=transaction
    )


async def test_deadlines_behind_a_locked_goal_are_met(
    world: World, open_transaction: ClientSession
) -> None:
    session = await world.session()
    locked, free = [await world.invited(session, viewer) for viewer in ("ben", "cleo")]
    world.clock.shift(60)
    lock(world, locked, open_transaction)

    claimed = await world.node.deadlines.claim_due(10)

    assert [str(due.goal_id) for due in claimed] == [free]


async def test_outboxes_behind_a_locked_goal_are_taken_over(
    world: World, open_transaction: ClientSession
) -> None:
    other = await world.add_node()
    session = await world.session()
    goal_ids = [await world.invited(session, viewer) for viewer in ("ben", "cleo")]
    for goal_id in goal_ids:
        await world.ask(CommandName.DISAGREE, goal_id)
    world.clock.shift(5)
    lock(world, goal_ids[0], open_transaction)

    claimed = await other.outbox.claim_due(10)

    assert [str(delivery.goal_id) for delivery in claimed] == goal_ids[1:]
