"""The same invitation through HTTP: same decisions, same events, the JWT's app as triggerer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import jwt
import pytest

from tests.e2e.gateway_process import CLIENT_ID, JWT_SECRET
from tests.e2e.stage import (
    AMOUNT_MINOR,
    PREPAID_S,
    authorized,
    to_audience,
    to_streamer,
    to_viewer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.e2e.party import Party
    from tests.e2e.stage import Stage


async def as_party(stage: Stage, party: Party, method: str, path: str, body: Any = None) -> Any:
    """An HTTP call by that party which has to succeed."""
    response = await stage.gateway.call(
        method, path, user_id=party.user_id, role=party.role, body=body
    )
    assert response.status_code in {200, 201}, response.text
    return response.json()


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    """RFC 9457: a problem document that names its code."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    assert response.json()["code"] == code
    assert response.json()["status"] == status


async def test_delete_with_agree_true_does_what_the_socket_does(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    bystander = await stage.viewer("bystander", streamer)
    await stage.mark()

    goal = await as_party(stage, viewer, "POST", "/goals", stage.terms())
    await stage.assert_received(
        {
            streamer: to_streamer("goal.added", streamer),
            viewer: to_viewer("escrow.held", viewer),
        }
    )
    assert goal["triggerer"] == CLIENT_ID
    assert goal == await as_party(stage, viewer, "GET", f"/goals/{goal['id']}")
    await stage.mark()

    agreed = await as_party(stage, streamer, "DELETE", f"/goals/{goal['id']}", {"agree": True})

    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [*to_audience("goal.ended", streamer), *authorized(streamer, viewer)],
            bystander: to_audience("goal.ended", streamer),
        }
    )
    assert agreed["state"] == "agreed"
    ended = stage.received(bystander, "goal.ended")[0]
    agreed_at = ended["metadata"]["agreed"]
    assert ended.pop("event_id")
    assert ended == {
        "goal_id": goal["id"],
        "_cls": "TriggerExclusiveGoal",
        "active": False,
        "progress": 1,
        "levels": [],
        "conditions": {"session_id": stage.session_id, "exclusive_to": viewer.user_id},
        "context": {"type": "trigger-exclusive", "exclusive_to": viewer.user_id},
        "exp": agreed["exp"],
        "triggerer": CLIENT_ID,
        "metadata": {
            "user_id": streamer.user_id,
            "prepaid_duration": PREPAID_S,
            "agreed": agreed_at,
        },
    }


async def test_delete_with_agree_false_does_what_the_socket_does(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await as_party(stage, viewer, "POST", "/goals", stage.terms())
    await stage.mark()

    declined = await as_party(stage, streamer, "DELETE", f"/goals/{goal['id']}", {"agree": False})

    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [
                *to_audience("goal.ended", streamer),
                *to_viewer("escrow.released", viewer),
            ],
        }
    )
    assert declined["reason"] == "disagreed"
    (ended,) = stage.received(viewer, "goal.ended")
    assert ended["metadata"] == {"user_id": streamer.user_id, "prepaid_duration": PREPAID_S}
    assert ended["triggerer"] == CLIENT_ID
    assert await stage.books.balances(stage.session_id) == {}


async def test_withdraw_start_and_finish_over_http(stage: Stage) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    first = await as_party(stage, viewer, "POST", "/goals", stage.terms())
    withdrawn = await as_party(stage, viewer, "POST", f"/goals/{first['id']}/withdraw")
    assert withdrawn["reason"] == "withdrawn"
    second = await as_party(stage, viewer, "POST", "/goals", stage.terms())
    await as_party(stage, streamer, "DELETE", f"/goals/{second['id']}", {"agree": True})
    await stage.mark()

    path = f"/sessions/{stage.session_id}/exclusive"
    started = await as_party(stage, streamer, "POST", path, {"goal_id": second["id"]})
    await stage.assert_received(
        {
            streamer: to_streamer("exclusive.started", streamer),
            viewer: [
                *to_audience("exclusive.started", streamer),
                *to_viewer("escrow.captured", viewer),
            ],
        }
    )
    finished = await as_party(stage, viewer, "DELETE", path)

    assert started["state"] == "live"
    assert (finished["state"], finished["outcome"]) == ("ended", "captured")
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{viewer.user_id}": -AMOUNT_MINOR,
        f"streamer:{streamer.user_id}": AMOUNT_MINOR,
    }
    await stage.books.assert_money_conserved(stage.session_id)


