"""Frees what a killed process still holds in MongoDB: its open transaction.

A process that is killed inside a transaction leaves it open on the server, which would keep the
goal and the Session locked for up to 90 s (`transactionLifetimeLimitSeconds` and the reaper's
period). Each process connects under its own name, so the survivors can see whose transaction has
not moved for longer than any living process lets one rest, and end that session.

A process that was only frozen finds its transaction aborted, and decides again: nothing is lost.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import structlog
from pymongo.errors import OperationFailure

from persistence.store import application_name

if TYPE_CHECKING:
    from persistence.store import Store

_log = structlog.get_logger(__name__)


# Unauthorized, CommandNotSupported, and what a hosted MongoDB answers instead.
_REFUSALS = frozenset({13, 115, 8000})


class AbandonedTransactions:
    """The open transactions of processes that are gone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._allowed = True

    async def free_predecessors(self) -> int:
        """Ends those of an earlier process of this node's name, however fresh they are."""
        own = application_name(self._store.database_name, self._store.owner)
        return await self._free(f"{self._store.options.node_name}/", 0.0, spared=[own])

    async def free_inactive(self) -> int:
        """Ends those of any node, this one included, that rest for twice a command's deadline."""
        return await self._free("", 2 * self._store.options.deadline_s, spared=[])

    async def _free(self, owner_prefix: str, inactive_s: float, spared: list[str]) -> int:
        """Kills the sessions found; tells how many."""
        if not self._allowed:
            return 0
        database = self._store.database_name
        prefix = re.escape(application_name(database, owner_prefix))
        async with self._store.reading():
            try:
                admin = self._store.admin
                found = await (
                    await admin.aggregate(
                        [
                            {"$currentOp": {"allUsers": False, "idleSessions": True}},
                            {
                                "$match": {
                                    "type": "idleSession",
                                    "appName": {"$regex": f"^{prefix}", "$nin": spared},
                                    "transaction.timeInactiveMicros": {
                                        "$gte": int(inactive_s * 1_000_000)
                                    },
                                }
                            },
                            {"$project": {"lsid": True, "appName": True}},
                        ]
                    )
                ).to_list()
                if found:
                    await admin.command(
                        "killSessions", [{"id": operation["lsid"]["id"]} for operation in found]
                    )
            except OperationFailure as error:
                if error.code not in _REFUSALS:
                    raise
                # Not every hosted MongoDB lets a user see his own operations: then the server's
                # own limit has to do, as it would without this.
                self._allowed = False
                _log.warning("abandoned_transactions_not_seen", why=str(error)[:200])
                return 0
        if found:
            names = sorted({operation["appName"] for operation in found})
            _log.info("abandoned_transactions_freed", of=names, count=len(found))
        return len(found)
