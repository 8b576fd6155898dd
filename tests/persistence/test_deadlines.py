"""Deadlines: found when due, claimed by one worker, and by another when that one dies."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bson import ObjectId

from persistence.claims import claim
from persistence.deadlines import DueGoal
from statemachine.goal import CommandName, Role
from tests.persistence.world import code_of

if TYPE_CHECKING:
    import pytest

    from tests.persistence.world import World


async def test_a_goal_is_found_when_it_is_due_and_not_a_millisecond_before(
    world: World,
) -> None:
    goal_id = await world.invited(await world.session())
    world.clock.shift(59.999)
    assert await world.node.deadlines.claim_due(10) == []
    world.clock.shift(0.001)

    due = await world.node.deadlines.claim_due(10)

    assert due == [DueGoal(ObjectId(goal_id), CommandName.EXPIRE, due_at=world.clock.now())]


async def test_a_deadline_that_nobody_has_met_is_overdue_claimed_or_not(world: World) -> None:
    await world.invited(await world.session())
    world.clock.shift(65)
    assert await world.node.deadlines.overdue() == 0
    world.clock.shift(0.001)
    assert await world.node.deadlines.overdue() == 1

    [due] = await world.node.deadlines.claim_due(10)
    assert await world.node.deadlines.overdue() == 1
    await world.node.deadlines.fire(due)

    assert await world.node.deadlines.overdue() == 0


async def test_a_goal_is_claimed_ahead_and_held_for_its_lease_from_its_time_on(
    world: World,
) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    due_at = world.clock.now() + timedelta(seconds=60)
    world.clock.shift(58.999)
    assert await world.node.deadlines.claim_due(10, ahead_s=1.0) == []
    world.clock.shift(0.001)

    [due] = await world.node.deadlines.claim_due(10, ahead_s=1.0)

    assert due.due_at == due_at
    assert world.goal_row(goal_id)["due_lease_until"] == due_at + timedelta(seconds=5)
    world.clock.shift(5.999)
    assert await other.deadlines.claim_due(10, ahead_s=1.0) == []
    world.clock.shift(0.001)
    assert await other.deadlines.claim_due(10, ahead_s=1.0) == [due]


async def test_a_goal_that_is_agreed_behind_a_claim_ahead_is_not_expired(world: World) -> None:
    goal_id = await world.invited(await world.session())
    world.clock.shift(59)
    [due] = await world.node.deadlines.claim_due(10, ahead_s=1.0)

    await world.node.deliver(await world.ask(CommandName.AGREE, goal_id))
    world.clock.shift(1)
    answer = await world.node.deadlines.fire(due)

    assert code_of(answer) == "goal_already_agreed"
    row = world.goal_row(goal_id)
    assert (row["state"], row["due_command"]) == ("agreed", "refund")
    assert "due_lease_until" not in row


async def test_of_two_workers_one_claims(world: World) -> None:
    other = await world.add_node()
    session = await world.session()
    for number in range(6):
        await world.invited(session, f"viewer{number}")
    world.clock.shift(60)

    mine, theirs = await asyncio.gather(
        world.node.deadlines.claim_due(10), other.deadlines.claim_due(10)
    )

    claimed = [due.goal_id for due in (*mine, *theirs)]
    assert len(claimed) == len(set(claimed)) == 6


async def test_what_another_worker_claims_between_the_look_and_the_claim_stays_his(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await world.add_node()
    session = await world.session()
    for number in range(3):
        await world.invited(session, f"viewer{number}")
    world.clock.shift(60)
    mine, theirs = world.node.deadlines, []

    async def claim_behind_the_other(*found: Any) -> None:
        monkeypatch.undo()
        theirs.extend(await other.deadlines.claim_due(2))
        await claim(*found)

    monkeypatch.setattr("persistence.deadlines.claim", claim_behind_the_other)
    claimed = await mine.claim_due(10)

    assert (len(theirs), len(claimed)) == (2, 1)
    assert claimed[0] not in theirs


async def test_a_claim_is_held_for_its_lease_and_then_free_again(world: World) -> None:
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    world.clock.shift(60)
    await world.node.deadlines.claim_due(10)
    row = world.goal_row(goal_id)
    assert row["due_owner"] == world.node.store.owner
    assert row["due_lease_until"] == world.clock.now() + timedelta(seconds=5)

    world.clock.shift(4.999)
    assert await other.deadlines.claim_due(10) == []
    world.clock.shift(0.001)
    [again] = await other.deadlines.claim_due(10)

    assert again.goal_id == ObjectId(goal_id)
    assert again.due_at == world.clock.now() - timedelta(seconds=5)
    assert world.goal_row(goal_id)["due_owner"] == other.store.owner


async def test_both_workers_may_fire_and_the_goal_expires_once(world: World) -> None:
    """The first was only slow, not dead: its command comes after all."""
    other = await world.add_node()
    goal_id = await world.invited(await world.session())
    world.clock.shift(60)
    [slow] = await world.node.deadlines.claim_due(10)
    world.clock.shift(5)
    [quick] = await other.deadlines.claim_due(10)

    answers = [await other.deadlines.fire(quick), await world.node.deadlines.fire(slow)]

    assert [code_of(answer) for answer in answers] == ["ok", "goal_expired"]
    assert world.movements(goal_id) == ["hold", "release"]


async def test_a_command_that_comes_first_takes_the_deadline_and_its_claim_away(
    world: World,
) -> None:
    goal_id = await world.invited(await world.session())
    world.clock.shift(60)
    [due] = await world.node.deadlines.claim_due(10)

    await world.withdraw(goal_id)
    answer = await world.node.deadlines.fire(due)

    assert code_of(answer) == "goal_already_declined"
    assert not {"due_at", "due_command", "due_lease_until", "due_owner"} & set(
        world.goal_row(goal_id)
    )


async def test_the_next_deadline_is_not_held_by_the_claim_of_the_last(world: World) -> None:
    goal_id = await world.agreed(await world.session())
    world.clock.shift(64.5)
    world.raw["goals"].update_one(
        {"_id": ObjectId(goal_id)},
        {"$set": {"due_lease_until": world.clock.now() + timedelta(days=1), "due_owner": "x"}},
    )

    await world.ask(CommandName.START, goal_id)
    world.clock.shift(60)

    [due] = await world.node.deadlines.claim_due(10)
    assert due.command is CommandName.FINISH


async def test_the_earliest_are_claimed_first_and_no_more_than_asked_for(world: World) -> None:
    session = await world.session()
    goal_ids = []
    for number in range(5):
        goal_ids.append(await world.invited(session, f"viewer{number}"))
        world.clock.shift(1)
    world.clock.shift(60)

    first = await world.node.deadlines.claim_due(3)
    second = await world.node.deadlines.claim_due(3)

    assert [str(due.goal_id) for due in (*first, *second)] == goal_ids
    assert len(first) == 3


async def test_after_a_restart_all_that_came_due_meanwhile_is_done(world: World) -> None:
    """No deadline is in memory alone: a process that has just started finds every kind."""
    standing = await world.invited(await world.session("anna"))
    agreed = await world.agreed(await world.session("berta"))
    live = await world.started(await world.session("clara"))
    world.clock.shift(3600)
    restarted = await world.add_node()

    answers = await restarted.fire_due()

    assert [code_of(answer) for answer in answers] == ["ok"] * 3
    reasons = [world.goal_row(goal_id).get("reason") for goal_id in (standing, agreed, live)]
    assert reasons == ["expired", "not_started", None]
    assert [world.movements(goal_id)[1] for goal_id in (standing, agreed, live)] == [
        "release",
        "release",
        "capture",
    ]
    assert await restarted.deadlines.claim_due(10) == []


async def test_the_timer_is_told_when_it_is_early(world: World) -> None:
    goal_id = await world.invited(await world.session())

    answer = await world.ask(CommandName.EXPIRE, goal_id, by=None, role=Role.TIMER)

    assert code_of(answer) == "too_early"


async def test_an_ended_streams_agreed_show_is_still_refunded_in_time(world: World) -> None:
    session = await world.session()
    goal_id = await world.agreed(session)
    await world.node.sessions.end(session)
    world.clock.shift(65)

    [answer] = await world.node.fire_due()

    assert code_of(answer) == "ok"
    assert world.movements(goal_id) == ["hold", "release"]
    assert world.session_row(session)["status"] == {"exclusive_to": []}
