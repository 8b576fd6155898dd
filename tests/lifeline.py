"""The line of one process to its Redis, which can be cut while everybody else keeps theirs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from gateway.redis_link import RedisAddress
from persistence.embedded_process import LOOPBACK

_CHUNK_BYTES = 65_536


class Lifeline:
    """A proxy in front of a Redis."""

    def __init__(self, redis_url: str) -> None:
        self._address = RedisAddress.of(redis_url)
        self._whole = True
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry_both_ways, LOOPBACK, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Where Redis is for whoever hangs on this line."""
        return f"redis://{LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Ends each connection; new ones are ended as soon as they come."""
        self._whole = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Lets new connections through again."""
        self._whole = True

    async def _carry_both_ways(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            if not self._whole:
                return
            if self._address.path is not None:
                far_reader, far_writer = await asyncio.open_unix_connection(self._address.path)
            else:
                far_reader, far_writer = await asyncio.open_connection(
                    self._address.host, self._address.port
                )
            both = {writer, far_writer}
            self._writers |= both
            try:
                async with asyncio.TaskGroup() as ways:
                    ways.create_task(self._carry(reader, far_writer))
                    ways.create_task(self._carry(far_reader, writer))
            finally:
                self._writers -= both

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                writer.write(data)
                await writer.drain()
