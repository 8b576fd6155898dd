"""Sockets that get events at a steady rate while something else goes on, and how late those are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.bench.publishing import EVENT, STAMP, Event, Publishers
from gateway.bench.results import percentile

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AsyncExitStack

    from gateway.bench.crowd import Crowd
    from gateway.bench.results import Figures
    from gateway.bench.target import Target

_CHANNEL: Final = "bench-witnesses"
_EVENT_BYTES: Final = 300
# So many that none is ever waited for: an event that is late must not hold back the next.
_PUBLISHING_CONNECTIONS: Final = 64
_ALL_HERE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What the witnesses received meanwhile.

    Attributes:
        received: Events, of all of them together.
        expected: As many were to be received.
        latencies_us: Of each.
        members_cpu_s: CPU time of each of their processes.
    """

    received: int
    expected: int
    latencies_us: Sequence[int]
    members_cpu_s: Sequence[float]

    def figures(self) -> Figures:
        """For the table."""
        shown = (("event p50 ms", 50), ("event p99 ms", 99), ("longest event ms", 100))
        return [(name, percentile(self.latencies_us, rank) / 1e3, 2) for name, rank in shown]


class Witnesses:
    """A crowd on a channel of its own, and the connections that publish there."""

    def __init__(self, target: Target, crowd: Crowd, sockets: int, rate: float) -> None:
        """Connects nobody yet.

        Args:
            target: Where they are.
            crowd: Their processes.
            sockets: How many there are.
            rate: Events a second to each of them.
        """
        self._target = target
        self._crowd = crowd
        self._sockets = sockets
        self._rate = rate
        self._event = Event(target, _CHANNEL, _EVENT_BYTES)
        self._publishers = Publishers(target)

    async def open(self, stack: AsyncExitStack, advance: Callable[[float], None]) -> None:
        """Connects them, also anew after `leave`; the stack closes what publishes.

        Raises:
            BenchError: The target refuses one or doesn't answer in time.
        """
        self._publishers = Publishers(self._target)
        await self._publishers.open(stack, _PUBLISHING_CONNECTIONS)
        await self._crowd.join(self._target, _CHANNEL, self._sockets, advance)

    async def leave(self) -> None:
        """Forgets sockets that the server has closed."""
        await self._crowd.leave()

    async def during(self, work: asyncio.Task[Any]) -> Witnessed:
        """Publishes to them as long as the work goes on, and at least once.

        Raises:
            BenchError: A publication is refused or unanswered.
        """
        published = 0

        def requests() -> Iterator[Callable[[], bytes]]:
            nonlocal published
            while not published or not work.done():
                published += 1
                yield self._publication

        event_bytes = self._event.frame_bytes
        await self._crowd.count(event_bytes, event_bytes, STAMP.encode())
        await self._publishers.paced(requests(), self._rate)
        await work
        await self._crowd.round_over(published, _ALL_HERE_S)
        told, members_cpu_s = await self._crowd.tell(published * event_bytes)
        return Witnessed(
            received=sum(each.received_bytes for each in told) // event_bytes,
            expected=published * self._sockets,
            latencies_us=[latency for each in told for latency in each.latencies_us],
            members_cpu_s=members_cpu_s,
        )

    def _publication(self) -> bytes:
        return self._target.publish_request(_CHANNEL, EVENT, self._event.data())
