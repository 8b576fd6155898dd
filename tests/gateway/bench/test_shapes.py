"""Every shape for real, on a gateway process of its own, with some twenty sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from gateway.bench.cli import app
from gateway.bench.orders import Within
from gateway.bench.rooms import apart_us
from gateway.bench.storm import storm_figures
from gateway.bench.target import GatewayTarget
from gateway.bench.watch import Cost
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


def test_connect_counts_public_and_signed_subscriptions(
    tmp_path: Path, stores: tuple[str, str]
) -> None:
    load = ["--sockets", "20", "--seconds", "0.05", "--processes", "2"]

    report = run("connect", *load, report=tmp_path / "report", stores=stores)

    rows = ["public", "private, signed", "private, a channel each"]
    assert [row["name"] for row in report["rows"]] == rows
    for row in rows:
        found = medians(report, row)
        assert found["connects/s"] > 0
        assert found["server CPU µs/connect"] > 0
        assert 0 < found["connect p50 ms"] <= found["connect p99 ms"]
        assert found["repeated attempts"] == 0


def test_a_subscription_that_is_refused_ends_the_run_with_the_server_s_words(
    monkeypatch: pytest.MonkeyPatch, stores: tuple[str, str]
) -> None:
    monkeypatch.setattr(GatewayTarget, "app_secret", "not the app's")
    mongodb_url, redis_url = stores
    where = ["--mongodb-url", mongodb_url, "--redis-url", redis_url]

    result = CliRunner().invoke(app, ["connect", "--sockets", "4", *where])

    assert result.exit_code == 1
    assert "pusher:subscription_error" in result.stderr
    assert result.stderr.count("\n") == 1


def test_idle_sockets_ping_and_are_answered(tmp_path: Path, stores: tuple[str, str]) -> None:
    load = ["--sockets", "20", "--ping-s", "1", "--seconds", "0.5", "--processes", "2"]

    report = run("idle", *load, report=tmp_path / "report", stores=stores)

    found = medians(report, "idle")
    assert found["pings/s"] == pytest.approx(20, rel=0.3)
    assert found["sockets lost"] == 0
    assert found["server CPU %"] > 0


@pytest.mark.parametrize(
    ("options", "row"), [([], "all come back"), (["--restart"], "after a restart")]
)
def test_storm_brings_every_socket_back(
    options: list[str], row: str, tmp_path: Path, stores: tuple[str, str]
) -> None:
    load = ["--sockets", "20", "--seconds", "0.2", "--retry-s", "0.1", "--witnesses", "2", *options]

    report = run("storm", *load, report=tmp_path / "report", stores=stores)

    assert [row["name"] for row in report["rows"]] == ["quiet", row]
    assert medians(report, "quiet")["event p50 ms"] > 0
    found = medians(report, row)
    assert found["all back s"] > 0
    assert ("down s" in found) == bool(options)
    assert 0 < found["event p50 ms"] <= found["event p99 ms"] <= found["longest event ms"]


def test_a_storm_is_over_with_its_last_socket_and_its_pace_leaves_out_the_restart() -> None:
    joined = [Within(at_s=14.0, latencies_us=[1] * 30, failures=2, cpu_s=0.1)]
    joined.append(Within(at_s=15.0, latencies_us=[1] * 30, failures=3, cpu_s=0.1))
    cost = Cost(5.0, 0.006, 1, None, 0.1, None)

    found = {name: value for name, value, _ in storm_figures(joined, 10.0, 2.0, cost)}

    assert found == {
        "all back s": 5.0,
        "down s": 2.0,
        "connects/s": 20.0,
        "failed attempts": 5,
        "server CPU µs/connect": pytest.approx(100.0),
    }
