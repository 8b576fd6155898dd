"""Gateways of two versions on one database: neither loses what only the other one knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from persistence.rows import object_id
from statemachine.goal import CommandName
from statemachine.receivers import (
    TRIGGER_EXCLUSIVE_GOAL,
    Phase,
    Push,
    Receiver,
    Registry,
    Signal,
    standard_receivers,
)
from tests.persistence.world import STREAMER, World, code_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from statemachine.receivers import Effect, Occurrence

NEWER = "notify_the_newer_apps"
# What a version to come may add, at each level of a goal and of a Session.
OF_A_GOAL = {
    "novelty": {"since": 2},
    "metadata.novelty": "m",
    "conditions.novelty": "c",
    "context.novelty": "x",
    "schema_version": 2,
}
OF_A_SESSION = {"novelty": [1, 2], "status.novelty": "s", "user.novelty": "u", "schema_version": 2}
# What documents of the first days lack; reading gives them their defaults.
CAME_LATER = ("schema_version", "progress", "levels", "rtc_sources")


def notify_the_newer_apps(occurrence: Occurrence) -> Sequence[Effect]:
    return (Push("goal.novelty", (f"private-user@{occurrence.viewer_id}",), {}),)


def newer_receivers() -> Registry:
    registry = standard_receivers()
    registry.register(
        Receiver(
            NEWER,
            Signal.GOAL_ENDED,
            Phase.DELIVER,
            frozenset({TRIGGER_EXCLUSIVE_GOAL}),
            notify_the_newer_apps,
        )
    )
    return registry


def at(row: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        row = row[name]
    return row


def pending(world: World, goal_id: str) -> list[str]:
    return [name for entry in world.goal_row(goal_id)["outbox"] for name in entry["pending"]]


async def test_a_receiver_that_only_the_newer_version_has_waits_for_it(world: World) -> None:
    old = world.node
    new = await world.add_node(newer_receivers())
    goal_id = await world.invited(await world.session())
    answer = await world.ask(CommandName.DISAGREE, goal_id, node=new)
    assert code_of(answer) == "ok"
    # The newer node dies, and the older one takes over.
    world.clock.shift(5.0)

    await old.deliver_due()
    left = pending(world, goal_id)
    world.clock.shift(5.0)
    await new.deliver_due()

    assert left[0] == NEWER
    assert "goal.ended" in old.recorder.events
    assert "goal.novelty" not in old.recorder.events
    assert "goal.novelty" in new.recorder.events
    assert new.recorder.events.count("goal.ended") == 0
    row = world.goal_row(goal_id)
    assert (row["state"], row["outbox"]) == ("ended", [])


async def test_what_the_older_version_commits_needs_no_receiver_that_it_does_not_know(
    world: World,
) -> None:
    new = await world.add_node(newer_receivers())
    goal_id = await world.invited(await world.session())
    await world.ask(CommandName.DISAGREE, goal_id)
    world.clock.shift(5.0)

    await new.deliver_due()

    assert "goal.novelty" not in new.recorder.events
    assert world.goal_row(goal_id)["state"] == "ended"


@pytest.mark.parametrize("last", [CommandName.WITHDRAW, CommandName.FINISH])
async def test_an_older_version_leaves_alone_the_fields_that_it_does_not_know(
    world: World, last: CommandName
) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    world.raw["goals"].update_one({"_id": ObjectId(goal_id)}, {"$set": OF_A_GOAL})
    pair = "exclusive_goal_pairs.ben.novelty"
    of_session = OF_A_SESSION | {pair: "p"}
    world.raw["sessions"].update_one({"_id": session.id}, {"$set": of_session})

    if last is CommandName.WITHDRAW:
        await world.node.deliver(await world.withdraw(goal_id))
    else:
        for name in (CommandName.AGREE, CommandName.START, CommandName.FINISH):
            await world.node.deliver(await world.ask(name, goal_id))

    goal, stored = world.goal_row(goal_id), world.session_row(session)
    assert goal["state"] == "ended"
    assert {path: at(goal, path) for path in OF_A_GOAL} == OF_A_GOAL
    assert {path: at(stored, path) for path in of_session} == of_session


async def test_documents_of_an_older_schema_go_through_the_whole_show(world: World) -> None:
    session = await world.session()
    goal_id = await world.invited(session)
    world.raw["goals"].update_one(
        {"_id": object_id(goal_id)}, {"$unset": dict.fromkeys(CAME_LATER, "")}
    )
    world.raw["sessions"].update_one({"_id": session.id}, {"$unset": dict.fromkeys(CAME_LATER, "")})

    for name in (CommandName.AGREE, CommandName.START, CommandName.FINISH):
        answer = await world.ask(name, goal_id)
        assert code_of(answer) == "ok", answer
        await world.node.deliver(answer)

    row = world.goal_row(goal_id)
    assert (row["state"], row["outcome"]) == ("ended", "captured")
    assert world.movements(goal_id) == ["hold", "capture"]


async def test_commands_of_one_goal_alternate_between_the_versions(world: World) -> None:
    new = await world.add_node(newer_receivers())
    session = await world.session()
    goal_id = await world.invited(session)

    for name, node in (
        (CommandName.AGREE, new),
        (CommandName.START, world.node),
        (CommandName.FINISH, new),
    ):
        answer = await world.ask(name, goal_id, by=STREAMER, node=node)
        assert code_of(answer) == "ok"
        await node.deliver(answer)

    assert world.goal_row(goal_id)["state"] == "ended"
    assert world.goal_row(goal_id)["outbox"] == []
    assert world.movements(goal_id) == ["hold", "capture"]
