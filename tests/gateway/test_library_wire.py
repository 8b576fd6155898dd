"""What the library reads for a socket: bytes in, messages out; the wire tests have the socket."""

from __future__ import annotations

import pytest
from websockets.protocol import State

from gateway import inbound
from gateway.library_wire import BINARY, CLOSE, LibraryWire
from tests.gateway.harness import masked_frame

MOST_BYTES = 1_024
TEXT_OPCODE, BINARY_OPCODE, CLOSE_OPCODE, PING_OPCODE = 1, 2, 8, 9
REQUEST = (
    b"GET /app/key HTTP/1.1\r\nHost: duet\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%b\r\n"
)


@pytest.fixture
def wire() -> LibraryWire:
    return LibraryWire(State.OPEN, MOST_BYTES)


def fragment(opcode: int, payload: bytes) -> bytes:
    return masked_frame(opcode, payload, fin=False)


def test_a_message_in_fragments_comes_when_its_last_one_has(wire: LibraryWire) -> None:
    ping = masked_frame(PING_OPCODE, b"p")

    begun = list(wire.messages(fragment(TEXT_OPCODE, b"to") + ping))
    ended = list(wire.messages(masked_frame(0, b"gether")))

    assert begun == [(inbound.PING, b"p")]
    assert ended == [(inbound.TEXT, b"together")]


def test_empty_fragments_without_end_take_no_memory(wire: LibraryWire) -> None:
    messages = list(wire.messages(fragment(TEXT_OPCODE, b"{") + fragment(0, b"") * 1_000))

    assert messages == []
    assert wire._fragments == [b"{"]


def test_a_binary_message_between_texts_is_told_once(wire: LibraryWire) -> None:
    text = fragment(TEXT_OPCODE, b"te") + masked_frame(0, b"xt")
    binary = fragment(BINARY_OPCODE, b"\x00") + masked_frame(0, b"\x01")

    messages = list(wire.messages(text + binary + text))

    assert messages == [(inbound.TEXT, b"text"), (BINARY, b""), (inbound.TEXT, b"text")]


def test_what_was_begun_elsewhere_is_read_to_its_end() -> None:
    close = masked_frame(CLOSE_OPCODE, (1000).to_bytes(2))
    wire = LibraryWire(State.OPEN, MOST_BYTES, begun=close[:3])

    assert list(wire.messages(close[3:])) == [(CLOSE, (1000).to_bytes(2))]
    assert not wire.broken


def test_a_message_that_is_too_long_breaks_the_wire_with_its_code(wire: LibraryWire) -> None:
    assert list(wire.messages(masked_frame(TEXT_OPCODE, b"x" * (MOST_BYTES + 1)))) == []

    last_words, code = wire.last_words()
    assert wire.broken
    assert code == 1009
    assert b"pusher:error" in last_words
    assert (1009).to_bytes(2) in last_words


def test_an_upgrade_is_answered_when_it_is_whole() -> None:
    wire = LibraryWire(State.CONNECTING, MOST_BYTES)
    request = REQUEST % b"Sec-WebSocket-Version: 13\r\nX-Forwarded-Proto: https\r\n"

    assert wire.opening(request[:40]) is None
    assert not wire.broken
    answered = wire.opening(request[40:])

    assert answered is not None
    opening, response = answered
    assert (opening.target, opening.forwarded_proto) == ("/app/key", "https")
    assert response.startswith(b"HTTP/1.1 101 ")


def test_an_upgrade_to_another_version_is_told_the_right_one() -> None:
    wire = LibraryWire(State.CONNECTING, MOST_BYTES)

    assert wire.opening(REQUEST % b"Sec-WebSocket-Version: 8\r\n") is None

    last_words, code = wire.last_words()
    assert wire.broken
    assert code is None
    assert last_words.startswith(b"HTTP/1.1 426 ")
    assert b"Sec-WebSocket-Version: 13\r\n" in last_words


@pytest.mark.parametrize("field", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_an_upgrade_with_a_body_is_told_that_it_is_none(field: bytes) -> None:
    wire = LibraryWire(State.CONNECTING, MOST_BYTES)

    assert wire.opening(REQUEST % (b"Sec-WebSocket-Version: 13\r\n" + field)) is None

    head, _, body = wire.last_words()[0].partition(b"\r\n\r\n")
    assert wire.broken
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Length: %d\r\n" % len(body) in head


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://gateway.example:6001/app/key?protocol=7", "/app/key?protocol=7"),
        (b"ws://gateway.example", "/"),
    ],
)
def test_an_upgrade_may_name_the_whole_url(target: bytes, path: str) -> None:
    wire = LibraryWire(State.CONNECTING, MOST_BYTES)
    request = (REQUEST % b"Sec-WebSocket-Version: 13\r\n").replace(b"/app/key", target)

    answered = wire.opening(request)

    assert answered is not None
    assert answered[0].target == path
