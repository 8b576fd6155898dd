"""A stage that the checker does not let anybody leave when something is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from bson import ObjectId

from tests.e2e.books import Books
from tests.faults.judged_stage import JudgedStage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.e2e.gateway_process import Gateway


async def lose_a_posting(stage: JudgedStage) -> None:
    session_id = ObjectId(stage.session_id)
    await stage.books.database["escrow"].delete_one({"session_id": session_id})


async def go_deaf(stage: JudgedStage) -> None:
    assert stage.ear is not None
    stage.ear.received = [replace(one, channel="elsewhere") for one in stage.ear.received]


async def drop_what_a_socket_received(stage: JudgedStage) -> None:
    for socket in stage.sockets:
        socket.received = [
            replace(one, event="elsewhere") if one.event == "escrow.held" else one
            for one in socket.received
        ]


async def undo_the_agreement(stage: JudgedStage) -> None:
    goals = stage.books.database["goals"]
    session_id = ObjectId(stage.session_id)
    await goals.update_one({"conditions.session_id": session_id}, {"$set": {"state": "invited"}})


@pytest.mark.parametrize(
    ("over", "wrong", "complaint"),
    [
        ("sockets", lose_a_posting, "escrow is conserved"),
        ("http", go_deaf, "ear never got goal.added"),
        (
            "sockets",
            undo_the_agreement,
            "says ended: True, and the goal is invited",
        ),
        ("http", lose_a_posting, "escrow is conserved"),
        ("sockets", drop_what_a_socket_received, "viewer-.* never got escrow.held"),
    ],
)
async def test_what_is_wrong_is_said_when_the_stage_is_left(
    shared_gateway: Gateway,
    over: str,
    wrong: Callable[[JudgedStage], Awaitable[None]],
    complaint: str,
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        await play(shared_gateway, over, wrong)


async def play(
    gateway: Gateway, over: str, wrong: Callable[[JudgedStage], Awaitable[None]]
) -> None:
    async with Books(gateway.stores) as books:
        stage = JudgedStage(gateway, books)
        try:
            async with stage:
                await agree(stage, over)
                assert await stage.verdict() == []
                await wrong(stage)
        finally:
            # The gateway serves others after this, and its timers are not to find what is wrong.
            session_id = ObjectId(stage.session_id)
            await books.database["goals"].delete_many({"conditions.session_id": session_id})


async def agree(stage: JudgedStage, over: str) -> None:
    """Plays an invitation to the agreement."""
    streamer, viewer = stage.user("streamer"), stage.user("viewer")
    await stage.open_session(streamer)
    if over == "sockets":
        own = await stage.socket("streamer", "streamer")
        invited = await (await stage.socket("viewer", "viewer")).command(
            "client-goal.invite", **stage.terms()
        )
        answer = await own.command("client-goal.agree", goal_id=invited["goal"]["id"])
        assert answer["ok"] is True
        return
    call = stage.gateway.call
    invitation = await call("POST", "/goals", user_id=viewer, role="viewer", body=stage.terms())
    path = f"/goals/{invitation.json()['id']}"
    agreement = {"agree": True}
    answered = await call("DELETE", path, user_id=streamer, role="streamer", body=agreement)
    assert answered.is_success
