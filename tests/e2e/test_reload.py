"""SIGHUP to `duet serve`: one process, and several."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.e2e.gateway_process import APPS_TOML, Gateway
from tests.e2e.wire_socket import WireSocket

if TYPE_CHECKING:
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores

OTHER = '\n[[apps]]\nid = "8"\nkey = "other-key"\nsecret = "other-secret"\n'


@dataclass
class OtherDoor:
    """The gateway as the clients of the second app see it."""

    gateway: Gateway
    app_key: str = "other-key"

    @property
    def ws_url(self) -> str:
        return self.gateway.ws_url

    def token(self, user_id: str, role: str | None) -> str:
        return self.gateway.token(user_id, role)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_apps_come_and_go_at_sighup_and_the_sockets_of_the_others_stay(
    server_guard: ServerGuard, stores: Stores, tmp_path: Path, workers: str
) -> None:
    apps_file = tmp_path / "apps.toml"
    apps_file.write_text(APPS_TOML)
    gateway = Gateway(server_guard, stores, apps_file, {"DUET_WORKERS": workers})
    door = OtherDoor(gateway)
    try:
        await asyncio.to_thread(gateway.start)
        pid = gateway.running().pid
        async with AsyncExitStack() as stack:
            stay = [
                await stack.enter_async_context(WireSocket(gateway, f"user-{n}", "viewer"))
                for n in range(6)
            ]

            apps_file.write_text(APPS_TOML + OTHER)
            os.kill(pid, signal.SIGHUP)
            # Each process has read the file.
            await gateway.until_said("apps_reloaded", int(workers))
            go = [
                await stack.enter_async_context(WireSocket(door, f"guest-{n}", "viewer"))
                for n in range(6)
            ]
            apps_file.write_text(APPS_TOML)
            os.kill(pid, signal.SIGHUP)

            assert [await socket.wait_closed() for socket in go] == [4001] * len(go)
            for socket in stay:
                await socket.subscribe("news")
    finally:
        await asyncio.to_thread(gateway.stop)
    assert not gateway.complaints()
