"""Awaits the platform's own receivers, within a bound each, and goes round one that hangs.

A call that hangs holds a place among the deliveries until its time is up. Once one has hung, the
others fail at once and are tried again, and one at a time finds out whether it answers again.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from persistence.outbox import DeliveryFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from statemachine.receivers import Occurrence

    Handler = Callable[[Occurrence], Awaitable[None]]

_log = structlog.get_logger(__name__)


class PlatformCode:
    """The platform's receivers as this process knows them."""

    __slots__ = ("_limit_s", "_next_try_at_s", "_now_s")

    def __init__(self, limit_s: float, now_s: Callable[[], float]) -> None:
        """Bounds each call to `limit_s` by the monotonic clock `now_s`."""
        self._limit_s = limit_s
        self._now_s = now_s
        # Of those that hung when they were called last.
        self._next_try_at_s: dict[object, float] = {}

    async def run(self, handler: Handler, occurrence: Occurrence) -> None:
        """Awaits a receiver.

        Raises:
            DeliveryFailed: it raised something, did not end in time, or has hung a moment ago.
        """
        code = _code_of(handler)
        if code in self._next_try_at_s:
            if self._now_s() < self._next_try_at_s[code]:
                raise DeliveryFailed("the platform's receiver hung a moment ago")
            self._hangs(code)
        bound = asyncio.timeout(self._limit_s)
        try:
            async with bound:
                await handler(occurrence)
        except Exception as error:
            if bound.expired():
                self._hangs(code)
            else:
                self._next_try_at_s.pop(code, None)
            _log.exception("platform_receiver_failed", event_id=occurrence.event_id)
            raise DeliveryFailed(f"{type(error).__name__} in the platform's receiver") from error
        self._next_try_at_s.pop(code, None)

    def _hangs(self, code: object) -> None:
        self._next_try_at_s[code] = self._now_s() + self._limit_s


def _code_of(handler: Handler) -> object:
    """What a handler runs: the same for each that a receiver makes anew for an occurrence."""
    function = handler.func if isinstance(handler, partial) else handler
    return getattr(function, "__code__", type(function))
