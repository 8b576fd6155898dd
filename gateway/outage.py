"""Something that does not work for a while, told when it begins, when it ends and seldom between.

For loops that try again soon: a line for each attempt would bury all others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import structlog

# No two lines of one outage come closer together, but its end.
_SAY_EVERY_S: Final = 10.0


class Outage:
    """The outages of one thing; none at first."""

    __slots__ = ("_attempts", "_began_at", "_fault", "_log", "_over", "_say_from")

    def __init__(self, log: structlog.stdlib.BoundLogger, fault: str, over: str) -> None:
        """Knows the events by which the log tells of it.

        Args:
            log: Where to.
            fault: While it does not work.
            over: When it works again.
        """
        self._log = log
        self._fault = fault
        self._over = over
        self._attempts = 0
        self._began_at = 0.0
        self._say_from = -math.inf

    def failed(self, now: float, error: Exception) -> None:
        """Counts an attempt, and tells of it when it is the first one or much time has passed."""
        more: dict[str, Any] = {}
        if not self._attempts:
            self._began_at = now
        self._attempts += 1
        if self._attempts > 1:
            if now < self._say_from:
                return
            more = self._extent(now)
        self._say_from = now + _SAY_EVERY_S
        self._log.warning(self._fault, error=str(error), **more)

    def worked(self, now: float) -> None:
        """Tells of an outage's end, if this is one."""
        if self._attempts:
            self._log.info(self._over, **self._extent(now))
            self._attempts = 0

    def _extent(self, now: float) -> dict[str, Any]:
        return {"for_s": round(now - self._began_at, 1), "attempts": self._attempts}
