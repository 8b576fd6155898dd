"""Subscribing a connection, from authorized to live, without losing or reordering a push.

The order: hub -> broker, if the node does not hear the channel yet -> the last event of a cache
channel -> presence -> `subscription_succeeded` -> that event, or `cache_miss` -> `goal.snapshot` on
one's own channel -> the pushes that came meanwhile -> live. What arrives before the connection is
live waits behind its gate.

Source: docs/architecture.md (subscribing), docs/protocol.md (`goal.snapshot`),
docs/pusher-compatibility.md 1.6 (cache channels).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from gateway import frames
from gateway.auth import user_channel
from gateway.backoff import Backoff
from gateway.broker import BrokerUnavailable
from gateway.cache import is_on_its_way
from gateway.channels import WATCHED, is_cache_channel
from gateway.hub import Gate
from gateway.presence import ChannelFull
from persistence.errors import StoreError
from persistence.repeated import Repeated

if TYPE_CHECKING:
    from gateway.hub import Channel, Connection
    from gateway.messages import Member, Subscribe
    from gateway.node import Node

# How long pushes wait for a snapshot that can't be read; then it follows behind them.
SNAPSHOT_WAIT_S: Final = 2.0
_RETRY_LEAST_S: Final = 0.5
_RETRY_MOST_S: Final = 10.0

log = structlog.get_logger(__name__)


class Subscribing:
    """Performs the subscriptions of one node's connections."""

    __slots__ = ("_delayed", "_node")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._delayed = Repeated(log, "snapshot_delayed")

    def at_once(self, connection: Connection, request: Subscribe) -> bool:
        """Subscribes without waiting where nothing has to be waited for; tells whether it did."""
        if request.member is not None or request.live_streamer is not None:
            return False
        if is_cache_channel(request.channel):
            return False
        app_id = connection.pusher.app.id
        channel = self._node.hub.channel((app_id, request.channel))
        if channel is None or not channel.heard:
            return False
        gate = Gate() if request.snapshot_of is not None else None
        self._node.hub.join(connection, channel.key, gate=gate)
        self._succeed(connection, channel, request, _succeeded(channel.name))
        return True

    async def later(self, connection: Connection, request: Subscribe) -> None:
        """Subscribes, or answers with `pusher:subscription_error`; never fails.

        A connection that ends meanwhile is left as it is: its end has undone what was done.
        """
        refusal = await self._must_be_live(connection, request)
        node = self._node
        if connection not in node.hub.connections:
            return
        if refusal is not None:
            connection.write(refusal)
            return
        gate = Gate()
        key = (connection.pusher.app.id, request.channel)
        channel, _ = node.hub.join(connection, key, request.member, gate)
        try:
            await node.interest.hear(channel)
            if channel.gates.get(connection) is not gate:
                return
            last = await self._last_event(channel)
            data = await self._join(connection, channel, request.member)
        except BrokerUnavailable:
            refusal = _unavailable(connection, request.channel)
        except ChannelFull:
            most = node.settings.presence_max_members
            refusal = connection.pusher.refusal(
                request.channel, f"The channel has its {most} members", "LimitReached", 403
            )
        else:
            if channel.gates.get(connection) is gate:
                first = _succeeded(channel.name, data) + _replay(channel, gate, last)
                self._succeed(connection, channel, request, first)
            return
        if channel.gates.get(connection) is gate:
            node.hub.leave(connection, channel)
            self._after_leaving(connection, channel, None)
            connection.write(refusal)

    async def _must_be_live(self, connection: Connection, request: Subscribe) -> bytes | None:
        """The refusal of a channel whose stream is not live; None if it is, or need not be."""
        streamer_id = request.live_streamer
        if streamer_id is None:
            return None
        try:
            if await self._node.stream_is_live(streamer_id):
                return None
        except StoreError:
            return _unavailable(connection, request.channel)
        message = "The stream is not live"
        return connection.pusher.refusal(request.channel, message, "AuthError", 403)

    async def _last_event(self, channel: Channel) -> bytes | None:
        """The body of a cache channel's last event."""
        if not is_cache_channel(channel.name):
            return None
        return await self._node.cache.last(*channel.key)

    async def _join(self, connection: Connection, channel: Channel, member: Member | None) -> bytes:
        """The `data` of `subscription_succeeded`, after joining if it is a presence channel."""
        if member is None:
            return b"{}"
        socket_id = connection.pusher.socket_id
        joined = await self._node.presence.join(*channel.key, member, socket_id)
        return frames.presence_data(joined.members)

    def _succeed(
        self, connection: Connection, channel: Channel, request: Subscribe, first: bytes
    ) -> None:
        """Writes the `first` frames of a subscription that stands, and makes it live."""
        # A presence channel's members may be many.
        (connection.write if request.member is None else connection.answer)(first)
        self._node.occupancy.report(*channel.key, len(channel))
        if request.snapshot_of is None:
            self._go_live(connection, channel)
            return
        self._node.spawn(
            self._send_snapshot(connection, channel, request.snapshot_of),
            "snapshot",
            user_id=request.snapshot_of,
            socket_id=connection.pusher.socket_id,
        )

    def _go_live(self, connection: Connection, channel: Channel) -> None:
        """Writes what waited behind the gate and opens it for good."""
        gate = self._node.hub.open_gate(channel, connection)
        if gate is not None and gate.waiting:
            connection.write(b"".join(gate.waiting))

    async def _send_snapshot(self, connection: Connection, channel: Channel, user_id: str) -> None:
        """Sends `goal.snapshot`, trying until it can be read; pushes wait for the first try only.

        The gate is what tells this subscription from a later one to the same channel.
        """
        gate = channel.gates.get(connection)
        snapshot = await self._read_snapshot(user_id)
        if gate is None or channel.gates.get(connection) is not gate:
            return
        if snapshot is not None:
            connection.answer(_snapshot_frame(channel.name, snapshot))
        self._go_live(connection, channel)
        backoff = Backoff(_RETRY_LEAST_S, _RETRY_MOST_S)
        while snapshot is None:
            await backoff.pause()
            if connection not in channel.live:
                return
            snapshot = await self._read_snapshot(user_id)
            if snapshot is not None and connection in channel.live:
                connection.answer(_snapshot_frame(channel.name, snapshot))

    async def snapshots_again(self) -> None:
        """Sends `goal.snapshot` to everyone on their own channel, after a gap of the broker.

        One after the other: thousands of readers at once would be an outage of their own.
        """
        for connection in list(self._node.hub.connections):
            pusher = connection.pusher
            identity = pusher.identity
            if identity is None or not pusher.invitations:
                continue
            key = (pusher.app.id, user_channel(identity.user_id))
            channel = self._node.hub.channel(key)
            # Amid slices the gate would take the connection out of the batch under way.
            if channel is None or connection not in channel.live or channel.slicing:
                continue
            self._node.hub.close_gate(channel, connection)
            await self._send_snapshot(connection, channel, identity.user_id)

    async def _read_snapshot(self, user_id: str) -> bytes | None:
        """The user's snapshot, None when it can't be read now."""
        try:
            async with asyncio.timeout(SNAPSHOT_WAIT_S):
                return await self._node.snapshot(user_id)
        except (StoreError, TimeoutError):
            self._delayed.met(user_id=user_id)
            return None

    # Ending

    def end(self, connection: Connection, name: str) -> None:
        """Ends one subscription that the connection has."""
        hub = self._node.hub
        channel = hub.channel((connection.pusher.app.id, name))
        if channel is None or name not in connection.pusher.subscriptions:
            return
        member = connection.pusher.subscriptions[name]
        hub.leave(connection, channel)
        self._after_leaving(connection, channel, member)

    def end_all(self, connection: Connection) -> None:
        """Ends every subscription of a connection that is going, and forgets it."""
        for channel, member in self._node.hub.detach(connection, connection.pusher.app.id):
            self._after_leaving(connection, channel, member)

    def _after_leaving(
        self, connection: Connection, channel: Channel, member: Member | None
    ) -> None:
        if channel.empty:
            self._node.interest.linger(channel)
        if not channel.name.startswith(WATCHED):
            self._node.occupancy.report(*channel.key, len(channel))
        if member is not None:
            socket_id = connection.pusher.socket_id
            leaving = self._node.presence.leave(*channel.key, member.user_id, socket_id)
            self._node.spawn(leaving, "presence_leave", channel=channel.name, socket_id=socket_id)


def _unavailable(connection: Connection, channel: str) -> bytes:
    message = "The subscription could not be made now; try again shortly"
    return connection.pusher.refusal(channel, message, "Unavailable", 503)


def _succeeded(channel: str, data: bytes = b"{}") -> bytes:
    return frames.frame(frames.succeeded_body(channel, data))


def _replay(channel: Channel, gate: Gate, last: bytes | None) -> bytes:
    """What a cache channel's subscriber is sent before all else; nothing on other channels."""
    if not is_cache_channel(channel.name):
        return b""
    if last is None:
        return frames.frame(frames.cache_miss_body(channel.name))
    return b"" if is_on_its_way(last, channel, gate) else frames.frame(last)


def _snapshot_frame(channel: str, snapshot: bytes) -> bytes:
    data = frames.json_string(snapshot)
    return frames.frame(frames.encode_event("goal.snapshot", channel, data))
