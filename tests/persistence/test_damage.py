"""One document that can't be read is told, and keeps nobody else waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.damage import Damage, damage
from persistence.errors import StoreDamaged, StoreUnavailable
from persistence.escrow_calls import EscrowBook, EscrowCalls
from persistence.escrow_port import CallStatus, EscrowAnswer, Verdict
from persistence.intents import Done
from statemachine.goal import CommandName
from tests.persistence.world import STREAMER, code_of, goal_id_of

if TYPE_CHECKING:
    from persistence.documents import EscrowCall
    from tests.persistence.world import World


class Acknowledging:
    """A payment service that says yes."""

    async def ask(self, call: EscrowCall, within_s: float) -> EscrowAnswer:
        return EscrowAnswer(Verdict.ACKNOWLEDGED)


def break_goal(world: World, goal_id: str, update: dict[str, Any]) -> None:
    world.raw["goals"].update_one({"_id": ObjectId(goal_id)}, update)


@pytest.mark.parametrize(
    "update", [{"$set": {"due_command": "explode"}}, {"$unset": {"due_command": ""}}]
)
async def test_deadlines_behind_a_damaged_goal_are_met(
    world: World, update: dict[str, Any]
) -> None:
    session = await world.session()
    broken, sound = [await world.invited(session, viewer) for viewer in ("ben", "cleo")]
    break_goal(world, broken, update)
    world.clock.shift(60)
    before = damage.count

    claimed = await world.node.deadlines.claim_due(10)

    assert [str(due.goal_id) for due in claimed] == [sound]
    assert damage.count == before + 1


async def test_a_goal_that_can_not_be_read_is_told_when_its_deadline_comes(world: World) -> None:
    session = await world.session()
    broken = await world.invited(session)
    break_goal(world, broken, {"$set": {"state": "molten"}})
    world.clock.shift(60)
    [due] = await world.node.deadlines.claim_due(10)
    before = damage.count

    with pytest.raises(StoreDamaged):
        await world.node.deadlines.fire(due)

    assert damage.count == before + 1


@pytest.mark.parametrize(
    "update",
    [
        {"$unset": {"outbox.0.pending": ""}},
        {"$set": {"outbox": None}},
        {"$set": {"outbox": 5}},
        {"$unset": {"outbox": ""}},
    ],
)
async def test_outboxes_behind_a_damaged_one_are_taken_over(
    world: World, update: dict[str, Any]
) -> None:
    other = await world.add_node()
    session = await world.session()
    broken, sound = [await world.invited(session, viewer) for viewer in ("ben", "cleo")]
    for goal_id in (broken, sound):
        await world.ask(CommandName.DISAGREE, goal_id)
    break_goal(world, broken, update)
    world.clock.shift(5)
    before = damage.count

    claimed = await other.outbox.claim_due(10)

    assert [str(delivery.goal_id) for delivery in claimed] == [sound]
    assert damage.count == before + 1


async def test_a_goal_that_can_not_be_settled_fails_no_delivery_that_shares_a_write_with_it(
    world: World,
) -> None:
    session = await world.session()
    answers = []
    for number in range(8):
        goal_id = await world.invited(session, f"viewer{number}")
        answers.append(await world.ask(CommandName.DISAGREE, goal_id))
    deliveries = [answer.deliveries[0] for answer in answers if isinstance(answer, Done)]
    break_goal(world, str(deliveries[0].goal_id), {"$set": {"version": "two"}})

    broken, *sound = await asyncio.gather(
        *(world.node.outbox.deliver(delivery) for delivery in deliveries), return_exceptions=True
    )

    assert isinstance(broken, StoreUnavailable)
    assert sound == [True] * 7


async def test_calls_behind_a_damaged_one_are_said_and_listed(world: World) -> None:
    node = await world.add_node(port=Acknowledging())
    session = await world.session()
    for viewer in ("ben", "cleo"):
        await world.invite(session, viewer, node=node)
    await node.sessions.end(session)
    calls = world.raw["escrow_calls"]
    broken, sound = calls.distinct("_id", {"call": "release"})
    calls.update_one({"_id": broken}, {"$set": {"amount": "much"}})
    worker = EscrowCalls(node.store, node.goals, Acknowledging(), timeout_s=1, give_up_s=60)

    listed = await EscrowBook(node.store).waiting([CallStatus.PENDING], 10)
    claimed = await worker.claim_due(10)

    assert [call.id for call in listed] == [sound]
    assert [call.id for call in claimed] == [sound]


async def test_the_other_goals_of_a_session_are_agreed_seen_and_closed(world: World) -> None:
    session = await world.session()
    broken, sound, other = [
        await world.invited(session, viewer) for viewer in ("ben", "cleo", "dora")
    ]
    before = world.goal_row(broken)
    break_goal(world, broken, {"$unset": {"context": ""}})

    seen = await world.node.goals.open_goals(STREAMER)
    agreed = await world.ask(CommandName.AGREE, sound)
    ended, _ = await world.node.sessions.end(session)
    world.raw["goals"].replace_one({"_id": before["_id"]}, before)
    world.clock.shift(60)
    mended = [answer for answer in await world.node.fire_due() if code_of(answer) == "ok"]

    assert {str(goal.id) for goal in seen} == {sound, other}
    assert code_of(agreed) == "ok"
    assert not ended.active
    assert sorted(world.movements(other)) == ["hold", "release"]
    assert broken in map(goal_id_of, mended)
    assert sorted(world.movements(broken)) == ["hold", "release"]


def test_a_document_is_counted_once_and_forgotten_when_it_was_mended() -> None:
    now_s = 1000.0
    met = Damage(lambda: now_s)

    for document_id in ("a", "a", "b"):
        met.met("goals", document_id, ValueError("so it is"))

    assert met.count == 2
    now_s += 61
    assert met.count == 0
