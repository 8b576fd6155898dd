"""The users who are signed in: online and offline across the cluster, and who watches whom.

A user is online while at least one connection of the cluster is signed in as that user, by whatever
proof. Each node reports 1 for a user with such a connection to an occupancy of its own, whose
turns are published on the hidden channel `#watch-{user}`; who has the user on a watchlist is
subscribed to it. No client can name that channel: `#` is reserved.

Watching: hidden channels -> who is online now -> one `watchlist_events` frame -> what has come
meanwhile. A user in both is told twice, which changes nothing.

Source: docs/pusher-compatibility.md 1.2, 1.8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from gateway import frames
from gateway.backoff import Backoff
from gateway.broker import BrokerUnavailable
from gateway.channels import WATCHED
from gateway.hub import Gate
from gateway.occupancy import Turns
from persistence.repeated import Repeated

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.connections import NodeConnection
    from gateway.node import Node

log = structlog.get_logger(__name__)

_RETRY_LEAST_S: Final = 0.5
_RETRY_MOST_S: Final = 10.0


def online_announcements(_app_id: str, user_id: str) -> Turns:
    """What is published when a user comes online and goes offline."""
    return Turns(
        WATCHED + user_id,
        frames.watchlist_body([user_id]),
        frames.watchlist_body(None, [user_id]),
    )


class Users:
    """The signed-in users of one node's connections, and whom these watch."""

    __slots__ = ("_connections", "_delayed", "_node", "_signed_in", "_watching")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._delayed = Repeated(log, "watchlist_delayed")
        # (app id, user id) -> this node's connections of that user.
        self._connections: dict[tuple[str, str], dict[NodeConnection, None]] = {}
        self._signed_in: dict[NodeConnection, tuple[str, str]] = {}
        # Connection -> whom it watches; the tuple itself tells one watching from the next.
        self._watching: dict[NodeConnection, tuple[str, ...]] = {}

    def connections(self, app_id: str, user_id: str) -> list[NodeConnection]:
        """This node's connections that are signed in as the user."""
        return list(self._connections.get((app_id, user_id), ()))

    def sign_in(self, connection: NodeConnection, app_id: str, user_id: str) -> None:
        """Counts an attached connection for the user, as whom it stays; once."""
        key = self._signed_in[connection] = (app_id, user_id)
        known = self._connections.setdefault(key, {})
        if not known:
            self._node.online.report(*key, 1)
        known[connection] = None

    def sign_out(self, connection: NodeConnection) -> None:
        """Ends what `sign_in` began, for a connection that has ended."""
        key = self._signed_in.pop(connection, None)
        if key is None:
            return
        self._watching.pop(connection, None)
        known = self._connections[key]
        del known[connection]
        if not known:
            del self._connections[key]
            self._node.online.report(*key, 0)

    # Watching

    def watch(self, connection: NodeConnection, watchlist: tuple[str, ...]) -> None:
        """Replaces the watchlist of a connection that has signed in."""
        before = self._watching.pop(connection, ())
        for user_id in before:
            self._node.subscribing.end(connection, WATCHED + user_id)
        users = tuple(dict.fromkeys(watchlist))
        if users:
            self._watching[connection] = users
            socket_id = connection.pusher.socket_id
            self._node.spawn(self._keep_watching(connection, users), "watch", socket_id=socket_id)

    async def _keep_watching(self, connection: NodeConnection, users: tuple[str, ...]) -> None:
        """Tries until it has worked; the connection's end or another watchlist ends it."""
        backoff = Backoff(_RETRY_LEAST_S, _RETRY_MOST_S)
        while self._watching.get(connection) is users:
            try:
                await self._begin(connection, users)
            except BrokerUnavailable:
                self._delayed.met(socket_id=connection.pusher.socket_id)
                await backoff.pause()
            else:
                return

    async def _begin(self, connection: NodeConnection, users: tuple[str, ...]) -> None:
        hub, app_id = self._node.hub, connection.pusher.app.id
        for user_id in users:
            if self._watching.get(connection) is not users:
                return
            # One that stands already, behind its gate, is from an attempt that failed later.
            channel, _ = hub.join(connection, (app_id, WATCHED + user_id), None, Gate())
            await self._node.interest.hear(channel)
        online = await self._online_of(app_id, users)
        if self._watching.get(connection) is not users:
            return
        connection.write(frames.frame(frames.watchlist_body(online)))
        for user_id in users:
            watched = hub.channel((app_id, WATCHED + user_id))
            gate = None if watched is None else hub.open_gate(watched, connection)
            if gate is not None and gate.waiting:
                connection.write(b"".join(gate.waiting))

    async def _online_of(self, app_id: str, users: Iterable[str]) -> list[str]:
        """Who of `users` is online anywhere."""
        counts = await self._node.online.counts(app_id, list(users))
        return [user_id for user_id, count in counts.items() if count]

    async def tell_again(self) -> None:
        """Tells every watching connection who is online and who is not, after a broker's gap."""
        backoff = Backoff(_RETRY_LEAST_S, _RETRY_MOST_S)
        waiting = list(self._watching.items())
        while waiting:
            connection, users = waiting[-1]
            try:
                online = await self._online_of(connection.pusher.app.id, users)
            except BrokerUnavailable:
                await backoff.pause()
                continue
            waiting.pop()
            if self._watching.get(connection) is users:
                offline = [user_id for user_id in users if user_id not in online]
                connection.write(frames.frame(frames.watchlist_body(online, offline)))
