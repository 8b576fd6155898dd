"""The client's side of a Pusher connection, as lean as a load generator has to be."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from gateway.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable

_encode = msgspec.json.Encoder().encode
_MASKED: Final = 0x80
# A mask of zeros is valid and leaves the payload as it is; a mask protects proxies, and there is
# none between a benchmark and its target.
_MASK: Final = bytes(4)
_HEAD_END: Final = b"\r\n\r\n"
_CLOSE: Final = 8
# Closing with a reset leaves no port behind in TIME_WAIT; a few runs would use up all 28,000.
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Message(msgspec.Struct):
    """One frame, decoded as far as needed to know whom it concerns.

    Attributes:
        data: JSON bytes; mostly a string that holds JSON.
    """

    event: str
    channel: str = ""
    data: msgspec.Raw = msgspec.Raw(b"null")

    def content(self) -> Any:
        """The data, decoded twice where it was encoded twice."""
        value = msgspec.json.decode(self.data)
        return msgspec.json.decode(value) if isinstance(value, str) else value


_decode_message = msgspec.json.Decoder(Message).decode


def upgrade_request(host: str, port: int, path: str) -> bytes:
    """The opening handshake (RFC 6455 section 4.1)."""
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def client_frame(payload: bytes) -> bytes:
    """The masked text frame that carries `payload`."""
    length = len(payload)
    if length < 126:
        return bytes((0x81, _MASKED | length)) + _MASK + payload
    if length < 0x10000:
        return bytes((0x81, _MASKED | 126)) + length.to_bytes(2) + _MASK + payload
    return bytes((0x81, _MASKED | 127)) + length.to_bytes(8) + _MASK + payload


def client_message(event: str, data: Any, channel: str | None = None) -> bytes:
    """The frame of one event from a client."""
    message = {"event": event, "data": data}
    if channel is not None:
        message["channel"] = channel
    return client_frame(_encode(message))


class FrameReader:
    """Cuts a server's bytes into payloads: first the handshake's answer, then unmasked frames."""

    __slots__ = ("_buffer", "upgraded")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.upgraded = False

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the text frames that are complete with `data`.

        Raises:
            BenchError: The server refused the handshake or closed the connection.
        """
        buffer = self._buffer
        buffer += data
        if not self.upgraded and not self._upgrade():
            return []
        payloads = []
        while (frame := _first_frame(buffer)) is not None:
            opcode, start, end = frame
            payload = bytes(buffer[start:end])
            del buffer[:end]
            if opcode == _CLOSE:
                code = int.from_bytes(payload[:2])
                raise BenchError(f"the server closed a socket: {code} {payload[2:].decode()}")
            if opcode == 1:
                payloads.append(payload)
        return payloads

    def _upgrade(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            return False
        status = self._buffer[: self._buffer.find(b"\r\n")].decode("latin-1")
        if " 101 " not in f"{status} ":
            raise BenchError(f"the server refused a WebSocket: {status}")
        del self._buffer[: end + len(_HEAD_END)]
        self.upgraded = True
        return True


def _first_frame(buffer: bytearray) -> tuple[int, int, int] | None:
    """Opcode, start and end of the payload of the first frame, if it is complete."""
    if len(buffer) < 2:
        return None
    length, start = buffer[1], 2
    if length == 126:
        length, start = int.from_bytes(buffer[2:4]), 4
    elif length == 127:
        length, start = int.from_bytes(buffer[2:10]), 10
    end = start + length
    return None if len(buffer) < end else (buffer[0] & 0x0F, start, end)


class BenchSocket(asyncio.Protocol):
    """One WebSocket of the generator.

    Attributes:
        on_event: event name -> what is called with each such message; others are dropped.
        on_fault: What is called once, when the socket can't be used any more.
        arrived_at_s: When the bytes that are being read now arrived, in monotonic seconds.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._reader = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._awaited: dict[str, asyncio.Future[Message]] = {}
        self._fault: BenchError | None = None
        self._transport: asyncio.Transport | None = None
        self.on_event: dict[str, Callable[[Message], None]] = {}
        self.on_fault: Callable[[BenchError], None] | None = None
        self.arrived_at_s = 0.0

    @property
    def transport(self) -> asyncio.Transport:
        """The socket's transport.

        Raises:
            BenchError: The socket is closed.
        """
        if self._transport is None:
            raise self._fault or BenchError("a socket is not connected")
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the handshake."""
        # uvloop's transports have the methods of asyncio.Transport without being one.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Hands each message to whoever waits for it."""
        # Not the loop's time: uvloop's has whole milliseconds.
        self.arrived_at_s = time.monotonic()
        try:
            payloads = self._reader.feed(data)
        except BenchError as error:
            self._fail(error)
            return
        for payload in payloads:
            self._take(_decode_message(payload))

    def _take(self, message: Message) -> None:
        if message.event in {"pusher:error", "pusher:subscription_error"}:
            self._fail(BenchError(f"the server answered {message.event}: {message.content()}"))
            return
        awaited = self._awaited.pop(message.event, None)
        if awaited is not None and not awaited.done():
            awaited.set_result(message)
        callback = self.on_event.get(message.event)
        if callback is not None:
            callback(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails whoever still waits."""
        self._fail(BenchError(f"the server closed a socket{f': {exc}' if exc else ''}"))

    def _fail(self, error: BenchError) -> None:
        if self._fault is not None:
            return
        self._fault = error
        for awaited in self._awaited.values():
            if not awaited.done():
                awaited.set_exception(self._fault)
        self._awaited.clear()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if self.on_fault is not None:
            self.on_fault(error)

    def expect(self, event: str) -> asyncio.Future[Message]:
        """The next message of that event; ask before sending what causes it."""
        awaited: asyncio.Future[Message] = self._loop.create_future()
        if self._fault is not None:
            awaited.set_exception(self._fault)
        else:
            self._awaited[event] = awaited
        return awaited

    async def subscribe(self, frame: bytes, deadline_s: float) -> None:
        """Sends a subscription and waits for its confirmation.

        Raises:
            BenchError: It is refused, or there is no answer in time.
        """
        await self.answer_to(frame, "pusher_internal:subscription_succeeded", deadline_s)

    async def answer_to(self, frame: bytes, event: str, deadline_s: float) -> Message:
        """Sends a frame and waits for the event that answers it.

        Raises:
            BenchError: It is refused, or there is no answer in time.
        """
        answer = self.expect(event)
        self.transport.write(frame)
        return await within(answer, deadline_s, event)

    def close(self) -> None:
        """Closes the socket with a reset."""
        if self._transport is not None:
            self._transport.abort()


async def within(awaited: asyncio.Future[Message], deadline_s: float, what: str) -> Message:
    """Waits for a message.

    Raises:
        BenchError: It does not come in time.
    """
    try:
        async with asyncio.timeout(deadline_s):
            return await awaited
    except TimeoutError:
        raise BenchError(f"no {what} within {deadline_s:g} s") from None


async def open_socket(host: str, port: int, path: str, deadline_s: float) -> BenchSocket:
    """Connects a socket and waits for `pusher:connection_established`.

    Raises:
        BenchError: The server can't be reached, refuses, or doesn't answer in time.
    """
    loop = asyncio.get_running_loop()
    request = upgrade_request(host, port, path)
    try:
        async with asyncio.timeout(deadline_s):
            connection = BenchSocket(request)
            # The bytes could come before `create_connection` returns: expect them first.
            established = connection.expect("pusher:connection_established")
            transport, _ = await loop.create_connection(lambda: connection, host, port)
            raw: socket.socket = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await established
    except TimeoutError:
        raise BenchError(f"a socket was not accepted within {deadline_s:g} s") from None
    except OSError as error:
        raise BenchError(f"a socket can't be opened: {error.strerror or error}") from error
    return connection
