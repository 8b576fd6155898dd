"""A streamer's Sessions: one at a time, and what its end does to what stands."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bson import ObjectId

from persistence.faults import Step
from statemachine.goal import CommandName
from tests.persistence.world import code_of, goal_id_of

if TYPE_CHECKING:
    from tests.persistence.world import Steps, World


async def test_going_live_writes_one_session(world: World) -> None:
    session, created = await world.node.sessions.create("anna", ["camera"])

    assert created
    assert world.session_row(session) == {
        "_id": session.id,
        "user": {"id": "anna"},
        "active": True,
        "status": {"exclusive_to": []},
        "exclusive_goal_pairs": {},
        "viewers": {},
        "rtc_sources": ["camera"],
        "created_at": world.clock.now(),
        "version": 1,
        "schema_version": 1,
    }


async def test_who_is_live_already_is_given_the_session_that_is_there(world: World) -> None:
    first, _ = await world.node.sessions.create("anna", [])
    world.clock.shift(10)

    second, created = await world.node.sessions.create("anna", ["other"])

    assert not created
    assert second == first
    assert len(world.documents()["sessions"]) == 1


async def test_going_live_twice_at_once_makes_one_session(world: World) -> None:
    other = await world.add_node()

    results = await asyncio.gather(
        *((world.node, other)[turn % 2].sessions.create("anna", []) for turn in range(10))
    )

    assert sum(created for _, created in results) == 1
    assert len({session.id for session, _ in results}) == 1


async def test_after_the_end_one_may_go_live_again(world: World) -> None:
    first = await world.session()
    await world.node.sessions.end(first)

    second, created = await world.node.sessions.create("anna", [])

    assert created
    assert second.id != first.id


async def test_a_session_is_found_by_its_id_and_by_its_streamer_while_live(world: World) -> None:
    session = await world.session()
    sessions = world.node.sessions

    assert await sessions.session(str(session.id)) == session
    assert await sessions.live_session_of("anna") == session
    assert await sessions.live_session_of("ben") is None
    assert await sessions.session("f" * 24) is None
    assert await sessions.session("nonsense") is None

    await sessions.end(session)
    ended = await sessions.session(str(session.id))
    assert ended is not None
    assert not ended.active
    assert await sessions.live_session_of("anna") is None


async def test_the_end_declines_standing_invitations_and_gives_the_money_back(
    world: World,
) -> None:
    session = await world.session()
    goal_ids = [await world.invited(session, viewer) for viewer in ("ben", "cleo")]
    world.clock.shift(3)

    ended, deliveries = await world.node.sessions.end(session)

    assert (ended.active, ended.ended_at, ended.version) == (False, world.clock.now(), 4)
    row = world.session_row(session)
    assert (row["active"], row["ended_at"], row["version"]) == (False, world.clock.now(), 4)
    pairs = row["exclusive_goal_pairs"]
    assert {viewer: pair["trigger_exclusive_goal_ended"] for viewer, pair in pairs.items()} == {
        "ben": True,
        "cleo": True,
    }
    assert {str(delivery.goal_id) for delivery in deliveries} == set(goal_ids)
    assert row["exclusive_goal_pairs"] == {
        viewer: {"trigger_exclusive_goal": ObjectId(goal_id), "trigger_exclusive_goal_ended": True}
        for viewer, goal_id in zip(("ben", "cleo"), goal_ids, strict=True)
    }
    for goal_id in goal_ids:
        goal = world.goal_row(goal_id)
        assert (goal["state"], goal["reason"]) == ("declined", "stream_ended")
        assert (goal["active"], goal["exp"]) == (False, world.clock.now())
        assert "due_at" not in goal
        assert world.movements(goal_id) == ["hold", "release"]
    for delivery in deliveries:
        await world.node.outbox.deliver(delivery)
    assert {world.goal_row(goal_id)["state"] for goal_id in goal_ids} == {"ended"}


async def test_the_end_touches_no_other_session(world: World) -> None:
    ours, theirs = await world.session("anna"), await world.session("berta")
    goal_id = await world.invited(theirs)

    await world.node.sessions.end(ours)

    assert world.goal_row(goal_id)["state"] == "invited"
    assert world.session_row(theirs)["active"] is True


async def test_the_end_leaves_an_agreed_show_to_its_deadline(world: World) -> None:
    session = await world.session()
    goal_id = await world.agreed(session)

    _, deliveries = await world.node.sessions.end(session)

    assert deliveries == ()
    assert world.goal_row(goal_id)["state"] == "agreed"
    assert code_of(await world.ask(CommandName.START, goal_id)) == "session_ended"


async def test_a_session_ends_once(world: World) -> None:
    session = await world.session()
    first, _ = await world.node.sessions.end(session)
    world.clock.shift(10)

    second, deliveries = await world.node.sessions.end(session)

    assert (second, deliveries) == (first, ())
    assert world.session_row(session)["version"] == 2


async def test_a_session_ended_on_two_nodes_at_once_declines_each_invitation_once(
    world: World,
) -> None:
    other = await world.add_node()
    session = await world.session()
    goal_id = await world.invited(session)

    results = await asyncio.gather(world.node.sessions.end(session), other.sessions.end(session))

    assert sorted(len(deliveries) for _, deliveries in results) == [0, 1]
    assert world.movements(goal_id) == ["hold", "release"]
    assert world.goal_row(goal_id)["version"] == 2


async def test_an_end_that_was_overtaken_reads_the_session_again(
    world: World, steps: Steps
) -> None:
    """A pair that names another goal by now is left alone."""
    session = await world.session()
    await world.invited(session)
    theirs = {"trigger_exclusive_goal": ObjectId()}

    def another_node_writes_the_pair() -> None:
        world.raw["sessions"].update_one(
            {"_id": session.id},
            {"$set": {"exclusive_goal_pairs.ben": theirs}, "$inc": {"version": 1}},
        )

    steps.once(Step.AFTER_DECIDE, "close", another_node_writes_the_pair)

    ended, _ = await world.node.sessions.end(session)

    row = world.session_row(session)
    assert row["exclusive_goal_pairs"] == {"ben": theirs}
    assert ended.version == row["version"] == 4


async def test_the_end_races_an_agree_and_the_money_knows_who_won(world: World) -> None:
    other = await world.add_node()
    for number in range(8):
        streamer = f"streamer{number}"
        session = await world.session(streamer)
        goal_id = await world.invited(session)

        answer, _ = await asyncio.gather(
            world.ask(CommandName.AGREE, goal_id, by=streamer, node=other),
            world.node.sessions.end(session),
        )

        row = world.goal_row(goal_id)
        assert world.session_row(session)["active"] is False
        if code_of(answer) == "ok":
            assert (row["state"], world.movements(goal_id)) == ("agreed", ["hold"])
        else:
            assert (row["state"], row["reason"]) == ("declined", "stream_ended")
            assert world.movements(goal_id) == ["hold", "release"]


async def test_no_invitation_reaches_a_session_that_has_ended(world: World) -> None:
    session = await world.session()
    await world.node.sessions.end(session)

    answer = await world.invite(session)

    assert code_of(answer) == "session_ended"
    assert world.documents()["goals"] == []


async def test_the_ids_of_users_are_taken_as_they_are(world: World) -> None:
    """All that `USER_ID_PATTERN` allows is a key of a map and a part of a path."""
    session = await world.session("a=b@c,d;e-f_1")
    for viewer_id in ("0", "1-2_3", "x@y=z,;", "_id"):
        goal_id = goal_id_of(await world.invite(session, viewer_id))
        assert world.session_row(session)["exclusive_goal_pairs"][viewer_id] == {
            "trigger_exclusive_goal": ObjectId(goal_id)
        }
        await world.ask(CommandName.AGREE, goal_id, by="a=b@c,d;e-f_1")
        assert set(world.session_row(session)["viewers"]) == {viewer_id}
        assert world.session_row(session)["status"] == {"exclusive_to": [viewer_id]}
        await world.ask(CommandName.START, goal_id, by="a=b@c,d;e-f_1")
        await world.ask(CommandName.FINISH, goal_id, by="a=b@c,d;e-f_1")
        assert world.session_row(session)["viewers"] == {}
