"""Publications of the generator: over a pool of HTTP connections, at a rate or flat out."""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from gateway.bench.errors import BenchError
from gateway.bench.http import HttpConnection
from gateway.bench.orders import STAMP_DIGITS, stamped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AsyncExitStack

    from gateway.bench.stage import Stage
    from gateway.bench.target import Target

EVENT: Final = "tick"
# In front of an event's stamp; nothing else in an event reads so.
STAMP: Final = "at:"
_ANSWER_DEADLINE_S: Final = 10.0
# Sent later than this after its turn, an event says more about the generator than the server.
_LATE_S: Final = 0.02


def filling(target: Target, channel: str, event_bytes: int, head: str = "") -> str:
    """What makes an event, whose data begin with `head`, as long as a subscriber is to get it."""
    least = target.delivered_bytes(channel, EVENT, head)
    # The frame's header grows with the event: it is not a part of what was asked for.
    header = 2 if least < 128 else 4
    return "x" * max(0, event_bytes + header - least)


def check_accepted(status: int, body: bytes) -> None:
    """Looks at the answer to a publication.

    Raises:
        BenchError: It is refused.
    """
    if status != HTTPStatus.OK:
        text = body.decode(errors="replace").strip()
        raise BenchError(f"a publication was refused: HTTP {status} {text}")


class Event:
    """An event of a given length for channels whose names are equally long.

    Attributes:
        frame_bytes: What each subscriber receives of one event.
    """

    def __init__(self, target: Target, channel: str, event_bytes: int) -> None:
        self._filling = filling(target, channel, event_bytes, STAMP + "0" * STAMP_DIGITS)
        self.frame_bytes = target.delivered_bytes(channel, EVENT, self.data())

    def data(self) -> str:
        """The data of one event that is sent now."""
        return f"{STAMP}{stamped(time.monotonic())}{self._filling}"


class Publishers:
    """HTTP connections, each for one call at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._free: asyncio.LifoQueue[HttpConnection] = asyncio.LifoQueue()
        self._count = 0
        self.late_s = 0.0

    async def open(self, stack: AsyncExitStack, connections: int) -> None:
        """Opens the connections; they close with the stack.

        Raises:
            BenchError: Nobody answers there.
        """
        for _ in range(connections):
            connection = await HttpConnection.open(self._target.host, self._target.port)
            stack.callback(connection.close)
            self._free.put_nowait(connection)
        self._count += connections

    async def publish(self, request: Callable[[], bytes]) -> None:
        """Makes one call, as soon as a connection is free.

        Raises:
            BenchError: It is refused or not answered in time.
        """
        connection = await self._free.get()
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE_S):
                status, body = await connection.send(request())
        except TimeoutError:
            raise BenchError(
                f"a publication was not answered in {_ANSWER_DEADLINE_S:g} s"
            ) from None
        check_accepted(status, body)
        self._free.put_nowait(connection)

    async def flat_out(self, requests: Iterable[Callable[[], bytes]]) -> None:
        """Makes all calls, on every connection the next one as soon as the last is answered."""
        remaining = iter(requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._count):
                group.create_task(self._one_after_the_other(remaining))

    async def _one_after_the_other(self, requests: Iterator[Callable[[], bytes]]) -> None:
        # One iterator shared by all: whoever is free takes the next.
        for request in requests:
            await self.publish(request)

    async def paced(self, requests: Iterable[Callable[[], bytes]], rate_per_s: float) -> None:
        """Makes all calls, evenly spread, without waiting for the one before."""
        self.late_s = 0.0
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                turn_s = started_s + index / rate_per_s
                wait_s = turn_s - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                self.late_s = max(self.late_s, time.monotonic() - turn_s)
                group.create_task(self.publish(request))

    def doubt(self, stage: Stage, row: str) -> None:
        """Notes that the generator did not keep its rate in the last `paced`."""
        if self.late_s > _LATE_S:
            stage.doubts.add(f"{row}: a publication was sent {self.late_s * 1e3:.0f} ms late")
