"""The first bytes of a TCP connection: a plain WebSocket upgrade, or uvicorn's HTTP side.

Most connections of a gateway are WebSockets. Going through uvicorn's HTTP side costs each of them
an HTTP parser, an ASGI scope and the same request written and parsed a second time; a look at the
first read spares them that. What is no plain upgrade goes to uvicorn untouched, which hands any
WebSocket in it to `GatewayProtocol` in its own way.

Source: docs/performance.md (figures).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from gateway.drain import FIRST_WORDS_S, NOTHING_CAME, READ_SOON_S, something_waits
from gateway.handshake import read_upgrade
from gateway.http_protocol import HttpProtocol
from gateway.open_files import OpenFiles
from gateway.socket import GatewayProtocol

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    from gateway.node import Node

# The limit of open files is the process's, however many gateways are in it.
_FILES: Final = OpenFiles()


class Arrival(asyncio.Protocol):
    """A TCP connection that has sent nothing yet; uvicorn makes one for each that it accepts."""

    __slots__ = (
        "_app_state",
        "_config",
        "_loop",
        "_node",
        "_server_state",
        "_transport",
        "bucket",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._loop = _loop
        self._node: Node = app_state["node"]
        self.bucket = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Waits for the first bytes, but not for ever, if there is room for one more."""
        # uvloop's transports have the methods of asyncio.Transport without being one.
        self._transport = cast("asyncio.Transport", transport)
        self._server_state.connections.add(self)  # type: ignore[arg-type]
        node = self._node
        if not _FILES.has_room(self._transport.get_extra_info("socket").fileno(), node.now()):
            self.abort()
            return
        node.wheel.put(self, node.now() + node.settings.handshake_timeout_s)
        if node.draining:
            # It waited in the listener's queue when that was closed.
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets a connection that ended without a word."""
        del exc
        self._leave()

    def shutdown(self) -> None:
        """The server is stopping: who has just come may still ask, and is answered."""
        asyncio.get_running_loop().call_later(FIRST_WORDS_S, self._send_away)

    def _send_away(self) -> None:
        transport = self._transport
        if transport.get_protocol() is not self or transport.is_closing():
            return
        if something_waits(transport.get_extra_info("socket").fileno()):
            asyncio.get_running_loop().call_later(READ_SOON_S, self._send_away)
            return
        transport.write(NOTHING_CAME)
        transport.close()

    def _leave(self) -> None:
        self._server_state.connections.discard(self)
        self._node.wheel.remove(self)

    def abort(self) -> None:
        """Ends the connection."""
        self._transport.abort()

    def on_deadline(self, now: float) -> float | None:
        """Ends a connection that has said nothing for `handshake_timeout_s`."""
        del now
        self.abort()
        return None

    def data_received(self, data: bytes) -> None:
        """Hands the connection to whoever it is for."""
        self._leave()
        transport = self._transport
        upgrade = read_upgrade(data)
        if upgrade is not None:
            socket = GatewayProtocol(self._config, self._server_state, self._app_state)
            transport.set_protocol(socket)
            socket.connection_made(transport)
            socket.upgraded(upgrade, data[upgrade.size_bytes :])
            return
        http = HttpProtocol(self._config, self._server_state, self._app_state, self._loop)
        transport.set_protocol(http)
        http.connection_made(transport)
        http.data_received(data)
