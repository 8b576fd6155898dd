"""The shape `rooms`: many channels with few sockets each, where publications cost, not deliveries.

Every publication goes to one channel. Each repeat is three stretches, one right after the other,
each with channels of its own: full rooms, rooms with a single socket, and rooms with nobody in
them. The first two tell the cost of a publication apart from that of its deliveries: with `c(n)`
CPU time for a publication to `n` sockets, one more delivery costs `d = (c(n) - c(1)) / (n - 1)`,
and the rest, the HTTP call and the way through Redis, is `c(1) - d`. The third shows what a
publication costs that no node wants: the publisher's side alone.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.crowd import Crowd, crowd_of
from gateway.bench.errors import BenchError
from gateway.bench.orders import Room
from gateway.bench.paired import Found, run_paired
from gateway.bench.publishing import EVENT, STAMP, Event, Publishers
from gateway.bench.results import percentile
from gateway.bench.target import GatewayTarget
from gateway.bench.watch import Watch, at_rest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AsyncExitStack

    from gateway.bench.results import Figures, Report
    from gateway.bench.stage import Stage
    from gateway.bench.target import Target
    from gateway.bench.watch import Cost

_ALL_HERE_S: Final = 10.0
_FLAT_OUT: Final = "flat out"


class RoomsOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        channels: Full ones; there are as many with one socket, and with none.
        sockets: On each full channel, at least 2.
        rate: Publications a second to each channel, in the row with a fixed rate.
        in_flight: Unanswered HTTP calls of the row that runs flat out.
        batch: Publications in one HTTP call.
        event_bytes: Length of an event's JSON as a subscriber receives it.
        processes: Processes that the sockets of each kind of rooms are spread over.
    """

    channels: int
    sockets: int
    rate: float
    in_flight: int
    batch: int
    event_bytes: int
    processes: int

    @property
    def rows(self) -> list[str]:
        """The names of the rows."""
        return [f"{self.rate:g} a second each", _FLAT_OUT]


@dataclass(frozen=True, slots=True)
class Audience:
    """Channels with the same number of sockets each, and how to publish to them."""

    sockets: int
    channels: Sequence[str]
    crowd: Crowd | None
    requests: Sequence[Callable[[], bytes]]


@dataclass(frozen=True, slots=True)
class Stretch:
    """What publishing to one audience did."""

    publications: int
    deliveries: int
    expected: int
    elapsed_s: float
    cost: Cost
    latencies_us: Sequence[int]

    @property
    def publication_us(self) -> float:
        """CPU time of the server for one publication with its deliveries."""
        return self.cost.server_cpu_s / self.publications * 1e6


def apart_us(full_us: float, single_us: float, sockets: int) -> tuple[float, float]:
    """CPU time of a publication without its deliveries, and of one more delivery.

    Args:
        full_us: CPU time of a publication to a full room.
        single_us: The same to one with a single socket.
        sockets: In a full room, at least 2.
    """
    delivery_us = (full_us - single_us) / (sockets - 1)
    return single_us - delivery_us, delivery_us


async def run(target: Target, stage: Stage, options: RoomsOptions) -> Report:
    """Runs the shape on the target, in turn with the stage's peers.

    Raises:
        BenchError: It can't be measured; a loss is no error, it is in the report.
    """

    async def load_of(server: Target, stack: AsyncExitStack) -> Rooms:
        load = Rooms(server, stage, options)
        await load.open(stack)
        return load

    return await run_paired("rooms", target, stage, options, options.rows, load_of)


