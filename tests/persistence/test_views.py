"""Documents as they appear outside: the requirements' names, JSON types, nothing of Duet's own."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from persistence.documents import Session, ViewerPass
from persistence.views import goal_view, pass_view, session_view
from statemachine.goal import CommandName
from statemachine.instants import rfc3339

if TYPE_CHECKING:
    from tests.persistence.world import World


async def test_an_invitation_appears_under_the_requirements_names(world: World) -> None:
    session = await world.session()
    now = world.clock.now()
    goal_id = await world.invited(session)

    goal = await world.node.goals.goal(goal_id)

    assert goal is not None
    assert goal_view(goal) == {
        "id": goal_id,
        "_cls": "TriggerExclusiveGoal",
        "active": True,
        "progress": 1,
        "levels": [],
        "conditions": {"session_id": str(session.id), "exclusive_to": "ben"},
        "context": {"type": "trigger-exclusive", "exclusive_to": "ben"},
        "exp": rfc3339(now + timedelta(seconds=60)),
        "triggerer": "viewer-app",
        "metadata": {"user_id": "anna", "prepaid_duration": 30},
        "breakdown": {"ben": 500},
        "amount": 500,
        "state": "invited",
        "reason": None,
        "outcome": None,
        "exclusive_goal": None,
        "due_at": rfc3339(now + timedelta(seconds=60)),
        "created_at": rfc3339(now),
        "version": 1,
    }


async def test_the_view_of_a_reply_is_the_view_of_what_is_stored(world: World) -> None:
    goal_id = await world.agreed(await world.session())
    answer = await world.ask(CommandName.START, goal_id)

    stored = await world.node.goals.goal(goal_id)

    assert stored is not None
    assert goal_view(stored) == answer.goal


async def test_a_show_names_its_invitation_and_its_sources(world: World) -> None:
    session = await world.session(rtc_sources=[{"id": "camera"}])
    goal_id = await world.started(session)
    goal = await world.node.goals.goal(goal_id)
    assert goal is not None
    await world.ask(CommandName.FINISH, goal_id)

    show = await world.node.goals.goal(str(goal.exclusive_goal))

    assert show is not None
    view = goal_view(show)
    assert (view["_cls"], view["trigger_goal"]) == ("ExclusiveGoal", goal_id)
    assert view["rtc_sources"] == [{"id": "camera"}]
    assert "trigger_goal" not in goal_view(goal)


async def test_every_view_is_plain_json(world: World) -> None:
    session = await world.session()
    goal_id = await world.started(session)
    goal = await world.node.goals.goal(goal_id)
    stored = await world.node.sessions.session(str(session.id))
    assert goal is not None
    assert stored is not None

    for view in (goal_view(goal), session_view(stored)):
        assert json.loads(json.dumps(view)) == view
        assert not {"outbox", "outbox_due_at", "outbox_owner", "schema_version"} & set(view)


async def test_a_session_shows_its_pairs_and_passes_in_every_stage(world: World) -> None:
    session = await world.session()

    async def view() -> dict[str, object]:
        stored = await world.node.sessions.session(str(session.id))
        assert stored is not None
        return session_view(stored)

    goal_id = await world.invited(session)
    assert (await view())["exclusive_goal_pairs"] == {"ben": {"trigger_exclusive_goal": goal_id}}

    await world.node.deliver(await world.ask(CommandName.AGREE, goal_id))
    at = rfc3339(world.clock.now())
    pair: dict[str, object] = {
        "trigger_exclusive_goal": goal_id,
        "trigger_exclusive_goal_agreed": at,
        "trigger_exclusive_goal_ended": True,
    }
    assert (await view())["exclusive_goal_pairs"] == {"ben": pair}
    assert (await view())["viewers"] == {
        "ben": {
            "nbf": at,
            "duration": 90,
            "exp": rfc3339(world.clock.now() + timedelta(seconds=90)),
        }
    }

    answer = await world.ask(CommandName.START, goal_id)
    assert answer.goal is not None
    pair["exclusive_goal"] = answer.goal["exclusive_goal"]
    assert (await view())["exclusive_goal_pairs"] == {"ben": pair}

    await world.ask(CommandName.FINISH, goal_id)
    pair["exclusive_goal_ended"] = True
    ended = await view()
    assert ended["exclusive_goal_pairs"] == {"ben": pair}
    assert (ended["viewers"], ended["status"]) == ({}, {"exclusive_to": []})


async def test_a_session_that_has_ended_says_when(world: World) -> None:
    session = await world.session()

    assert session_view(session)["ended_at"] is None
    ended, _ = await world.node.sessions.end(session)

    assert isinstance(ended, Session)
    assert session_view(ended) == session_view(session) | {
        "active": False,
        "ended_at": rfc3339(world.clock.now()),
        "version": 2,
    }


def test_a_pass_keeps_parts_of_a_second() -> None:
    nbf = datetime(2026, 11, 22, 17, 25, tzinfo=UTC)
    entry = ViewerPass(nbf=nbf, duration=61.5, exp=nbf + timedelta(seconds=61.5))

    assert pass_view(entry) == {
        "nbf": "2026-11-22T17:25:00.000Z",
        "duration": 61.5,
        "exp": "2026-11-22T17:26:01.500Z",
    }
