"""The shape `idle`: subscribed sockets to which nothing is published.

They do what clients do: who has heard nothing for the activity timeout pings (pusher-js does),
and answers when it is pinged itself. Their pings are spread evenly, as of clients that came
at different times. A peer's sockets are silent: that favours the peer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.crowd import crowd_of
from gateway.bench.orders import Room
from gateway.bench.paired import Found, run_paired
from gateway.bench.stage import no_bar
from gateway.bench.target import GatewayTarget
from gateway.bench.watch import Watch, at_rest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from gateway.bench.crowd import Crowd
    from gateway.bench.results import Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target

_ROW: Final = "idle"
_NEVER_S: Final = 1e9
_KIB: Final = 1024
# They make the server load what it loads once, before its memory is read.
_FIRST_SOCKETS: Final = 100


class IdleOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        sockets: Subscribed ones.
        per_channel: How many of them share a channel.
        ping_s: After so much silence a client pings; the gateway's activity timeout.
        processes: Processes that they are spread over.
    """

    sockets: int
    per_channel: int
    ping_s: float
    processes: int

    def rooms(self, target: Target, first: int, last: int) -> list[Room]:
        """The channels of the sockets from `first` up to `last`."""
        counts: dict[str, int] = {}
        for number in range(first, last):
            channel = f"bench-idle-{number // self.per_channel:06d}"
            counts[channel] = counts.get(channel, 0) + 1
        frame = target.subscribe_frame
        return [Room(channel, frame(channel), count) for channel, count in counts.items()]


async def run(target: Target, stage: Stage, options: IdleOptions) -> Report:
    """Runs the shape on the target, in turn with the stage's peers.

    Raises:
        BenchError: It can't be measured; a ping without an answer is no error, it is in the report.
    """

    async def load_of(server: Target, stack: AsyncExitStack) -> Idle:
        crowd = await stack.enter_async_context(crowd_of(options.processes))
        load = Idle(server, crowd, stage, options)
        await load.open()
        return load

    return await run_paired("idle", target, stage, options, [_ROW], load_of)


class Idle:
    """A server with subscribed sockets.

    Attributes:
        name: The server's.
    """

    def __init__(self, target: Target, crowd: Crowd, stage: Stage, options: IdleOptions) -> None:
        self.name = target.name
        self._target = target
        self._crowd = crowd
        self._stage = stage
        self._options = options
        self._socket_bytes = 0.0
        self._further_bytes = 0.0

    async def open(self) -> None:
        """Connects everybody, and tells from the server's memory what a socket takes.

        Once from the empty server on, and once from the first half of the sockets on: memory that
        was free before the first came hides a part of what they take.
        """
        sockets = self._options.sockets
        advance = self._stage.bar("connecting", sockets)
        await self._join(0, min(_FIRST_SOCKETS, sockets), no_bar)
        await self._crowd.leave()
        empty_bytes = await self._resting_bytes()
        half = sockets // 2
        await self._join(0, half, advance)
        half_bytes = await self._resting_bytes()
        await self._join(half, sockets, advance)
        full_bytes = await self._resting_bytes()
        self._socket_bytes = (full_bytes - empty_bytes) / sockets
        self._further_bytes = (full_bytes - half_bytes) / (sockets - half)

    async def _join(self, first: int, last: int, advance: Callable[[float], None]) -> None:
        rooms = self._options.rooms(self._target, first, last)
        await self._crowd.join_rooms(self._target, rooms, advance)

    async def _resting_bytes(self) -> int:
        await at_rest(self._target)
        return self._target.usage().resident_bytes

    async def measure(self, row: str, seconds: float) -> Found:
        """Lets that time pass.

        Raises:
            BenchError: The server has ended.
        """
        del row
        has_pings = isinstance(self._target, GatewayTarget)
        watch = Watch(self._target)
        await self._crowd.keep(self._options.ping_s if has_pings else _NEVER_S)
        await asyncio.sleep(seconds)
        cost = watch.cost()
        awake, cpu_s = await self._crowd.kept()
        pings = sum(each.pings for each in awake)
        lost = sum(each.lost for each in awake)
        return Found(
            figures=[
                ("pings/s", pings / cost.elapsed_s, 1),
                ("KiB/socket", self._socket_bytes / _KIB, 2),
                ("KiB/further socket", self._further_bytes / _KIB, 2),
                ("sockets lost", lost, 0),
                *cost.figures(),
            ],
            deliveries=sum(each.pongs for each in awake),
            expected=pings + lost,
            generator_share=max(cost.generator_share, *(each / cost.elapsed_s for each in cpu_s)),
            idle_share=cost.idle_share,
        )
