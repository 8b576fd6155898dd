"""The life of a connection on the HTTP side: how long it may be silent, and how it ends.

It ends honestly. Whoever has sent a whole call is answered, in the order of his calls, even if he
has closed his sending side behind it. A call that can't be read, or does not come in time, is
answered behind those before it, and what its caller still sends is read for a while: the kernel
would reset a connection on which something lies unread, and the answer with it.

Source: RFC 9112 sections 9.3.2 (the order of answers), 9.5 and 9.6 (silence, closing), decision 87.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.drain import FIRST_WORDS_S, NOTHING_CAME, READ_SOON_S, something_waits
from gateway.errors import ErrorCode
from gateway.problem import refusal

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, MutableMapping

    from starlette.types import Message, Receive, Scope, Send
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from gateway.errors import Code
    from gateway.node import Node

# How long what is still sent behind the last answer is read, and dropped.
_LINGER_S: Final = 2.0


class _NoEvent:
    """Takes the place of the event that an ASGI application waits for."""

    __slots__ = ()

    def set(self) -> None:
        """Wakes nobody."""


_NO_EVENT: Final = _NoEvent()


class Publishing:
    """A plain call that waits for the broker; uvicorn keeps it where it keeps its own cycles.

    Attributes:
        disconnected: The caller has gone; uvicorn sets it.
        keep_alive: Whether the connection outlives the answer; uvicorn clears it to stop.
        response_complete: The answer is written.
        message_event: For uvicorn, which sets it.
    """

    __slots__ = ("disconnected", "keep_alive", "message_event", "response_complete")

    # It begins when all of it has come, and its answer is written at once.
    more_body: ClassVar = False
    response_started: ClassVar = False

    def __init__(self, *, keep_alive: bool) -> None:
        self.disconnected = False
        self.keep_alive = keep_alive
        self.response_complete = False
        self.message_event = _NO_EVENT


class _LastAnswer:
    """What the last call of a connection takes for its transport: it waits before it closes."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.close = close
        self.is_closing = transport.is_closing
        self.write = transport.write


def last_words(code: Code, message: str | None = None) -> bytes:
    """The bytes of an answer that says why not, and that it is the connection's last."""
    response = refusal(code, message)
    status = HTTPStatus(response.status_code)
    fields = [*response.raw_headers, (b"connection", b"close")]
    lines = [b"HTTP/1.1 %d %b" % (status, status.phrase.encode())]
    lines += [b"%b: %b" % field for field in fields]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


