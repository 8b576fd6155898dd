"""How the generator's sockets speak to a server: the Pusher protocol, or Socket.IO's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.bench.orders import Greeting, Manners
from gateway.bench.wire import client_frame, client_message

if TYPE_CHECKING:
    from collections.abc import Mapping

DIALECTS: Final[Mapping[str, Manners]] = {
    "pusher": Manners(
        welcome=b"pusher:connection_established",
        confirmed=b"pusher_internal:subscription_succeeded",
        refused=(b'"event":"pusher:subscription_error"',),
        failed=(b'"event":"pusher:error"',),
        ping=client_message("pusher:ping", {}),
        pong=b'"pusher:pong"',
        asked=b'"pusher:ping"',
        reply=client_message("pusher:pong", {}),
    ),
    # Packets of Engine.IO 4 (first digit) that carry packets of Socket.IO 5 (second digit): the
    # server opens, the client connects, the acknowledgement of its `join` is the confirmation.
    "socket.io": Manners(
        greetings=(Greeting(b'0{"sid"', client_frame(b"40")),),
        welcome=b'40{"sid"',
        confirmed=b"43",
        refused=(b"44{",),
    ),
}
