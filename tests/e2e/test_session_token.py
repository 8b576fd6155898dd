"""The session-token view: cached for everyone, and never stale for who has heard the news."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jwt
import pytest

from tests.e2e.stage import PREPAID_S

if TYPE_CHECKING:
    from tests.e2e.gateway_process import Gateway, GatewayBuilder
    from tests.e2e.stage import StageBuilder
    from tests.e2e.wire_socket import WireSocket

pytestmark = pytest.mark.timeout(120)

SHOW_GRACE_S = 60


async def _pass(
    gateway: Gateway, session_id: str, socket: WireSocket, role: str = "viewer"
) -> tuple[int, Any]:
    response = await gateway.call(
        "GET", f"/sessions/{session_id}/token", user_id=socket.user_id, role=role
    )
    return response.status_code, response.json()


async def test_who_has_seen_a_reply_reads_no_stale_view_on_any_node(
    stage_with: StageBuilder, gateway_with: GatewayBuilder
) -> None:
    stage = await stage_with()
    nodes = [stage.gateway, await gateway_with()]
    streamer = await stage.socket("streamer", "streamer")
    session_id = await stage.open_session(streamer.user_id)
    viewer = await stage.socket("viewer", "viewer")
    bystander = await stage.socket("bystander", "viewer")
    # Both nodes have the views of a stream that is open to everyone in the cache.
    for node in nodes:
        for socket in (viewer, bystander):
            status, view = await _pass(node, session_id, socket)
            assert status == 200
            assert view["duration"] == 3600
    reply = await viewer.command("client-goal.invite", **stage.terms())
    goal = reply["goal"]

    agreed = (await streamer.command("client-goal.agree", goal_id=goal["id"]))["goal"]
    for node in nodes:
        status, view = await _pass(node, session_id, viewer)
        assert (status, view["duration"]) == (200, PREPAID_S + SHOW_GRACE_S)
        claims = jwt.decode(view["token"], options={"verify_signature": False})
        assert claims["exclusive"] is True
        assert claims["exp"] - claims["nbf"] == PREPAID_S + SHOW_GRACE_S
        status, problem = await _pass(node, session_id, bystander)
        assert (status, problem["code"]) == (403, "forbidden")
    assert agreed["state"] == "agreed"

    await streamer.command("client-exclusive.start", goal_id=goal["id"])
    await viewer.command("client-exclusive.finish", goal_id=goal["id"])
    for node in nodes:
        for socket in (viewer, bystander):
            status, view = await _pass(node, session_id, socket)
            assert (status, view["duration"]) == (200, 3600)


async def test_a_view_is_handed_out_again_until_it_is_dropped(stage_with: StageBuilder) -> None:
    stage = await stage_with()
    streamer = await stage.socket("streamer", "streamer")
    session_id = await stage.open_session(streamer.user_id)
    viewer = await stage.socket("viewer", "viewer")

    _, first = await _pass(stage.gateway, session_id, viewer)
    _, again = await _pass(stage.gateway, session_id, viewer)

    assert again == first
