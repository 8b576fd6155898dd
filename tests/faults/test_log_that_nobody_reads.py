"""Whoever was to read the log has stopped: the gateway goes on, and says later what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import redis.asyncio

from persistence.embedded_process import free_port
from tests.e2e.gateway_process import START_DEADLINE_S, Gateway
from tests.gateway.harness import until_yes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores

# Each makes a line of over a hundred bytes; a pipe holds 64 KiB.
NONSENSE = 2_000


@contextlib.asynccontextmanager
async def running_into_a_pipe(gateway: Gateway) -> AsyncIterator[int]:
    """Runs a gateway whose log goes into a pipe, and brings the end to read from."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    child = await asyncio.create_subprocess_exec(
        *gateway.argv, env={**os.environ, **gateway.environment()}, stderr=theirs
    )
    os.close(theirs)
    try:
        await until_yes(lambda: asyncio.to_thread(gateway.is_ready), within_s=START_DEADLINE_S)
        yield ours
    finally:
        child.kill()
        await child.wait()
        os.close(ours)


async def test_a_full_pipe_stops_nothing_and_what_was_dropped_is_told(
    server_guard: ServerGuard, stores: Stores, apps_file: Path
) -> None:
    gateway = Gateway(server_guard, stores, apps_file, port=free_port(), name="silent")
    async with (
        running_into_a_pipe(gateway) as pipe,
        redis.asyncio.Redis.from_url(stores.redis_url) as admin,
    ):
        control = f"{stores.prefix}:control"
        for _ in range(NONSENSE):
            await admin.publish(control, "nonsense")

        assert await asyncio.to_thread(gateway.is_ready)

        log = b""
        async with asyncio.timeout(START_DEADLINE_S):
            while b"log_lines_dropped" not in log:
                await admin.publish(control, "nonsense")
                with contextlib.suppress(BlockingIOError):
                    log += os.read(pipe, 1 << 20)
    lines = log.splitlines()
    # The last one may still be on its way.
    assert all(line.startswith(b"{") and line.endswith(b"}") for line in lines[:-1])
