"""The shape `storm`: every socket is cut at once, and all of them come back at once.

They come back without a wait, as many as there are; who fails waits about a second, as clients do,
and tries again. The generator cuts them, or the gateway does by being stopped and started anew.
Meanwhile events go to a few other sockets, the witnesses: how long those take says what the storm
does to those whom it does not concern, beside the same events in a quiet stretch.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.connect import OWN_CHANNELS, rooms_of
from gateway.bench.crowd import Entry, crowd_of
from gateway.bench.errors import BenchError
from gateway.bench.paired import Found, run_paired
from gateway.bench.stage import no_bar
from gateway.bench.target import GatewayTarget
from gateway.bench.watch import Watch, at_rest
from gateway.bench.witnesses import Witnesses

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AsyncExitStack

    from gateway.bench.crowd import Crowd
    from gateway.bench.orders import Within
    from gateway.bench.results import Figures, Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target
    from gateway.bench.watch import Cost
    from gateway.bench.witnesses import Witnessed

_QUIET: Final = "quiet"
_CUT: Final = "all come back"
_RESTARTED: Final = "after a restart"


class StormOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        sockets: That are cut and come back, each to a signed channel that it shares with nobody.
        restart: The gateway is stopped and started, instead of only its sockets being cut.
        witnesses: Sockets that stay.
        rate: Events a second to the witnesses.
        deadline_s: How long an attempt to come back may take.
        retry_s: The wait after one that failed, give or take a half.
        processes: Processes that the sockets are spread over.
    """

    sockets: int
    restart: bool
    witnesses: int
    rate: float
    deadline_s: float
    retry_s: float
    processes: int

    @property
    def rows(self) -> list[str]:
        """The names of the rows."""
        return [_QUIET, _RESTARTED if self.restart else _CUT]


async def run(target: Target, stage: Stage, options: StormOptions) -> Report:
    """Runs the shape on the target, in turn with the stage's peers.

    Raises:
        BenchError: It can't be measured.
    """

    async def load_of(server: Target, stack: AsyncExitStack) -> Storm:
        crowd = await stack.enter_async_context(crowd_of(options.processes))
        witnesses = await stack.enter_async_context(crowd_of(1))
        load = Storm(server, crowd, witnesses, stack, stage, options)
        await load.open()
        return load

    return await run_paired("storm", target, stage, options, options.rows, load_of)


class Storm:
    """A server, the sockets that come back to it, and the witnesses.

    Attributes:
        name: The server's.
    """

    def __init__(
        self,
        target: Target,
        crowd: Crowd,
        witnesses: Crowd,
        stack: AsyncExitStack,
        stage: Stage,
        options: StormOptions,
    ) -> None:
        self.name = target.name
        self._target = target
        self._crowd = crowd
        self._witnesses = Witnesses(target, witnesses, options.witnesses, options.rate)
        self._stack = stack
        self._stage = stage
        self._options = options
        self._rooms, self._secret = rooms_of(target, OWN_CHANNELS, options.sockets)

    async def open(self) -> None:
        """Connects everybody.

        Raises:
            BenchError: The target refuses one or doesn't answer in time.
        """
        await self._witnesses.open(self._stack, no_bar)
        advance = self._stage.bar("connecting", self._options.sockets)
        await self._crowd.join_rooms(self._target, self._rooms, advance, Entry(secret=self._secret))
        await at_rest(self._target)

    async def measure(self, row: str, seconds: float) -> Found:
        """Lets that time pass quietly, or lets everybody come back, however long it takes.

        Raises:
            BenchError: A publication is refused or unanswered, or the gateway can't be restarted.
        """
        if row == _QUIET:
            return await self._quiet(seconds)
        found = await (self._restarted() if row == _RESTARTED else self._cut())
        await at_rest(self._target)
        return found

    async def _quiet(self, seconds: float) -> Found:
        watch = Watch(self._target)
        async with asyncio.TaskGroup() as group:
            told = await self._witnesses.during(group.create_task(asyncio.sleep(seconds)))
        return self._found(told, watch.cost(), [])

    async def _cut(self) -> Found:
        watch = Watch(self._target)
        async with asyncio.TaskGroup() as group:
            cut_s = await self._crowd.leave()
            returning = group.create_task(self._come_back())
            told = await self._witnesses.during(returning)
        return self._found(told, watch.cost(), returning.result(), cut_s)

    async def _restarted(self) -> Found:
        target = self._target
        if not isinstance(target, GatewayTarget):
            raise BenchError(f"{self.name} is not restarted: leave out --restart")
        async with asyncio.TaskGroup() as group:
            cut_s = time.monotonic()
            await asyncio.to_thread(target.stop)
            await self._crowd.leave()
            await self._witnesses.leave()
            returning = group.create_task(self._come_back())
            await asyncio.to_thread(target.start)
            down_s = time.monotonic() - cut_s
            watch = Watch(target)
            await self._witnesses.open(self._stack, no_bar)
            told = await self._witnesses.during(returning)
        return self._found(told, watch.cost(), returning.result(), cut_s, down_s)

    async def _come_back(self) -> list[Within]:
        options = self._options
        entry = Entry(options.sockets, options.deadline_s, options.retry_s, self._secret)
        return await self._crowd.join_rooms(self._target, self._rooms, no_bar, entry)

    def _found(
        self,
        witnessed: Witnessed,
        cost: Cost,
        joined: Sequence[Within],
        cut_s: float = 0.0,
        down_s: float | None = None,
    ) -> Found:
        figures = storm_figures(joined, cut_s, down_s, cost) if joined else []
        generator_shares = (each.cpu_s / cost.elapsed_s for each in joined)
        back = sum(len(each.latencies_us) for each in joined)
        return Found(
            figures=figures + witnessed.figures() + cost.figures(),
            deliveries=back + witnessed.received,
            expected=(self._options.sockets if joined else 0) + witnessed.expected,
            generator_share=max(cost.generator_share, *generator_shares, 0.0),
            idle_share=cost.idle_share,
        )


def storm_figures(
    joined: Sequence[Within], cut_s: float, down_s: float | None, cost: Cost
) -> Figures:
    """How the sockets came back.

    Args:
        joined: What each process of the generator tells.
        cut_s: When they were cut, in monotonic seconds.
        down_s: How long nobody could come back, because the server was being restarted.
        cost: Of the server while they came back.
    """
    sockets = sum(len(each.latencies_us) for each in joined)
    back_s = max(each.at_s for each in joined) - cut_s
    figures = [("all back s", back_s, 2)]
    if down_s is not None:
        figures.append(("down s", down_s, 2))
    # A few sockets may all be back before the server was seen to be ready.
    if back_s > (down_s or 0.0):
        figures.append(("connects/s", sockets / (back_s - (down_s or 0.0)), 0))
    return [
        *figures,
        ("failed attempts", sum(each.failures for each in joined), 0),
        ("server CPU µs/connect", cost.server_cpu_s / sockets * 1e6, 1),
    ]