class HttpConnection(HttpToolsProtocol):
    """A connection that carries calls, whatever they are."""

    # When the last answer was written, on the loop's clock.
    _idle_since: float = 0.0
    # The body of a plain call while it comes, else None.
    _plain_body: bytes | None = None
    # When the call that comes began, None between two.
    _coming_since: float | None = None
    # What waited for the peer to read at the last deadline, None if nothing had to.
    _unsent_bytes: int | None = None
    # The call that is being answered; uvicorn knows the last one only, which may wait behind it.
    _answering: RequestResponseCycle | Publishing | None = None
    # What ends the connection behind the answers that are still to come; nothing is read any more.
    _last_words: bytes | None = None
    # The last words are said, and only what is left unread is read.
    _has_ended: bool = False
    # The caller has closed his sending side.
    _has_asked_all: bool = False
    # The wheel's.
    bucket: int = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection over."""
        super().connection_made(transport)
        self._node: Node = self.app_state["node"]
        now = self._coming_since = self.loop.time()
        self._node.wheel.put(self, now + self._node.settings.handshake_timeout_s)
        if self._node.draining:
            self.shutdown()

    @property
    def _under_way(self) -> RequestResponseCycle | None:
        """The last call that has come, as far as its head, and is not answered; None if all are."""
        # None before the first call, whatever uvicorn's annotation says.
        last: RequestResponseCycle | None = self.cycle
        return None if last is None or last.response_complete else last

    def abort(self) -> None:
        """Ends the connection at once."""
        self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Has a call carried out by an application that hears of a caller who has asked all.

        For those who wait for their caller's leaving that is all they will ever learn: who closes
        his connection says no more than who closes his sending side.
        """

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            is_whole = False

            async def hear() -> Message:
                nonlocal is_whole
                if is_whole:
                    if not self._has_asked_all:
                        await receive()
                    return {"type": "http.disconnect"}
                message: MutableMapping[str, Any] = await receive()
                is_whole = message["type"] == "http.request" and not message["more_body"]
                return message

            await app(scope, hear, send)  # type: ignore[arg-type]

        self._answering = cycle
        super()._start_asgi_task(cycle, call)  # type: ignore[arg-type]

    # The deadlines

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
            self._refuse(ErrorCode.INCOMPLETE)
            return now + timeout_s
        return self._coming_since + timeout_s

    def resume_writing(self) -> None:
        """The peer has read."""
        self._unsent_bytes = None
        super().resume_writing()

    # Idle connections: one timer for many calls, instead of a new one behind each answer

    def _unset_keepalive_if_required(self) -> None:
        """Leaves the timer alone; when it fires it sees whether the connection was idle."""

    def on_response_complete(self) -> None:
        """Begins what waited behind the answer, or the time in which a next call must come."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            if self._last_words is not None:
                self.flow.pause_reading()
            return
        if self._last_words is not None:
            self._end(self._last_words)
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
        if self._coming_since is not None or not self.cycle.response_complete:
            # The next answer begins it anew.
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._watch_idle(left_s)
        else:
            super().timeout_keep_alive_handler()

    # The end

    def eof_received(self) -> bool:  # type: ignore[override]
        """The caller asks nothing more; he may still read.

        Returns:
            Whether the connection stays open, for the answers to what has come whole. TLS knows no
            half-closed connections.
        """
        self._has_asked_all = True
        if self._coming_since is not None:
            self._refuse(ErrorCode.MALFORMED, "The call ended before it was complete.")
        last = self._under_way
        if last is None or self.scheme == "https":
            return False
        if self._last_words is None:
            self._end_behind(last)
        for call in (self._answering, *(cycle for cycle, _ in self.pipeline)):
            if call is not None:
                call.message_event.set()
        return True

    def _refuse(self, code: Code, message: str | None = None) -> None:
        """Answers the call that is coming, behind those before it, and ends the connection."""
        self._say_last(last_words(code, message))

    def _say_last(self, words: bytes) -> None:
        if self._last_words is not None or self.transport.is_closing():
            return
        self._last_words = words = b"" if self._has_begun_to_answer else words
        self._drop_coming()
        if self._under_way is None:
            self._end(words)
        else:
            self.flow.pause_reading()

    @property
    def _has_begun_to_answer(self) -> bool:
        """Whether the call that is coming has its answer, or a part of it, already."""
        last: RequestResponseCycle | Publishing | None = self.cycle
        return last is not None and last.more_body and last.response_started

    def _drop_coming(self) -> None:
        """Forgets the call that is coming; if it is being carried out, its caller has gone."""
        self._coming_since = self._plain_body = None
        half = self._under_way
        if half is None or not half.more_body:
            return
        half.disconnected = half.response_complete = True
        half.message_event.set()
        if self.pipeline and self.pipeline[0][0] is half:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering  # type: ignore[assignment]

    def _end_behind(self, call: RequestResponseCycle | Publishing) -> None:
        """Makes the answer to a call the connection's last."""
        call.keep_alive = False
        if call.more_body:
            last = _LastAnswer(self.transport, self._close_behind_answer)
            call.transport = last  # type: ignore[union-attr]

    def _close_behind_answer(self) -> None:
        if self._coming_since is None:
            self.transport.close()
        elif self._last_words is None:
            # Its caller still sends the body that was too long.
            self._last_words = b""
            self.pipeline.clear()
            self._end(b"")

    def _end(self, words: bytes) -> None:
        """Ends the connection with these words, and reads on for a while to have them arrive."""
        if self._has_ended:
            return
        self._has_ended = True
        transport = self.transport
        if words:
            transport.write(words)
        if self._has_asked_all or not transport.can_write_eof():
            transport.close()
            return
        transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, transport.close)

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
            self._end_behind(under_way)

    def _send_away(self, at_last: float) -> None:
        """Closes an idle connection now, and one on which half a call has come `at_last`."""
        transport, under_way = self.transport, self._under_way
        ended = transport.is_closing() or transport.get_protocol() is not self
        if ended or (under_way is not None and not under_way.more_body):
            return
        now = self.loop.time()
        if something_waits(transport.get_extra_info("socket").fileno()):
            self.loop.call_at(now + READ_SOON_S, self._send_away, at_last)
        elif self._coming_since is None:
            transport.close()
        elif now < at_last:
            self.loop.call_at(at_last, self._send_away, at_last)
        elif self._body_comes:
            self._refuse(ErrorCode.UNAVAILABLE, "The gateway is stopping; send it again.")
        else:
            self._say_last(NOTHING_CAME)

    @property
    def _body_comes(self) -> bool:
        """Whether the head of a call has come, and not all of its body."""
        under_way = self._under_way
        return self._plain_body is not None or (under_way is not None and under_way.more_body)

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
