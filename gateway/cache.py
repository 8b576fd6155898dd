"""Cache channels: the last event of the app's backend, for whoever subscribes. Contract and memory.

What every implementation promises:

- **Kept by the publication.** The broker keeps the last event of each cache channel in the same
  atomic step in which it publishes it; events of clients (`Publication.by_client`) are not kept.
- **No event twice.** When `last` returns an event, its publication has come to this node already
  if the node heard the channel then. So a subscriber who stands behind a gate since before the
  call finds it there, or has to be sent it.
- **Told once.** Of many misses of a channel webhooks are told one, in the same atomic step, until
  something is published or `MISS_TOLD_AGAIN_S` have passed, cluster-wide.
- An event is kept for the setting `cache_ttl_s`, and not longer than the store keeps its data.

Source: docs/pusher-compatibility.md 1.6 (cache channels), 2.2 (`info=cache`), 2.3 (`cache_miss`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from gateway.frames import frame

if TYPE_CHECKING:
    from gateway.broker import MemoryBus
    from gateway.hub import Channel, Gate

MISS_TOLD_AGAIN_S: Final = 10.0


class Cache(Protocol):
    """The last events of cache channels; see the module's promises."""

    async def last(self, app_id: str, channel: str) -> bytes | None:
        """The body of the channel's last event; None, which is a miss, when there is none.

        Raises:
            BrokerUnavailable: The store did not answer in time.
        """

    async def cached(self, app_id: str, channel: str) -> tuple[str, int] | None:
        """The data of the channel's last event as it was published, and its seconds to live.

        Raises:
            BrokerUnavailable: The store did not answer in time.
        """


class _Kept(msgspec.Struct):
    data: str


_decode = msgspec.json.Decoder(_Kept).decode


def data_of(body: bytes) -> str:
    """The data of a kept event."""
    return _decode(body).data


def seconds_left(milliseconds: int) -> int:
    """Whole seconds to live: at least 1 for what still lives."""
    return max(1, math.ceil(milliseconds / 1000))


def is_on_its_way(body: bytes, channel: Channel, gate: Gate) -> bool:
    """Whether whoever waits behind `gate` gets the event from there.

    It waits in the gate, alone or joined with others, or in the channel's batch.
    """
    wanted = frame(body)
    return any(wanted in data for data in gate.waiting) or wanted in (channel.batch or ())


class MemoryCache:
    """The cache inside one process, for unit tests: the bus keeps the events, for ever.

    It knows of no webhooks.
    """

    __slots__ = ("_bus",)

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus

    async def last(self, app_id: str, channel: str) -> bytes | None:
        """See `Cache`."""
        return self._bus.last.get((app_id, channel))

    async def cached(self, app_id: str, channel: str) -> tuple[str, int] | None:
        """See `Cache`."""
        body = self._bus.last.get((app_id, channel))
        return None if body is None else (data_of(body), 1800)
