"""The shape `connect`: sockets that come as fast as the server takes them, and subscribe.

Each connects, is greeted, subscribes and is confirmed. On a private channel every subscription is
signed for its own socket, as a client's backend does; here the generator's processes sign, and the
time they take counts as theirs. A peer asks nobody for a signature: its private rows are public.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.crowd import Entry, crowd_of
from gateway.bench.orders import Room
from gateway.bench.paired import Found, run_paired
from gateway.bench.results import percentile
from gateway.bench.target import GatewayTarget
from gateway.bench.watch import Watch, at_rest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AsyncExitStack

    from gateway.bench.crowd import Crowd
    from gateway.bench.orders import Within
    from gateway.bench.results import Figures, Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target
    from gateway.bench.watch import Cost

_PUBLIC: Final = "public"
_PRIVATE: Final = "private, signed"
OWN_CHANNELS: Final = "private, a channel each"
_ROWS: Final = (_PUBLIC, _PRIVATE, OWN_CHANNELS)
_RETRY_S: Final = 0.5
_DEADLINE_S: Final = 30.0
# They make the server load what it loads once, before its memory is read.
_FIRST_SOCKETS: Final = 100


class ConnectOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        sockets: That come in one round.
        in_flight: On their way at the same time.
        processes: Processes that they are spread over.
    """

    sockets: int
    in_flight: int
    processes: int


async def run(target: Target, stage: Stage, options: ConnectOptions) -> Report:
    """Runs the shape on the target, in turn with the stage's peers.

    Raises:
        BenchError: It can't be measured.
    """

    async def load_of(server: Target, stack: AsyncExitStack) -> Connect:
        crowd = await stack.enter_async_context(crowd_of(options.processes))
        load = Connect(server, crowd, stage, options)
        await load.open()
        return load

    return await run_paired("connect", target, stage, options, _ROWS, load_of)


def rooms_of(target: Target, row: str, sockets: int) -> tuple[list[Room], str]:
    """The channels of a row with their sockets, and the secret that signs for them."""
    if row == _PUBLIC:
        channel = "bench-connect"
        return [Room(channel, target.subscribe_frame(channel), sockets)], ""
    frame, secret = target.subscribe_frame, ""
    if isinstance(target, GatewayTarget):
        frame, secret = target.signed_frame, target.app_secret
    if row == _PRIVATE:
        channel = "private-bench-connect"
        return [Room(channel, frame(channel), sockets)], secret
    channels = [f"private-bench-{number:05d}" for number in range(sockets)]
    return [Room(channel, frame(channel), 1) for channel in channels], secret


class Connect:
    """A server and the sockets that come to it and go again.

    Attributes:
        name: The server's.
    """

    def __init__(self, target: Target, crowd: Crowd, stage: Stage, options: ConnectOptions) -> None:
        self.name = target.name
        self._target = target
        self._crowd = crowd
        self._stage = stage
        self._options = options
        self._empty_bytes = 0

    async def open(self) -> None:
        """Lets a few sockets come and go, and reads the server's memory."""
        for row in _ROWS:
            await self._come(row, min(_FIRST_SOCKETS, self._options.sockets))
            await self._go()
        self._empty_bytes = self._target.usage().resident_bytes

    async def _come(self, row: str, sockets: int) -> list[Within]:
        rooms, secret = rooms_of(self._target, row, sockets)
        entry = Entry(self._options.in_flight, _DEADLINE_S, _RETRY_S, secret)
        with self._stage.passing_bar("connecting", sockets) as advance:
            return await self._crowd.join_rooms(self._target, rooms, advance, entry)

    async def _go(self) -> None:
        await self._crowd.leave()
        await at_rest(self._target)

    async def measure(self, row: str, seconds: float) -> Found:
        """Lets all sockets come, again until they took that long; how they go is not measured.

        Raises:
            BenchError: The server can't be reached at all.
        """
        joined: list[Within] = []
        costs: list[Cost] = []
        until_s = time.monotonic() + seconds
        while not costs or time.monotonic() < until_s:
            watch = Watch(self._target)
            round_ = await self._come(row, self._options.sockets)
            costs.append(watch.cost([each.cpu_s for each in round_]))
            joined += round_
            await self._go()
        title = f"{row}, {self.name}"
        for cost in costs:
            cost.doubt_rest(self._stage, title)
        shares = [cost.idle_share for cost in costs if cost.idle_share is not None]
        sockets = self._options.sockets * len(costs)
        return Found(
            figures=self._figures(joined, costs),
            deliveries=sum(len(each.latencies_us) for each in joined),
            expected=sockets,
            generator_share=max(cost.generator_share for cost in costs),
            idle_share=min(shares, default=None),
        )

    def _figures(self, joined: Sequence[Within], costs: Sequence[Cost]) -> Figures:
        sockets = self._options.sockets * len(costs)
        latencies_us = [latency for each in joined for latency in each.latencies_us]
        grown_bytes = max(cost.server_bytes for cost in costs) - self._empty_bytes
        server_us = sum(cost.server_cpu_s for cost in costs) / sockets * 1e6
        generator_us = sum(each.cpu_s for each in joined) / sockets * 1e6
        return [
            ("connects/s", sockets / sum(cost.elapsed_s for cost in costs), 0),
            ("server CPU µs/connect", server_us, 1),
            ("generator CPU µs/connect", generator_us, 1),
            ("connect p50 ms", percentile(latencies_us, 50) / 1e3, 1),
            ("connect p99 ms", percentile(latencies_us, 99) / 1e3, 1),
            ("repeated attempts", sum(each.failures for each in joined), 0),
            ("KiB/socket", grown_bytes / self._options.sockets / 1024, 1),
            *costs[-1].figures(),
        ]
