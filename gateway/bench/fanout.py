"""The shape `fanout`: one public channel, many sockets, events through the HTTP API.

A round is `burst` publications sent at once; it is over when every socket has received all of
them, and only then the next one begins. So there are never more than `burst` publications
outstanding, and no queue hides what a delivery costs. Duet gets each as a signed call over a
connection of its own; a peer that publishes in its own process is told the whole burst in one call
(see `gateway.bench.peers`), which favours the peer.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.crowd import crowd_of
from gateway.bench.errors import BenchError
from gateway.bench.http import HttpConnection, http_request
from gateway.bench.paired import Found, measure_in_turn, paired_report
from gateway.bench.publishing import EVENT, check_accepted, filling
from gateway.bench.results import Row, measures_of, percentile
from gateway.bench.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.bench.crowd import Crowd
    from gateway.bench.results import Figures, Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target
    from gateway.bench.watch import Cost

_CHANNEL: Final = "bench-fanout"
_ROUND_DEADLINE_S: Final = 10.0
_PROBE_PAUSE_S: Final = 0.001
_MIB: Final = 1024 * 1024


class FanoutOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        sockets: Subscribers of the channel.
        bursts: Publications outstanding, a row for each.
        event_bytes: Length of an event's JSON as a subscriber receives it.
        processes: Processes that the sockets of one server are spread over.
        probe: Another connection asks for the server's health all the time; the longest wait for
            an answer is how long the server did nothing but fan out. It costs the server CPU.
    """

    sockets: int
    bursts: tuple[int, ...]
    event_bytes: int
    processes: int
    probe: bool = False


class Fanout:
    """A server with a crowd on one channel, and the connections that publish there.

    Attributes:
        name: The server's.
    """

    def __init__(self, target: Target, crowd: Crowd, options: FanoutOptions) -> None:
        self.name = target.name
        self._target = target
        self._crowd = crowd
        self._options = options
        self._bursts = {f"burst {burst}": burst for burst in options.bursts}
        self._data = filling(target, _CHANNEL, options.event_bytes)
        self._frame_bytes = target.delivered_bytes(_CHANNEL, EVENT, self._data)
        self._connections: list[HttpConnection] = []
        self._probe: HttpConnection | None = None

    @property
    def rows(self) -> list[str]:
        """The names of the rows that it can be measured in."""
        return list(self._bursts)

    async def open(self, stack: AsyncExitStack) -> None:
        """Opens the connections that publish, and the probe's; they close with the stack."""
        for _ in range(max(self._options.bursts) + self._options.probe):
            connection = await HttpConnection.open(self._target.host, self._target.port)
            stack.callback(connection.close)
            self._connections.append(connection)
        if self._options.probe:
            self._probe = self._connections.pop()

    async def connect(self, stage: Stage) -> Figures:
        """Connects and subscribes the crowd."""
        target, sockets = self._target, self._options.sockets
        advance = stage.bar("connecting", sockets)
        before = target.usage()
        started_s = time.monotonic()
        await self._crowd.join(target, _CHANNEL, sockets, advance)
        elapsed_s = time.monotonic() - started_s
        after = target.usage()
        grown_bytes = after.resident_bytes - before.resident_bytes
        return [
            ("connects/s", sockets / elapsed_s, 0),
            ("server CPU µs/connect", (after.cpu_s - before.cpu_s) / sockets * 1e6, 0),
            ("KiB/socket", grown_bytes / sockets / 1024, 1),
            ("server MiB", after.resident_bytes / _MIB, 0),
        ]

    async def measure(self, row: str, seconds: float) -> Found:
        """Rounds for at least `seconds`; ends early when a round's events don't all arrive.

        Raises:
            BenchError: A publication is refused, or something came that was not expected.
        """
        burst = self._bursts[row]
        round_bytes = burst * self._frame_bytes
        await self._crowd.count(round_bytes)
        watch = Watch(self._target)
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(self._longest_wait_s(over))
            rounds, latencies_s = await self._rounds(burst, watch.started_s + seconds)
            ended = watch.cost()
            over.set()
        told, cpu_s = await self._crowd.tell(rounds * round_bytes)
        cost = ended.with_members(cpu_s)
        surplus = sum(each.surplus_bytes for each in told)
        if surplus:
            raise BenchError(f"sockets received {surplus:,} bytes that were not expected")
        deliveries = sum(each.received_bytes for each in told) // self._frame_bytes
        return Found(
            figures=_figures(cost, deliveries, latencies_s, waiting.result()),
            deliveries=deliveries,
            expected=rounds * burst * self._options.sockets,
            generator_share=cost.generator_share,
            idle_share=cost.idle_share,
        )

    async def _rounds(self, burst: int, until_s: float) -> tuple[int, list[float]]:
        """How many there were, and how long each took that was delivered whole."""
        latencies_s: list[float] = []
        rounds = 0
        while time.monotonic() < until_s:
            rounds += 1
            latency_s = await self._round(rounds, burst)
            if latency_s is None:
                break
            latencies_s.append(latency_s)
        return rounds, latencies_s

    async def _longest_wait_s(self, over: asyncio.Event) -> float | None:
        """What somebody who wants little had to wait for at most; None without a probe."""
        if self._probe is None:
            return None
        request = http_request("GET", self._target.health_path, self._target.host)
        longest_s = 0.0
        while not over.is_set():
            asked_s = time.monotonic()
            await self._probe.send(request)
            longest_s = max(longest_s, time.monotonic() - asked_s)
            await asyncio.sleep(_PROBE_PAUSE_S)
        return longest_s

    async def _round(self, number: int, burst: int) -> float | None:
        """Seconds from the first publication to the last socket; None when some got too little."""
        requests = self._target.burst_requests(_CHANNEL, EVENT, self._data, burst)
        started_s = time.monotonic()
        answers = [
            connection.send(request)
            for connection, request in zip(self._connections, requests, strict=False)
        ]
        over_s = await self._crowd.round_over(number, _ROUND_DEADLINE_S)
        try:
            async with asyncio.timeout(_ROUND_DEADLINE_S):
                for answer in answers:
                    check_accepted(*await answer)
        except TimeoutError:
            raise BenchError(f"a publication was not answered in {_ROUND_DEADLINE_S:g} s") from None
        return None if over_s is None else over_s - started_s


