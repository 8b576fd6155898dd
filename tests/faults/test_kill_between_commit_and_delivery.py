"""`kill -9` of the gateway at each step of an agreement: all of it happens, and only once."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.stage import (
    AMOUNT_MINOR,
    authorized,
    to_audience,
    to_streamer,
    to_viewer,
)
from tests.e2e.wire_socket import WireSocket
from tests.faults.crashing_gateway import CRASHING_SERVE
from tests.faults.judged_stage import JudgedStage

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Gateway, GatewayBuilder
    from tests.e2e.stage import Stage

DELIVERED_ON_AGREE = {
    "invalidate_get_session_token_view_cache",
    "invalidate_cached_pusher_channel_data",
    "notify_stream_authorized_for_agreed_trigger_goal",
    "notify_goal_ended",
    "track_goals",
}
LEASE_S = "1"

# What a caller sees of a process that ends amid its call; not a mere timeout.
DIED = (httpx.RemoteProtocolError, httpx.ReadError)

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, slots=True)
class Doomed:
    """A gateway that will kill itself at its step, once it is armed."""

    gateway: Gateway
    armed_by: Path

    async def crash_on(self, method: str, path: str, user_id: str, role: str, body: Any) -> None:
        """Makes the call during which, or right after which, the gateway dies."""
        async with WireSocket(self.gateway, "watcher", "viewer") as watcher:
            self.armed_by.touch()
            with contextlib.suppress(*DIED):
                await self.gateway.call(method, path, user_id=user_id, role=role, body=body)
            assert await watcher.wait_closed() == 1006  # nobody said good-bye
        await self.until_gone()

    async def until_gone(self) -> None:
        """Waits for its process: whose sockets are closed may be ending still."""
        assert not self.armed_by.exists(), "it never crashed"
        await asyncio.to_thread(self.gateway.kill)

    async def restart(self) -> None:
        """Starts it again on the same stores; it does not crash any more."""
        await self.until_gone()
        await self.gateway.restart()


async def doomed_at(step: str, gateway_with: GatewayBuilder, tmp_path: Path) -> Doomed:
    armed_by = tmp_path / "armed"
    gateway = await gateway_with(
        argv=CRASHING_SERVE,
        DUET_FAULT_CRASH_AT=step,
        DUET_FAULT_ARMED_BY=str(armed_by),
        DUET_LEASE_S=LEASE_S,
    )
    return Doomed(gateway, armed_by)


async def invitation(gateway: Gateway, stage: Stage, viewer: str = "viewer") -> dict[str, Any]:
    """A goal that a viewer without a socket has invited to."""
    response = await gateway.call(
        "POST", "/goals", user_id=stage.user(viewer), role="viewer", body=stage.terms()
    )
    assert response.status_code == 201, response.text
    goal: dict[str, Any] = response.json()
    return goal


async def test_what_was_committed_is_delivered_by_the_restarted_gateway(
    gateway_with: GatewayBuilder, books: Books, tmp_path: Path
) -> None:
    doomed = await doomed_at("after_commit", gateway_with, tmp_path)
    async with JudgedStage(doomed.gateway, books) as stage:
        streamer = stage.user("streamer")
        session_id = await stage.open_session(streamer)
        goal = await invitation(doomed.gateway, stage)
        loser = await invitation(doomed.gateway, stage, "loser")
        await books.until_delivered()

        await doomed.crash_on(
            "DELETE", f"/goals/{goal['id']}", streamer, "streamer", {"agree": True}
        )

        # Committed, and nothing delivered yet.
        committed = await books.goal(goal["id"])
        assert committed["state"] == "agreed"
        assert set(await books.pending(goal["id"])) == DELIVERED_ON_AGREE
        assert await books.records_of(goal["id"]) == 0

        await doomed.restart()
        await books.until_delivered()

        assert await books.pending(goal["id"]) == []
        assert await books.records_of(goal["id"]) == 1
        assert await books.records_of(loser["id"]) == 1
        assert (await books.goal(goal["id"]))["state"] == "agreed"
        superseded = await books.until_state(loser["id"], "ended")
        assert (superseded["reason"], superseded["outcome"]) == ("superseded", "refunded")
        assert await books.balances(session_id) == {
            f"viewer:{stage.user('viewer')}": -AMOUNT_MINOR,
            "escrow": AMOUNT_MINOR,
        }
        await books.assert_money_conserved(session_id)


async def test_another_node_delivers_to_its_sockets_what_the_killed_one_committed(
    gateway_with: GatewayBuilder, books: Books, tmp_path: Path
) -> None:
    doomed = await doomed_at("after_commit", gateway_with, tmp_path)
    survivor = await gateway_with(DUET_LEASE_S=LEASE_S)
    async with JudgedStage(survivor, books) as stage:
        streamer = await stage.streamer()
        viewer = await stage.viewer("viewer", streamer)
        loser = await stage.viewer("loser", streamer)
        goal = await stage.invited(viewer)
        lost = await stage.invited(loser)
        await stage.mark()

        await doomed.crash_on(
            "DELETE", f"/goals/{goal['id']}", streamer.user_id, "streamer", {"agree": True}
        )

        await books.until_state(lost["id"], "ended")
        heard = [*to_audience("goal.ended", streamer)] * 2
        await stage.assert_received(
            {
                streamer: [*to_streamer("goal.ended", streamer)] * 2,
                viewer: [*heard, *authorized(streamer, viewer)],
                loser: [*heard, *to_viewer("escrow.released", loser)],
            }
        )
        await books.assert_money_conserved(stage.session_id)


@pytest.mark.parametrize(
    "step",
    [
        "after_receiver:notify_stream_authorized",
        "after_receiver:notify_goal_ended",
        "after_receiver:track_goals",
        "before_outbox_removal",
    ],
)
async def test_a_crash_amid_the_delivery_repeats_events_under_the_same_id_and_no_effect(
    gateway_with: GatewayBuilder, books: Books, tmp_path: Path, step: str
) -> None:
    doomed = await doomed_at(step, gateway_with, tmp_path)
    survivor = await gateway_with(DUET_LEASE_S=LEASE_S)
    async with JudgedStage(survivor, books) as stage:
        streamer = await stage.streamer()
        viewer = await stage.viewer("viewer", streamer)
        goal = await stage.invited(viewer)
        await stage.mark()

        await doomed.crash_on(
            "DELETE", f"/goals/{goal['id']}", streamer.user_id, "streamer", {"agree": True}
        )
        await stage.settle()

        ended = stage.received(streamer, "goal.ended")
        assert {data["event_id"] for data in ended} == {ended[0]["event_id"]}
        assert len(ended) in {3, 6}, "each channel got it once, or once more"
        authorizations = stage.received(viewer, "stream.authorized")
        assert 1 <= len(authorizations) <= 2
        assert all(data == authorizations[0] for data in authorizations)
        assert await books.records_of(goal["id"]) == 1
        assert await books.pending(goal["id"]) == []
        assert await books.movements(goal["id"]) == {"hold": 1}


@pytest.mark.parametrize("step", ["before_load", "after_decide", "in_transaction", "before_commit"])
async def test_a_crash_before_the_commit_leaves_everything_as_it_was(
    gateway_with: GatewayBuilder, books: Books, tmp_path: Path, step: str
) -> None:
    doomed = await doomed_at(step, gateway_with, tmp_path)
    async with JudgedStage(doomed.gateway, books) as stage:
        streamer = stage.user("streamer")
        session_id = await stage.open_session(streamer)
        goal = await invitation(doomed.gateway, stage)
        await books.until_delivered()
        before = (await books.goal(goal["id"]), await books.session(session_id))

        await doomed.crash_on(
            "DELETE", f"/goals/{goal['id']}", streamer, "streamer", {"agree": True}
        )

        assert (await books.goal(goal["id"]), await books.session(session_id)) == before
        await doomed.restart()
        agreed = await doomed.gateway.call(
            "DELETE",
            f"/goals/{goal['id']}",
            user_id=streamer,
            role="streamer",
            body={"agree": True},
        )
        assert agreed.status_code == 200, agreed.text
        await books.until_delivered()
        assert await books.movements(goal["id"]) == {"hold": 1}


async def test_the_command_whose_answer_was_lost_is_answered_when_it_is_sent_again(
    gateway_with: GatewayBuilder, books: Books, tmp_path: Path
) -> None:
    """Committed, then killed before the reply: the same request_id finds the same answer."""
    doomed = await doomed_at("after_commit", gateway_with, tmp_path)
    async with JudgedStage(doomed.gateway, books) as stage:
        streamer = stage.user("streamer")
        viewer = stage.user("viewer")
        session_id = await stage.open_session(streamer)
        headers = {"Idempotency-Key": "the-same"}
        doomed.armed_by.touch()
        with pytest.raises(DIED):
            await doomed.gateway.call(
                "POST",
                "/goals",
                user_id=viewer,
                role="viewer",
                body=stage.terms(),
                headers=headers,
            )

        await doomed.restart()
        again = await doomed.gateway.call(
            "POST", "/goals", user_id=viewer, role="viewer", body=stage.terms(), headers=headers
        )

        assert again.status_code == 201, again.text
        (goal,) = await books.goals_of(session_id)
        assert str(goal["_id"]) == again.json()["id"]
        assert await books.movements(again.json()["id"]) == {"hold": 1}


async def test_what_fell_due_while_no_gateway_ran_is_done_right_after_the_restart(
    gateway_with: GatewayBuilder, books: Books
) -> None:
    gateway = await gateway_with()
    async with JudgedStage(gateway, books) as stage:
        streamer = stage.user("streamer")
        await stage.open_session(streamer)
        goal = await invitation(gateway, stage)
        await books.until_delivered()
        await asyncio.to_thread(gateway.kill)
        await books.move_deadline(goal["id"], seconds=-3600)

        await gateway.restart()

        ended = await books.until_state(goal["id"], "ended")
        assert (ended["reason"], ended["outcome"]) == ("expired", "refunded")
        assert await books.movements(goal["id"]) == {"hold": 1, "release": 1}


async def test_killed_under_load_nothing_is_lost_and_nothing_is_done_twice(
    gateway_with: GatewayBuilder, books: Books
) -> None:
    gateway = await gateway_with(DUET_LEASE_S=LEASE_S)
    streams = 12
    async with JudgedStage(gateway, books) as stage:
        goals: dict[str, str] = {}
        sessions: list[str] = []
        for number in range(streams):
            session_id = await stage.open_session(stage.user(f"streamer{number}"))
            sessions.append(session_id)
            goal = await invitation(gateway, stage)
            goals[stage.user(f"streamer{number}")] = goal["id"]
        agreed_first = asyncio.Event()

        async def agree(streamer: str, goal_id: str) -> None:
            try:
                response = await gateway.call(
                    "DELETE",
                    f"/goals/{goal_id}",
                    user_id=streamer,
                    role="streamer",
                    body={"agree": True},
                )
            except httpx.TransportError:
                return
            assert response.status_code == 200, response.text
            agreed_first.set()

        async with asyncio.TaskGroup() as tasks:
            for streamer, goal_id in goals.items():
                tasks.create_task(agree(streamer, goal_id))
            await agreed_first.wait()
            await asyncio.to_thread(gateway.kill)
        await gateway.restart()
        await books.until_delivered()

        for goal_id in goals.values():
            goal_document = await books.goal(goal_id)
            assert goal_document["state"] in {"invited", "agreed"}
            agreed = goal_document["state"] == "agreed"
            assert await books.records_of(goal_id) == (1 if agreed else 0)
        for session_id in sessions:
            await books.assert_money_conserved(session_id)
