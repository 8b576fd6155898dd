"""What one client has received, and waiting for it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Long enough for two busy cores; a test that passes never waits this long.
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Received:
    """One thing a client was told: `kind` is the record it belongs to (event, frame, state, …)."""

    kind: str
    channel: str | None
    event: str | None
    data: Any
    fields: dict[str, Any]
    at_s: float


@dataclass(frozen=True, slots=True)
class Sent:
    """A command that a client has sent."""

    at_s: float
    name: str
    data: dict[str, Any]


class Inbox:
    """Everything one client received, in order; each record is handed out by `expect` once.

    Attributes:
        sent: the commands that it sent, for whoever compares them with what was received.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent: list[Sent] = []
        self.received: list[Received] = []
        self.closed: str | None = None
        self._taken: set[int] = set()
        self._waiters: set[asyncio.Future[None]] = set()

    def put(self, kind: str, fields: dict[str, Any]) -> None:
        self.received.append(
            Received(
                kind=kind,
                channel=fields.get("channel"),
                event=fields.get("event"),
                data=fields.get("data"),
                fields=fields,
                at_s=time.monotonic(),
            )
        )
        self._wake()

    def close(self, reason: str) -> None:
        self.closed = reason
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def expect(
        self,
        event: str | None = None,
        channel: str | None = None,
        *,
        kind: str = "event",
        where: Callable[[Received], bool] = lambda _: True,
        timeout_s: float = PATIENCE_S,
    ) -> Received:
        """Waits for the first record that fits and was not handed out yet."""

        def fits(candidate: Received) -> bool:
            return (
                candidate.kind == kind
                and event in {None, candidate.event}
                and channel in {None, candidate.channel}
                and where(candidate)
            )

        seen = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    for index in range(seen, len(self.received)):
                        if index not in self._taken and fits(self.received[index]):
                            self._taken.add(index)
                            return self.received[index]
                    seen = len(self.received)
                    if self.closed is not None:
                        break
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiters.add(waiter)
                    try:
                        await waiter
                    finally:
                        self._waiters.discard(waiter)
        except TimeoutError:
            pass
        end = f" before it ended ({self.closed})" if self.closed else f" in {timeout_s} s"
        raise AssertionError(
            f"{self.name} did not get {kind} {event!r} on {channel!r}{end}. It got:\n"
            + "\n".join(f"  {record.kind} {record.fields}" for record in self.received)
        )

    def mark(self) -> int:
        """The place in the record where `pushes` can start to read."""
        return len(self.received)

    def pushes(self, since: int = 0, *, kind: str = "event") -> Counter[tuple[str, str]]:
        """How often each event came on each channel, the protocol's own frames left out."""
        return Counter(
            (record.event, record.channel)
            for record in self.received[since:]
            if record.kind == kind
            and record.event is not None
            and record.channel is not None
            and not record.event.startswith(("pusher:", "pusher_internal:", "barrier."))
        )

    def all_of(self, event: str, channel: str | None = None, since: int = 0) -> list[Any]:
        """The data of each such event, in the order in which they came."""
        return [
            record.data
            for record in self.received[since:]
            if record.kind == "event"
            and record.event == event
            and channel in {None, record.channel}
        ]
