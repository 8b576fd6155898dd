"""What a command reads of a Session with many viewers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.session_reads import of_goal, of_invitations, with_session

if TYPE_CHECKING:
    from tests.persistence.world import World

Row = dict[str, Any]
VIEWERS = [f"viewer{number}" for number in range(50)]


async def joined(world: World, goal_id: str, _viewer_id: str) -> Row:
    found = await world.node.store.goals.aggregate(
        [{"$match": {"_id": ObjectId(goal_id)}}, *with_session()]
    )
    [row] = await found.to_list()
    session: Row = row["session"]
    return session


async def by_itself(world: World, goal_id: str, viewer_id: str) -> Row:
    session_id = world.goal_row(goal_id)["conditions"]["session_id"]
    session = await world.node.store.sessions.find_one({"_id": session_id}, of_goal(viewer_id))
    assert session is not None
    return session


@pytest.mark.parametrize("read", [joined, by_itself])
@pytest.mark.parametrize("viewer_id", [VIEWERS[0], VIEWERS[30]])
async def test_a_command_reads_its_own_pair_and_of_all_others_one(
    world: World, read: Any, viewer_id: str
) -> None:
    session = await world.session(rtc_sources=["camera"])
    goal_ids = {viewer: await world.invited(session, viewer) for viewer in VIEWERS}
    whole = world.session_row(session)

    found = await read(world, goal_ids[viewer_id], viewer_id)

    pairs = found.pop("exclusive_goal_pairs")
    assert len(pairs) == 2
    assert pairs[viewer_id] == whole.pop("exclusive_goal_pairs")[viewer_id]
    assert found == whole


@pytest.mark.parametrize("read", [joined, by_itself])
async def test_the_only_viewers_pair_and_pass_are_read_alone(world: World, read: Any) -> None:
    session = await world.session()
    goal_id = await world.started(session)

    assert await read(world, goal_id, "ben") == world.session_row(session)


@pytest.mark.parametrize("read", [joined, by_itself])
async def test_a_session_that_never_had_a_viewer_can_be_read(world: World, read: Any) -> None:
    goal_id = await world.invited(await world.session())
    unset = {"exclusive_goal_pairs": "", "viewers": ""}
    world.raw["sessions"].update_many({}, {"$unset": unset})

    found = await read(world, goal_id, "ben")

    assert (found["exclusive_goal_pairs"], found["viewers"]) == ({}, {})


async def test_an_invitation_reads_nobody_elses_pair(world: World) -> None:
    session = await world.session()
    for viewer in VIEWERS[:3]:
        await world.invited(session, viewer)

    found = await world.node.store.sessions.find_one(
        {"_id": session.id}, of_invitations([VIEWERS[1]])
    )

    assert found is not None
    assert list(found["exclusive_goal_pairs"]) == [VIEWERS[1]]
