"""The opening handshake as nearly every client sends it: one read, one plain HTTP/1.1 upgrade.

`read_upgrade` knows that one shape and answers None to everything else: half a request, a body, a
repeated header, another version, anything it is not sure of. That goes the long way, through
uvicorn's HTTP side and websockets' handshake, which know the whole of HTTP and how to refuse it.
So nothing is refused here. Pure.

Source: RFC 6455 section 4.2, RFC 9112 section 5 (header fields), docs/performance.md (figures).
"""

from __future__ import annotations

import hashlib
import re
from binascii import b2a_base64
from typing import Final

import msgspec

# Longer heads are rare (a JWT is 1 KiB) and go the long way.
_HEAD_BYTES_MAX: Final = 8_192
# Possessive, so that a head which does not match costs no more than one that does.
_HEAD: Final = re.compile(
    rb"GET (/[!-~]*+) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[\t -~\x80-\xff]*+\r\n)++)\r\n"
)
# A list of tokens: what Connection and Sec-WebSocket-Protocol consist of.
_TOKENS: Final = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++(?:[\t ]*+,[\t ]*+[!#$%&'*+.^_`|~0-9A-Za-z-]++)*+"
)
# What stands in a Host field: a name or an address, and a port; RFC 3986 section 3.2.
HOST: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*+")
# 16 bytes in base64.
_KEY: Final = re.compile(rb"[A-Za-z0-9+/]{22}==")
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# Fields that say that the request goes on, or that someone else is to be asked first.
_LONG_WAY: Final = (b"content-length", b"transfer-encoding", b"expect")
_SWITCHING: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
)


class Opening(msgspec.Struct, frozen=True, gc=False):
    """What an upgrade request says to the gateway.

    Attributes:
        target: The request target: path and query.
        forwarded_proto: `X-Forwarded-Proto`, all of them joined by commas.
    """

    target: str
    origin: str | None
    authorization: str | None
    forwarded_proto: str


class Upgrade(msgspec.Struct, frozen=True, gc=False):
    """An upgrade request that is in order.

    Attributes:
        response: The bytes that answer it.
        size_bytes: How much of what was read is the request.
    """

    opening: Opening
    response: bytes
    size_bytes: int


def read_upgrade(data: bytes) -> Upgrade | None:
    """The upgrade request that `data` begins with; None if it has to go the long way."""
    matched = _HEAD.match(data)
    if matched is None or matched.end() > _HEAD_BYTES_MAX:
        return None
    lines = matched[2].split(b"\r\n")
    fields: dict[bytes, bytes] = {}
    # The last line is what stands behind the last line's end: nothing.
    for line in lines[:-1]:
        name, _, value = line.partition(b":")
        fields[name.lower()] = value.strip(b" \t")
    key = fields.get(b"sec-websocket-key", b"")
    offered = fields.get(b"sec-websocket-protocol")
    if (
        len(fields) != len(lines) - 1
        or fields.get(b"upgrade", b"").lower() != b"websocket"
        or fields.get(b"sec-websocket-version") != b"13"
        or not _KEY.fullmatch(key)
        or not HOST.fullmatch(fields.get(b"host", b" "))
        or not _asks_for_upgrade(fields.get(b"connection", b""))
        or (offered is not None and not _TOKENS.fullmatch(offered))
        or any(name in fields for name in _LONG_WAY)
    ):
        return None
    opening = Opening(
        matched[1].decode(),
        _text(fields.get(b"origin")),
        _text(fields.get(b"authorization")),
        fields.get(b"x-forwarded-proto", b"").decode("latin-1"),
    )
    response = _answer(key, offered)
    return Upgrade(opening, response, matched.end())


def first_subprotocol(offered: str) -> str:
    """The subprotocol that is agreed to: Swift's client drops a connection that repeats none."""
    return offered.partition(",")[0].strip()


def _asks_for_upgrade(connection: bytes) -> bool:
    # Firefox sends "keep-alive, Upgrade".
    return connection == b"Upgrade" or (
        _TOKENS.fullmatch(connection) is not None
        and b"upgrade" in [token.strip(b" \t") for token in connection.lower().split(b",")]
    )


def _text(value: bytes | None) -> str | None:
    # As websockets' parser reads them.
    return None if value is None else value.decode("latin-1")


def _answer(key: bytes, offered: bytes | None) -> bytes:
    digest = hashlib.sha1(key + _GUID, usedforsecurity=False).digest()
    accept = b2a_base64(digest, newline=False)
    if offered is None:
        return b"%b%b\r\n\r\n" % (_SWITCHING, accept)
    subprotocol = first_subprotocol(offered.decode("latin-1")).encode("latin-1")
    return b"%b%b\r\nSec-WebSocket-Protocol: %b\r\n\r\n" % (_SWITCHING, accept, subprotocol)
