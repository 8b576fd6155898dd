"""How many connections an app has, and whether it may have one more.

An app's own connections on this node are counted exactly. Those on other nodes are looked up every
`LOOK_EVERY_S` instead of for each connection, so nobody waits for Redis to connect: in that time
nodes together may let in more than `max_connections`, by what the others let in.

Source: docs/pusher-compatibility.md 1.9 (4004).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from gateway.broker import BrokerUnavailable

if TYPE_CHECKING:
    from gateway.apps import App
    from gateway.node import Node
    from gateway.occupancy import Occupancy

LOOK_EVERY_S: Final = 1.0

# The one name in this occupancy, which counts whole apps.
_ALL: Final = "all"


class Quotas:
    """The connections of one node by app, and those of the cluster where they are limited."""

    __slots__ = ("_cluster", "_elsewhere", "_here", "_node")

    def __init__(self, node: Node, cluster: Occupancy) -> None:
        self._node = node
        self._cluster = cluster
        # App id -> connections on this node.
        self._here: dict[str, int] = {}
        # App id -> connections on all other nodes, as they were lately.
        self._elsewhere: dict[str, int] = {}

    def has_room(self, app: App) -> bool:
        """Whether the app may have one more connection."""
        count = self._here.get(app.id, 0) + self._elsewhere.get(app.id, 0)
        return not app.max_connections or count < app.max_connections

    def count(self, app: App, change: int) -> None:
        """Counts a connection that has come (1) or gone (-1)."""
        before = self._here.get(app.id)
        if before is None:
            # Read when it is asked for: finding the label costs more than counting.
            gauge = self._node.telemetry.app_connections.labels(app.id)
            gauge.set_function(lambda: self._here[app.id])
        count = self._here[app.id] = (before or 0) + change
        if app.max_connections:
            self._cluster.report(app.id, _ALL, count)

    async def keep_looking(self) -> None:
        """Looks for the other nodes' connections until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Looks once; what can't be looked up stays as it was."""
        for app in list(self._node.apps):
            if not app.max_connections:
                continue
            here = self._here.get(app.id, 0)
            # Also when nothing has changed: the limit may be new.
            self._cluster.report(app.id, _ALL, here)
            try:
                total = (await self._cluster.counts(app.id, [_ALL]))[_ALL]
            except BrokerUnavailable:
                return
            self._elsewhere[app.id] = max(0, total - here)
