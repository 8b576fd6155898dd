"""Many answers at once: the database picks one winner, and the losers learn what they lost to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.stage import AMOUNT_MINOR
from tests.faults.judged_stage import JudgedStage, insist

if TYPE_CHECKING:
    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Gateway, GatewayBuilder
    from tests.e2e.stage import Stage
    from tests.e2e.wire_socket import WireSocket

CONNECTIONS = 10
ANSWERS = 200

pytestmark = pytest.mark.timeout(300)


async def answer_all(
    sockets: list[WireSocket], goal_ids: list[str], events: list[str]
) -> list[dict[str, Any]]:
    """Sends every answer at once, over the connections in turn; returns the replies."""
    async with asyncio.TaskGroup() as tasks:
        answers = [
            tasks.create_task(
                insist(sockets[number % len(sockets)], event, goal_id=goal_id),
                name=f"answer-{number}",
            )
            for number, (event, goal_id) in enumerate(zip(events, goal_ids, strict=True))
        ]
    return [answer.result()[-1] for answer in answers]


async def invitations(stage: Stage, count: int) -> list[str]:
    """That many viewers invite the streamer; returns the goals."""
    goal_ids = []
    for number in range(count):
        response = await stage.gateway.call(
            "POST",
            "/goals",
            user_id=stage.user(f"viewer{number}"),
            role="viewer",
            body=stage.terms(),
        )
        assert response.status_code == 201, response.text
        goal_ids.append(response.json()["id"])
    return goal_ids


async def test_two_hundred_answers_to_one_goal_have_one_winner(stage: Stage) -> None:
    await two_hundred_answers(stage, [stage.gateway])


async def test_two_hundred_answers_over_two_nodes_have_one_winner(
    gateway_with: GatewayBuilder, books: Books
) -> None:
    nodes = [await gateway_with(), await gateway_with()]
    async with JudgedStage(nodes[0], books) as stage:
        await two_hundred_answers(stage, nodes)


async def two_hundred_answers(stage: Stage, nodes: list[Gateway]) -> None:
    await stage.open_session(stage.user("streamer"))
    sockets = [
        await stage.socket("streamer", "streamer", gateway=nodes[number % len(nodes)])
        for number in range(CONNECTIONS)
    ]
    (goal_id,) = await invitations(stage, 1)

    replies = await answer_all(
        sockets,
        [goal_id] * ANSWERS,
        ["client-goal.agree", "client-goal.disagree"] * (ANSWERS // 2),
    )

    await assert_one_winner(stage, goal_id, replies)


async def assert_one_winner(stage: Stage, goal_id: str, replies: list[dict[str, Any]]) -> None:
    winners = [reply for reply in replies if reply["ok"]]
    assert len(winners) == 1
    won = winners[0]["goal"]["state"]
    lost_to = {
        "agreed": ({"goal_already_agreed"}, {"agreed"}),
        "declined": ({"goal_already_declined", "goal_already_ended"}, {"declined", "ended"}),
    }
    codes, states = lost_to["agreed" if won == "agreed" else "declined"]
    for reply in replies:
        if not reply["ok"]:
            assert reply["error"]["code"] in codes
            assert reply["goal"]["state"] in states
            assert reply["goal"]["id"] == goal_id
    await stage.books.until_delivered()
    await stage.books.assert_money_conserved(stage.session_id)
    held = {f"viewer:{stage.user('viewer0')}": -AMOUNT_MINOR, "escrow": AMOUNT_MINOR}
    assert await stage.books.balances(stage.session_id) == (held if won == "agreed" else {})
    assert await stage.books.records_of(goal_id) == 1


async def test_agreeing_to_twenty_goals_of_a_session_at_once_agrees_to_one(stage: Stage) -> None:
    count = 20
    await stage.open_session(stage.user("streamer"))
    sockets = [await stage.socket("streamer", "streamer") for _ in range(4)]
    goal_ids = await invitations(stage, count)

    replies = await answer_all(sockets, goal_ids, ["client-goal.agree"] * count)

    (winner,) = [reply["goal"]["id"] for reply in replies if reply["ok"]]
    lost_codes = {reply["error"]["code"] for reply in replies if not reply["ok"]}
    assert lost_codes <= {"session_busy", "goal_already_declined", "goal_already_ended"}
    for loser in set(goal_ids) - {winner}:
        superseded = await stage.books.until_state(loser, "ended")
        assert (superseded["reason"], superseded["outcome"]) == ("superseded", "refunded")
    await stage.books.until_delivered()
    session = await stage.books.session(stage.session_id)
    assert len(session["exclusive_goal_pairs"]) == 1
    winner_viewer = (await stage.books.goal(winner))["conditions"]["exclusive_to"]
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{winner_viewer}": -AMOUNT_MINOR,
        "escrow": AMOUNT_MINOR,
    }
    await stage.books.assert_money_conserved(stage.session_id)


async def test_an_answer_races_the_withdrawal_and_one_of_them_wins(stage: Stage) -> None:
    await stage.open_session(stage.user("streamer"))
    streamer = await stage.socket("streamer", "streamer")
    viewer = await stage.socket("viewer", "viewer")
    for _ in range(10):
        invited = await viewer.command("client-goal.invite", **stage.terms())
        assert invited["ok"] is True, invited
        goal_id = invited["goal"]["id"]

        async with asyncio.TaskGroup() as tasks:
            disagree = tasks.create_task(insist(streamer, "client-goal.disagree", goal_id=goal_id))
            withdraw = tasks.create_task(insist(viewer, "client-goal.withdraw", goal_id=goal_id))

        assert [disagree.result()[-1]["ok"], withdraw.result()[-1]["ok"]].count(True) == 1
        ended = await stage.books.until_state(goal_id, "ended")
        assert ended["reason"] == ("disagreed" if disagree.result()[-1]["ok"] else "withdrawn")
        assert await stage.books.movements(goal_id) == {"hold": 1, "release": 1}


async def test_viewers_who_invite_at_once_all_get_their_own_goal(stage: Stage) -> None:
    await stage.open_session(stage.user("streamer"))
    viewers = [await stage.socket(f"viewer{number}", "viewer") for number in range(20)]

    async with asyncio.TaskGroup() as tasks:
        invited = [
            tasks.create_task(insist(viewer, "client-goal.invite", **stage.terms()))
            for viewer in viewers
        ]

    goals = [task.result()[-1]["goal"] for task in invited]
    assert len({goal["id"] for goal in goals}) == 20
    session = await stage.books.session(stage.session_id)
    assert {
        user: str(pair["trigger_exclusive_goal"])
        for user, pair in session["exclusive_goal_pairs"].items()
    } == {goal["conditions"]["exclusive_to"]: goal["id"] for goal in goals}
    await stage.books.assert_money_conserved(stage.session_id)


async def test_one_viewer_who_invites_ten_times_at_once_is_held_once(stage: Stage) -> None:
    await stage.open_session(stage.user("streamer"))
    sockets = [await stage.socket("viewer", "viewer") for _ in range(10)]

    async with asyncio.TaskGroup() as tasks:
        invited = [
            tasks.create_task(insist(socket, "client-goal.invite", **stage.terms()))
            for socket in sockets
        ]

    replies = [task.result()[-1] for task in invited]
    assert [reply["ok"] for reply in replies].count(True) == 1
    assert {reply["error"]["code"] for reply in replies if not reply["ok"]} == {"already_invited"}
    assert await stage.books.balances(stage.session_id) == {
        f"viewer:{stage.user('viewer')}": -AMOUNT_MINOR,
        "escrow": AMOUNT_MINOR,
    }
