"""uvicorn's HTTP side, with a straight way for the call that carries nearly every publication.

A plain `POST /apps/{id}/events` or `batch_events` (signed and in order, no idempotency key, nothing
asked in return) is answered where its last byte is parsed: no ASGI scope, no task, one write.
Whatever is not plain goes the ordinary way through `gateway.pusher_api`, which alone says what is
wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api_call import NOTHING, UNREACHABLE
from gateway.broker import BrokerUnavailable
from gateway.drain import FIRST_WORDS_S, NOTHING_CAME, READ_SOON_S, something_waits
from gateway.fallback import ABORT_EXTENSION
from gateway.pusher_api import KEY_HEADERS, plain_publications, written

if TYPE_CHECKING:
    import asyncio

    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from gateway.node import Node
    from gateway.parts import Parts

# A call with one of these is not plain.
_UNPLAIN: Final = frozenset({b"expect", b"transfer-encoding", b"upgrade", *KEY_HEADERS})
_PLAIN_ENDS: Final = (b"/events", b"/batch_events")
# What the first line and the fields of a call may have, beside the read in which it begins.
_HEAD_BYTES_MAX: Final = 65_536
# Calls of one connection that may wait for the answer to one before them.
_WAITING_MAX: Final = 64


class _NoEvent:
    """Takes the place of the event that an ASGI application waits for."""

    __slots__ = ()

    def set(self) -> None:
        """Wakes nobody."""


_NO_EVENT: Final = _NoEvent()


class _Publishing:
    """A plain call that waits for the broker; uvicorn keeps it where it keeps its own cycles.

    Attributes:
        disconnected: The caller has gone; uvicorn sets it.
        keep_alive: Whether the connection outlives the answer; uvicorn clears it to stop.
        response_complete: The answer is written.
        message_event: For uvicorn, which sets it.
    """

    __slots__ = ("disconnected", "keep_alive", "message_event", "response_complete")

    def __init__(self, *, keep_alive: bool) -> None:
        self.disconnected = False
        self.keep_alive = keep_alive
        self.response_complete = False
        self.message_event = _NO_EVENT


class TooManyWaitingError(Exception):
    """A caller goes on asking without waiting for answers."""


class HttpProtocol(HttpToolsProtocol):
    """One connection on the HTTP side, until an upgrade or its end.

    Its calls can end their TCP connection at once: through ASGI alone the answer to a reader that
    stalls can't be ended, because closing waits for the full buffer.
    """

    # The body of a plain call while it comes, else None.
    _plain_body: bytes | None = None
    # When the last answer was written, on the loop's clock.
    _idle_since: float = 0.0
    # When the call that comes began, None between two.
    _coming_since: float | None = None
    # What has been read of its head or its trailers, -1 while neither comes.
    _head_bytes: int = 0
    # What waited for the peer to read at the last deadline, None if nothing had to.
    _unsent_bytes: int | None = None
    # The call that is being answered; uvicorn knows the last one only, which may wait behind it.
    _answering: RequestResponseCycle | _Publishing | None = None
    # The wheel's.
    bucket: int = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection over."""
        super().connection_made(transport)
        self._node: Node = self.app_state["node"]
        self._plain_bytes_below = min(HIGH_WATER_LIMIT, self._node.settings.max_body_bytes + 1)
        now = self._coming_since = self.loop.time()
        self._node.wheel.put(self, now + self._node.settings.handshake_timeout_s)
        if self._node.draining:
            self.shutdown()

    def data_received(self, data: bytes) -> None:
        """Acts on what has come; nothing behind an upgrade is lost, as it would be by uvicorn's."""
        if self._head_bytes >= 0:
            # uvicorn and the parser keep a head however long it is.
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._on_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        else:
            if self._head_bytes > _HEAD_BYTES_MAX:
                self.send_400_response("The request's head is too long.")

    def _on_upgrade(self, rest: bytes) -> None:
        """Goes on behind the head of a call that asks for another protocol."""
        if self._should_upgrade():
            self._hand_over(rest)
        elif self.parser.get_method() == b"CONNECT":
            self.send_400_response("This server is no proxy.")
        else:
            # Java's client asks for HTTP/2 this way, which a server may overlook. The parser does
            # not: it takes the call to end here, and its body to be the next call.
            self.data_received(self._without_upgrade() + rest)

    def _without_upgrade(self) -> bytes:
        """The head of the call as it would be if it asked for no other protocol."""
        parser = self.parser
        lines = [
            b"%b %b HTTP/%b" % (parser.get_method(), self.url, parser.get_http_version().encode()),
            *(b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"),
        ]
        return b"\r\n".join([*lines, b"", b""])

    def _hand_over(self, rest: bytes) -> None:
        """Makes a WebSocket of the connection, if no answer is still to be written to it."""
        if self.parser.get_http_version() != "1.1" or self._under_way is not None:
            self.send_400_response("This connection can't be upgraded.")
            return
        self._let_go()
        self.handle_websocket_upgrade()
        successor = cast("asyncio.Protocol", self.transport.get_protocol())
        if self.transport.get_write_buffer_size():
            # The transport has told us, and tells our successor only when nothing waits any more.
            successor.pause_writing()
        if rest:
            successor.data_received(rest)

    @property
    def _under_way(self) -> RequestResponseCycle | None:
        """The last call that has come and is not answered; None when all are."""
        # None before the first call, whatever uvicorn's annotation says.
        last: RequestResponseCycle | None = self.cycle
        return None if last is None or last.response_complete else last

    def abort(self) -> None:
        """Ends the connection at once."""
        self.transport.abort()

    def on_deadline(self, now: float) -> float | None:
        """Ends a connection whose call does not come, or whose peer does not read its answers."""
        transport, timeout_s = self.transport, self._node.settings.handshake_timeout_s
        if self.flow.write_paused or transport.is_closing():
            unsent_bytes = transport.get_write_buffer_size()
            if self._unsent_bytes is not None and unsent_bytes >= self._unsent_bytes:
                transport.abort()
                return None
            self._unsent_bytes = unsent_bytes
            return now + timeout_s
        if self._coming_since is None or self.flow.read_paused:
            return now + timeout_s
        if now >= self._coming_since + timeout_s:
            transport.close()
            return now + timeout_s
        return self._coming_since + timeout_s

    def resume_writing(self) -> None:
        """The peer has read."""
        self._unsent_bytes = None
        super().resume_writing()

    def on_message_begin(self) -> None:
        """Begins a call."""
        self._coming_since = self.loop.time()
        self._head_bytes = 0
        super().on_message_begin()
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Chooses the way of a call by its head.

        Raises:
            TooManyWaitingError: The caller is answered 400 and cut off; uvicorn would go on
                reading, and remember its calls, without end.
        """
        self._head_bytes = -1
        if len(self.pipeline) >= _WAITING_MAX:
            raise TooManyWaitingError
        if self._begins_plain_call():
            self._plain_body = b""
        elif not self._asks_for_another_protocol():
            self._begin_call()

    def _begin_call(self) -> None:
        """Has the application carry out a call; while the node drains, the connection's last."""
        super().on_headers_complete()
        self._end_with_answer()

    def _asks_for_another_protocol(self) -> bool:
        """Whether `_on_upgrade` is about to begin the call anew, or to refuse it."""
        return self.parser.should_upgrade() and not self._should_upgrade()

    def _begins_plain_call(self) -> bool:
        parser = self.parser
        if parser.get_method() != b"POST" or not self.url.partition(b"?")[0].endswith(_PLAIN_ENDS):
            return False
        if self._under_way is not None:
            # Answers go out in the order of the calls.
            return False
        length = None
        for name, value in self.headers:
            if name in _UNPLAIN:
                return False
            if name == b"content-length":
                length = value
        return (
            length is not None
            and int(length) < self._plain_bytes_below
            and not self.flow.write_paused
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
        )

    def on_chunk_header(self) -> None:
        """Begins a chunk of a body, or the trailers behind the last one.

        These are dropped, and bounded: the parser would add them to the call's header fields.
        """
        self._head_bytes = 0
        self.headers = []

    def on_body(self, body: bytes) -> None:
        """Takes a piece of a call's body."""
        if self._plain_body is None:
            self._head_bytes = -1
            super().on_body(body)
        else:
            # Nearly every body comes in one piece, which is then handed on uncopied.
            self._plain_body = self._plain_body + body if self._plain_body else body

    def on_message_complete(self) -> None:
        """Carries out a plain call, or lets the application carry out another one."""
        self._coming_since = None
        body = self._plain_body
        if body is not None:
            self._plain_body = None
            if self._publish(body):
                return
            # Not so plain: the ordinary way, from the start.
            self._begin_call()
            super().on_body(body)
        if not self._asks_for_another_protocol():
            super().on_message_complete()

    def _publish(self, body: bytes) -> bool:
        """Hands a plain call's publications to the broker; false when it is not one."""
        parts: Parts = self.app_state["parts"]
        path, _, query = self.url.partition(b"?")
        publications = plain_publications(parts, path.decode("latin-1"), query, body)
        if publications is None:
            return False
        try:
            accepted = parts.node.send(publications)
        except BrokerUnavailable:
            return False
        self._answering = call = _Publishing(keep_alive=not parts.node.draining)
        self.cycle = call  # type: ignore[assignment]
        # Stopping the server waits for these.
        self.tasks.add(accepted)  # type: ignore[arg-type]

        def answer(accepted: asyncio.Future[Any]) -> None:
            self.tasks.discard(accepted)
            self._answer(call, parts, len(publications), accepted)

        accepted.add_done_callback(answer)
        return True

    def _answer(
        self, call: _Publishing, parts: Parts, count: int, accepted: asyncio.Future[Any]
    ) -> None:
        call.response_complete = True
        failed = accepted.cancelled() or accepted.exception() is not None
        answer = UNREACHABLE if failed else NOTHING
        parts.telemetry.api_called(answer.status)
        if not failed:
            parts.telemetry.publications_sent.inc(count)
        if call.disconnected:
            return
        self.transport.write(written(answer, keep_alive=call.keep_alive))
        if not call.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # Idle connections: one timer for many calls, instead of a new one behind each answer

    def _unset_keepalive_if_required(self) -> None:
        """Leaves the timer alone; when it fires it sees whether the connection was idle."""

    def on_response_complete(self) -> None:
        """Begins what waited behind the answer, or the time in which a next call must come."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._watch_idle(self.timeout_keep_alive)

    def _watch_idle(self, for_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(for_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Closes the connection if no call has come for so long."""
        self.timeout_keep_alive_task = None
        if self._plain_body is not None or not self.cycle.response_complete:
            # The next answer begins it anew.
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._watch_idle(left_s)
        else:
            super().timeout_keep_alive_handler()

    # The drain

    def shutdown(self) -> None:
        """The server is stopping: the next answer is the last one; who needs none is sent away."""
        self._end_with_answer()
        now = self.loop.time()
        patience_s = min(self._node.settings.drain_s, FIRST_WORDS_S)
        self.loop.call_at(now + patience_s, self._send_away, now + FIRST_WORDS_S)

    def _end_with_answer(self) -> None:
        """Closes the connection behind the answer that is under way, if the node drains."""
        under_way = self._under_way
        if under_way is not None and self._node.draining:
            under_way.keep_alive = False

    def _send_away(self, at_last: float) -> None:
        """Closes an idle connection now, and one on which half a call has come `at_last`."""
        transport = self.transport
        ended = transport.is_closing() or transport.get_protocol() is not self
        if ended or self._under_way is not None:
            return
        now = self.loop.time()
        if something_waits(transport.get_extra_info("socket").fileno()):
            self.loop.call_at(now + READ_SOON_S, self._send_away, at_last)
        elif self._coming_since is None:
            transport.close()
        elif now < at_last:
            self.loop.call_at(at_last, self._send_away, at_last)
        else:
            transport.write(NOTHING_CAME)
            transport.close()

    def _let_go(self) -> None:
        self._node.wheel.remove(self)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of the connection."""
        self._let_go()
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)
