"""pusher-js's HTTP transports, for clients behind a proxy that lets no WebSocket through.

    POST {prefix}/pusher/app/{key}/{server}/{session}/xhr_streaming   one long answer of lines
    POST {prefix}/pusher/app/{key}/{server}/{session}/xhr             one poll
    POST {prefix}/pusher/app/{key}/{server}/{session}/xhr_send        a JSON array of messages

The client picks `{server}/{session}` at random; who knows them speaks for the connection, so they
are never logged. A connection lives on the process that its first request came to. Messages that
come to another process are handed to the right one over the control channel; streams and polls
can't be, so the process that gets one opens a connection of its own, which tells the client to
connect anew. Behind a load balancer all requests of a connection therefore belong on one node.

Source: docs/pusher-compatibility.md 1.10.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from gateway import fallback_lines as lines
from gateway import frames
from gateway.admission import Admission
from gateway.broker import BrokerUnavailable
from gateway.errors import DISCONNECTS, CloseCode
from gateway.fallback_connection import FallbackConnection, Stream
from gateway.handshake import Opening
from gateway.opening import Refusal, admitted, app_now, prove
from gateway.problem import BodyTooLargeError, DisconnectedError, header, read_body
from gateway.rates import Rate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping, Sequence

    from gateway.apps import App
    from gateway.auth import Identity
    from gateway.node import Node

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# What the HTTP side of the server puts into the scope: ends the TCP connection at once.
ABORT_EXTENSION: Final = "duet.abort"
# Messages for other processes, all clients together; each costs every process a look.
FORWARDED_PER_S: Final = 500

_FORWARD: Final = "fallback_send"
_PATH: Final = re.compile(
    r"(?P<key>[A-Za-z0-9_-]{1,64})/(?P<server>[0-9]{1,3})/(?P<session>[0-9A-Za-z]{1,32})"
    r"/(?P<route>xhr_streaming|xhr|xhr_send)",
    re.ASCII,
)
_decode_messages: Final = msgspec.json.Decoder(list[str]).decode

# Pages of any origin may call; an app that allows some origins only refuses the others itself,
# in words that the client can read.
_CORS: Final = ((b"access-control-allow-origin", b"*"),)
_PREFLIGHT: Final = (
    *_CORS,
    (b"access-control-allow-methods", b"POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"7200"),
)
# Neither caches nor guesses nor buffers on the way.
_LINES: Final = (
    *_CORS,
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
)


class _Name(NamedTuple):
    """What a client calls its connection: pusher-js's word for one is session."""

    key: str
    server: str
    session: str


