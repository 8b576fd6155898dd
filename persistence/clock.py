"""The one clock of a process: it follows MongoDB's time, so that all nodes agree on deadlines.

A node's own wall clock may be minutes off. Only its monotonic clock is used, with an offset that
`Store` measures against the database, so no node expires early and none refunds late.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

# A measured offset replaces the one in use when it differs by more than the measurement's own
# doubt, so that the clock does not jitter with every round trip.
_LEAST_CORRECTION_S = 0.005


class Clock:
    """Tells the time: aware, UTC, in whole milliseconds, as MongoDB keeps it."""

    __slots__ = ("_offset_s", "_shift_s")

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()
        self._shift_s = 0.0

    def now(self) -> datetime:
        """The database's time, as well as this process knows it."""
        seconds = time.monotonic() + self._offset_s + self._shift_s
        return datetime.fromtimestamp(int(seconds * 1000) / 1000, UTC)

    def follow(self, server_at: datetime, asked_at_s: float, answered_at_s: float) -> None:
        """Takes over the database's time, read between two readings of the monotonic clock."""
        middle_s = (asked_at_s + answered_at_s) / 2
        offset_s = server_at.timestamp() - middle_s
        doubt_s = max((answered_at_s - asked_at_s) / 2, _LEAST_CORRECTION_S)
        if abs(offset_s - self._offset_s) > doubt_s:
            self._offset_s = offset_s

    def shift(self, seconds: float) -> None:
        """Moves this clock on; tests use it instead of waiting."""
        self._shift_s += seconds

    @staticmethod
    def monotonic_s() -> float:
        """Seconds of the clock that never jumps, for measuring."""
        return time.monotonic()


def milliseconds(seconds: float) -> timedelta:
    """A span in whole milliseconds, which is what MongoDB keeps."""
    return timedelta(milliseconds=round(seconds * 1000))
