from __future__ import annotations

from dataclasses import dataclass

import structlog
from structlog.testing import capture_logs

from persistence.repeated import Repeated


@dataclass
class Watch:
    now_s: float = 0.0

    def read_s(self) -> float:
        return self.now_s


def test_what_fails_again_and_again_is_told_at_once_then_seldom_with_how_often() -> None:
    watch = Watch()
    failures = Repeated(structlog.get_logger(), "broken", watch.read_s)
    with capture_logs() as logs:
        for attempt in range(25 * 20):
            watch.now_s = attempt / 20
            failures.met(goal=attempt)

    told = [line for line in logs if line["log_level"] == "warning"]
    assert [(line["goal"], line.get("others_since")) for line in told] == [
        (0, None),
        (200, 199),
        (400, 199),
    ]
    assert len(logs) == 500, "each has its line at level debug"


def test_one_kind_does_not_hide_another() -> None:
    failures = Repeated(structlog.get_logger(), "broken", Watch().read_s)
    with capture_logs() as logs:
        for receiver in ("one", "other", "one"):
            failures.met(receiver, receiver=receiver)

    told = [line["receiver"] for line in logs if line["log_level"] == "warning"]
    assert told == ["one", "other"]
