"""The shapes of `duet bench` at the sizes that are promised, on embedded MongoDB and Redis.

What they assert holds on any machine; the figures are printed (`pytest -m load -s`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.load, pytest.mark.timeout(900)]


@pytest.fixture
def report_file(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def bench(report_file: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from gateway.cli import main; main()", "bench"]
    subprocess.run([*command, *arguments, "--json", report_file], check=True)
    report: dict[str, Any] = json.loads(report_file.read_bytes())
    return report


def median(report: dict[str, Any], row_name: str, measure_name: str) -> float:
    row = next(row for row in report["rows"] if row["name"] == row_name)
    found: float = next(
        measure["median"] for measure in row["measures"] if measure["name"] == measure_name
    )
    return found


@pytest.mark.parametrize("sockets", [1_000, 10_000])
def test_every_socket_of_a_channel_gets_every_event(report_file: Path, sockets: int) -> None:
    report = bench(report_file, "fanout", "--sockets", str(sockets))

    assert report["delivery_ratio"] == 1.0
    one, eight, many = (
        median(report, f"burst {burst}", "server CPU µs/delivery") for burst in (1, 8, 64)
    )
    # Joining pays: a write that carries many events costs less for each.
    assert one > eight > many


def test_fifty_agrees_a_second_are_kept_up_with(report_file: Path) -> None:
    report = bench(report_file, "agree", "--rate", "50", "--seconds", "10")

    assert report["delivery_ratio"] == 1.0
    assert median(report, "50 a second", "transactions/s") > 45


def test_a_hot_session_serves_all_its_callers(report_file: Path) -> None:
    report = bench(report_file, "agree", "--pairs", "64", "--seconds", "5", "--hot")

    assert report["delivery_ratio"] == 1.0
    assert median(report, "hot, 64 callers", "reply p99 ms") < 2_000
