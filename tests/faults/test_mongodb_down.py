"""MongoDB frozen or dead: a retryable error within two seconds, and nothing half done."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import httpx
import pytest
import pytest_asyncio

from tests.e2e.stage import AMOUNT_MINOR, Stage, reply, to_streamer, to_viewer
from tests.faults.crashing_gateway import CRASHING_SERVE
from tests.faults.judged_stage import ANSWER_WITHIN_S, COMES_BACK_WITHIN_S, insist, judged_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from persistence.embedded_mongod import ReplicaSet
    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, slots=True)
class Victim:
    """A stage whose MongoDB can be taken away."""

    stage: Stage
    mongodb: ReplicaSet

    def pause(self) -> None:
        self.mongodb.members[0].process.pause()

    def resume(self) -> None:
        self.mongodb.members[0].process.resume()

    def kill(self) -> None:
        self.mongodb.members[0].process.kill()

    async def start(self) -> None:
        """Starts the killed server on its old data and waits until it takes writes."""
        await asyncio.to_thread(self.mongodb.start)

    def take_away(self, how: str) -> None:
        {"frozen": self.pause, "killed": self.kill}[how]()

    async def give_back(self, how: str) -> None:
        if how == "frozen":
            self.resume()
        else:
            await self.start()


@pytest_asyncio.fixture
async def victim(
    victim_mongodb: ReplicaSet, server_guard: ServerGuard, apps_file: Path, stores: Stores
) -> AsyncIterator[Victim]:
    stores = replace(stores, mongodb_url=victim_mongodb.url)
    async with judged_stage(server_guard, stores, apps_file) as stage:
        yield Victim(stage, victim_mongodb)


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_commands_get_a_retryable_error_in_time_and_nothing_is_half_done(
    victim: Victim, how: str
) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()
    before = await stage.books.goal(goal["id"])
    request_id = streamer.new_request_id()

    victim.take_away(how)
    asked_at = time.monotonic()
    refused = await streamer.command("client-goal.agree", request_id=request_id, goal_id=goal["id"])
    took_s = time.monotonic() - asked_at
    asked_at = time.monotonic()
    over_http = await stage.gateway.call(
        "DELETE",
        f"/goals/{goal['id']}",
        user_id=streamer.user_id,
        role="streamer",
        body={"agree": True},
    )
    took_over_http_s = time.monotonic() - asked_at
    ready = await stage.gateway.call("GET", "/readyz")
    alive = await stage.gateway.call("GET", "/healthz")
    await victim.give_back(how)

    assert refused["ok"] is False
    assert refused["error"]["retryable"] is True, refused
    assert refused["error"]["code"] in {"unavailable", "timed_out"}
    assert took_s < ANSWER_WITHIN_S
    assert over_http.status_code in {503, 504}
    assert over_http.json()["retryable"] is True
    assert took_over_http_s < ANSWER_WITHIN_S
    assert ready.status_code == 503
    assert alive.status_code == 200
    assert len(stage.gateway.said("command_unavailable")) <= 1, "a line for each command"
    assert await stage.books.goal(goal["id"]) == before

    # The same request_id, sent again, is carried out now.
    agreed = (await insist(streamer, "client-goal.agree", request_id, goal_id=goal["id"]))[-1]

    assert agreed["ok"] is True, agreed
    replies = len(stage.received(streamer, "goal.reply"))
    await stage.assert_received(
        {
            streamer: [*reply(streamer) * replies, *to_streamer("goal.ended", streamer)],
            viewer: [
                ("goal.ended", streamer.audience_channel),
                ("stream.authorized", streamer.preview_channel(viewer)),
            ],
        }
    )
    assert await stage.books.movements(goal["id"]) == {"hold": 1}
    assert await stage.books.records_of(goal["id"]) == 1


@pytest.mark.parametrize("step", ["after_decide", "in_transaction", "before_commit"])
async def test_frozen_amid_a_transaction_the_command_is_done_once_when_it_is_sent_again(
    victim_mongodb: ReplicaSet,
    server_guard: ServerGuard,
    apps_file: Path,
    stores: Stores,
    tmp_path: Path,
    step: str,
) -> None:
    """Frozen before the commit, nobody knows whether it will come to pass; the caller may ask."""
    stores = replace(stores, mongodb_url=victim_mongodb.url)
    mongod = victim_mongodb.members[0].process
    armed_by = tmp_path / "armed"
    settings = {
        "DUET_FAULT_CRASH_AT": step,
        "DUET_FAULT_ARMED_BY": str(armed_by),
        "DUET_FAULT_FREEZES": str(mongod.pid),
    }
    try:
        async with judged_stage(server_guard, stores, apps_file, settings, CRASHING_SERVE) as stage:
            books = stage.books
            await stage.open_session(stage.user("streamer"))
            streamer = await stage.socket("streamer", "streamer")
            viewer = await stage.socket("viewer", "viewer")
            invited = await viewer.command("client-goal.invite", **stage.terms())
            goal_id = invited["goal"]["id"]
            await books.until_delivered()
            before = await books.goal(goal_id)

            armed_by.touch()
            asked_at = time.monotonic()
            refused = await streamer.command("client-goal.agree", request_id="r", goal_id=goal_id)
            took_s = time.monotonic() - asked_at
            assert not armed_by.exists()
            mongod.resume()

            assert refused["ok"] is False
            assert refused["error"]["retryable"] is True
            assert took_s < ANSWER_WITHIN_S
            if step != "before_commit":
                assert await books.goal(goal_id) == before
            agreed = (await insist(streamer, "client-goal.agree", "r", goal_id=goal_id))[-1]
            assert agreed["ok"] is True, agreed
            await streamer.expect("goal.ended", streamer.own_channel)
            await books.until_delivered()
            assert await books.movements(goal_id) == {"hold": 1}
            assert await books.records_of(goal_id) == 1
            assert (await books.goal(goal_id))["version"] == before["version"] + 1
    finally:
        mongod.resume()


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_sockets_stay_open_and_other_channels_go_on(victim: Victim, how: str) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    channel = stage.user("news")
    await streamer.subscribe(channel)

    victim.take_away(how)
    published = await stage.gateway.publish([channel], "headline", {"n": 1})
    await streamer.expect("headline", channel)
    await victim.give_back(how)

    assert published.status_code == 200
    assert {record.fields["current"] for record in streamer.received if record.kind == "state"} <= {
        "connecting",
        "connected",
    }


async def test_a_snapshot_that_can_not_be_read_follows_when_it_can(victim: Victim) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await viewer.disconnect()

    victim.pause()
    await viewer.reconnect()
    await viewer.expect(
        "pusher:subscription_succeeded", viewer.own_channel, timeout_s=COMES_BACK_WITHIN_S
    )
    victim.resume()
    snapshot = await viewer.expect(
        "goal.snapshot", viewer.own_channel, timeout_s=COMES_BACK_WITHIN_S
    )

    assert [open_goal["id"] for open_goal in snapshot.data["goals"]] == [goal["id"]]


async def test_a_timer_that_found_no_database_comes_as_soon_as_there_is_one(
    victim: Victim,
) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()
    await stage.books.move_deadline(goal["id"], seconds=-57)

    victim.kill()
    await victim.start()
    ended = await stage.books.until_state(goal["id"], "ended", timeout_s=COMES_BACK_WITHIN_S)

    assert ended["reason"] == "expired"
    await stage.assert_received(
        {
            streamer: to_streamer("goal.ended", streamer),
            viewer: [
                ("goal.ended", streamer.audience_channel),
                *to_viewer("escrow.released", viewer),
            ],
        }
    )
    assert await stage.books.balances(stage.session_id) == {}


async def test_killed_amid_many_commands_money_is_conserved(victim: Victim) -> None:
    stage = victim.stage
    count = 30
    await stage.open_session(stage.user("streamer"))
    first_is_in = asyncio.Event()

    async def invite(number: int) -> None:
        """Invites until it is told yes, each time as the same request."""
        give_up_at = time.monotonic() + COMES_BACK_WITHIN_S
        while time.monotonic() < give_up_at:
            try:
                response = await stage.gateway.call(
                    "POST",
                    "/goals",
                    user_id=stage.user(f"viewer{number}"),
                    role="viewer",
                    body=stage.terms(),
                    headers={"Idempotency-Key": f"invitation-{number}"},
                )
            except httpx.TimeoutException:
                continue
            if response.status_code == 201:
                first_is_in.set()
                return
            assert response.json()["retryable"] is True, response.text
        raise AssertionError(f"viewer {number} was never let in")

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(invite(number))
        await first_is_in.wait()
        victim.kill()
        await victim.start()

    goals = await stage.books.goals_of(stage.session_id)
    assert len(goals) == count
    await stage.books.until_delivered(timeout_s=COMES_BACK_WITHIN_S)
    await stage.books.assert_money_conserved(stage.session_id)
    balances = await stage.books.balances(stage.session_id)
    assert balances.pop("escrow") == count * AMOUNT_MINOR
    assert set(balances.values()) == {-AMOUNT_MINOR}
