"""A disk that fills up under the primary: it gives up, the others go on, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from persistence.embedded_mongod import Mongod, ReplicaSet, mongod_path
from tests.conftest import require
from tests.faults.judged_stage import (
    ANSWER_WITHIN_S,
    COMES_BACK_WITHIN_S,
    JudgedStage,
    insist,
    judged_stage,
    slowest_answer_s,
)
from tests.faults.trouble import ELECTED_WITHIN_S, choose_primary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores
    from tests.e2e.wire_socket import WireSocket

# A mongod does not start with less than 100 MiB free, and takes some for itself then.
_DISK_MIB = 256
_PAGE_BYTES = 4_096

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this process may mount one.

    Elsewhere, on CI too, the error comes from a failpoint alone (`test_transaction_faults`).
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", disk],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system of a limited size: {made.stderr.strip()}")
    yield disk
    # Lazily: a mongod may need a moment to let go of its files.
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """Takes every byte that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size_bytes in (1 << 20, _PAGE_BYTES, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size_bytes))
    assert shutil.disk_usage(disk).free == 0
    return ballast


def start_servers(guard: ServerGuard, disk: Path) -> ReplicaSet:
    """Three members; the first one has little room, and leads."""
    members = [
        Mongod(guard, name="small", data_directory=disk),
        *(Mongod(guard, name=f"roomy-{number}") for number in range(2)),
    ]
    servers = ReplicaSet(members)
    servers.start(settings={"electionTimeoutMillis": 2_000, "heartbeatIntervalMillis": 250})
    choose_primary(members[:1])
    return servers


def start_again(member: Mongod) -> None:
    """Starts a member and lets it lead once it has caught up."""
    member.start()
    choose_primary([member])


async def invite_and_disagree(stage: JudgedStage, viewer: WireSocket, streamer: WireSocket) -> None:
    invited = await insist(viewer, "client-goal.invite", **stage.terms())
    goal_id = invited[-1]["goal"]["id"]
    declined = await insist(streamer, "client-goal.disagree", goal_id=goal_id)
    assert declined[-1]["ok"] is True


async def test_every_promise_is_kept_when_the_primarys_disk_is_full(
    small_disk: Path, victim_guard: ServerGuard, stores: Stores, apps_file: Path
) -> None:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    servers = await asyncio.to_thread(start_servers, victim_guard, small_disk)
    small = servers.members[0].process
    stores = replace(stores, mongodb_url=servers.url)
    try:
        async with judged_stage(victim_guard, stores, apps_file) as stage:
            await stage.open_session(stage.user("streamer"))
            streamer = await stage.socket("streamer", "streamer")
            viewer = await stage.socket("viewer", "viewer")
            invited = await viewer.command("client-goal.invite", **stage.terms())

            ballast = fill(small_disk)
            give_up_at_s = time.monotonic() + ELECTED_WITHIN_S
            answered = await insist(streamer, "client-goal.disagree", goal_id=invited["goal"]["id"])
            while await asyncio.to_thread(small.exit_code) is None:
                assert time.monotonic() < give_up_at_s, "it bears a full disk"
                await invite_and_disagree(stage, viewer, streamer)
            await invite_and_disagree(stage, viewer, streamer)
            ballast.unlink()
            await asyncio.to_thread(start_again, servers.members[0])

            assert answered[-1]["ok"] is True
            assert max(map(slowest_answer_s, (streamer, viewer))) < ANSWER_WITHIN_S
            # What the checker reads at the end comes from the member whose disk was full.
            await invite_and_disagree(stage, viewer, streamer)
            await stage.books.until_delivered(timeout_s=COMES_BACK_WITHIN_S)
    finally:
        # It keeps its data, so it would be given the time to end in order.
        await asyncio.to_thread(small.kill)
