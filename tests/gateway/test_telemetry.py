from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Literal

import pytest
import structlog

from gateway.settings import Settings
from gateway.telemetry import Telemetry, configure_logging

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = ("_total", "_seconds", "_bytes", "_info")
COUNTED_THINGS = {
    "connections",
    "app_connections",
    "subscriptions",
    "channels",
    "outbox_pending",
    "deadlines_overdue",
    "damaged_documents",
}


@pytest.fixture(autouse=True)
def logging_is_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("httpx", "httpcore", "pymongo", "uvicorn"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_every_metric_is_duets_and_says_its_unit_or_what_it_counts() -> None:
    names = [
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in Telemetry().registry.collect()
        if metric.name.startswith("duet_")
    ]

    assert len(names) > 15
    for name in names:
        counts = name.endswith(UNITS) or name.removeprefix("duet_") in COUNTED_THINGS
        assert counts or name.endswith(("_alive", "_pending", "_dead")), name


def test_two_nodes_in_one_process_count_for_themselves() -> None:
    one, other = Telemetry(), Telemetry()

    one.connections.inc()

    assert b"duet_connections 1.0" in one.exposition()
    assert b"duet_connections 0.0" in other.exposition()


def test_a_command_is_counted_by_name_and_outcome_and_timed() -> None:
    telemetry = Telemetry()

    telemetry.command_done("agree", "ok", 0.004)
    telemetry.command_done("agree", "goal_expired", 0.002)

    text = telemetry.exposition().decode()
    assert 'duet_commands_total{command="agree",outcome="ok"} 1.0' in text
    assert 'duet_commands_total{command="agree",outcome="goal_expired"} 1.0' in text
    assert 'duet_command_duration_seconds_bucket{command="agree",le="0.005"} 2.0' in text


def test_logs_for_machines_are_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Settings(log_format="json"))

    structlog.get_logger("duet").info("gateway_started", node="n1")
    logging.getLogger("some.library").warning("about %s", "that")

    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["node"], ours["level"]) == ("gateway_started", "n1", "info")
    assert (theirs["event"], theirs["logger"]) == ("about that", "some.library")
    assert ours["timestamp"].endswith("Z")


def test_a_fault_is_logged_with_its_traceback_on_the_same_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(Settings(log_format="json"))

    try:
        int("the cause")
    except ValueError:
        structlog.get_logger("duet").exception("task_failed")

    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


def test_logs_for_people_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Settings(log_format="console"))

    structlog.get_logger("duet").info("gateway_started", node="n1")

    written = capsys.readouterr().err
    assert "gateway_started" in written
    assert "node=n1" in written


def test_a_fault_shown_to_people_tells_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Settings(log_format="console"))
    token = "eyJ.the-callers.token"

    try:
        int(token[:0])
    except ValueError:
        structlog.get_logger("duet").exception("task_failed")

    written = capsys.readouterr().err
    assert "ValueError: invalid literal" in written
    assert token not in written


def test_what_is_less_severe_than_asked_for_is_not_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(Settings(log_level="warning"))

    structlog.get_logger("duet").info("unwanted")
    logging.getLogger("some.library").info("unwanted")
    structlog.get_logger("duet").warning("wanted")

    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == [
        "wanted"
    ]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_without_standard_error_there_is_no_log_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, log_format: Literal["json", "console"]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)

    configure_logging(Settings(log_format=log_format))

    structlog.get_logger("duet.test").warning("nobody_hears_it")
