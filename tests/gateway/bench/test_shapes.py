"""Every shape for real, on a gateway process of its own, with some twenty sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.bench.rooms import apart_us
from tests.gateway.bench.runs import medians, run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def stores(mongodb_url: str, redis_url: str) -> tuple[str, str]:
    return mongodb_url, redis_url


def test_rooms_tells_a_publication_apart_from_its_deliveries(
    tmp_path: Path, stores: tuple[str, str]
) -> None:
    load = ["--channels", "5", "--sockets", "4", "--rate", "20", "--seconds", "0.2"]

    report = run("rooms", *load, "--batch", "2", report=tmp_path / "report", stores=stores)

    assert [row["name"] for row in report["rows"]] == ["20 a second each", "flat out"]
    paced = medians(report, "20 a second each")
    assert 0 < paced["latency p50 ms"] <= paced["latency p99 ms"]
    assert paced["publications/s"] < 110
    flat_out = medians(report, "flat out")
    assert flat_out["deliveries/s"] == pytest.approx(4 * flat_out["publications/s"])
    whole_us = flat_out["server CPU µs/publication to 4"]
    apart = flat_out["server CPU µs/publication, deliveries apart"]
    assert whole_us == pytest.approx(apart + 4 * flat_out["server CPU µs/further delivery"])


def test_a_publication_costs_what_is_left_of_it_without_a_delivery() -> None:
    assert apart_us(full_us=130.0, single_us=40.0, sockets=10) == (30.0, 10.0)