class Fallback:
    """The ASGI application below `/pusher/app/`, and the connections of this process."""

    def __init__(self, path_prefix: str) -> None:
        self._prefix = path_prefix
        self.root = f"{path_prefix}/pusher/app/"
        self._connections: dict[_Name, FallbackConnection] = {}
        self._shared = lines.SharedLines()
        self._forwarded: Rate | None = None

    def __len__(self) -> int:
        return len(self._connections)

    def join(self, node: Node) -> None:
        """Takes messages that came to other processes; called once the node has been started."""
        self._forwarded = Rate(FORWARDED_PER_S, node.now())
        node.control.on(_FORWARD, lambda data: self._take_forwarded(node, data))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call."""
        found = _PATH.fullmatch(scope["path"].removeprefix(self.root))
        if found is None:
            await _answer(send, 404)
        elif scope["method"] == "OPTIONS":
            await _answer(send, 204, headers=_PREFLIGHT)
        elif scope["method"] != "POST":
            await _answer(send, 405, headers=(*_CORS, (b"allow", b"OPTIONS, POST")))
        else:
            name = _Name(found["key"], found["server"], found["session"])
            node: Node = scope["state"]["node"]
            if found["route"] == "xhr_send":
                await self._take(scope, receive, send, node, name)
            else:
                long = found["route"] == "xhr_streaming"
                await self._stream(scope, receive, send, node, name, long=long)

    # Sending to the client

    async def _stream(
        self, scope: Scope, receive: Receive, send: Send, node: Node, name: _Name, *, long: bool
    ) -> None:
        connection = self._connections.get(name) or await self._open(scope, node, name)
        if isinstance(connection, Refusal):
            await _answer(send, 200, _refusal_lines(connection), _LINES)
            return
        stream = Stream(long=long, abort=_abort_of(scope))
        connection.take_over(stream)
        node.spawn(_watch(receive, connection, stream), "fallback_watch")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _LINES})
            while (body := await connection.lines_for(stream)) is not None:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if not long:
                    break
            await send({"type": "http.response.body", "body": b""})
        finally:
            connection.let_go(stream)

    async def _open(self, scope: Scope, node: Node, name: _Name) -> FallbackConnection | Refusal:
        """The connection that this request begins, or why there is none."""
        query = scope["query_string"].decode("latin-1")
        opening = Opening(
            f"{self._prefix}/app/{name.key}?{query}",
            header(scope, b"origin"),
            header(scope, b"authorization"),
            header(scope, b"x-forwarded-proto") or "",
        )
        admission = admitted(node, opening, encrypted=scope["scheme"] == "https")
        if not isinstance(admission, Admission):
            return Refusal(admission)
        identity: Identity | None = None
        if admission.token is not None:
            proved = await _prove_in_time(node, admission.token)
            if isinstance(proved, Refusal):
                return proved
            identity = proved
        app = app_now(node.apps, admission.app)
        if isinstance(app, CloseCode):
            return Refusal(app)
        # Another request of the client may have opened it meanwhile.
        return self._connections.get(name) or self._begin(node, name, app, identity)

    def _begin(
        self, node: Node, name: _Name, app: App, identity: Identity | None
    ) -> FallbackConnection | Refusal:
        if not node.has_room(app):
            return Refusal(CloseCode.OVER_CONNECTION_QUOTA)
        connection = FallbackConnection(
            node, app, identity, self._shared.of, lambda _: self._forget(name)
        )
        self._connections[name] = connection
        return connection

    def _forget(self, name: _Name) -> None:
        self._connections.pop(name, None)

    # Taking from the client

    async def _take(
        self, scope: Scope, receive: Receive, send: Send, node: Node, name: _Name
    ) -> None:
        """204 once the messages have been acted upon, or handed to the other processes."""
        try:
            body = await read_body(scope, receive, node.settings.max_body_bytes)
            texts = _decode_messages(body)
        except BodyTooLargeError:
            await _answer(send, 413)
            return
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            await _answer(send, 400)
            return
        except DisconnectedError:
            return
        connection = self._connections.get(name)
        if connection is not None:
            await connection.receive(texts)
            await _answer(send, 204)
        else:
            await _answer(send, await self._forward(node, name, body))

    async def _forward(self, node: Node, name: _Name, body: bytes) -> int:
        """The status for messages whose connection is not here: where it is, nobody is asked."""
        rate = self._forwarded
        if node.apps.by_key(name.key) is None:
            return 404
        if len(body) > node.settings.max_message_bytes:
            return 413
        if rate is None or not rate.allow(FORWARDED_PER_S, node.now()):
            return 503
        try:
            await node.control.send(_FORWARD, **name._asdict(), body=body.decode())
        except BrokerUnavailable:
            return 503
        return 204

    def _take_forwarded(self, node: Node, data: dict[str, str]) -> None:
        connection = self._connections.get(_Name(data["key"], data["server"], data["session"]))
        if connection is not None:
            texts = _decode_messages(data["body"])
            node.spawn(connection.receive(texts), "fallback_receive")


async def _prove_in_time(node: Node, token: str) -> Identity | Refusal:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(node.settings.handshake_timeout_s):
            return await prove(node, token)
    return Refusal(CloseCode.OVER_CAPACITY)


async def _watch(receive: Receive, connection: FallbackConnection, stream: Stream) -> None:
    """Notices that the client has closed the answer, or that it is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass
    connection.let_go(stream)


def _abort_of(scope: Scope) -> Callable[[], None]:
    abort: Callable[[], None] = scope["extensions"][ABORT_EXTENSION]
    return abort


def _refusal_lines(refusal: Refusal) -> bytes:
    text = refusal.message or DISCONNECTS[refusal.code].reason
    error = frames.frame(frames.error_body(text, int(refusal.code)))
    close = lines.close_line(int(refusal.code), text)
    return lines.OPEN + lines.messages_line(error) + close


async def _answer(
    send: Send, status: int, body: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = _CORS
) -> None:
    if status != 204:
        headers = (*headers, (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
