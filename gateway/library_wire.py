"""What the short ways leave over, read by websockets: any upgrade, any frame, and broken ones.

`gateway.handshake` and `gateway.inbound` each know what clients send nearly always; this knows all
of RFC 6455, and how a peer that breaks it is told. Sans-I/O, like the library's `ServerProtocol`
below it: bytes in, messages out.

The library has read on to the last frame before the first one is seen, so its pongs and closes
would come in another order than what they answer. The socket answers by itself; only the answer to
the handshake and the last words to a broken one are the library's.

Permessage-deflate is refused, because ready frames are uncompressed.

Source: RFC 6455, docs/decisions.md 69.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from gateway import frames, inbound
from gateway.handshake import Opening, first_subprotocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.protocol import State

# Its own logger, so that websockets' line per connection can be switched off; and one for all
# connections, because ServerProtocol asks it for its level when it is built.
_log = logging.getLogger("duet.wire")
_log.setLevel(logging.WARNING)

# Kinds of messages beside those of `inbound`.
BINARY: Final = 0x82
CLOSE: Final = 0x88

_NO_UPGRADE: Final = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 43\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
    b"This is no request to open a WebSocket by.\n"
)


class LibraryWire:
    """What one peer sends, as the library reads it."""

    __slots__ = ("_fragments", "_protocol")

    def __init__(self, state: State, most_bytes: int, begun: bytes = b"") -> None:
        """Reads nothing yet.

        Args:
            state: `CONNECTING` before the upgrade, `OPEN` behind it.
            most_bytes: How long a message may be.
            begun: The beginning of a frame, which was read elsewhere.
        """
        self._protocol = ServerProtocol(state=state, max_size=most_bytes, logger=_log)
        self._fragments: list[bytes | bytearray] | None = None
        if begun:
            self._protocol.receive_data(begun)

    def opening(self, data: bytes) -> tuple[Opening, bytes] | None:
        """The upgrade request that is whole with `data`, and its answer.

        None when more is to come, or when the request is refused: then the wire is broken.
        """
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Request):
                return self._answered(event)
        return None

    def _answered(self, request: Request) -> tuple[Opening, bytes] | None:
        protocol, headers = self._protocol, request.headers
        response = protocol.accept(request)
        versions = headers.get_all("Sec-WebSocket-Version")
        if response.status_code == HTTPStatus.BAD_REQUEST and versions not in ([], ["13"]):
            # So that the client can choose another one (RFC 6455 section 4.4).
            response = protocol.reject(
                HTTPStatus.UPGRADE_REQUIRED, "The WebSocket version is 13.\n"
            )
            response.headers["Upgrade"] = "websocket"
            response.headers["Sec-WebSocket-Version"] = "13"
        is_accepted = response.status_code == HTTPStatus.SWITCHING_PROTOCOLS
        if is_accepted and (offered := headers.get_all("Sec-WebSocket-Protocol")):
            response.headers["Sec-WebSocket-Protocol"] = first_subprotocol(offered[0])
        protocol.send_response(response)
        if not is_accepted:
            return None
        opening = Opening(
            _origin_form(request.path),
            next(iter(headers.get_all("Origin")), None),
            next(iter(headers.get_all("Authorization")), None),
            ",".join(headers.get_all("X-Forwarded-Proto")),
        )
        return opening, b"".join(protocol.data_to_send())

    def messages(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The kind and the payload of each message that `data` completes; pongs say nothing.

        A binary message comes without its payload, as soon as it begins.
        """
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                message = self._message(event)
                if message is not None:
                    yield message
        self._protocol.data_to_send()

    def _message(self, event: Frame) -> tuple[int, bytes] | None:
        match event.opcode:
            case Opcode.TEXT if event.fin:
                return inbound.TEXT, bytes(event.data)
            case Opcode.PING:
                return inbound.PING, bytes(event.data)
            case Opcode.CLOSE:
                return CLOSE, bytes(event.data)
            case Opcode.BINARY:
                return BINARY, b""
            case Opcode.TEXT:
                self._fragments = [event.data]  # type: ignore[list-item]
            case Opcode.CONT:
                return self._continued(event)
        return None

    def _continued(self, event: Frame) -> tuple[int, bytes] | None:
        """The text message that this frame ends; what continues a binary one is dropped."""
        fragments = self._fragments
        if fragments is None:
            return None
        if event.data:
            # Empty ones may come without end: the message's limit doesn't count them.
            fragments.append(event.data)  # type: ignore[arg-type]
        if not event.fin:
            return None
        self._fragments = None
        return inbound.TEXT, b"".join(fragments)

    @property
    def broken(self) -> bool:
        """Whether the peer breaks HTTP or the RFC, or asks for what is refused."""
        return self._protocol.parser_exc is not None or self._protocol.handshake_exc is not None

    def last_words(self) -> tuple[bytes, int | None]:
        """What a broken wire ends with, and the close code in it; an HTTP answer has none."""
        close = self._protocol.close_sent
        if close is None:
            # The library has no answer to what it can't read as a request without a body.
            return b"".join(self._protocol.data_to_send()) or _NO_UPGRADE, None
        error = frames.frame(frames.error_body(close.reason))
        return error + frames.close_frame(close.serialize()), int(close.code)


def _origin_form(target: str) -> str:
    """Path and query, of which a client may make a whole URL (RFC 9112 section 3.2.2)."""
    if target.startswith("/"):
        return target
    return "/" + target.partition("://")[2].partition("/")[2]
