"""A replica set of three that loses its primary in every way, under load, judged by the checker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from persistence.embedded_mongod import mongod_path, start_replica_set
from tests.conftest import require
from tests.faults.trouble import Members, assert_every_promise_is_kept

if TYPE_CHECKING:
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores

pytestmark = pytest.mark.timeout(300)


async def test_every_promise_is_kept_while_primaries_die_resign_freeze_and_are_cut_off(
    victim_guard: ServerGuard, stores: Stores, apps_file: Path, tmp_path: Path
) -> None:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    # Members that are told of each other late do not vote their leader out where all are busy.
    patient = {"electionTimeoutMillis": 2_000, "heartbeatIntervalMillis": 250}
    members = Members(start_replica_set(victim_guard, 3, settings=patient))
    faults = [members.killed, members.stepped_down, members.frozen, members.cut_off]

    await assert_every_promise_is_kept(members.servers, faults, stores, apps_file, tmp_path / "log")
