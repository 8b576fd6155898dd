"""The I/O shell of one connection: the `asyncio.Protocol` that uvicorn hands a socket to.

A plain upgrade comes from `gateway.arrival`, any other from uvicorn's HTTP side, which feeds the
request to a new `GatewayProtocol`; from there on nothing of uvicorn or ASGI is in between. The
frames that clients send nearly always are read by `gateway.inbound`; from the first other one on,
and for unusual requests, `gateway.library_wire` reads. What is written goes by `gateway.outbound`,
messages are `gateway.protocol`; this class owns the connection's life: opening, deadlines, close.

What a client gets for a broken frame: `pusher:error` and the RFC's close code, 1002 (protocol),
1007 (not UTF-8) or 1009 (message over `max_message_bytes`); pusher-js then reconnects. A binary
frame is answered by `pusher:error` and ignored: closing would only make the same client send it
again after reconnecting.

Source: docs/architecture.md, docs/decisions.md (measured), RFC 6455,
docs/pusher-compatibility.md 1.1, 1.4, 1.9.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, cast

from websockets.protocol import State

from gateway import frames, inbound
from gateway.admission import Admission
from gateway.errors import CloseCode
from gateway.library_wire import BINARY, CLOSE, LibraryWire
from gateway.opening import Refusal, admitted, app_now, prove
from gateway.outbound import Outbound
from gateway.performing import perform

if TYPE_CHECKING:
    import asyncio

    from uvicorn.config import Config
    from uvicorn.server import ServerState

    from gateway.apps import App
    from gateway.auth import Identity
    from gateway.handshake import Opening, Upgrade
    from gateway.node import Node
    from gateway.protocol import PusherProtocol

# How long a peer may take to close after the close frame; then its socket is aborted.
CLOSE_GRACE_S: Final = 3.0
# After a broken frame the rest of what the peer is sending is read and dropped for this long:
# closing with unread data would reset the connection and could destroy the close frame.
_LINGER_S: Final = 0.5

# What is taken of a socket in one turn of the loop. A read has up to 250 KiB: thousands of
# messages, during which nobody else would be heard.
_AT_ONCE_BYTES: Final = 8_192

_BINARY: Final = frames.frame(frames.error_body("Binary frames are not supported; send JSON text"))


class Phase(IntEnum):
    """Where a connection is in its life."""

    CONNECTING = 0  # until the upgrade is answered
    PROVING = 1  # the token is being checked
    OPEN = 2
    PINGED = 3  # silent for activity_timeout; a ping is out
    CLOSING = 4  # the close frame is out
    CLOSED = 5


class GatewayProtocol(Outbound):
    """One accepted socket.

    Attributes:
        pusher: The protocol's state; set when the connection is established.
        bucket: The wheel's.
    """

    __slots__ = (
        "_authorize_by",
        "_last_seen",
        "_open_connections",
        "_phase",
        "_pinged_at",
        "_read",
        "_reading",
        "_unread",
        "_wire",
        "bucket",
        "pusher",
    )

    pusher: PusherProtocol

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        del config
        node: Node = app_state["node"]
        super().__init__(node)
        self._open_connections: set[Any] = server_state.connections
        self._phase = Phase.CONNECTING
        # Reads from when something unusual has come.
        self._wire: LibraryWire | None = None
        # The beginning of a frame whose rest is still to come.
        self._read = b""
        self._unread = b""
        self._last_seen = 0.0
        self._pinged_at = 0.0
        self._authorize_by = math.inf
        self._reading = True
        self.bucket = -1

    @property
    def is_open(self) -> bool:
        """Whether messages may come and go: from `connection_established` to the close frame."""
        return Phase.OPEN <= self._phase < Phase.CLOSING

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the socket over from uvicorn's HTTP side."""
        self._transport = cast("asyncio.Transport", transport)
        self._open_connections.add(self)
        self.node.arrive(self)

    def data_received(self, data: bytes) -> None:
        """Acts on each complete frame, in order."""
        self._last_seen = self.node.now()
        if self._unread:
            # Reading went on before all was taken; nothing may overtake it.
            self._unread += data
            return
        if len(data) > _AT_ONCE_BYTES:
            self._unread = data[_AT_ONCE_BYTES:]
            data = data[:_AT_ONCE_BYTES]
            self._pause_reading()
            self.node.call_soon(self._read_on)
        self._take(data)

    def _read_on(self) -> None:
        """Takes the next piece of a long read, after everybody else has had a turn."""
        if self._phase is Phase.CLOSED:
            return
        data, self._unread = self._unread[:_AT_ONCE_BYTES], self._unread[_AT_ONCE_BYTES:]
        self._take(data)
        if self._unread:
            self.node.call_soon(self._read_on)
        elif self._phase is not Phase.PROVING and not (self.is_open and self.pusher.congested):
            self.resume_reading()

    def _take(self, data: bytes) -> None:
        if self._phase is Phase.CONNECTING:
            self._answer(data)
        elif self._wire is not None:
            self._feed(self._wire, data)
        elif self._phase is Phase.PROVING:
            self._read += data
        else:
            self._cut(self._read + data if self._read else data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of everything that knows this socket."""
        del exc
        self._phase = Phase.CLOSED
        self._fall_silent()
        self._open_connections.discard(self)
        self.node.detach(self)
        self.node.gone(self)

    def shutdown(self) -> None:
        """The server is stopping; the node closes its sockets in slices, this one among them."""
        self.node.begin_drain()

    # Opening

    def upgraded(self, upgrade: Upgrade, rest: bytes) -> None:
        """Answers a plain upgrade, and goes on with what was read behind it."""
        self._last_seen = self.node.now()
        self._begin_writing()
        self._open(upgrade.opening, upgrade.response)
        if rest:
            self.data_received(rest)

    def _answer(self, data: bytes) -> None:
        """Answers an unusual upgrade once it is whole, or refuses what is none."""
        wire = self._wire
        if wire is None:
            wire = self._wire = self._new_wire(State.CONNECTING)
        answered = wire.opening(data)
        if wire.broken:
            self._on_broken_wire(wire)
        elif answered is not None:
            # It keeps the request's headers for as long as it lives.
            self._wire = None
            self._begin_writing()
            self._open(*answered)

    def _open(self, opening: Opening, response: bytes) -> None:
        """Judges who wants to connect; the `response` to the upgrade is sent in any case."""
        node = self.node
        encrypted = self._transport.get_extra_info("sslcontext") is not None
        admission = admitted(node, opening, encrypted=encrypted)
        self._phase = Phase.PROVING
        if not isinstance(admission, Admission):
            self.write(response)
            self.disconnect(admission)
        elif admission.token is None:
            self._establish(admission.app, None, response)
        else:
            self.write(response)
            self._pause_reading()
            node.spawn(self._prove(admission.app, admission.token), "prove")

    async def _prove(self, app: App, token: str) -> None:
        """Opens the connection for the token's user, or closes it."""
        identity = await prove(self.node, token)
        if isinstance(identity, Refusal):
            self.disconnect(identity.code, identity.message)
            return
        # The apps may have been read anew meanwhile.
        now = app_now(self.node.apps, app)
        if isinstance(now, CloseCode):
            self.disconnect(now)
        elif self._phase is Phase.PROVING:
            self._establish(now, identity)
            self._cut(self._read)

    def _establish(self, app: App, identity: Identity | None, response: bytes = b"") -> None:
        """Makes the socket a connection; the `response` to its upgrade leaves in the same write."""
        node = self.node
        if not node.has_room(app):
            self.write(response)
            self.disconnect(CloseCode.OVER_CONNECTION_QUOTA)
            return
        self.pusher = node.attach(self, app, identity)
        self._phase = Phase.OPEN
        now = node.now()
        if app.authorized_only:
            self._authorize_by = now + app.authorization_timeout_s
        timeout_s = node.settings.activity_timeout_s
        body = frames.established_body(self.pusher.socket_id, timeout_s)
        self.write(response + frames.frame(body))
        self.resume_reading()
        node.wheel.put(self, min(now + node.jittered(timeout_s), self._authorize_by))

    # Receiving

    def _cut(self, data: bytes) -> None:
        """Acts on the usual frames; from the first other one on, the whole wire reads."""
        at, size = 0, len(data)
        most_bytes = self.node.settings.max_message_bytes
        self._read = b""
        while at < size and self.is_open:
            kind, payload, end = inbound.next_frame(data, at, most_bytes)
            if kind == inbound.INCOMPLETE:
                self._read = data[at:]
                return
            if kind == inbound.UNUSUAL:
                self._feed(self._whole_wire(), data[at:])
                return
            at = end
            if kind == inbound.TEXT:
                self._on_text(payload)
            elif kind == inbound.PING:
                self.write(inbound.pong(payload))
        if self._wire is not None:
            # A message has ended the connection: of what follows only the peer's close counts.
            self._feed(self._wire, data[at:])

    def _whole_wire(self) -> LibraryWire:
        """What reads the connection from here on, whatever comes."""
        wire = self._wire
        if wire is None:
            wire = self._wire = self._new_wire(State.OPEN)
            self._read = b""
        return wire

    def _new_wire(self, state: State) -> LibraryWire:
        return LibraryWire(state, self.node.settings.max_message_bytes, self._read)

    def _feed(self, wire: LibraryWire, data: bytes) -> None:
        for kind, payload in wire.messages(data):
            if kind == CLOSE:
                self._on_close(payload)
            elif not self.is_open:
                continue
            elif kind == inbound.TEXT:
                self._on_text(payload)
            elif kind == inbound.PING:
                self.write(inbound.pong(payload))
            elif kind == BINARY:
                self.write(_BINARY)
        if wire.broken:
            self._on_broken_wire(wire)

    def _on_text(self, text: bytes) -> None:
        if not text.isascii():
            try:
                text.decode()
            except UnicodeDecodeError:
                self.disconnect(1007, "The message is not UTF-8")
                return
        pusher = self.pusher
        perform(self, pusher.receive(text, self._last_seen))
        if pusher.congested:
            self._pause_reading()

    def _on_close(self, payload: bytes) -> None:
        """The peer closes, or answers our close frame: the server ends the TCP connection."""
        if self._phase < Phase.CLOSING:
            self._transport.write(frames.close_frame(payload))
        self._end()
        self._transport.close()
        self.node.wheel.put(self, self.node.now() + CLOSE_GRACE_S)

    def _on_broken_wire(self, wire: LibraryWire) -> None:
        """The peer breaks HTTP or RFC 6455; the wire knows the last words."""
        if self._phase >= Phase.CLOSING:
            return
        last_words, code = wire.last_words()
        if code is not None:
            self.node.telemetry.disconnects.labels(str(code)).inc()
        self._transport.write(last_words)
        self._end()
        self.resume_reading()
        self.node.wheel.put(self, self.node.now() + _LINGER_S)

    # Deadlines

    def on_deadline(self, now: float) -> float | None:
        """Does what is due at `now` (monotonic); returns the next deadline, if there is one."""
        settings = self.node.settings
        match self._phase:
            case Phase.CONNECTING | Phase.CLOSING:
                self.abort()
                return None
            case Phase.PROVING:
                self.disconnect(CloseCode.OVER_CAPACITY)
                return None
            case Phase.CLOSED:
                return None
            case Phase.PINGED if self._last_seen < self._pinged_at:
                if now >= self._pinged_at + settings.pong_timeout_s:
                    self.disconnect(CloseCode.NO_PONG)
                    return None
                return min(self._pinged_at + settings.pong_timeout_s, self._authorize_by)
            case _:
                self._phase = Phase.OPEN
                return self._while_open(now)

    def _while_open(self, now: float) -> float | None:
        settings = self.node.settings
        if now >= self._authorize_by:
            if not self.pusher.authorized:
                self.disconnect(CloseCode.UNAUTHORIZED)
                return None
            self._authorize_by = math.inf
        if now < self._last_seen + settings.activity_timeout_s:
            due = self._last_seen + self.node.jittered(settings.activity_timeout_s)
            return min(due, self._authorize_by)
        self._phase = Phase.PINGED
        self._pinged_at = now
        self.write(frames.PING_FRAME)
        return min(now + settings.pong_timeout_s, self._authorize_by)

    # Closing

    def disconnect(self, code: int, message: str | None = None) -> None:
        """Ends the connection with `pusher:error` and a close frame; does nothing on a second call.

        Args:
            code: Of `CloseCode`, or of RFC 6455.
            message: For a person; the table's sentence when there is none.
        """
        if self._phase >= Phase.CLOSING:
            return
        if self._phase is Phase.CONNECTING:
            self.abort()
            return
        reason, error = frames.farewell(code, message)
        if self._phase is Phase.PROVING:
            self._read = b""
        # From here on only the peer's close counts.
        self._whole_wire()
        self.write(error + frames.close_frame(frames.close_payload(code, reason)))
        self.node.telemetry.disconnects.labels(str(int(code))).inc()
        self._end()
        self.resume_reading()
        self.node.wheel.put(self, self.node.now() + CLOSE_GRACE_S)

    def abort_slow(self) -> None:
        """Ends a connection whose peer reads too slowly; it recovers when it reconnects."""
        if self._phase < Phase.CLOSED:
            self.node.telemetry.slow_aborts.inc()
            self.abort()

    def abort(self) -> None:
        """Ends the connection without a word; unsent data is lost."""
        self._phase = Phase.CLOSED
        self._fall_silent()
        self._transport.abort()

    def _end(self) -> None:
        """Takes part in nothing any more; only the transport is left."""
        self._phase = max(self._phase, Phase.CLOSING)
        self._fall_silent()
        self.node.detach(self)

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Goes on reading, if it was paused and nothing that was read is still to be taken."""
        if not self._reading and not self._unread:
            self._reading = True
            if not self._transport.is_closing():
                self._transport.resume_reading()
