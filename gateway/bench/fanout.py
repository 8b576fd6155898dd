"""The shape `fanout`: one public channel, many sockets, events through the HTTP API.

A round is `burst` publications sent at once, each over an HTTP connection of its own; it is over
when every socket has received all of them, and only then the next one begins. So there are never
more than `burst` publications outstanding, and no queue hides what a delivery costs.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.crowd import crowd_of
from gateway.bench.errors import BenchError
from gateway.bench.http import HttpConnection
from gateway.bench.results import Row, measures_of, percentile
from gateway.bench.stage import CpuWatch, IdleWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.bench.crowd import Crowd
    from gateway.bench.results import Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target

_CHANNEL: Final = "bench-fanout"
_EVENT: Final = "tick"
_ROUND_DEADLINE_S: Final = 10.0
_MIB: Final = 1024 * 1024

Repeat = list[tuple[str, float, int]]


class FanoutOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        sockets: Subscribers of the channel.
        bursts: Publications outstanding, a row for each.
        event_bytes: Length of an event's JSON as a subscriber receives it.
        processes: Processes that the sockets are spread over.
    """

    sockets: int
    bursts: tuple[int, ...]
    event_bytes: int
    processes: int


@dataclass(slots=True)
class Phase:
    """What one stretch of rounds did.

    Attributes:
        latencies_s: One for each round, from the first publication to the last socket.
    """

    deliveries: int
    expected: int
    elapsed_s: float
    server_cpu_s: float
    resident_bytes: int
    latencies_s: list[float]
    generator_share: float
    idle_share: float | None

    def repeat(self) -> Repeat:
        """The figures for the table."""
        deliveries = max(1, self.deliveries)
        return [
            ("deliveries/s", self.deliveries / self.elapsed_s, 0),
            ("server CPU µs/delivery", self.server_cpu_s / deliveries * 1e6, 2),
            ("last socket p50 ms", percentile(self.latencies_s, 50) * 1e3, 2),
            ("last socket p99 ms", percentile(self.latencies_s, 99) * 1e3, 2),
            ("server CPU %", self.server_cpu_s / self.elapsed_s * 100, 0),
            ("generator CPU %", self.generator_share * 100, 0),
            ("server MiB", self.resident_bytes / _MIB, 0),
        ]


class Publisher:
    """Sends bursts of one event over as many connections as there are publications."""

    def __init__(self, target: Target, event_bytes: int, sockets: int) -> None:
        self._target = target
        least = target.delivered_bytes(_CHANNEL, _EVENT, "")
        # The frame's header grows with the event: it is not a part of what was asked for.
        header = 2 if least < 128 else 4
        self._data = "x" * max(0, event_bytes + header - least)
        self._connections: list[HttpConnection] = []
        self.frame_bytes = target.delivered_bytes(_CHANNEL, _EVENT, self._data)
        self.sockets = sockets

    async def open(self, stack: AsyncExitStack, connections: int) -> None:
        """Opens the connections; they close with the stack."""
        for _ in range(connections):
            connection = await HttpConnection.open(self._target.host, self._target.port)
            stack.callback(connection.close)
            self._connections.append(connection)

    async def phase(self, crowd: Crowd, burst: int, seconds: float) -> Phase:
        """Rounds for at least `seconds`; ends early when a round's events don't all arrive."""
        round_bytes = burst * self.frame_bytes
        await crowd.count(round_bytes)
        cpu, idle = CpuWatch(), IdleWatch()
        before = self._target.usage()
        latencies_s: list[float] = []
        rounds = 0
        started_s = now_s = time.monotonic()
        while now_s - started_s < seconds:
            rounds += 1
            latency_s = await self._round(crowd, rounds, burst)
            now_s = time.monotonic()
            if latency_s is None:
                break
            latencies_s.append(latency_s)
        after = self._target.usage()
        told, cpu_s = await crowd.tell(rounds * round_bytes)
        elapsed_s = now_s - started_s
        surplus = sum(each.surplus_bytes for each in told)
        if surplus:
            raise BenchError(f"sockets received {surplus:,} bytes that were not expected")
        return Phase(
            deliveries=sum(each.received_bytes for each in told) // self.frame_bytes,
            expected=rounds * burst * self.sockets,
            elapsed_s=elapsed_s,
            server_cpu_s=after.cpu_s - before.cpu_s,
            resident_bytes=after.resident_bytes,
            latencies_s=latencies_s,
            generator_share=max(cpu.share(), *(each / elapsed_s for each in cpu_s)),
            idle_share=idle.share(),
        )

    async def _round(self, crowd: Crowd, number: int, burst: int) -> float | None:
        requests = self._target.burst_requests(_CHANNEL, _EVENT, self._data, burst)
        started_s = time.monotonic()
        answers = [
            connection.send(request)
            for connection, request in zip(self._connections, requests, strict=False)
        ]
        over_s = await crowd.round_over(number, _ROUND_DEADLINE_S)
        try:
            async with asyncio.timeout(_ROUND_DEADLINE_S):
                for answer in answers:
                    status, body = await answer
                    if status != 200:
                        text = body.decode(errors="replace").strip()
                        raise BenchError(f"a publication was refused: HTTP {status} {text}")
        except TimeoutError:
            raise BenchError(f"a publication was not answered in {_ROUND_DEADLINE_S:g} s") from None
        return None if over_s is None else over_s - started_s


