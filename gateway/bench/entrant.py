"""A socket of the generator on its way in: connected, upgraded, greeted, subscribed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import re
import socket
import struct
from typing import TYPE_CHECKING, Final

from gateway.bench.errors import BenchError, RefusedError
from gateway.bench.orders import SIGNATURE_PLACE
from gateway.bench.wire import FrameReader

if TYPE_CHECKING:
    from gateway.bench.orders import Join, Room

# Closing with a reset leaves no port behind in TIME_WAIT; a few runs would use up all 28,000.
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_SOCKET_ID: Final = re.compile(rb'socket_id[\\": ]+([0-9.]+)')
_READ_BYTES: Final = 65_536


class Entrant:
    """One socket until its subscription is confirmed.

    Attributes:
        socket: Never blocks; closed with a reset.
        room: What it is to subscribe to.
        began_s: When the attempt began, in monotonic seconds.
        writable: It is connected, and the upgrade is asked for.
    """

    __slots__ = ("_join", "_reader", "_request", "_step", "began_s", "room", "socket", "writable")

    def __init__(self, join: Join, request: bytes, room: Room, began_s: float) -> None:
        """Begins to connect.

        Raises:
            OSError: The server can't be reached.
        """
        self._join = join
        self._reader = FrameReader()
        self._request = request
        self._step = 0
        self.room = room
        self.began_s = began_s
        self.writable = False
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self.socket.setblocking(False)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            with contextlib.suppress(BlockingIOError):  # it is under way
                self.socket.connect((join.host, join.port))
            self.greet()
        except OSError:
            self.socket.close()
            raise

    def greet(self) -> bool:
        """Asks for the upgrade; False while the connection is still being made.

        Raises:
            OSError: It could not be made.
        """
        try:
            self.socket.send(self._request)
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.ENOTCONN, errno.EINPROGRESS}:
                raise
        else:
            self.writable = True
        return self.writable

    def receive(self) -> bool:
        """Reads, answers what is to be answered, and tells whether the socket is subscribed.

        Raises:
            OSError: The connection is broken.
            RefusedError: The server refuses the subscription.
            BenchError: It hangs up, or has no room.
        """
        data = self.socket.recv(_READ_BYTES)
        if not data:
            raise BenchError("the server closed a socket")
        is_subscribed = False
        for payload in self._reader.feed(data):
            is_subscribed |= self._take(payload)
        return is_subscribed

    def _take(self, payload: bytes) -> bool:
        manners = self._join.manners
        _check(manners.refused, payload, RefusedError)
        _check(manners.failed, payload, BenchError)
        if self._step < len(manners.greetings):
            greeting = manners.greetings[self._step]
            if greeting.awaited in payload:
                self._step += 1
                self.socket.send(greeting.answer)
            return False
        if self._step == len(manners.greetings):
            if manners.welcome in payload:
                self._step += 1
                self.socket.send(self._subscription(payload))
            return False
        return manners.confirmed in payload

    def _subscription(self, welcome: bytes) -> bytes:
        frame = self.room.subscribe_frame
        if not self._join.secret:
            return frame
        found = _SOCKET_ID.search(welcome)
        if found is None:
            raise BenchError("the server gave a socket no id")
        text = b"%s:%s" % (found[1], self.room.channel.encode())
        digest = hmac.digest(self._join.secret.encode(), text, hashlib.sha256)
        return frame.replace(SIGNATURE_PLACE, digest.hex().encode())


def _check(texts: tuple[bytes, ...], payload: bytes, error: type[BenchError]) -> None:
    for text in texts:
        if text in payload:
            raise error(f"the server answered {payload[:200].decode(errors='replace')}")
