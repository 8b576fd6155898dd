"""What follows an agreement: the show, its end by hand and by the clock, or the refund."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from tests.e2e.stage import (
    AMOUNT_MINOR,
    authorized,
    reply,
    to_audience,
    to_streamer,
    to_viewer,
)

# Half a second when idle; a busy machine may double it.
LATE_AT_MOST_S = 1.0

if TYPE_CHECKING:
    from tests.e2e.party import Party
    from tests.e2e.stage import Push, Stage, StageBuilder

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)


async def test_starting_captures_the_money_and_everyone_watching_hears_it(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    bystander = await stage.viewer("bystander", streamer)
    goal = await stage.invited(viewer)
    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await stage.mark()

    live = await streamer.succeed("client-exclusive.start", goal_id=goal["id"])

    await stage.assert_received(
        {
            streamer: [*reply(streamer), *to_streamer("exclusive.started", streamer)],
            viewer: [
                *to_audience("exclusive.started", streamer),
                *to_viewer("escrow.captured", viewer),
            ],
            bystander: to_audience("exclusive.started", streamer),
        }
    )
    assert live["state"] == "live"
    started = stage.received(streamer, "exclusive.started")[0]
    assert started.pop("event_id")
    assert started["session_id"] == stage.session_id
    assert started["exclusive_to"] == viewer.user_id
    (captured,) = stage.received(viewer, "escrow.captured")
    assert (captured["goal_id"], captured["amount"]) == (goal["id"], AMOUNT_MINOR)
    session = await stage.books.session(stage.session_id)
    show_id = session["exclusive_goal_pairs"][viewer.user_id]["exclusive_goal"]
    assert (await stage.books.goal(str(show_id)))["_cls"] == "ExclusiveGoal"
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{viewer.user_id}": -AMOUNT_MINOR,
        f"streamer:{streamer.user_id}": AMOUNT_MINOR,
    }


async def test_the_viewer_can_finish_the_show_and_the_room_is_authorized_again(
    stage: Stage,
) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    bystander = await stage.viewer("bystander", streamer)
    goal = await stage.invited(viewer)
    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await streamer.succeed("client-exclusive.start", goal_id=goal["id"])
    await stage.mark()

    finished = await viewer.succeed("client-exclusive.finish", goal_id=goal["id"])

    assert (finished["state"], finished["outcome"]) == ("ended", "captured")
    await assert_show_ended(stage, streamer, viewer, bystander, replied=reply(viewer))
    await stage.books.assert_money_conserved(stage.session_id)


async def test_the_show_ends_by_the_clock(stage_with: StageBuilder) -> None:
    stage = await stage_with(DUET_SHOW_GRACE_S="0")
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    bystander = await stage.viewer("bystander", streamer)
    goal = await stage.invited(viewer, prepaid_duration=3)
    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await streamer.succeed("client-exclusive.start", goal_id=goal["id"])
    await stage.mark()

    ended = await stage.books.until_state(goal["id"], "ended")

    assert ended["outcome"] == "captured"
    await assert_show_ended(stage, streamer, viewer, bystander, replied=[])
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{viewer.user_id}": -AMOUNT_MINOR,
        f"streamer:{streamer.user_id}": AMOUNT_MINOR,
    }
    await stage.books.assert_money_conserved(stage.session_id)


async def assert_show_ended(
    stage: Stage, streamer: Party, viewer: Party, bystander: Party, *, replied: list[Push]
) -> None:
    """Everyone hears that the show and its goal are over and may watch the stream again."""
    over = [*to_audience("exclusive.ended", streamer), *to_audience("goal.ended", streamer)]
    await stage.assert_received(
        {
            streamer: [
                *to_streamer("exclusive.ended", streamer),
                *to_streamer("goal.ended", streamer),
            ],
            viewer: [*over, *authorized(streamer, viewer), *replied],
            bystander: [*over, *authorized(streamer, bystander)],
        }
    )
    assert {data["_cls"] for data in stage.received(bystander, "goal.ended")} == {"ExclusiveGoal"}


async def test_an_invitation_that_nobody_answers_expires_and_is_refunded(
    stage_with: StageBuilder,
) -> None:
    stage = await stage_with(DUET_INVITATION_TTL_S="3")
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()

    ended = await stage.books.until_state(goal["id"], "ended")

    assert (ended["reason"], ended["outcome"]) == ("expired", "refunded")
    (release,) = [p for p in await stage.books.postings(goal["id"]) if p["movement"] == "release"]
    late_s = (release["at"] - datetime.fromisoformat(goal["exp"])).total_seconds()
    assert 0 <= late_s < LATE_AT_MOST_S
    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [
                *to_audience("goal.ended", streamer),
                *to_viewer("escrow.released", viewer),
            ],
        }
    )
    (released,) = stage.received(viewer, "escrow.released")
    assert released["reason"] == "expired"
    assert await stage.books.balances(stage.session_id) == {}
    late = await streamer.fail("client-goal.agree", goal_id=goal["id"])
    assert (late["code"], late["retryable"]) == ("goal_expired", False)


async def test_an_agreed_show_that_never_starts_is_refunded(stage_with: StageBuilder) -> None:
    stage = await stage_with(DUET_REFUND_DELAY_S="3")
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    agreed = await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await stage.mark()

    ended = await stage.books.until_state(goal["id"], "ended")

    assert (ended["reason"], ended["outcome"]) == ("not_started", "refunded")
    await stage.assert_received(
        {streamer: [], viewer: to_viewer("escrow.released", viewer)},
    )
    (released,) = stage.received(viewer, "escrow.released")
    assert (released["goal_id"], released["reason"]) == (agreed["id"], "not_started")
    assert await stage.books.movements(goal["id"]) == {"hold": 1, "release": 1}
    assert await stage.books.balances(stage.session_id) == {}
    refused = await streamer.fail("client-exclusive.start", goal_id=goal["id"])
    assert refused["code"] == "goal_already_ended"

    # The stream is free again for another viewer.
    other = await stage.viewer("other", streamer)
    second = await stage.invited(other)
    assert (await streamer.succeed("client-goal.agree", goal_id=second["id"]))["state"] == "agreed"


async def test_a_show_that_was_started_is_never_refunded(stage_with: StageBuilder) -> None:
    stage = await stage_with(DUET_REFUND_DELAY_S="1", DUET_SHOW_GRACE_S="0")
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer, prepaid_duration=3)
    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await streamer.succeed("client-exclusive.start", goal_id=goal["id"])

    # The show ends after the moment of the refund check.
    ended = await stage.books.until_state(goal["id"], "ended")

    assert ended["outcome"] == "captured"
    assert await stage.books.movements(goal["id"]) == {"hold": 1, "capture": 1}
