"""Lets PyMongo log in anew when MongoDB no longer knows its connections' user.

A connection is logged in once, when it is made. When its user is dropped and created again, as a
password is changed by some, it stays nobody's for ever, and PyMongo goes on using it, the same one
again and again where little is asked: only a restart helped. PyMongo has no call for this.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from pymongo.errors import OperationFailure

from persistence.clock import Clock

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient

UNAUTHORIZED: Final = 13
# While rights are lacking every call is refused; so often connections are made anew for it.
_AT_MOST_EVERY_S: Final = 1.0


class Logins:
    """The logins of one client's connections."""

    def __init__(self, client: AsyncMongoClient[dict[str, Any]]) -> None:
        self._client = client
        self._renewed_at_s = -math.inf

    async def refused(self, error: BaseException | None) -> None:
        """Closes the idle connections, and the others when they are given back, after a refusal."""
        if not isinstance(error, OperationFailure) or error.code != UNAUTHORIZED:
            return
        now_s = Clock.monotonic_s()
        if now_s < self._renewed_at_s + _AT_MOST_EVERY_S:
            return
        self._renewed_at_s = now_s
        for server in [*self._client._topology._servers.values()]:  # noqa: SLF001 - see above
            await server.pool.reset_without_pause()
