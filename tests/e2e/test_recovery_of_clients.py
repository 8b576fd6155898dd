"""A client that was away is right again after one frame, and its repeated command harms nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.stage import reply, to_streamer, to_viewer

if TYPE_CHECKING:
    from tests.e2e.gateway_process import GatewayBuilder
    from tests.e2e.stage import Stage, StageBuilder

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)


async def test_the_snapshot_holds_every_goal_of_the_user_that_has_not_ended(stage: Stage) -> None:
    streamer = await stage.streamer()
    first = await stage.viewer("first", streamer)
    second = await stage.viewer("second", streamer)
    gone = await stage.invited(first)
    await first.succeed("client-goal.withdraw", goal_id=gone["id"])
    await stage.books.until_state(gone["id"], "ended")
    of_first = await stage.invited(first)
    of_second = await stage.invited(second)

    await streamer.disconnect()
    await streamer.reconnect()
    snapshot = await streamer.expect("goal.snapshot", streamer.own_channel)
    await second.disconnect()
    await second.reconnect()
    snapshot_of_second = await second.expect("goal.snapshot", second.own_channel)

    assert {goal["id"]: goal for goal in snapshot.data["goals"]} == {
        of_first["id"]: of_first,
        of_second["id"]: of_second,
    }
    assert snapshot.data["as_of"] >= of_second["created_at"]
    assert snapshot_of_second.data["goals"] == [of_second]


async def test_the_snapshot_follows_subscription_succeeded_and_comes_before_any_push(
    stage: Stage,
) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    await streamer.disconnect()
    missed = await stage.invited(viewer)
    since = streamer.mark()

    await streamer.reconnect()
    await streamer.expect("goal.snapshot", streamer.own_channel)
    await viewer.succeed("client-goal.withdraw", goal_id=missed["id"])
    await streamer.expect("goal.ended", streamer.own_channel, kind="frame")

    on_own_channel = [
        record.event
        for record in streamer.received[since:]
        if record.kind == "frame" and record.channel == streamer.own_channel
    ]
    assert on_own_channel[:2] == ["pusher_internal:subscription_succeeded", "goal.snapshot"]
    assert set(on_own_channel[2:]) == {"goal.ended"}


async def test_others_never_see_commands_or_replies(stage: Stage) -> None:
    streamer = await stage.streamer()
    elsewhere = await stage.socket("streamer", "streamer")
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await elsewhere.expect("goal.added", elsewhere.own_channel)

    await streamer.succeed("client-goal.disagree", goal_id=goal["id"])
    await elsewhere.expect("goal.ended", elsewhere.own_channel)
    await stage.settle()
    await elsewhere.expect("barrier.1", elsewhere.own_channel)

    assert set(elsewhere.pushes()) == {
        ("goal.snapshot", elsewhere.own_channel),
        ("goal.added", elsewhere.own_channel),
        ("goal.ended", elsewhere.own_channel),
    }


async def test_the_same_request_id_gives_the_same_answer_and_no_second_effect(
    stage: Stage,
) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    await stage.mark()
    request_id = viewer.new_request_id()
    terms = stage.terms()

    first = await viewer.command("client-goal.invite", request_id=request_id, **terms)
    second = await viewer.command("client-goal.invite", request_id=request_id, **terms)
    await viewer.disconnect()
    await viewer.reconnect()
    await viewer.expect("goal.snapshot", viewer.own_channel)
    third = await viewer.command("client-goal.invite", request_id=request_id, **terms)

    assert first["ok"] is True, first
    assert first == second == third
    assert len(await stage.books.goals_of(stage.session_id)) == 1
    assert await stage.books.movements(first["goal"]["id"]) == {"hold": 1}
    await stage.assert_received(
        {
            streamer: to_streamer("goal.added", streamer),
            viewer: [
                *reply(viewer) * 3,
                *to_viewer("escrow.held", viewer),
                ("goal.snapshot", viewer.own_channel),
            ],
        }
    )


async def test_a_repeated_answer_stays_what_it_was_when_the_goal_has_moved_on(
    stage: Stage,
) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    request_id = streamer.new_request_id()
    first = await streamer.command("client-goal.agree", request_id=request_id, goal_id=goal["id"])
    await streamer.succeed("client-exclusive.start", goal_id=goal["id"])

    again = await streamer.command("client-goal.agree", request_id=request_id, goal_id=goal["id"])

    assert first["ok"] is True
    assert again == first


async def test_a_refusal_is_repeated_too(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    request_id = viewer.new_request_id()
    refused = await viewer.command("client-goal.agree", request_id=request_id, goal_id=goal["id"])

    again = await viewer.command("client-goal.agree", request_id=request_id, goal_id=goal["id"])

    assert refused["ok"] is False
    assert again == refused


async def test_a_request_id_of_another_command_is_refused(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    request_id = viewer.new_request_id()
    invited = await viewer.command("client-goal.invite", request_id=request_id, **stage.terms())
    goal_id = invited["goal"]["id"]

    reused = await viewer.command("client-goal.withdraw", request_id=request_id, goal_id=goal_id)
    other_terms = await viewer.command(
        "client-goal.invite", request_id=request_id, **stage.terms(amount=1)
    )

    for refused in (reused, other_terms):
        assert refused["ok"] is False
        assert refused["error"]["code"] == "request_id_reused"
        assert refused["error"]["retryable"] is False
    assert (await stage.books.goal(goal_id))["state"] == "invited"


async def test_a_request_id_belongs_to_its_user(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    request_id = "shared"
    invited = await viewer.command("client-goal.invite", request_id=request_id, **stage.terms())

    agreed = await streamer.command(
        "client-goal.agree", request_id=request_id, goal_id=invited["goal"]["id"]
    )

    assert agreed["ok"] is True, agreed


async def test_an_idempotency_key_is_the_request_id_of_http(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = stage.user("viewer")
    calls = [
        await stage.gateway.call(
            "POST",
            "/goals",
            user_id=viewer,
            role="viewer",
            body=stage.terms(),
            headers={"Idempotency-Key": "once"},
        )
        for _ in range(2)
    ]

    assert [call.status_code for call in calls] == [201, 201]
    assert calls[0].json() == calls[1].json()
    assert len(await stage.books.goals_of(stage.session_id)) == 1
    await streamer.expect("goal.added", streamer.own_channel)


async def test_the_same_request_id_on_another_node_has_no_second_effect(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with()
    other_node = await gateway_with()
    streamer = await stage.streamer()
    here = await stage.socket("viewer", "viewer")
    there = await stage.socket("viewer", "viewer", gateway=other_node)
    terms = stage.terms()

    first = await here.command("client-goal.invite", request_id="once", **terms)
    again = await there.command("client-goal.invite", request_id="once", **terms)

    assert first["ok"] is True, first
    assert again == first
    assert len(await stage.books.goals_of(stage.session_id)) == 1
    await streamer.expect("goal.added", streamer.own_channel)
