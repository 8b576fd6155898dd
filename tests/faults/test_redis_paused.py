"""Redis stands still for half a minute: events come late, and nothing else is any different."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.faults.judged_stage import (
    ANSWER_WITHIN_S,
    COMES_BACK_WITHIN_S,
    JudgedStage,
    judged_stage,
    slowest_answer_s,
)

if TYPE_CHECKING:
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from persistence.embedded_redis import RedisServer
    from tests.e2e.gateway_process import Gateway, Stores
    from tests.e2e.wire_socket import WireSocket

PAUSED_S = 30.0
# A show at a time; each leaves a dozen events to be delivered afterwards.
SHOW_EVERY_S = 1.5
NOTICED_WITHIN_S = 5.0

pytestmark = pytest.mark.timeout(300)


async def play_a_show(stage: JudgedStage, streamer: WireSocket, viewer: WireSocket) -> None:
    """From the invitation to the end; every command has to succeed at once."""
    invited = await viewer.command("client-goal.invite", **stage.terms())
    assert invited["ok"] is True, invited
    goal_id = invited["goal"]["id"]
    for name in ("client-goal.agree", "client-exclusive.start", "client-exclusive.finish"):
        done = await streamer.command(name, goal_id=goal_id)
        assert done["ok"] is True, done


async def until(gateway: Gateway, *, ready: bool, within_s: float) -> None:
    """Waits until the gateway says that it can do all of its work, or that it can't."""
    give_up_at_s = time.monotonic() + within_s
    while await asyncio.to_thread(gateway.is_ready) is not ready:
        assert time.monotonic() < give_up_at_s, gateway.log_text()


async def test_while_redis_is_paused_for_half_a_minute_every_command_succeeds(
    victim_redis: RedisServer, victim_guard: ServerGuard, stores: Stores, apps_file: Path
) -> None:
    """That every event has come to the sockets in the end says the checker."""
    stores = replace(stores, redis_url=victim_redis.url)
    async with judged_stage(victim_guard, stores, apps_file, deaf=True) as stage:
        await stage.open_session(stage.user("streamer"))
        streamer = await stage.socket("streamer", "streamer")
        viewer = await stage.socket("viewer", "viewer")
        room = f"presence-stream@{streamer.user_id}"
        for socket in (streamer, viewer):
            await socket.subscribe(room)
        await streamer.subscribe(f"private-stream@{streamer.user_id}")
        await viewer.subscribe(
            f"presence-stream-viewer@{streamer.user_id}.preview.{viewer.user_id}"
        )

        victim_redis.process.pause()
        resume_at_s = time.monotonic() + PAUSED_S
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(until(stage.gateway, ready=False, within_s=NOTICED_WITHIN_S))
            while time.monotonic() < resume_at_s:
                await play_a_show(stage, streamer, viewer)
                await asyncio.sleep(SHOW_EVERY_S)
        silent = any("redis_silent" in line for line in stage.gateway.complaints())
        waiting = await stage.books.database["goals"].count_documents(
            {"outbox.0": {"$exists": True}}
        )
        heard = streamer.all_of("goal.ended")
        victim_redis.process.resume()
        await until(stage.gateway, ready=True, within_s=COMES_BACK_WITHIN_S)

        assert silent, "the node's own heartbeat noticed it"
        assert waiting
        assert heard == []
        assert max(map(slowest_answer_s, (streamer, viewer))) < ANSWER_WITHIN_S
