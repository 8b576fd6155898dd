"""How the generator's sockets speak to a server: the Pusher protocol, or Socket.IO's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.bench.wire import BenchSocket, Message, client_frame

if TYPE_CHECKING:
    from collections.abc import Mapping

# Packets of Engine.IO 4 (first digit) that carry packets of Socket.IO 5 (second digit).
_OPEN: Final = b"0"
_PING: Final = b"2"
_PONG: Final = b"3"
_CONNECT: Final = b"40"
_ACKNOWLEDGED: Final = b"43"
_CONNECT_ERROR: Final = b"44"


class SocketIoSocket(BenchSocket):
    """A WebSocket that speaks Socket.IO and tells it in the Pusher protocol's events.

    So everything that opens and subscribes sockets needs to know one protocol only: the server's
    `CONNECT` is the connection's greeting, an acknowledgement (of `join`) a subscription's.
    """

    def payload_received(self, payload: bytes) -> None:
        """Answers what must be answered; events (`42[…]`) are dropped."""
        if payload.startswith(_OPEN):
            self.transport.write(client_frame(_CONNECT))
        elif payload.startswith(_PING):
            self.transport.write(client_frame(_PONG))
        elif payload.startswith(_CONNECT):
            self.take(Message("pusher:connection_established"))
        elif payload.startswith(_ACKNOWLEDGED):
            self.take(Message("pusher_internal:subscription_succeeded"))
        elif payload.startswith(_CONNECT_ERROR):
            self.take(Message("pusher:error"))


DIALECTS: Final[Mapping[str, type[BenchSocket]]] = {
    "pusher": BenchSocket,
    "socket.io": SocketIoSocket,
}
