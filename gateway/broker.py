"""The broker: publish and subscribe between nodes. The contract, and its memory implementation.

What every broker promises:

- **At most once.** A publication reaches each subscribed node once or, when the broker fails in
  between, not at all. `on_gap` says that some may have been missed.
- **Recoverable publications**, and they alone, also reach a node whose subscriptions were broken
  meanwhile: once, in their order among themselves, before `on_gap`. The broker keeps the last ones.
- **Order.** Publications of one channel arrive everywhere in the order in which the broker
  accepted them. Calls for one channel take effect in the order in which they are made.
- **Last events.** The last event of a cache channel is kept in the same atomic step in which it
  is published (`gateway.cache`), unless a client sent it.
- **Encoded once.** The body is client-ready JSON; a broker neither reads nor changes it.
- **Bounded.** No call waits longer than the settings allow; then it raises `BrokerUnavailable`.
  A `subscribe` that raised has left no interest behind. A `publish` that raised may or may not
  have been delivered.
- **Recovery.** What was subscribed is subscribed again when the broker is back, for ever, without
  anyone asking.

Source: docs/architecture.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec

from gateway.channels import is_cache_channel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    OnPublication: TypeAlias = Callable[[str, str, bytes, str | None], None]
    OnControl: TypeAlias = Callable[[bytes], None]
    OnGap: TypeAlias = Callable[[], None]


class BrokerUnavailable(Exception):
    """The broker did not accept a call in time; the same call may work later."""


class Publication(msgspec.Struct, frozen=True, gc=False):
    """What a broker carries on a channel.

    Attributes:
        body: Client-ready JSON, without a WebSocket header.
        except_socket_id: The connection that must not get it, wherever it is.
        by_client: A client event, which a cache channel does not keep as its last one.
    """

    app_id: str
    channel: str
    body: bytes
    except_socket_id: str | None = None
    by_client: bool = False


class Broker(Protocol):
    """Publish and subscribe between nodes; see the module's promises."""

    @property
    def alive(self) -> bool:
        """Whether the node's own heartbeat came back through the broker lately."""

    async def start(
        self, on_publication: OnPublication, on_control: OnControl, on_gap: OnGap
    ) -> None:
        """Connects, or begins to try; the callbacks run in the event loop and must not block.

        Args:
            on_publication: Called with app id, channel, body, excluded socket id.
            on_control: Called with what any node gave to `publish_control`.
            on_gap: Called when all subscriptions stand again after a time without, and what is
                recoverable of it has been told.
        """

    async def stop(self) -> None:
        """Disconnects; no callback is called from here on."""

    async def subscribe(self, app_id: str, channel: str) -> None:
        """Returns when publications of the channel are sure to arrive.

        Raises:
            BrokerUnavailable: Not confirmed in time; nothing is subscribed.
        """

    async def unsubscribe(self, app_id: str, channel: str) -> None:
        """Ends a subscription; never fails and never waits for the broker."""

    def publish(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """Sends them on their way; the future is done when the broker has accepted all of them.

        Raises:
            BrokerUnavailable: It can't; the future fails with it when the broker has not accepted
                all of them in time.
        """

    def publish_recoverable(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """As `publish`, for nodes that can't hear it now, too; nobody is excluded.

        Raises:
            BrokerUnavailable: As `publish`.
        """

    async def publish_told(self, publication: Publication, hook: bytes, event: bytes) -> None:
        """Publishes a client event and records it for webhooks, in one atomic step.

        Args:
            publication: What is published; `by_client`.
            hook: What `Webhooks.hook` gave, not empty.
            event: JSON, as the backend gets it.

        Raises:
            BrokerUnavailable: As `publish`.
        """

    async def fence(self) -> None:
        """Returns when what was published before the call has come to `on_publication`.

        Raises:
            BrokerUnavailable: As `publish`.
        """

    async def publish_control(self, body: bytes) -> None:
        """Reaches `on_control` of every node, this one included.

        Raises:
            BrokerUnavailable: As `publish`.
        """


class MemoryBus:
    """What the memory brokers of several nodes of one process share.

    Attributes:
        last: (app id, channel) -> body of the last event, of cache channels.
    """

    __slots__ = ("last", "nodes")

    def __init__(self) -> None:
        self.nodes: list[MemoryBroker] = []
        self.last: dict[tuple[str, str], bytes] = {}


class MemoryBroker:
    """A broker inside one process, for unit tests; publishing calls the subscribers directly."""

    __slots__ = ("_on_control", "_on_publication", "_wanted", "alive", "bus")

    def __init__(self, bus: MemoryBus | None = None) -> None:
        self.bus = bus or MemoryBus()
        self._wanted: set[tuple[str, str]] = set()
        self.alive = False

    async def start(
        self, on_publication: OnPublication, on_control: OnControl, on_gap: OnGap
    ) -> None:
        """Joins the bus, which has no gaps."""
        del on_gap
        self._on_publication = on_publication
        self._on_control = on_control
        self.bus.nodes.append(self)
        self.alive = True

    async def stop(self) -> None:
        """Leaves the bus."""
        self.alive = False
        if self in self.bus.nodes:
            self.bus.nodes.remove(self)

    async def subscribe(self, app_id: str, channel: str) -> None:
        """See `Broker`."""
        self._wanted.add((app_id, channel))

    async def unsubscribe(self, app_id: str, channel: str) -> None:
        """See `Broker`."""
        self._wanted.discard((app_id, channel))

    def publish(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """See `Broker`."""
        self.publish_now(publications)
        for one in publications:
            if is_cache_channel(one.channel) and not one.by_client:
                self.bus.last[one.app_id, one.channel] = one.body
        accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        accepted.set_result(None)
        return accepted

    def publish_recoverable(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """See `Broker`: here nothing is missed."""
        return self.publish(publications)

    async def publish_told(self, publication: Publication, hook: bytes, event: bytes) -> None:
        """See `Broker`; in memory there are no webhooks."""
        del hook, event
        await self.publish([publication])

    async def fence(self) -> None:
        """See `Broker`: publishing has called the subscribers already."""

    def publish_now(self, publications: Sequence[Publication]) -> None:
        """Publishes without waiting; memory presence needs it for its member events.

        Raises:
            BrokerUnavailable: The broker has been stopped.
        """
        if not self.alive:
            raise BrokerUnavailable("the broker is stopped")
        for one in publications:
            for node in self.bus.nodes:
                if (one.app_id, one.channel) in node._wanted:  # noqa: SLF001  its own kind
                    node._on_publication(  # noqa: SLF001
                        one.app_id, one.channel, one.body, one.except_socket_id
                    )

    async def publish_control(self, body: bytes) -> None:
        """See `Broker`."""
        if not self.alive:
            raise BrokerUnavailable("the broker is stopped")
        for node in list(self.bus.nodes):
            node._on_control(body)  # noqa: SLF001
