"""Redis frozen or dead: commands still commit and say so; deliveries follow when it is back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from redis import Redis

from tests.e2e.stage import (
    Stage,
    authorized,
    reply,
    to_audience,
    to_streamer,
    to_viewer,
)
from tests.faults.judged_stage import ANSWER_WITHIN_S, COMES_BACK_WITHIN_S, judged_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from persistence.embedded_redis import RedisServer
    from tests.e2e.gateway_process import Stores

NOTICED_WITHIN_S = 5.0

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, slots=True)
class Victim:
    """A stage whose Redis can be taken away."""

    stage: Stage
    redis: RedisServer

    def take_away(self, how: str) -> None:
        match how:
            case "frozen":
                self.redis.process.pause()
            case "wiped":
                with Redis.from_url(self.redis.url) as client:
                    client.flushall()
            case "full":
                with Redis.from_url(self.redis.url) as client:
                    client.config_set("maxmemory", 1000)
            case "demoted":
                with Redis.from_url(self.redis.url) as client:
                    client.replicaof("127.0.0.1", 1)
                    # As Sentinel does it.
                    client.client_kill_filter(_type="normal", skipme=True)
                    client.client_kill_filter(_type="pubsub")
            case _:
                self.redis.process.kill()

    async def give_back(self, how: str) -> None:
        if how == "frozen":
            self.redis.process.resume()
        elif how == "killed":
            # It has kept nothing: what was in it the gateway has to know by itself.
            await asyncio.to_thread(self.redis.start)
        elif how in {"full", "demoted"}:
            with Redis.from_url(self.redis.url) as client:
                client.config_set("maxmemory", 0)
                client.replicaof("NO", "ONE")
        await self.until_ready()

    async def until_ready(self) -> None:
        """Waits until the gateway says that it reaches both its stores again, and can publish."""
        gateway = self.stage.gateway
        give_up_at = time.monotonic() + COMES_BACK_WITHIN_S
        while not (
            await asyncio.to_thread(gateway.is_ready)
            and (await gateway.publish(["nobody-listens"], "probe", {})).status_code == 200
        ):
            assert time.monotonic() < give_up_at, gateway.log_text()


@pytest_asyncio.fixture
async def victim(
    victim_redis: RedisServer, server_guard: ServerGuard, apps_file: Path, stores: Stores
) -> AsyncIterator[Victim]:
    stores = replace(stores, redis_url=victim_redis.url)
    async with judged_stage(server_guard, stores, apps_file, deaf=True) as stage:
        yield Victim(stage, victim_redis)


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_commands_commit_and_say_so_and_their_deliveries_follow(
    victim: Victim, how: str
) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    loser = await stage.viewer("loser", streamer)
    goal = await stage.invited(viewer)
    lost = await stage.invited(loser)
    await stage.mark()

    victim.take_away(how)
    asked_at = time.monotonic()
    agreed = await streamer.command("client-goal.agree", goal_id=goal["id"])
    took_s = time.monotonic() - asked_at
    committed = await stage.books.goal(goal["id"])
    waiting = await stage.books.pending(goal["id"])
    await victim.give_back(how)

    assert agreed["ok"] is True, agreed
    assert agreed["goal"]["state"] == "agreed"
    assert took_s < ANSWER_WITHIN_S
    assert committed["state"] == "agreed"
    assert waiting, "nothing was delivered while nothing could be"

    await stage.books.until_delivered(timeout_s=COMES_BACK_WITHIN_S)
    await stage.books.until_state(lost["id"], "ended", timeout_s=COMES_BACK_WITHIN_S)
    # A publication whose answer was lost is sent again under the same event_id: at least once.
    await stage.settle()
    ended_ids = {goal["id"], lost["id"]}
    for party, pushes in (
        (streamer, to_streamer("goal.ended", streamer)),
        (viewer, [*to_audience("goal.ended", streamer), *authorized(streamer, viewer)]),
        (loser, [*to_audience("goal.ended", streamer), *to_viewer("escrow.released", loser)]),
    ):
        wanted = {*pushes, *(reply(party) if party is streamer else [])}
        pushed = set(party.pushes(stage.marks[party.name]))
        again = ("goal.snapshot", party.own_channel)
        if how == "killed":
            # What the broker may have lost is told again.
            wanted.add(again)
        else:
            # A short freeze may lose nothing.
            pushed.discard(again)
        assert pushed == wanted
        ended = stage.received(party, "goal.ended")
        assert {data["goal_id"] for data in ended} == ended_ids
        assert len({data["event_id"] for data in ended}) == 2
    assert await stage.books.movements(goal["id"]) == {"hold": 1}
    assert await stage.books.movements(lost["id"]) == {"hold": 1, "release": 1}
    assert await stage.books.records_of(goal["id"]) == 1


@pytest.mark.parametrize("how", ["frozen", "killed", "wiped", "full", "demoted"])
async def test_afterwards_events_flow_and_members_are_who_they_were(
    victim: Victim, how: str
) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)

    victim.take_away(how)
    refused = await stage.gateway.publish([stage.user("news")], "headline", {})
    await victim.give_back(how)

    assert refused.status_code == (200 if how in {"wiped", "full"} else 503)
    await stage.mark()
    goal = await stage.invited(viewer)
    await stage.assert_received(
        {
            streamer: to_streamer("goal.added", streamer),
            viewer: [*reply(viewer), *to_viewer("escrow.held", viewer)],
        }
    )
    assert goal["state"] == "invited"
    newcomer = await stage.party("newcomer", "viewer")
    seen = await newcomer.subscribe(streamer.audience_channel)
    missing = {streamer.user_id, viewer.user_id} - set(seen.data["members"])
    while missing:
        added = await newcomer.expect("pusher:member_added", streamer.audience_channel)
        missing.discard(added.data["id"])
    assert not streamer.all_of("pusher:member_removed"), "nobody has left"


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_the_gateway_says_that_it_is_not_ready(victim: Victim, how: str) -> None:
    """A frozen one breaks no connection: only the node's own heartbeat can tell."""
    gateway = victim.stage.gateway

    victim.take_away(how)
    give_up_at = time.monotonic() + NOTICED_WITHIN_S
    while await asyncio.to_thread(gateway.is_ready):
        assert time.monotonic() < give_up_at, "a Redis that does not answer was not noticed"
    alive = await gateway.call("GET", "/healthz")
    await victim.give_back(how)

    assert alive.status_code == 200


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_a_whole_show_is_invited_paid_and_over_without_redis(
    victim: Victim, how: str
) -> None:
    """Frozen for longer than the heartbeat bears, or gone: no command needs it."""
    stage = victim.stage
    gateway = stage.gateway
    streamer, viewer = stage.user("streamer"), stage.user("viewer")
    slowest_s = 0.0

    async def call(method: str, path: str, user_id: str, role: str, body: Any = None) -> Any:
        nonlocal slowest_s
        asked_at = time.monotonic()
        response = await gateway.call(method, path, user_id=user_id, role=role, body=body)
        slowest_s = max(slowest_s, time.monotonic() - asked_at)
        assert response.is_success, response.text
        return response.json()

    victim.take_away(how)
    give_up_at = time.monotonic() + NOTICED_WITHIN_S
    while await asyncio.to_thread(gateway.is_ready):
        assert time.monotonic() < give_up_at
    session = await call("POST", "/sessions", streamer, "streamer", {})
    stage.session_id = session["id"]
    goal = await call("POST", "/goals", viewer, "viewer", stage.terms())
    await call("DELETE", f"/goals/{goal['id']}", streamer, "streamer", {"agree": True})
    await call("GET", f"/sessions/{session['id']}/token", viewer, "viewer")
    show = f"/sessions/{session['id']}/exclusive"
    await call("POST", show, streamer, "streamer", {"goal_id": goal["id"]})
    await call("DELETE", show, viewer, "viewer", {"goal_id": goal["id"]})
    declined = await call("POST", "/goals", viewer, "viewer", stage.terms())
    await call("DELETE", f"/goals/{declined['id']}", streamer, "streamer", {"agree": False})
    await call("DELETE", f"/sessions/{session['id']}", streamer, "streamer")

    assert slowest_s < ANSWER_WITHIN_S
    assert await stage.books.movements(goal["id"]) == {"hold": 1, "capture": 1}
    assert await stage.books.movements(declined["id"]) == {"hold": 1, "release": 1}
    await victim.give_back(how)
    await stage.books.until_delivered(timeout_s=COMES_BACK_WITHIN_S)
    assert await stage.books.records_of(goal["id"]) == 2, "the invitation's end and the show's"
    await stage.books.assert_money_conserved(session["id"])


