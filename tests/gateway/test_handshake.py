"""The plain upgrade request, and all that is left to those who know the whole of HTTP."""

from __future__ import annotations

import pytest
from websockets.http11 import Request
from websockets.server import ServerProtocol

from gateway.handshake import read_upgrade

REQUEST = (
    b"GET /app/app-key?protocol=7 HTTP/1.1\r\n"
    b"Host: gateway.example\r\n"
    b"Upgrade: websocket\r\n"
    b"Connection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n"
    b"\r\n"
)


def with_line(line: bytes) -> bytes:
    return REQUEST.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n")


def response_of_the_library(request: bytes) -> bytes:
    wire = ServerProtocol()
    wire.receive_data(request)
    [event] = wire.events_received()
    response = wire.accept(event)  # type: ignore[arg-type]
    del response.headers["Date"]
    wire.send_response(response)
    return b"".join(wire.data_to_send())


def test_a_plain_upgrade_is_answered_as_the_library_answers_it() -> None:
    upgrade = read_upgrade(REQUEST + b"frames")

    assert upgrade is not None
    assert upgrade.response == response_of_the_library(REQUEST)
    assert upgrade.size_bytes == len(REQUEST)
    assert upgrade.opening.target == "/app/app-key?protocol=7"
    assert upgrade.opening.origin is None


def test_what_the_gateway_asks_about_is_read_whatever_the_case_of_its_name() -> None:
    request = with_line(
        b"ORIGIN: https://shop.example\r\nauthorization:\tBearer a.b.c \r\n"
        b"x-forwarded-proto: https,http\r\nSec-WebSocket-Protocol: pusher-v7 , other"
    )

    upgrade = read_upgrade(request)

    assert upgrade is not None
    assert upgrade.opening.origin == "https://shop.example"
    assert upgrade.opening.authorization == "Bearer a.b.c"
    assert upgrade.opening.forwarded_proto == "https,http"
    assert upgrade.response.endswith(b"\r\nSec-WebSocket-Protocol: pusher-v7\r\n\r\n")


@pytest.mark.parametrize("connection", [b"upgrade", b"keep-alive, Upgrade", b"Upgrade,close"])
def test_upgrade_may_be_one_of_several_connection_options(connection: bytes) -> None:
    request = REQUEST.replace(b"Connection: Upgrade", b"Connection: " + connection)

    assert read_upgrade(request) is not None


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        REQUEST[:-1],
        REQUEST.replace(b"GET", b"POST"),
        REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        REQUEST.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        REQUEST.replace(b"Connection: Upgrade", b"Connection: keep-alive"),
        REQUEST.replace(b"Version: 13", b"Version: 8"),
        REQUEST.replace(b"ZQ==", b"ZQ="),
        REQUEST.replace(b"Sec-WebSocket-Key", b"Sec-WebSocket-Other"),
        REQUEST.replace(b"protocol=7", b"protocol=\xc3\xa4"),
        REQUEST.replace(b"\r\n", b"\n"),
        with_line(b"Origin: https://a.example\r\norigin: https://b.example"),
        with_line(b"Content-Length: 5"),
        with_line(b"Transfer-Encoding: chunked"),
        with_line(b"Expect: 100-continue"),
        with_line(b"X-Folded: one\r\n two"),
        with_line(b"X-Bad\x00Name: one"),
        with_line(b"X-Bad: a\x00b"),
        with_line(b"X-Long: " + b"a" * 8_192),
        REQUEST.replace(b"/app", b"http://gateway.example/app"),
        REQUEST.replace(b"/app/app-key?protocol=7", b"*"),
        REQUEST.replace(b"Connection: Upgrade", b"Connection: keep alive, Upgrade"),
        REQUEST.replace(b"Connection: Upgrade", b'Connection: Upgrade, ("x'),
        with_line(b"Sec-WebSocket-Protocol: "),
        with_line(b"Sec-WebSocket-Protocol: ,pusher"),
        with_line(b"Sec-WebSocket-Protocol: one two"),
    ],
)
def test_everything_else_goes_the_long_way(request_: bytes) -> None:
    assert read_upgrade(request_) is None


def test_what_is_no_ascii_is_read_as_the_library_reads_it() -> None:
    request = with_line(b"Origin: https://\xe4.example\r\nAuthorization: Bearer \xff")
    wire = ServerProtocol()
    wire.receive_data(request)
    [event] = wire.events_received()

    upgrade = read_upgrade(request)

    assert upgrade is not None
    assert isinstance(event, Request)
    assert upgrade.opening.origin == event.headers["Origin"]
    assert upgrade.opening.authorization == event.headers["Authorization"]
