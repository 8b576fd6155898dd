"""The primary behind a network that swallows everything: what it alone has is told to nobody."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient

from persistence.embedded_mongod import mongod_path
from tests.conftest import require
from tests.faults.judged_stage import (
    ANSWER_WITHIN_S,
    COMES_BACK_WITHIN_S,
    insist,
    judged_stage,
)
from tests.faults.network import SOCKETS, Network
from tests.faults.trouble import choose_primary

if TYPE_CHECKING:
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores
    from tests.faults.network import Member

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not SOCKETS.exists(), reason="who connects only Linux tells"),
]


def states_in(member: Member, database: str) -> list[str]:
    """What a member has written down by itself, asked past the network."""
    with MongoClient[dict[str, Any]](f"mongodb://{member.behind}/?directConnection=true") as client:
        return [row["state"] for row in client[database]["goals"].find()]


@pytest.mark.parametrize("from_clients", [False, True])
async def test_what_a_cut_off_primary_has_committed_for_itself_is_told_to_nobody(
    victim_guard: ServerGuard,
    stores: Stores,
    apps_file: Path,
    from_clients: bool,
) -> None:
    """Either the gateway still speaks to it, or it hears nothing of it either."""
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    async with Network(victim_guard) as network:
        stores = replace(stores, mongodb_url=network.servers.url)
        async with judged_stage(victim_guard, stores, apps_file) as stage:
            # All lines go through this process, which a busy machine slows down.
            patience_s = COMES_BACK_WITHIN_S
            await stage.open_session(stage.user("streamer"), patience_s=patience_s)
            streamer = await stage.socket("streamer", "streamer")
            viewer = await stage.socket("viewer", "viewer")
            *_, invited = await insist(viewer, "client-goal.invite", **stage.terms())
            goal_id = invited["goal"]["id"]
            await stage.books.until_delivered(timeout_s=patience_s)
            old = await asyncio.to_thread(network.primary)

            network.cut_off(old, from_clients=from_clients)
            asked_at_s = time.monotonic()
            told = await streamer.command("client-goal.agree", request_id="r", goal_id=goal_id)
            took_s = time.monotonic() - asked_at_s
            alone = await asyncio.to_thread(states_in, old, stores.database)
            others = [member for member in network.members if member is not old]
            await asyncio.to_thread(choose_primary, others)
            agreed = await insist(streamer, "client-goal.agree", "r", goal_id=goal_id)
            network.mend()

            assert told["ok"] is False
            assert told["error"]["retryable"] is True
            assert took_s < ANSWER_WITHIN_S
            if not from_clients:
                assert alone == ["agreed"], "it has committed it, for itself"
            assert agreed[-1]["ok"] is True
            assert await stage.books.movements(goal_id) == {"hold": 1}
