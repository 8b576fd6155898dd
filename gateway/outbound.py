"""How bytes leave a socket: at once while its peer keeps up, measured while it lags.

The transport is asked to say so as soon as one byte has to wait. Until then `write` is the
transport's own and fan-out may write to the descriptor, past the transport; from then on every
write goes through the transport and is followed by a look at what waits. A peer for which too much
waits is cut off: a close frame would only wait behind the rest.

What the peer has asked for may be longer than that by itself: the members of a large presence
channel, a streamer's many invitations. Cut off for it, he would ask for it again for ever. So the
longest such answer on its way is waited for on top of the bound.

Source: docs/decisions.md 67 and 74.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.connections import NodeConnection
    from gateway.node import Node


def drop(_data: bytes) -> None:
    """Takes the place of `write` on a connection that is ending, or not there yet."""


class Outbound(asyncio.Protocol):
    """The writing half of a socket.

    Attributes:
        node: Where the connection lives.
        write: `transport.write` itself while the socket keeps up.
        fd: See `gateway.hub.Connection`; fan-out writes there.
    """

    __slots__ = ("_longest_answer_bytes", "_transport", "fd", "node", "write")

    _transport: asyncio.Transport
    write: Callable[[bytes], None]

    def __init__(self, node: Node) -> None:
        self.node = node
        self.write = drop
        self.fd = -1
        self._longest_answer_bytes = 0

    def answer(self, data: bytes) -> None:
        """Writes what the peer has asked for, however long it is."""
        self._longest_answer_bytes = max(self._longest_answer_bytes, len(data))
        self.write(data)
        if not self._transport.get_write_buffer_size():
            self._longest_answer_bytes = 0

    def _begin_writing(self) -> None:
        # `pause_writing` comes as soon as a byte has to wait: until then nothing waits.
        self._transport.set_write_buffer_limits(high=0)
        self.write = self._transport.write
        self.fd = descriptor(self._transport)

    def pause_writing(self) -> None:
        """The peer reads more slowly than we write: from here on every write is measured."""
        if self.write is not drop:
            self.write = self._write_bounded
            self._reroute(-1)
            self._check_buffer()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._longest_answer_bytes = 0
        if self.write is not drop:
            self.write = self._transport.write
            self._reroute(descriptor(self._transport))

    def _write_bounded(self, data: bytes) -> None:
        self._transport.write(data)
        self._check_buffer()

    def _check_buffer(self) -> None:
        unsent_bytes = self._transport.get_write_buffer_size()
        if unsent_bytes > self.node.settings.send_buffer_bytes + self._longest_answer_bytes:
            self._as_connection().abort_slow()

    def _fall_silent(self) -> None:
        """Nothing is written any more."""
        self.write = drop
        self._reroute(-1)

    def _reroute(self, fd: int) -> None:
        if fd != self.fd:
            self.fd = fd
            self.node.reroute(self._as_connection())

    def _as_connection(self) -> NodeConnection:
        """Whoever writes this way is a connection."""
        return cast("NodeConnection", self)


def descriptor(transport: asyncio.Transport) -> int:
    """What `Connection.fd` is for a transport in which nothing waits."""
    plain = transport.get_extra_info("socket")
    encrypted = transport.get_extra_info("sslcontext") is not None
    return -1 if plain is None or encrypted else plain.fileno()
