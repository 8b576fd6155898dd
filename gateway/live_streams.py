"""Cached channel data: which streamers are live, as far as this node needs to know.

Only "live" is remembered: a stream that has just begun must not be refused. A drop that arrives
while the answer is on its way wins over that answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Longer than a burst of arrivals, short enough that a lost drop does little harm.
TTL_S: Final = 15.0
_MOST: Final = 10_000


class LiveStreams:
    """streamer id -> until when the answer may be used (monotonic seconds)."""

    __slots__ = ("_drops", "_until")

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._drops = 0

    async def is_live(
        self, streamer_id: str, now: float, ask: Callable[[str], Awaitable[bool]]
    ) -> bool:
        """Whether the streamer is live, from the cache or by asking."""
        if self._until.get(streamer_id, 0.0) > now:
            return True
        drops = self._drops
        live = await ask(streamer_id)
        if live and drops == self._drops:
            if len(self._until) >= _MOST:
                self._until.clear()
            self._until[streamer_id] = now + TTL_S
        return live

    def drop(self, streamer_id: str) -> None:
        """Forgets what is known of a streamer."""
        self._drops += 1
        self._until.pop(streamer_id, None)
