"""One connection over HTTP: what a socket is for WebSocket, for a client that can't have one.

What is written to it waits as lines until the HTTP answer that the client holds open takes them:
one long answer (`xhr_streaming`), or one answer for each batch (`xhr`, polling). The lines that
wait are bounded like a socket's send buffer.

pusher-js opens the next stream when it has read more than 256 KiB of one, and drops what it has
not read of the old one then. So a stream that has carried that much is left silent: everything
later waits for the next one, and nothing is lost.

Source: docs/pusher-compatibility.md 1.10, 1.4.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from gateway import fallback_lines as lines
from gateway import frames
from gateway.errors import CloseCode
from gateway.outbound import drop
from gateway.performing import perform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.apps import App
    from gateway.auth import Identity
    from gateway.node import Node
    from gateway.protocol import PusherProtocol

# Proxies commonly end answers that are silent for 30 s.
HEARTBEAT_S: Final = 25.0
# How long one may be without a stream or a poll: a round trip of a slow network, or two.
REOPEN_GRACE_S: Final = 5.0
# How long the last words wait for whoever fetches them.
_CLOSE_GRACE_S: Final = 3.0
# After this the client opens another stream.
STREAM_UNITS: Final = 256 * 1024
# Handed to the transport at once; more waits here, where it is bounded.
_CHUNK_BYTES: Final = 65_536
# What is acted upon of a call in one turn of the loop: as much as of a socket.
_AT_ONCE_BYTES: Final = 8_192


class Phase(IntEnum):
    """Where a connection is in its life."""

    OPEN = 0
    CLOSING = 1  # the close line waits to be fetched
    CLOSED = 2


class Stream:
    """One HTTP answer that takes a connection's lines.

    Attributes:
        long: A stream; otherwise a poll, which ends with the first lines.
        abort: Ends the TCP connection below at once.
        units: What it has carried, as the client counts it.
        woken: Set when there may be something to do.
    """

    __slots__ = ("abort", "long", "units", "woken")

    def __init__(self, *, long: bool, abort: Callable[[], None]) -> None:
        self.long = long
        self.abort = abort
        self.units = 0
        self.woken = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether the client is about to open the next one."""
        return self.long and self.units > STREAM_UNITS


