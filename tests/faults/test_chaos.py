"""Some kills at random under load, alone and with all else that may go wrong at the same time.

`duet bench chaos` kills a thousand times.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from tests.faults.chaos import Chaos, ChaosOptions, result_json
from tests.payment_service import SECRET, PaymentService

if TYPE_CHECKING:
    from pathlib import Path

    from pymongo import MongoClient

    from persistence.embedded_redis import RedisServer
    from tests.e2e.gateway_process import Stores

KILLS = 10
KILLS_IN_THE_STORM = 6

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


async def test_gateways_die_and_freeze_while_redis_forgets_and_the_payment_service_lies(
    stores: Stores,
    own_redis: RedisServer,
    mongodb_client: MongoClient[dict[str, Any]],
    apps_file: Path,
    tmp_path: Path,
) -> None:
    """Nothing is lost, nobody is charged twice, and the two books agree."""
    stores = replace(stores, redis_url=own_redis.url)
    options = ChaosOptions(kills=KILLS_IN_THE_STORM, seed=5, streams=4)
    chaos = Chaos(options, stores, apps_file, tmp_path / "log")

    async def forget() -> None:
        await redis.flushall()
        await redis.script_flush()
        await redis.client_pause(timeout=300)
        await asyncio.sleep(1)  # between two of them something is to get through

    with PaymentService() as service:
        service.go_wild(Random(5), rate=0.3)
        chaos.settings = {
            "escrow_url": service.url,
            "escrow_secret": SECRET,
            "escrow_timeout_s": 0.3,
        }
        async with Redis.from_url(own_redis.url) as redis:
            chaos.troubles = [chaos.stop_one, forget]

            result = await chaos.run()

    assert result.violations == []
    assert result.kills >= KILLS_IN_THE_STORM
    assert result.streams > 0
    assert service.times("hold") > 0
    assert service.disagreements(mongodb_client[stores.database]) == []