async def run(target: Target, stage: Stage, options: FanoutOptions) -> Report:
    """Runs the shape.

    Raises:
        BenchError: It can't be measured; a loss is no error, it is in the report.
    """
    plan, progress = stage.plan, stage.progress
    async with AsyncExitStack() as stack:
        crowd = await stack.enter_async_context(crowd_of(options.processes))
        connected = await _connect(target, crowd, stage, options)
        publisher = Publisher(target, options.event_bytes, options.sockets)
        await publisher.open(stack, max(options.bursts))
        phases: dict[int, list[Phase]] = {burst: [] for burst in options.bursts}
        rounds = (plan.repeats + (plan.warmup_s > 0)) * len(options.bursts)
        bar = progress.add_task("measuring", total=rounds)
        if plan.warmup_s > 0:
            for burst in options.bursts:
                await publisher.phase(crowd, burst, plan.warmup_s)
                progress.advance(bar)
        # Repeats go round the bursts, so that a slow minute of the machine hits each alike.
        for burst in options.bursts * plan.repeats:
            phase = await publisher.phase(crowd, burst, plan.seconds)
            phases[burst].append(phase)
            progress.advance(bar)
            if phase.deliveries < phase.expected:
                # What is under way still would be counted in the next stretch.
                stage.doubts.add(f"burst {burst}: ended early, a round was not delivered whole")
                break
    rows = [connected]
    for burst, measured in phases.items():
        if measured:
            rows.append(_row(stage, f"burst {burst}", measured))
    done = [phase for measured in phases.values() for phase in measured]
    ratio = sum(phase.deliveries for phase in done) / sum(phase.expected for phase in done)
    return stage.report("fanout", target.name, options, rows, ratio)


async def _connect(target: Target, crowd: Crowd, stage: Stage, options: FanoutOptions) -> Row:
    bar = stage.progress.add_task("connecting", total=options.sockets)
    before = target.usage()
    started_s = time.monotonic()
    await crowd.join(
        target, _CHANNEL, options.sockets, lambda count: stage.progress.advance(bar, count)
    )
    elapsed_s = time.monotonic() - started_s
    after = target.usage()
    grown_bytes = after.resident_bytes - before.resident_bytes
    found: Repeat = [
        ("connects/s", options.sockets / elapsed_s, 0),
        ("server CPU µs/connect", (after.cpu_s - before.cpu_s) / options.sockets * 1e6, 0),
        ("KiB/socket", grown_bytes / options.sockets / 1024, 1),
        ("server MiB", after.resident_bytes / _MIB, 0),
    ]
    return Row("connect", measures_of([found]))


def _row(stage: Stage, name: str, measured: Sequence[Phase]) -> Row:
    for phase in measured:
        stage.doubts.generator_share(name, phase.generator_share)
        stage.doubts.idle_share(name, phase.idle_share)
    return Row(name, measures_of([phase.repeat() for phase in measured]))
