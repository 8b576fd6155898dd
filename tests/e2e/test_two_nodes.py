"""Two gateway processes on the same stores are one gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.stage import authorized, reply, to_audience, to_streamer, to_viewer

if TYPE_CHECKING:
    from tests.e2e.gateway_process import GatewayBuilder
    from tests.e2e.stage import StageBuilder

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)


async def test_parties_on_different_nodes_hear_the_same_as_on_one(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with()
    other_node = await gateway_with()
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer, gateway=other_node)
    bystander = await stage.viewer("bystander", streamer, gateway=other_node)
    await stage.mark()

    goal = await stage.invited(viewer)
    await stage.assert_received(
        {
            streamer: to_streamer("goal.added", streamer),
            viewer: [*reply(viewer), *to_viewer("escrow.held", viewer)],
        }
    )
    await stage.mark()
    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    await stage.assert_received(
        {
            streamer: [*reply(streamer), *to_streamer("goal.ended", streamer)],
            viewer: [*to_audience("goal.ended", streamer), *authorized(streamer, viewer)],
            bystander: to_audience("goal.ended", streamer),
        }
    )
    await stage.mark()
    await streamer.succeed("client-exclusive.start", goal_id=goal["id"])
    await viewer.succeed("client-exclusive.finish", goal_id=goal["id"])
    over = [
        *to_audience("exclusive.started", streamer),
        *to_audience("exclusive.ended", streamer),
        *to_audience("goal.ended", streamer),
    ]
    await stage.assert_received(
        {
            streamer: [
                *reply(streamer),
                *to_streamer("exclusive.started", streamer),
                *to_streamer("exclusive.ended", streamer),
                *to_streamer("goal.ended", streamer),
            ],
            viewer: [
                *reply(viewer),
                *over,
                *to_viewer("escrow.captured", viewer),
                *authorized(streamer, viewer),
            ],
            bystander: [*over, *authorized(streamer, bystander)],
        }
    )
    await stage.books.assert_money_conserved(stage.session_id)


async def test_a_command_on_a_node_that_has_no_party_reaches_all_of_them(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with()
    other_node = await gateway_with()
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()

    response = await other_node.call(
        "DELETE",
        f"/goals/{goal['id']}",
        user_id=streamer.user_id,
        role="streamer",
        body={"agree": True},
    )

    assert response.status_code == 200, response.text
    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [*to_audience("goal.ended", streamer), *authorized(streamer, viewer)],
        }
    )


@pytest.mark.pusher("1.6", "presence counts the members of every node, a user once")
async def test_presence_counts_the_members_of_every_node_and_a_user_once(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with()
    other_node = await gateway_with()
    streamer = await stage.streamer()
    viewer = await stage.party("viewer", "viewer", gateway=other_node)
    since = streamer.mark()

    seen = await viewer.subscribe(streamer.audience_channel)
    added = await streamer.expect("pusher:member_added", streamer.audience_channel)
    again = await stage.party("viewer", "viewer")
    await again.subscribe(streamer.audience_channel)
    await again.disconnect()
    await viewer.disconnect()
    removed = await streamer.expect("pusher:member_removed", streamer.audience_channel)

    assert set(seen.data["members"]) == {streamer.user_id, viewer.user_id}
    assert seen.data["me"] == viewer.user_id
    assert added.data["id"] == removed.data["id"] == viewer.user_id
    told = [
        record.event
        for record in streamer.received[since:]
        if record.kind == "event"
        and record.event in {"pusher:member_added", "pusher:member_removed"}
    ]
    assert told == ["pusher:member_added", "pusher:member_removed"]


async def test_the_session_token_read_on_one_node_is_fresh_after_a_command_on_another(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with()
    other_node = await gateway_with()
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer, gateway=other_node)
    path = f"/sessions/{stage.session_id}/token"
    await other_node.call("GET", path, user_id=viewer.user_id, role="viewer")
    goal = await stage.invited(viewer)
    await other_node.call("GET", path, user_id=viewer.user_id, role="viewer")

    await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    token = await other_node.call("GET", path, user_id=viewer.user_id, role="viewer")

    assert token.status_code == 200, token.text
    assert token.json()["duration"] == 360


@pytest.mark.pusher("1.6", "the members of a killed node leave, once")
async def test_members_of_a_killed_node_leave_once_when_its_lease_runs_out(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with(DUET_NODE_LEASE_S="2")
    doomed = await gateway_with(DUET_NODE_LEASE_S="2")
    streamer = await stage.streamer()
    viewer = await stage.socket("viewer", "viewer", gateway=doomed)
    await viewer.subscribe(streamer.audience_channel)
    await streamer.expect("pusher:member_added", streamer.audience_channel)

    doomed.kill()

    removed = await streamer.expect("pusher:member_removed", streamer.audience_channel)
    assert removed.data["id"] == viewer.user_id
    await stage.settle()
    assert [
        record.event
        for record in streamer.received
        if record.kind == "event" and record.event == "pusher:member_removed"
    ] == ["pusher:member_removed"]