async def test_the_timer_works_without_redis(victim: Victim) -> None:
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    await stage.mark()

    victim.take_away("killed")
    await stage.books.move_deadline(goal["id"], seconds=-3600)

    async def released() -> bool:
        return await stage.books.movements(goal["id"]) == {"hold": 1, "release": 1}

    await stage.books.until("the escrow is released", released)
    await victim.give_back("killed")
    ended = await stage.books.until_state(goal["id"], "ended", timeout_s=COMES_BACK_WITHIN_S)
    assert (ended["reason"], ended["outcome"]) == ("expired", "refunded")
    await viewer.expect("escrow.released", viewer.own_channel, timeout_s=COMES_BACK_WITHIN_S)


async def test_a_gateway_restarted_without_redis_delivers_when_it_comes(victim: Victim) -> None:
    """Both die: the commit survives in MongoDB and its events come in the end."""
    stage = victim.stage
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)
    victim.take_away("killed")
    await streamer.succeed("client-goal.agree", goal_id=goal["id"])

    await asyncio.to_thread(stage.gateway.kill)
    await asyncio.to_thread(victim.redis.start)
    await stage.gateway.restart()

    await stage.books.until_delivered(timeout_s=COMES_BACK_WITHIN_S)
    assert await stage.books.records_of(goal["id"]) == 1
    await viewer.connected(timeout_s=COMES_BACK_WITHIN_S)
    snapshot = await viewer.expect("goal.snapshot", viewer.own_channel)
    assert [open_goal["state"] for open_goal in snapshot.data["goals"]] == ["agreed"]
