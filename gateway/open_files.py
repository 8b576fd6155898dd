"""Open files: the last ones that a process may have are kept for what it needs to go on.

Each socket takes one. When none is left, uvloop takes newcomers in and drops them without a word,
or, when even that fails, asks for them again and again with a whole core; and the process can't
reach a store any more whose link has broken. So newcomers are sent away a little earlier, and the
log says why.

Source: decision 93.
"""

from __future__ import annotations

import math
import resource
from typing import Final

import structlog

log = structlog.get_logger(__name__)

# For links to MongoDB (a pool of 64) and Redis, for calls of webhooks and the payment service.
KEPT_FREE: Final = 128
# No two lines about newcomers that are sent away come closer together.
_SAY_EVERY_S: Final = 10.0


def files_allowed() -> float:
    """How many files this process may have open; infinite when there is no limit."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def files_for_sockets(allowed: float) -> float:
    """How many of the files that are allowed connections may take."""
    return allowed - min(KEPT_FREE, allowed // 2)


class OpenFiles:
    """Who of the newcomers finds room in one process."""

    __slots__ = ("_say_from", "_sent_away")

    def __init__(self) -> None:
        self._sent_away = 0
        self._say_from = -math.inf

    def has_room(self, descriptor: int, now: float) -> bool:
        """Whether a newcomer may stay that has been given this descriptor, which is the lowest one.

        All lower ones are in use, so the number says how many files are open.
        """
        allowed = files_allowed()
        if descriptor < files_for_sockets(allowed):
            return True
        self._sent_away += 1
        if now >= self._say_from:
            self._say_from = now + _SAY_EVERY_S
            log.error(
                "no_file_for_newcomers",
                sent_away=self._sent_away,
                allowed=allowed,
                kept_free=int(allowed - files_for_sockets(allowed)),
                remedy="raise LimitNOFILE (systemd) or ulimit -n, or have more DUET_WORKERS",
            )
            self._sent_away = 0
        return False