def _figures(
    cost: Cost, deliveries: int, latencies_s: Sequence[float], longest_wait_s: float | None
) -> Figures:
    waited: Figures = []
    if longest_wait_s is not None:
        waited = [("longest wait ms", longest_wait_s * 1e3, 1)]
    each_us = 1e6 / max(1, deliveries)
    redis: Figures = []
    if cost.redis_cpu_s is not None:
        redis = [("redis CPU µs/delivery", cost.redis_cpu_s * each_us, 2)]
    return [
        ("deliveries/s", deliveries / cost.elapsed_s, 0),
        ("server CPU µs/delivery", cost.server_cpu_s * each_us, 2),
        *redis,
        ("last socket p50 ms", percentile(latencies_s, 50) * 1e3, 2),
        ("last socket p99 ms", percentile(latencies_s, 99) * 1e3, 2),
        *waited,
        *cost.figures(),
    ]


async def run(target: Target, stage: Stage, options: FanoutOptions) -> Report:
    """Runs the shape on the target, in turn with the stage's peers.

    Raises:
        BenchError: It can't be measured; a loss is no error, it is in the report.
    """
    async with AsyncExitStack() as stack:
        loads: list[Fanout] = []
        for each in (target, *stage.peers):
            crowd = await stack.enter_async_context(crowd_of(options.processes))
            load = Fanout(each, crowd, options)
            await load.open(stack)
            loads.append(load)
        rows = [
            Row(
                "connect",
                measures_of([await load.connect(stage)]),
                "" if load is loads[0] else load.name,
            )
            for load in loads
        ]
        outcome = await measure_in_turn(loads, loads[0].rows, stage)
    outcome = replace(outcome, rows=rows + outcome.rows)
    return paired_report("fanout", target, stage, options, outcome)
