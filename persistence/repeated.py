"""A fault that many things meet for one cause: told at once, then seldom, with how often it was.

Without Redis each delivery fails, again and again, and without the payment service each call to
it: a line for each would bury all others, and fill the disk. At level debug each has its line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from persistence.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    import structlog

# No two lines of one kind come closer together.
_SAY_EVERY_S: Final = 10.0


class Repeated:
    """One event of the log; those that are `met` of each kind since its last line are counted."""

    __slots__ = ("_event", "_log", "_now_s", "_say_from", "_untold")

    def __init__(
        self,
        log: structlog.stdlib.BoundLogger,
        event: str,
        now_s: Callable[[], float] = Clock.monotonic_s,
    ) -> None:
        self._log = log
        self._event = event
        self._now_s = now_s
        # kind -> when its next line may come, and how many were met without one.
        self._say_from: dict[str, float] = {}
        self._untold: dict[str, int] = {}

    def met(self, kind: str = "", /, **facts: Any) -> None:
        """Tells of one, or counts it.

        Args:
            kind: Those of another kind are told apart; there are few.
            facts: Of this one alone.
        """
        now_s = self._now_s()
        if now_s < self._say_from.get(kind, now_s):
            self._untold[kind] = self._untold.get(kind, 0) + 1
            self._log.debug(self._event, **facts)
            return
        self._say_from[kind] = now_s + _SAY_EVERY_S
        untold = self._untold.pop(kind, 0)
        more = {"others_since": untold} if untold else {}
        self._log.warning(self._event, **facts, **more)
