"""Frees what a killed process still holds in MongoDB: its open transaction.

A process that is killed inside a transaction leaves it open on the server, which would keep goals
and Sessions locked for up to 90 s (`transactionLifetimeLimitSeconds` and the reaper's period).
Each process connects under its own name, so the survivors can see whose transaction is left:
nobody is connected under the name any more, or the transaction has not moved for longer than any
living process lets one rest. They end that session.

A process that was only frozen, or cut off, finds its transaction aborted and decides again:
nothing is lost.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import structlog
from pymongo.errors import OperationFailure

from persistence.errors import in_short
from persistence.store import application_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from persistence.store import Row, Store

_log = structlog.get_logger(__name__)


# A transaction rests between two of its writes for a few milliseconds; over a slow network longer.
_RESTS_S = 0.2
# Unauthorized, CommandNotSupported, and what a hosted MongoDB answers instead.
_REFUSALS = frozenset({13, 115, 8000})
# Between two questions to a server that refuses them: rights may be given while this runs.
_ASK_AGAIN_S = 60.0


class AbandonedTransactions:
    """The open transactions of processes that are gone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refused = False
        self._asks_from_s = 0.0
        self._name = application_name(store.database_name, store.owner)

    async def free_predecessors(self) -> int:
        """Ends those of an earlier process of this node's name, however fresh they are."""
        return await self._free(self._predecessors)

    async def free_left(self) -> int:
        """Ends those whose process is gone, and those that rest for twice a command's deadline."""
        return await self._free(self._left)

    async def _predecessors(self) -> list[Row]:
        prefix = f"{self._store.options.node_name}/"
        return await self._open_transactions(prefix, 0.0, spared=[self._name])

    async def _left(self) -> list[Row]:
        found = await self._open_transactions("", _RESTS_S, spared=[])
        if not found:
            return []
        connected = await self._connected()
        too_long_us = 2 * self._store.options.deadline_s * 1_000_000
        return [
            one
            for one in found
            if (connected is not None and one["appName"] not in connected)
            or one["transaction"]["timeInactiveMicros"] >= too_long_us
        ]

    async def _open_transactions(
        self, owner_prefix: str, inactive_s: float, spared: list[str]
    ) -> list[Row]:
        """Those of processes whose names begin like this that have rested for so long."""
        prefix = re.escape(application_name(self._store.database_name, owner_prefix))
        found = await self._store.admin.aggregate(
            [
                {"$currentOp": {"allUsers": False, "idleSessions": True}},
                {
                    "$match": {
                        "type": "idleSession",
                        "appName": {"$regex": f"^{prefix}", "$nin": spared},
                        "transaction.timeInactiveMicros": {"$gte": int(inactive_s * 1_000_000)},
                    }
                },
                {"$project": {"lsid": True, "appName": True, "transaction": True}},
            ]
        )
        return await found.to_list()

    async def _connected(self) -> set[str] | None:
        """The names of all who have a connection; none when the server does not show them all.

        A mongos shows the connections between it and its shards.
        """
        found = await self._store.admin.aggregate(
            [
                {"$currentOp": {"allUsers": False, "idleConnections": True}},
                {"$match": {"type": "op", "appName": {"$exists": True}}},
                {"$group": {"_id": "$appName", "count": {"$sum": 1}}},
            ]
        )
        counts = {row["_id"]: row["count"] async for row in found}
        # This very question comes by one of our connections; the driver has others.
        return set(counts) if counts.get(self._name, 0) > 1 else None

    async def _free(self, find: Callable[[], Awaitable[list[Row]]]) -> int:
        """Kills the sessions found; tells how many."""
        if self._store.clock.monotonic_s() < self._asks_from_s:
            return 0
        async with self._store.reading():
            try:
                found = await find()
                if found:
                    await self._store.admin.command(
                        "killSessions", [{"id": one["lsid"]["id"]} for one in found]
                    )
            except OperationFailure as error:
                if error.code not in _REFUSALS:
                    raise
                # Not every hosted MongoDB lets a user see his own operations: then the server's
                # own limit has to do, as it would without this.
                if not self._refused:
                    _log.warning("abandoned_transactions_not_seen", why=in_short(error))
                self._refused = True
                self._asks_from_s = self._store.clock.monotonic_s() + _ASK_AGAIN_S
                return 0
        self._refused = False
        if found:
            names = sorted({one["appName"] for one in found})
            _log.info("abandoned_transactions_freed", of=names, count=len(found))
        return len(found)
