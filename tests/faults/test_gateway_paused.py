"""One of two gateways stands still amid shows; the other does its work, and nothing comes twice."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.e2e.gateway_process import Gateway
from tests.faults.judged_stage import insist, judged_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores
    from tests.faults.judged_stage import JudgedStage

# Longer than a lease, and than a node waits for the heartbeat that it sends to itself.
PAUSED_S = 4.5
SETTINGS = {"DUET_LEASE_S": "1", "DUET_POLL_INTERVAL_S": "0.05"}

pytestmark = pytest.mark.timeout(180)


@asynccontextmanager
async def second_gateway(stage: JudgedStage) -> AsyncIterator[Gateway]:
    first = stage.gateway
    gateway = Gateway(first.guard, first.stores, first.apps_file, first.settings, calls=first.calls)
    try:
        await asyncio.to_thread(gateway.start)
        yield gateway
    finally:
        await asyncio.to_thread(gateway.kill)


async def test_a_gateway_that_stood_still_acts_on_no_claim_and_its_sockets_miss_nothing(
    server_guard: ServerGuard, stores: Stores, apps_file: Path
) -> None:
    """Invitations expire while it may have claimed them; the checker judges the rest."""
    async with (
        judged_stage(server_guard, stores, apps_file, SETTINGS) as stage,
        second_gateway(stage) as paused,
    ):
        streamer = await stage.socket("streamer", "streamer", gateway=paused)
        await stage.open_session(streamer.user_id)
        await streamer.subscribe(f"private-stream@{streamer.user_id}")
        viewers = [await stage.socket(f"viewer{number}", "viewer") for number in range(3)]
        goals = []
        for viewer in viewers:
            await viewer.subscribe(f"presence-stream@{streamer.user_id}")
            [invited] = await insist(viewer, "client-goal.invite", **stage.terms())
            goals.append(invited["goal"]["id"])

        # Not yet answered when it stops.
        agreeing = asyncio.create_task(insist(streamer, "client-goal.agree", goal_id=goals[0]))
        await stage.books.move_deadline(goals[1], seconds=-3600)
        paused.running().pause()
        await stage.books.move_deadline(goals[2], seconds=-3600)
        await asyncio.sleep(PAUSED_S)
        paused.running().resume()

        await agreeing
        for goal_id in goals[1:]:
            await stage.books.until_state(goal_id, "ended", timeout_s=90)
        log = [json.loads(line)["event"] for line in paused.log_text().splitlines()]
        assert "redis_silent" not in log
        assert "redis_lost" not in log
