"""Calls over one kept-alive HTTP/1.1 connection, a few microseconds of the generator each."""

from __future__ import annotations

import asyncio
from typing import Self, cast

from gateway.bench.errors import BenchError


class HttpConnection(asyncio.Protocol):
    """One connection, one call at a time; answers need a `Content-Length`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    @classmethod
    async def open(cls, host: str, port: int, deadline_s: float = 10.0) -> Self:
        """Connects.

        Raises:
            BenchError: Nobody answers there.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline_s):
                _, connection = await loop.create_connection(cls, host, port)
        except OSError as error:  # TimeoutError among them
            raise BenchError(f"{host}:{port} can't be reached: {error}") from error
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        # uvloop's transports have the methods of asyncio.Transport without being one.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Ends the call when its answer is complete."""
        buffer = self._buffer
        buffer += data
        head_end = buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(buffer[:head_end]).lower()
        _, _, rest = head.partition(b"\r\ncontent-length:")
        end = head_end + 4 + int(rest.partition(b"\r\n")[0] or 0)
        if len(buffer) < end:
            return
        body = bytes(buffer[head_end + 4 : end])
        del buffer[:end]
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails the call that waits."""
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BenchError(f"an HTTP connection was closed: {exc}"))

    def send(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Sends a whole call; the future is its answer's status and body.

        Raises:
            BenchError: The connection is closed.
        """
        if self._transport is None:
            raise BenchError("the server closed an HTTP connection")
        self._answer = self._loop.create_future()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        """Closes the connection; nobody waits for an answer any more."""
        if self._answer is not None:
            self._answer.cancel()
        if self._transport is not None:
            self._transport.abort()


def http_request(method: str, path: str, host: str, body: bytes = b"", headers: str = "") -> bytes:
    """The bytes of one call; `headers` are whole lines, each with its line break."""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    ).encode() + body