class Rooms:
    """A server with its rooms, and the connections that publish there.

    Attributes:
        name: The server's.
    """

    def __init__(self, target: Target, stage: Stage, options: RoomsOptions) -> None:
        self.name = target.name
        self._target = target
        self._stage = stage
        self._options = options
        self._publishers = Publishers(target)
        self._audiences: list[Audience] = []
        self._event = Event(target, _channel(0, 0), options.event_bytes)

    async def open(self, stack: AsyncExitStack) -> None:
        """Connects everybody; they leave with the stack.

        Raises:
            BenchError: The target refuses one or doesn't answer in time.
        """
        options = self._options
        await self._publishers.open(stack, options.in_flight)
        total = (options.sockets + 1) * options.channels
        advance = self._stage.bar("connecting", total)
        for sockets in (options.sockets, 1, 0):
            channels = [_channel(sockets, number) for number in range(options.channels)]
            crowd = None
            if sockets:
                crowd = await stack.enter_async_context(crowd_of(options.processes))
                frame = self._target.subscribe_frame
                await crowd.join_rooms(
                    self._target,
                    [Room(channel, frame(channel), sockets) for channel in channels],
                    advance,
                )
            self._audiences.append(Audience(sockets, channels, crowd, self._requests(channels)))
        await at_rest(self._target)

    def _requests(self, channels: Sequence[str]) -> list[Callable[[], bytes]]:
        batch = self._options.batch
        if batch == 1:
            return [partial(self._publish_one, channel) for channel in channels]
        return [
            partial(self._publish_batch, channels[start : start + batch])
            for start in range(0, len(channels), batch)
        ]

    def _publish_one(self, channel: str) -> bytes:
        return self._target.publish_request(channel, EVENT, self._event.data())

    def _publish_batch(self, channels: Sequence[str]) -> bytes:
        if not isinstance(self._target, GatewayTarget):
            raise BenchError(f"{self.name} takes no batches: --batch 1")
        return self._target.batch_request(channels, EVENT, self._event.data())

    async def measure(self, row: str, seconds: float) -> Found:
        """Publishes to each audience in turn, for at least `seconds` each.

        Raises:
            BenchError: A publication is refused, or something came that was not expected.
        """
        rate = 0.0 if row == _FLAT_OUT else self._options.rate
        stretches = [await self._stretch(each, rate, seconds) for each in self._audiences]
        if rate:
            self._publishers.doubt(self._stage, f"{row}, {self.name}")
        else:
            stretches[0].cost.doubt_rest(self._stage, f"{row}, {self.name}")
        shares = [stretch.cost.idle_share for stretch in stretches]
        return Found(
            figures=self._figures(stretches),
            deliveries=sum(stretch.deliveries for stretch in stretches),
            expected=sum(stretch.expected for stretch in stretches),
            generator_share=max(stretch.cost.generator_share for stretch in stretches),
            idle_share=min((share for share in shares if share is not None), default=None),
        )

    def _figures(self, stretches: Sequence[Stretch]) -> Figures:
        full, single, nobody = stretches
        sockets = self._options.sockets
        beside_us, delivery_us = apart_us(full.publication_us, single.publication_us, sockets)
        figures: Figures = [
            ("deliveries/s", full.deliveries / full.elapsed_s, 0),
            ("publications/s", full.publications / full.elapsed_s, 0),
            ("server CPU µs/delivery", full.publication_us / sockets, 2),
            (f"server CPU µs/publication to {sockets}", full.publication_us, 1),
            ("server CPU µs/publication to 1", single.publication_us, 1),
            ("server CPU µs/publication to 0", nobody.publication_us, 1),
            ("server CPU µs/publication, deliveries apart", beside_us, 1),
            ("server CPU µs/further delivery", delivery_us, 2),
        ]
        if full.latencies_us:
            figures += [
                (f"latency p{percent} ms", percentile(full.latencies_us, percent) / 1e3, 2)
                for percent in (50, 99)
            ]
        return figures + full.cost.figures()

    async def _stretch(self, audience: Audience, rate: float, seconds: float) -> Stretch:
        """Publishes to all channels in turn, at a rate or flat out, and waits for the last."""
        crowd, event_bytes = audience.crowd, self._event.frame_bytes
        if crowd is not None:
            # Timing each event costs the generator more than counting it.
            await crowd.count(event_bytes, event_bytes if rate else 0, STAMP.encode())
        watch = Watch(self._target)
        if rate:
            cycles = max(1, math.ceil(seconds * rate))
            requests = itertools.chain.from_iterable([audience.requests] * cycles)
            await self._publishers.paced(requests, len(audience.requests) * rate)
        else:
            cycles = await self._flat_out(audience, seconds)
        over_s: float | None = time.monotonic()
        if crowd is not None:
            over_s = await crowd.round_over(cycles, _ALL_HERE_S)
        told, cpu_s = ([], []) if crowd is None else await crowd.tell(cycles * event_bytes)
        if surplus := sum(each.surplus_bytes for each in told):
            raise BenchError(f"sockets received {surplus:,} bytes that were not expected")
        cost = watch.cost(cpu_s)
        publications = cycles * len(audience.channels)
        return Stretch(
            publications=publications,
            deliveries=sum(each.received_bytes for each in told) // event_bytes,
            expected=publications * audience.sockets,
            elapsed_s=cost.elapsed_s if over_s is None else over_s - watch.started_s,
            cost=cost,
            latencies_us=[latency for each in told for latency in each.latencies_us],
        )

    async def _flat_out(self, audience: Audience, seconds: float) -> int:
        """Publishes whole rounds of all channels for at least `seconds`; returns how many."""
        cycles = 0
        until_s = time.monotonic() + seconds

        def requests() -> Iterator[Callable[[], bytes]]:
            nonlocal cycles
            while not cycles or time.monotonic() < until_s:
                cycles += 1
                yield from audience.requests

        await self._publishers.flat_out(requests())
        return cycles


def _channel(sockets: int, number: int) -> str:
    """Equally long for every channel of a run, so that all events are."""
    return f"bench-rooms-{sockets:04d}-{number:05d}"