class FallbackConnection:
    """A connection whose bytes go by HTTP; for node, hub and protocol it is one like any other.

    Attributes:
        write: Takes ready WebSocket frames, as a socket's does.
        fd: There is no descriptor to write them to.
    """

    __slots__ = (
        "__weakref__",
        "_asked_at",
        "_authorize_by",
        "_beat_at",
        "_forget",
        "_last_seen",
        "_left_at",
        "_line_of",
        "_lines",
        "_longest_answer_bytes",
        "_phase",
        "_resumed",
        "_stream",
        "_waiting_bytes",
        "bucket",
        "node",
        "pusher",
        "write",
    )

    fd = -1
    pusher: PusherProtocol
    write: Callable[[bytes], None]

    def __init__(
        self,
        node: Node,
        app: App,
        identity: Identity | None,
        line_of: Callable[[bytes], bytes],
        forget: Callable[[FallbackConnection], None],
    ) -> None:
        """Opens the connection on a node that has room for it.

        Args:
            node: Where it lives.
            app: Whose connection it is.
            identity: What a token has proved.
            line_of: Frames to a line.
            forget: Called once, when the connection has ended.
        """
        self.node = node
        self.bucket = -1
        self._line_of = line_of
        self._forget = forget
        self._phase = Phase.OPEN
        self._lines: deque[bytes] = deque((lines.OPEN,))
        self._waiting_bytes = len(lines.OPEN)
        self._longest_answer_bytes = 0
        self._stream: Stream | None = None
        self._resumed = asyncio.Event()
        now = node.now()
        self._last_seen = self._left_at = now
        self._asked_at = self._beat_at = math.inf
        self._authorize_by = math.inf
        if app.authorized_only:
            self._authorize_by = now + app.authorization_timeout_s
        self.write = self._write
        node.arrive(self)
        self.pusher = node.attach(self, app, identity)
        timeout_s = node.settings.activity_timeout_s
        self.write(frames.frame(frames.established_body(self.pusher.socket_id, timeout_s)))

    @property
    def is_open(self) -> bool:
        """Whether messages may come and go."""
        return self._phase is Phase.OPEN

    # Sending

    def _write(self, data: bytes) -> None:
        self._queue(self._line_of(data))

    def answer(self, data: bytes) -> None:
        """Writes what the client has asked for; see `gateway.outbound`."""
        if self.is_open:
            line = self._line_of(data)
            self._longest_answer_bytes = max(self._longest_answer_bytes, len(line))
            self._queue(line)

    def _queue(self, line: bytes) -> bool:
        """Adds a line to those that wait; tells whether that was not one too many."""
        self._lines.append(line)
        self._waiting_bytes += len(line)
        most_bytes = self.node.settings.send_buffer_bytes + self._longest_answer_bytes
        if self._waiting_bytes > most_bytes:
            self.abort_slow()
            return False
        if self._stream is not None:
            self._stream.woken.set()
        return True

    def take_over(self, stream: Stream) -> None:
        """Lines go out on this answer from now on; the one before it ends."""
        if self._stream is not None:
            self._stream.woken.set()
        self._stream = stream
        now = self.node.now()
        self._last_seen = now
        self._asked_at = math.inf
        self._beat_at = now + self._heartbeat_s
        self.node.wheel.put(self, min(self._beat_at, self._authorize_by))

    def let_go(self, stream: Stream) -> None:
        """The answer has ended, or nobody reads it; the next one has a while to come."""
        stream.woken.set()
        if self._stream is stream and self._phase < Phase.CLOSED:
            self._stream = None
            self._left_at = self.node.now()
            self.node.wheel.put(self, min(self._left_at + REOPEN_GRACE_S, self._authorize_by))

    async def lines_for(self, stream: Stream) -> bytes | None:
        """The next lines for this answer, as soon as there are some; None when it is to end."""
        while self._stream is stream:
            if self._lines and (not stream.full or self._phase is Phase.CLOSING):
                return self._take(stream)
            if self._phase is not Phase.OPEN:
                break
            await stream.woken.wait()
            stream.woken.clear()
        return None

    def _take(self, stream: Stream) -> bytes:
        taken = []
        size_bytes = 0
        while self._lines and size_bytes < _CHUNK_BYTES:
            line = self._lines.popleft()
            taken.append(line)
            size_bytes += len(line)
            stream.units += lines.length_in_browser(line)
            if stream.full and self._phase is Phase.OPEN:
                break
        self._waiting_bytes -= size_bytes
        if not self._lines:
            self._longest_answer_bytes = 0
        if self._phase is Phase.CLOSING and not self._lines:
            self._end()
        return b"".join(taken)

    # Receiving

    async def receive(self, texts: Sequence[str]) -> None:
        """Acts on messages in order, as fast as the ones before them have been acted upon.

        None is a sign of life.
        """
        node = self.node
        self._last_seen = node.now()
        taken_bytes = 0
        for text in texts:
            if taken_bytes > _AT_ONCE_BYTES:
                # A call may hold thousands of messages, during which nobody else would be heard.
                taken_bytes = 0
                await asyncio.sleep(0)
            message = text.encode()
            # The empty one costs about as much as the shortest that says something.
            taken_bytes += len(message) + 32
            if len(message) > node.settings.max_message_bytes:
                self.disconnect(1009, "The message is too long")
            while self.is_open and self.pusher.congested:
                self._resumed.clear()
                await self._resumed.wait()
            if not self.is_open:
                return
            perform(self, self.pusher.receive(message, node.now()))

    def resume_reading(self) -> None:
        """Goes on with the messages that were held up."""
        self._resumed.set()

    # Deadlines

    @property
    def _heartbeat_s(self) -> float:
        """Often enough for the client never to doubt the connection."""
        return min(HEARTBEAT_S, self.node.settings.activity_timeout_s / 2)

    def on_deadline(self, now: float) -> float | None:
        """Does what is due at `now` (monotonic); returns the next deadline, if there is one."""
        if self._phase is not Phase.OPEN:
            self.abort()
            return None
        if now >= self._authorize_by:
            if not self.pusher.authorized:
                self.disconnect(CloseCode.UNAUTHORIZED)
                return None
            self._authorize_by = math.inf
        if self._stream is None:
            if now >= self._left_at + REOPEN_GRACE_S:
                self.abort()
                return None
            return min(self._left_at + REOPEN_GRACE_S, self._authorize_by)
        return self._while_streaming(self._stream, now)

    def _while_streaming(self, stream: Stream, now: float) -> float | None:
        """A heartbeat ends a poll, and the next one is the answer; on a stream `[]` is."""
        no_answer_at = math.inf
        if self._last_seen < self._asked_at < math.inf:
            no_answer_at = self._asked_at + self.node.settings.pong_timeout_s
            if now >= no_answer_at:
                self.disconnect(CloseCode.NO_PONG)
                return None
        if now >= self._beat_at:
            self._beat_at = now + self._heartbeat_s
            if stream.long and no_answer_at is math.inf:
                self._asked_at = now
                no_answer_at = now + self.node.settings.pong_timeout_s
            self._queue(lines.HEARTBEAT)
        return min(self._beat_at, no_answer_at, self._authorize_by)

    # Ending

    def disconnect(self, code: int, message: str | None = None) -> None:
        """Ends the connection with `pusher:error` and a close line; nothing on a second call."""
        if not self.is_open:
            return
        reason, error = frames.farewell(code, message)
        if not self._queue(lines.messages_line(error) + lines.close_line(code, reason)):
            return
        self._phase = Phase.CLOSING
        self.node.telemetry.disconnects.labels(str(int(code))).inc()
        self._part()
        self.node.wheel.put(self, self.node.now() + _CLOSE_GRACE_S)

    def abort_slow(self) -> None:
        """Ends a connection whose peer reads too slowly; it recovers when it reconnects."""
        if self._phase < Phase.CLOSED:
            self.node.telemetry.slow_aborts.inc()
            self.abort()

    def abort(self) -> None:
        """Ends the connection without a word; what waited is lost."""
        if self._phase < Phase.CLOSED:
            self._lines.clear()
            self._part()
            stream = self._stream
            self._end()
            if stream is not None:
                stream.abort()

    def _part(self) -> None:
        """Takes part in nothing any more."""
        self.write = drop
        self.node.detach(self)
        self._resumed.set()

    def _end(self) -> None:
        self._phase = Phase.CLOSED
        if self._stream is not None:
            self._stream.woken.set()
        self.node.gone(self)
        self._forget(self)
