"""The one clock of a process: it follows MongoDB's time, so that all nodes agree on deadlines.

A node's own wall clock may be minutes off. Only its monotonic clock is used, with an offset that
`Store` measures against the database, so no node expires early and none refunds late.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

# A measured offset replaces the one in use when it differs by more than the measurement's own
# doubt, so that the clock does not jitter with every round trip.
_LEAST_CORRECTION_S: Final = 0.005
# More than clocks drift apart between two measurements: one of the two was set.
_JUMP_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Jump:
    """The database's time has moved against this process's, by more than clocks drift.

    Attributes:
        from_offset_s: seconds between the monotonic clock and the time in use.
        to_offset_s: the same as just measured.
    """

    from_offset_s: float
    to_offset_s: float


class Clock:
    """Tells the time: aware, UTC, in whole milliseconds, as MongoDB keeps it."""

    __slots__ = ("_followed", "_offset_s", "_shift_s", "_suspected_s")

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()
        self._followed = False
        # The offset that the last measurement told, when it was too far off to be believed.
        self._suspected_s: float | None = None
        self._shift_s = 0.0

    def now(self) -> datetime:
        """The database's time, as well as this process knows it."""
        seconds = time.monotonic() + self._offset_s + self._shift_s
        return datetime.fromtimestamp(int(seconds * 1000) / 1000, UTC)

    def follow(self, server_at: datetime, asked_at_s: float, answered_at_s: float) -> Jump | None:
        """Takes over the database's time, read between two readings of the monotonic clock.

        A jump is believed when the next measurement says the same: a primary whose clock is wrong
        for a moment ends no invitation early.

        Returns:
            The jump, when it is seen for the first time.
        """
        middle_s = (asked_at_s + answered_at_s) / 2
        offset_s = server_at.timestamp() - middle_s
        doubt_s = max((answered_at_s - asked_at_s) / 2, _LEAST_CORRECTION_S)
        suspected_s, self._suspected_s = self._suspected_s, None
        is_first, self._followed = not self._followed, True
        moved_s = abs(offset_s - self._offset_s)
        if moved_s <= doubt_s:
            return None
        drifted = moved_s <= _JUMP_S + doubt_s
        confirmed = suspected_s is not None and abs(offset_s - suspected_s) <= _JUMP_S + doubt_s
        if is_first or drifted or confirmed:
            self._offset_s = offset_s
            return None
        self._suspected_s = offset_s
        return Jump(self._offset_s, offset_s)

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
