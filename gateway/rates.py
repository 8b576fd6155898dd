"""How many a second: a token bucket that is told the time. Pure."""

from __future__ import annotations


class Rate:
    """Allows `per_s` a second, as many at once after a second of rest."""

    __slots__ = ("_at", "_left")

    def __init__(self, per_s: float, now: float) -> None:
        self._left = per_s
        self._at = now

    def allow(self, per_s: float, now: float) -> bool:
        """Takes one if there is one left at `now` (monotonic seconds)."""
        left = min(per_s, self._left + (now - self._at) * per_s)
        self._at = now
        if left < 1.0:
            self._left = left
            return False
        self._left = left - 1.0
        return True

    def take(self, count: int) -> None:
        """Takes what was allowed elsewhere; what is not there is owed, and `allow` waits for it."""
        self._left -= count

    @property
    def left(self) -> int:
        """How many would be allowed right after the last call of `allow`."""
        return max(0, int(self._left))
