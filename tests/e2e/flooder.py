"""Sends one request again and again over several connections until its standard input ends.

`calls` waits for each answer; `events` sends what follows the upgrade in the request as client
events, as fast as the gateway reads them. What comes back is read and dropped. Each connection
writes one byte to standard output when its first answer has come.
"""

from __future__ import annotations

import asyncio
import os
import sys

AT_ONCE_BYTES = 262_144


async def flood(kind: str, port: int, request: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head, end, message = request.partition(b"\r\n\r\n")
    writer.write(request if kind == "calls" else head + end)
    await reader.read(65_536)
    os.write(1, b".")
    async with asyncio.TaskGroup() as group:
        if kind == "events":
            group.create_task(send_for_ever(writer, message * (AT_ONCE_BYTES // len(message))))
        while True:
            if kind == "calls":
                writer.write(request)
            assert await reader.read(65_536), "the gateway has hung up"


async def send_for_ever(writer: asyncio.StreamWriter, messages: bytes) -> None:
    while True:
        writer.write(messages)
        await writer.drain()


async def main(kind: str, port: int, count: int) -> None:
    size = int.from_bytes(sys.stdin.buffer.read(4), "big")
    request = sys.stdin.buffer.read(size)
    floods = [asyncio.ensure_future(flood(kind, port, request)) for _ in range(count)]
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.buffer.read))
    done, _ = await asyncio.wait([ended, *floods], return_when=asyncio.FIRST_COMPLETED)
    # One that ended before it was told to has failed.
    os._exit(0 if ended in done else 1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
