"""Who is on this node: channel -> connections and connection -> channels.

The two indexes always agree, and the hub reports when a channel's first connection comes and its
last one goes. Pure: no I/O, no waiting; the node decides what follows from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.messages import Member
    from gateway.protocol import PusherProtocol

ChannelKey: TypeAlias = tuple[str, str]  # app id, channel


class Connection(Protocol):
    """What hub and fan-out know of one accepted socket.

    Attributes:
        fd: The descriptor that bytes may be written to past `write`, because nothing waits there
            to be sent and nobody encrypts; else -1. Whoever changes it calls `Hub.reroute`.
    """

    fd: int

    @property
    def pusher(self) -> PusherProtocol:
        """The protocol's state of the connection."""

    @property
    def write(self) -> Callable[[bytes], None]:
        """Hands bytes to the transport, or drops them when the connection is ending."""

    def answer(self, data: bytes) -> None:
        """As `write`, for what the peer has asked for: its length makes no peer slow."""

    def abort_slow(self) -> None:
        """Ends the connection at once because its peer reads too slowly."""


class Gate:
    """Holds back what a channel pushes to a connection that is still being subscribed.

    Attributes:
        waiting: Frames in order, to be written behind `subscription_succeeded`.
        size_bytes: Their length together; the node bounds it.
    """

    __slots__ = ("size_bytes", "waiting")

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.size_bytes = 0

    def hold(self, data: bytes) -> None:
        """Queues `data` behind what already waits."""
        self.waiting.append(data)
        self.size_bytes += len(data)


class Channel:
    """One channel of one app on this node.

    Attributes:
        live: Connections that get every push at once, in order -> their `fd`.
        removals: How often a connection was taken off `live`, or its `fd` changed there.
        gates: Connections whose pushes wait until their subscription stands.
        heard: The broker has confirmed that this node gets the channel's publications.
        batch: Frames that wait to be joined, None when the channel is quiet (fan-out).
        bursty: How many waits for more it still has, since bursts have come (fan-out).
        seen: Frames in `batch` at the last tick (fan-out).
        waited: Ticks that `batch` has waited for more (fan-out).
        excepts: (index in `batch`, socket id that must not get that frame) (fan-out).
        slicing: A write to this channel is under way in slices (fan-out).
    """

    __slots__ = (
        "app_id",
        "batch",
        "bursty",
        "excepts",
        "gates",
        "heard",
        "live",
        "name",
        "removals",
        "seen",
        "slicing",
        "waited",
    )

    def __init__(self, app_id: str, name: str) -> None:
        self.app_id = app_id
        self.name = name
        self.live: dict[Connection, int] = {}
        self.removals = 0
        self.gates: dict[Connection, Gate] = {}
        self.heard = False
        self.batch: list[bytes] | None = None
        self.bursty = 0
        self.seen = 0
        self.waited = 0
        self.excepts: list[tuple[int, str]] = []
        self.slicing = False

    @property
    def key(self) -> ChannelKey:
        """The channel's name in the hub."""
        return (self.app_id, self.name)

    @property
    def empty(self) -> bool:
        """Whether nobody is here, not even behind a gate."""
        return not self.live and not self.gates

    def __len__(self) -> int:
        return len(self.live) + len(self.gates)

    def put(self, connection: Connection) -> None:
        """Lets a connection get every push from now on."""
        self.live[connection] = connection.fd

    def remove(self, connection: Connection) -> None:
        """Lets a connection get nothing more, not even the rest of a batch under way."""
        self.gates.pop(connection, None)
        if self.live.pop(connection, None) is not None:
            self.removals += 1

    def reroute(self, connection: Connection) -> None:
        """Takes over how a connection is written to."""
        if connection in self.live:
            self.live[connection] = connection.fd
            self.removals += 1


Subscriptions: TypeAlias = "dict[str, Member | None]"


class Hub:
    """The registry of one node.

    Attributes:
        connections: connection -> its subscriptions: channel -> presence member, None on channels
            without presence. The connection's protocol reads the same dict; only the hub writes.
    """

    __slots__ = ("_channels", "connections")

    def __init__(self) -> None:
        self._channels: dict[ChannelKey, Channel] = {}
        self.connections: dict[Connection, Subscriptions] = {}

    def attach(self, connection: Connection) -> Subscriptions:
        """Registers a connection and returns its subscriptions, empty yet."""
        subscriptions: Subscriptions = {}
        self.connections[connection] = subscriptions
        return subscriptions

    def detach(self, connection: Connection, app_id: str) -> list[tuple[Channel, Member | None]]:
        """Removes a connection from every channel; returns what it was subscribed to.

        A second call returns nothing. Channels left empty are still there; see `forget`.
        """
        subscriptions = self.connections.pop(connection, None)
        if not subscriptions:
            return []
        left = []
        for name, member in subscriptions.items():
            channel = self._channels[app_id, name]
            channel.remove(connection)
            left.append((channel, member))
        subscriptions.clear()
        return left

    def join(
        self,
        connection: Connection,
        key: ChannelKey,
        member: Member | None = None,
        gate: Gate | None = None,
    ) -> tuple[Channel, bool]:
        """Subscribes an attached connection; returns the channel and whether it was empty.

        With a gate the channel's pushes wait in it until `open_gate`.
        """
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = Channel(*key)
        first = channel.empty
        self.connections[connection][channel.name] = member
        if gate is None:
            channel.put(connection)
        else:
            channel.gates[connection] = gate
        return channel, first

    @staticmethod
    def open_gate(channel: Channel, connection: Connection) -> Gate | None:
        """Makes a gated subscription live; None if it has gone meanwhile."""
        gate = channel.gates.pop(connection, None)
        if gate is not None:
            channel.put(connection)
        return gate

    @staticmethod
    def close_gate(channel: Channel, connection: Connection) -> None:
        """Holds back what the channel pushes to a live connection until `open_gate`."""
        channel.remove(connection)
        channel.gates[connection] = Gate()

    def leave(self, connection: Connection, channel: Channel) -> bool:
        """Ends one subscription; returns whether it was the channel's last."""
        self.connections[connection].pop(channel.name, None)
        channel.remove(connection)
        return channel.empty

    def reroute(self, connection: Connection, app_id: str) -> None:
        """Takes over, in all channels of an attached connection, how it is written to."""
        for name in self.connections.get(connection, ()):
            self._channels[app_id, name].reroute(connection)

    def forget(self, channel: Channel) -> None:
        """Drops a channel that nobody is in; a channel that somebody is in stays."""
        if channel.empty and self._channels.get(channel.key) is channel:
            del self._channels[channel.key]

    def channel(self, key: ChannelKey) -> Channel | None:
        """The channel of that key, if it is known on this node."""
        return self._channels.get(key)

    def channels(self) -> Iterator[Channel]:
        """All channels that are known on this node, the empty ones among them."""
        return iter(self._channels.values())
