"""uvicorn's HTTP side, with a straight way for the call that carries nearly every publication.

A plain `POST /apps/{id}/events` or `batch_events` (signed and in order, no idempotency key, nothing
asked in return) is answered where its last byte is parsed: no ASGI scope, no task, one write.
Whatever is not plain goes the ordinary way through `gateway.pusher_api`, which alone says what is
wrong.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
import structlog
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from gateway.api_call import NOTHING, UNREACHABLE
from gateway.broker import BrokerUnavailable
from gateway.errors import ErrorCode
from gateway.fallback import ABORT_EXTENSION
from gateway.handshake import HOST
from gateway.http_connection import HttpConnection, Publishing
from gateway.pusher_api import KEY_HEADERS, plain_publications, written

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from gateway.parts import Parts

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# A call with one of these is not plain.
_UNPLAIN: Final = frozenset({b"expect", b"transfer-encoding", b"upgrade", *KEY_HEADERS})
_PLAIN_ENDS: Final = (b"/events", b"/batch_events")
# What the first line and the fields of a call may have, beside the read in which it begins.
_HEAD_BYTES_MAX: Final = 65_536
# What stands before the path of a target that is a whole URL.
_AUTHORITY: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*+://[^/?#]++")
# Calls of one connection that may wait for the answer to one before them.
_WAITING_MAX: Final = 64


class RefusedHeadError(Exception):
    """A call is answered 400 for its head, and the connection ended; says why."""


class HttpProtocol(HttpConnection):
    """What is read from a connection on the HTTP side: calls, until an upgrade or its end.

    Its calls can end their TCP connection at once: through ASGI alone the answer to a reader that
    stalls can't be ended, because closing waits for the full buffer.
    """

    # The host that was named last: most calls of a connection name the same one.
    _host: bytes = b""
    # What has been read of the head or the trailers of a call, -1 while neither comes.
    _head_bytes: int = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection over."""
        super().connection_made(transport)
        self._plain_bytes_below = min(HIGH_WATER_LIMIT, self._node.settings.max_body_bytes + 1)

    def data_received(self, data: bytes) -> None:
        """Acts on what has come; nothing behind an upgrade is lost, as it would be by uvicorn's."""
        if self._last_words is not None:
            return
        if self._head_bytes >= 0:
            # uvicorn and the parser keep a head however long it is.
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._refuse_unread(error)
            return
        else:
            if self._head_bytes > _HEAD_BYTES_MAX:
                too_long = ErrorCode.HEAD_TOO_LONG if self.headers else ErrorCode.URL_TOO_LONG
                self._refuse(too_long)
            return
        self._on_upgrade(rest)

    def _refuse_unread(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if isinstance(cause, RefusedHeadError):
            self._refuse(ErrorCode.MALFORMED, str(cause))
        elif cause is None or isinstance(cause, httptools.HttpParserError):
            self._refuse(ErrorCode.MALFORMED, "This is no HTTP/1.1.")
        else:
            # A fault of ours, which the parser has met on its way.
            log.error("call_not_read", exc_info=cause)
            self._refuse(ErrorCode.INTERNAL)

    def _on_upgrade(self, rest: bytes) -> None:
        """Goes on behind the head of a call that asks for another protocol."""
        if self._should_upgrade():
            self._hand_over(rest)
        elif self.parser.get_method() == b"CONNECT":
            self._refuse(ErrorCode.MALFORMED, "This server is no proxy.")
        else:
            # Java's client asks for HTTP/2 this way, which a server may overlook. The parser does
            # not: it takes the call to end here, and its body to be the next call.
            again = self._without_upgrade() + rest
            # One that has read `Connection: close` reads no further call.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.data_received(again)

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
            self._refuse(ErrorCode.MALFORMED, "This connection can't be upgraded.")
            return
        self._let_go()
        self.handle_websocket_upgrade()
        successor = cast("asyncio.Protocol", self.transport.get_protocol())
        if self.transport.get_write_buffer_size():
            # The transport has told us, and tells our successor only when nothing waits any more.
            successor.pause_writing()
        if rest:
            successor.data_received(rest)

    def on_message_begin(self) -> None:
        """Begins a call; what uvicorn does here beside is done in `_begin_call`, if at all."""
        self._coming_since = self.loop.time()
        self._head_bytes = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Chooses the way of a call by its head.

        Raises:
            RefusedHeadError: It does not name one host, or too many calls wait: uvicorn would go on
                reading, and remember them, without end.
        """
        self._head_bytes = -1
        if len(self.pipeline) >= _WAITING_MAX:
            raise RefusedHeadError("Too many calls wait for their answers.")
        if self._begins_plain_call():
            self._plain_body = b""
        elif not self._asks_for_another_protocol():
            self._begin_call()

    def _begin_call(self) -> None:
        """Has the application carry out a call; while the node drains, the connection's last.

        Raises:
            RefusedHeadError: It does not name one host.
        """
        if not self._names_one_host():
            raise RefusedHeadError("A call names one host, in one Host field.")
        if self.expect_100_continue and self.parser.get_http_version() == "1.0":
            # RFC 9110 section 10.1.1: it would take that for the answer.
            self.expect_100_continue = False
        url = self.url if self.url.startswith(b"/") else _with_path(self.url)
        head = url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = head
        self.scope["headers"] = self.headers
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]
        super().on_headers_complete()
        under_way = self._under_way
        if under_way is not None and (self._node.draining or not under_way.keep_alive):
            self._end_behind(under_way)

    def _names_one_host(self) -> bool:
        """Whether a call says for which host it is; source: RFC 9112 section 3.2."""
        hosts = [value for name, value in self.headers if name == b"host"]
        if not hosts:
            return self.parser.get_http_version() == "1.0"
        return len(hosts) == 1 and self._is_host(hosts[0])

    def _is_host(self, host: bytes) -> bool:
        if HOST.fullmatch(host) is None:
            return False
        self._host = host
        return True

    def _should_upgrade(self) -> bool:
        """Whether a WebSocket is asked for, of a parser that has seen that something is.

        uvicorn's would look at the last Connection field alone.
        """
        return any(
            name == b"upgrade" and value.lower() == b"websocket" for name, value in self.headers
        )

    def _asks_for_another_protocol(self) -> bool:
        """Whether `_on_upgrade` is about to begin the call anew, or to refuse it."""
        return self.parser.should_upgrade() and not self._should_upgrade()

    def _begins_plain_call(self) -> bool:
        parser = self.parser
        if parser.get_method() != b"POST" or not self.url.partition(b"?")[0].endswith(_PLAIN_ENDS):
            return False
        last: RequestResponseCycle | None = self.cycle
        if last is not None and not last.response_complete:
            # Answers go out in the order of the calls.
            return False
        length = host = None
        for name, value in self.headers:
            if name in _UNPLAIN:
                return False
            if name == b"content-length":
                length = value
            elif name == b"host":
                if host is not None:
                    return False
                host = value
        return (
            length is not None
            and host is not None
            and (host == self._host or self._is_host(host))
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
        if not self.parser.should_upgrade():
            super().on_message_complete()
            # uvicorn leaves it be when the answer was there before the body's end.
            self.cycle.more_body = False

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
        self._answering = call = Publishing(keep_alive=not parts.node.draining)
        self.cycle = call  # type: ignore[assignment]
        # Stopping the server waits for these.
        self.tasks.add(accepted)  # type: ignore[arg-type]

        def answer(accepted: asyncio.Future[Any]) -> None:
            self.tasks.discard(accepted)
            self._answer(call, parts, len(publications), accepted)

        accepted.add_done_callback(answer)
        return True

    def _answer(
        self, call: Publishing, parts: Parts, count: int, accepted: asyncio.Future[Any]
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


def _with_path(target: bytes) -> bytes:
    """A target that is a whole URL, of which uvicorn expects a path.

    An empty one is the same as `/` (RFC 9110 section 4.2.3).
    """
    authority = _AUTHORITY.match(target)
    if authority is None or target.startswith(b"/", authority.end()):
        return target
    return authority[0] + b"/" + target[authority.end() :]
