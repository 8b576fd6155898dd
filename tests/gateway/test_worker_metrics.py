"""What the workers of one machine tell of each other, over real Unix sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.telemetry import Telemetry
from gateway.worker_metrics import WorkerMetrics

if TYPE_CHECKING:
    from pathlib import Path


def worker(folder: Path, number: int, calls: int) -> WorkerMetrics:
    telemetry = Telemetry()
    for _ in range(calls):
        telemetry.api_called(200)
    return WorkerMetrics(folder, number, telemetry)


async def test_any_worker_tells_of_all_each_with_its_number(tmp_path: Path) -> None:
    async with worker(tmp_path, 0, calls=1), worker(tmp_path, 1, calls=2) as asked:
        told = (await asked.exposition()).decode()

    assert 'duet_api_calls_total{status="200",worker="0"} 1.0' in told
    assert 'duet_api_calls_total{status="200",worker="1"} 2.0' in told


@pytest.mark.parametrize("cut", [b"", b"# HELP duet_x Some", b'duet_x{label="1'])
async def test_a_worker_that_dies_while_it_tells_is_left_out(tmp_path: Path, cut: bytes) -> None:
    async def die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(cut)
        writer.close()

    async with worker(tmp_path, 0, calls=1) as asked:
        dying = await asyncio.start_unix_server(die, tmp_path / "1")
        async with dying:
            told = (await asked.exposition()).decode()

    assert 'duet_api_calls_total{status="200",worker="0"} 1.0' in told
    assert 'worker="1"' not in told
