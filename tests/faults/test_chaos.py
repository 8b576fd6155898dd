"""Some kills at random under load; `duet bench chaos` does the same a thousand times."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.faults.chaos import Chaos, ChaosOptions, result_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.gateway_process import Stores

KILLS = 10

pytestmark = pytest.mark.timeout(120)


async def test_random_kills_break_no_promise(
    stores: Stores, apps_file: Path, tmp_path: Path
) -> None:
    options = ChaosOptions(kills=KILLS, seed=3)
    killed: list[int] = []

    result = await Chaos(options, stores, apps_file, tmp_path / "log", killed.append).run()

    assert result.violations == []
    assert result.kills >= KILLS
    assert killed == list(range(1, result.kills + 1))
    assert result.streams > 0
    assert result.goals.total() > 0
    assert json.loads(result_json(options, result))["kills"] == result.kills
