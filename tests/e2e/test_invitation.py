"""An invitation that is answered: agreed or not, by whom, heard by whom."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.e2e.gateway_process import APP_KEY
from tests.e2e.stage import (
    AMOUNT_MINOR,
    PREPAID_S,
    authorized,
    reply,
    to_audience,
    to_streamer,
    to_viewer,
)

if TYPE_CHECKING:
    from typing import Any

    from tests.e2e.party import Party
    from tests.e2e.stage import Stage


def arguments_of_goal_ended(
    goal: dict[str, Any], streamer: Party, viewer: Party, session_id: str
) -> dict[str, Any]:
    """The requirements' arguments that a test knows beforehand; exp and agreed it only checks."""
    return {
        "goal_id": goal["id"],
        "_cls": "TriggerExclusiveGoal",
        "active": False,
        "progress": 1,
        "levels": [],
        "conditions": {"session_id": session_id, "exclusive_to": viewer.user_id},
        "context": {"type": "trigger-exclusive", "exclusive_to": viewer.user_id},
        "triggerer": APP_KEY,
        "metadata": {"user_id": streamer.user_id, "prepaid_duration": PREPAID_S},
    }


async def test_the_streamer_hears_of_an_invitation_and_the_viewer_that_the_money_is_held(
    stage: Stage,
) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    bystander = await stage.viewer("bystander", streamer)
    await stage.mark()

    goal = await stage.invited(viewer)

    await stage.assert_received(
        {
            streamer: to_streamer("goal.added", streamer),
            viewer: [*reply(viewer), *to_viewer("escrow.held", viewer)],
            bystander: [],
        }
    )
    assert goal["state"] == "invited"
    assert goal["active"] is True
    assert goal["amount"] == AMOUNT_MINOR
    assert goal["breakdown"] == {viewer.user_id: AMOUNT_MINOR}
    assert goal["metadata"] == {"user_id": streamer.user_id, "prepaid_duration": PREPAID_S}
    for added in stage.received(streamer, "goal.added"):
        assert added.pop("event_id")
        assert added == goal
    (held,) = stage.received(viewer, "escrow.held")
    assert (held["goal_id"], held["amount"]) == (goal["id"], AMOUNT_MINOR)
    assert await stage.books.movements(goal["id"]) == {"hold": 1}
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{viewer.user_id}": -AMOUNT_MINOR,
        "escrow": AMOUNT_MINOR,
    }


@pytest.mark.parametrize("by", ["endpoint", "signin", "backend"])
async def test_agreeing_tells_each_party_exactly_what_concerns_it(stage: Stage, by: str) -> None:
    streamer = await stage.streamer(by=by)
    viewer = await stage.viewer("viewer", streamer, by=by)
    bystander = await stage.viewer("bystander", streamer, by=by)
    goal = await stage.invited(viewer)
    await stage.mark()

    agreed = await streamer.succeed("client-goal.agree", goal_id=goal["id"])

    await stage.assert_received(
        {
            streamer: [*reply(streamer), *to_streamer("goal.ended", streamer)],
            viewer: [*to_audience("goal.ended", streamer), *authorized(streamer, viewer)],
            bystander: to_audience("goal.ended", streamer),
        }
    )
    assert agreed["state"] == "agreed"
    assert agreed["active"] is False

    # The same event on every channel, with the requirements' arguments and event_id alone.
    ended = [
        *stage.received(streamer, "goal.ended"),
        *stage.received(viewer, "goal.ended"),
        *stage.received(bystander, "goal.ended"),
    ]
    assert all(data == ended[0] for data in ended)
    assert ended[0].pop("event_id")
    exp = ended[0].pop("exp")
    assert exp == agreed["exp"]
    assert exp <= goal["exp"]
    agreed_at = ended[0]["metadata"].pop("agreed")
    assert ended[0] == arguments_of_goal_ended(goal, streamer, viewer, stage.session_id)

    (authorization,) = stage.received(viewer, "stream.authorized")
    assert authorization.pop("event_id")
    duration_s = 60 + PREPAID_S
    until = datetime.fromisoformat(agreed_at) + timedelta(seconds=duration_s)
    assert datetime.fromisoformat(authorization.pop("exp")) == until
    assert authorization == {
        "session_id": stage.session_id,
        "streamer_id": streamer.user_id,
        "viewer_id": viewer.user_id,
        "nbf": agreed_at,
        "duration": duration_s,
    }

    session = await stage.books.session(stage.session_id)
    pair = session["exclusive_goal_pairs"][viewer.user_id]
    assert str(pair["trigger_exclusive_goal"]) == goal["id"]
    assert pair["trigger_exclusive_goal_ended"] is True
    assert pair["trigger_exclusive_goal_agreed"] == datetime.fromisoformat(agreed_at)
    assert session["status"]["exclusive_to"] == [viewer.user_id]
    assert session["viewers"][viewer.user_id]["duration"] == duration_s
    assert await stage.books.movements(goal["id"]) == {"hold": 1}
    assert await stage.books.records_of(goal["id"]) == 1