async def test_the_session_token_is_never_stale_for_who_has_heard_the_reply(
    stage: Stage,
) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    path = f"/sessions/{stage.session_id}/token"
    refused = await stage.gateway.call("GET", path, user_id=viewer.user_id, role="viewer")
    before = refused.json()
    goal = await stage.invited(viewer)

    agreed = await streamer.succeed("client-goal.agree", goal_id=goal["id"])
    after = await as_party(stage, viewer, "GET", path)

    assert after != before
    assert after["duration"] == 60 + PREPAID_S
    claims = jwt.decode(
        after["token"], JWT_SECRET, algorithms=["HS256"], options={"verify_aud": False}
    )
    assert claims["exp"] - claims["nbf"] == 60 + PREPAID_S
    assert agreed["state"] == "agreed"


@pytest.mark.parametrize("agree", [True, False])
async def test_deleting_twice_is_refused_with_the_state_that_stands(
    stage: Stage, agree: bool
) -> None:
    streamer = stage.user("streamer")
    viewer = stage.user("viewer")
    session_id = await stage.open_session(streamer)
    created = await stage.gateway.call(
        "POST", "/goals", user_id=viewer, role="viewer", body=stage.terms(session_id=session_id)
    )
    assert created.status_code == 201, created.text
    path = f"/goals/{created.json()['id']}"

    first = await stage.gateway.call(
        "DELETE", path, user_id=streamer, role="streamer", body={"agree": agree}
    )
    second = await stage.gateway.call(
        "DELETE", path, user_id=streamer, role="streamer", body={"agree": not agree}
    )

    assert first.status_code == 200, first.text
    assert second.status_code == 409, second.text
    assert second.json()["code"] in (
        {"goal_already_agreed"} if agree else {"goal_already_declined", "goal_already_ended"}
    )
    await stage.books.assert_money_conserved(session_id)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("DELETE", "/goals/000000000000000000000000", {"agree": True}, 404, "unknown_goal"),
        ("DELETE", "/goals/not-an-id", {"agree": True}, 404, "unknown_goal"),
        ("DELETE", "/goals/$where", {"agree": True}, 404, "unknown_goal"),
        ("DELETE", "/goals/000000000000000000000000", {"agree": "yes"}, 400, "malformed"),
        ("DELETE", "/goals/000000000000000000000000", {}, 400, "malformed"),
        ("DELETE", "/goals/000000000000000000000000", [], 400, "malformed"),
        ("GET", "/goals/000000000000000000000000", None, 404, "unknown_goal"),
        ("PUT", "/goals/000000000000000000000000", {}, 405, "method_not_allowed"),
        ("GET", "/nowhere", None, 404, "not_found"),
    ],
)
async def test_bad_calls_are_answered_with_problem_documents(
    stage: Stage, method: str, path: str, body: Any, status: int, code: str
) -> None:
    response = await stage.gateway.call(
        method, path, user_id=stage.user("streamer"), role="streamer", body=body
    )

    assert_problem(response, status, code)


async def test_who_has_no_token_is_refused(stage: Stage) -> None:
    response = await stage.gateway.call("POST", "/sessions", body={})

    assert_problem(response, 401, "unauthenticated")


async def test_malformed_json_is_refused(stage: Stage) -> None:
    response = await stage.gateway.call(
        "POST", "/goals", user_id=stage.user("viewer"), role="viewer", content=b'{"session_id":'
    )

    assert_problem(response, 400, "malformed")


async def test_a_body_over_the_limit_is_refused(stage: Stage) -> None:
    response = await stage.gateway.call(
        "POST",
        "/goals",
        user_id=stage.user("viewer"),
        role="viewer",
        content=b'{"session_id":"' + b"a" * 262_144 + b'"}',
    )

    assert_problem(response, 413, "body_too_large")


async def test_a_body_that_does_not_say_how_long_it_is_is_cut_off_at_the_limit(
    stage: Stage,
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"a" * 8_192

    headers = {
        "Authorization": f"Bearer {stage.gateway.token(stage.user('viewer'), 'viewer')}",
        "Content-Type": "application/json",
    }
    async with httpx.AsyncClient(timeout=10) as client:
        response = await client.post(
            f"{stage.gateway.url}/goals", content=endless(), headers=headers
        )

    assert_problem(response, 413, "body_too_large")
