from __future__ import annotations

import structlog
from structlog.testing import capture_logs

from gateway.outage import Outage


def outage() -> Outage:
    return Outage(structlog.get_logger(), "broken", "mended")


def test_an_outage_is_told_at_once_then_seldom_and_at_its_end() -> None:
    thing = outage()
    with capture_logs() as logs:
        for attempt in range(25 * 20):
            thing.failed(attempt / 20, OSError("no route"))
        thing.worked(25.0)

    assert [(line["event"], line.get("for_s"), line.get("attempts")) for line in logs] == [
        ("broken", None, None),
        ("broken", 10.0, 201),
        ("broken", 20.0, 401),
        ("mended", 25.0, 500),
    ]
    assert logs[0]["error"] == "no route"


def test_what_works_is_not_told() -> None:
    thing = outage()
    with capture_logs() as logs:
        thing.worked(0.0)
        thing.worked(1.0)

    assert logs == []


def test_a_second_outage_is_told_at_once_like_the_first() -> None:
    thing = outage()
    with capture_logs() as logs:
        for second in (0.0, 1.0):
            thing.failed(second, OSError())
            thing.worked(second + 0.5)

    assert [line["event"] for line in logs] == ["broken", "mended"] * 2