async def test_a_socket_that_carries_the_jwt_needs_no_signature(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.socket("viewer", "viewer")
    await viewer.subscribe(f"presence-stream-viewer@{streamer.user_id}.preview.{viewer.user_id}")

    invited = await viewer.command("client-goal.invite", **stage.terms())
    assert invited["ok"] is True, invited
    await streamer.succeed("client-goal.agree", goal_id=invited["goal"]["id"])

    authorization = await viewer.expect("stream.authorized")
    assert authorization.data["viewer_id"] == viewer.user_id


async def test_disagreeing_gives_the_money_back_and_authorizes_nobody(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    bystander = await stage.viewer("bystander", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()

    declined = await streamer.succeed("client-goal.disagree", goal_id=goal["id"])

    await stage.assert_received(
        {
            streamer: [*reply(streamer), *to_streamer("goal.ended", streamer)],
            viewer: [
                *to_audience("goal.ended", streamer),
                *to_viewer("escrow.released", viewer),
            ],
            bystander: to_audience("goal.ended", streamer),
        }
    )
    assert declined["reason"] == "disagreed"
    ended = stage.received(streamer, "goal.ended")
    assert ended[0] == ended[1] == ended[2]
    assert ended[0].pop("event_id")
    assert ended[0].pop("exp") == declined["exp"]
    assert ended[0] == arguments_of_goal_ended(goal, streamer, viewer, stage.session_id)
    (released,) = stage.received(viewer, "escrow.released")
    assert released["goal_id"] == goal["id"]
    assert released["amount"] == AMOUNT_MINOR
    assert released["reason"] == "disagreed"

    settled = await stage.books.until_state(goal["id"], "ended")
    assert settled["outcome"] == "refunded"
    session = await stage.books.session(stage.session_id)
    assert session["status"]["exclusive_to"] == []
    assert session["viewers"] == {}
    assert "trigger_exclusive_goal_agreed" not in session["exclusive_goal_pairs"][viewer.user_id]
    assert await stage.books.balances(stage.session_id) == {}
    await stage.books.assert_money_conserved(stage.session_id)


async def test_withdrawing_gives_the_money_back(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()

    withdrawn = await viewer.succeed("client-goal.withdraw", goal_id=goal["id"])

    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [
                *reply(viewer),
                *to_audience("goal.ended", streamer),
                *to_viewer("escrow.released", viewer),
            ],
        }
    )
    assert withdrawn["reason"] == "withdrawn"
    (released,) = stage.received(viewer, "escrow.released")
    assert released["reason"] == "withdrawn"
    assert await stage.books.balances(stage.session_id) == {}


async def test_agreeing_with_one_viewer_refunds_the_other_at_once(stage: Stage) -> None:
    streamer = await stage.streamer()
    chosen = await stage.viewer("chosen", streamer)
    other = await stage.viewer("other", streamer)
    goal = await stage.invited(chosen)
    lost = await stage.invited(other, amount=AMOUNT_MINOR + 1)
    await stage.mark()

    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await stage.books.until_state(lost["id"], "ended")

    await stage.assert_received(
        {
            streamer: [
                *reply(streamer),
                *to_streamer("goal.ended", streamer),
                *to_streamer("goal.ended", streamer),
            ],
            chosen: [
                *to_audience("goal.ended", streamer),
                *to_audience("goal.ended", streamer),
                *authorized(streamer, chosen),
            ],
            other: [
                *to_audience("goal.ended", streamer),
                *to_audience("goal.ended", streamer),
                *to_viewer("escrow.released", other),
            ],
        }
    )
    ended_ids = {data["goal_id"] for data in stage.received(other, "goal.ended")}
    assert ended_ids == {goal["id"], lost["id"]}
    (of_loser,) = (
        data for data in stage.received(other, "goal.ended") if data["goal_id"] == lost["id"]
    )
    assert "agreed" not in of_loser["metadata"]
    (released,) = stage.received(other, "escrow.released")
    assert (released["goal_id"], released["amount"], released["reason"]) == (
        lost["id"],
        AMOUNT_MINOR + 1,
        "superseded",
    )
    superseded = await stage.books.goal(lost["id"])
    assert (superseded["reason"], superseded["outcome"]) == ("superseded", "refunded")
    session = await stage.books.session(stage.session_id)
    assert set(session["exclusive_goal_pairs"]) == {chosen.user_id}
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{chosen.user_id}": -AMOUNT_MINOR,
        "escrow": AMOUNT_MINOR,
    }
    await stage.books.assert_money_conserved(stage.session_id)


async def test_ending_the_stream_closes_its_invitations_and_refunds_them(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()

    response = await stage.gateway.call(
        "DELETE", f"/sessions/{stage.session_id}", user_id=streamer.user_id, role="streamer"
    )

    assert response.status_code == 200, response.text
    ended = await stage.books.until_state(goal["id"], "ended")
    assert (ended["reason"], ended["outcome"]) == ("stream_ended", "refunded")
    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [
                *to_audience("goal.ended", streamer),
                *to_viewer("escrow.released", viewer),
            ],
        }
    )
    assert await stage.books.balances(stage.session_id) == {}
