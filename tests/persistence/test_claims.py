"""What a dead process's open transaction holds is gone round."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.claims import claim
from persistence.errors import StoreUnavailable
from persistence.intents import Done
from statemachine.goal import CommandName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymongo import MongoClient
    from pymongo.client_session import ClientSession

    from persistence.deadlines import DueGoal
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


async def test_beside_a_locked_goal_what_another_worker_claims_first_stays_his(
    world: World, open_transaction: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the locked one taken for claimed by who had claimed it before."""
    other = await world.add_node()
    session = await world.session()
    goal_ids = [await world.invited(session, viewer) for viewer in ("ben", "cleo", "dora")]
    world.clock.shift(60)
    await world.node.deadlines.claim_due(10)
    world.clock.shift(5)
    lock(world, goal_ids[0], open_transaction)
    theirs: list[DueGoal] = []

    async def claim_behind_the_other(*found: Any) -> None:
        monkeypatch.undo()
        theirs.extend(await other.deadlines.claim_due(2))
        await claim(*found)

    monkeypatch.setattr("persistence.deadlines.claim", claim_behind_the_other)
    mine = await world.node.deadlines.claim_due(10)

    assert [[str(due.goal_id) for due in claimed] for claimed in (theirs, mine)] == [
        goal_ids[1:2],
        goal_ids[2:],
    ]


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


async def test_however_many_are_locked_the_others_are_claimed_in_time(
    world: World, open_transaction: ClientSession
) -> None:
    session = await world.session()
    goal_ids = [await world.invited(session, f"viewer{number}") for number in range(16)]
    for goal_id in goal_ids:
        await world.ask(CommandName.DISAGREE, goal_id)
    world.clock.shift(5)
    for goal_id in goal_ids[:15]:
        lock(world, goal_id, open_transaction)

    # One after the other they would use up twice what a look may take in a real gateway.
    other = await world.add_node(deadline_s=2.0)
    claimed = await other.outbox.claim_due(16)

    assert [str(delivery.goal_id) for delivery in claimed] == goal_ids[15:]


async def test_a_locked_goal_keeps_no_delivery_waiting_that_shares_a_write_with_it(
    world: World, open_transaction: ClientSession
) -> None:
    node = await world.add_node(deadline_s=2.0)
    session = await world.session()
    answers = []
    for number in range(8):
        goal_id = await world.invited(session, f"viewer{number}")
        answers.append(await world.ask(CommandName.DISAGREE, goal_id, node=node))
    deliveries = [answer.deliveries[0] for answer in answers if isinstance(answer, Done)]
    locked, *free = [str(delivery.goal_id) for delivery in deliveries]
    lock(world, locked, open_transaction)

    ended = await asyncio.gather(
        *(node.outbox.deliver(delivery) for delivery in deliveries), return_exceptions=True
    )

    assert isinstance(ended[0], StoreUnavailable)
    assert ended[1:] == [True] * 7
    assert [world.goal_row(goal_id)["outbox"] for goal_id in free] == [[]] * 7
