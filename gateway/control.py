"""What nodes tell each other: small messages of a kind, which the sender hears as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.broker import Broker

log = structlog.get_logger(__name__)


class _Message(msgspec.Struct, frozen=True):
    kind: str
    data: dict[str, str]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Message).decode


class Control:
    """The control messages of one node."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._handlers: dict[str, Callable[[dict[str, str]], None]] = {}

    def on(self, kind: str, handler: Callable[[dict[str, str]], None]) -> None:
        """Registers what this node does when any node sends a control message of `kind`."""
        self._handlers[kind] = handler

    async def send(self, kind: str, **data: str) -> None:
        """Sends a control message to every node, this one included.

        Raises:
            BrokerUnavailable: It may not have been sent.
        """
        await self._broker.publish_control(_encode(_Message(kind, data)))

    def receive(self, body: bytes) -> None:
        """Does what a message says that the broker has brought."""
        try:
            message = _decode(body)
        except msgspec.DecodeError as error:
            log.warning("control_malformed", error=str(error))
            return
        handler = self._handlers.get(message.kind)
        if handler is None:
            # A newer node may know kinds that this one doesn't.
            log.info("control_unknown", kind=message.kind)
            return
        handler(message.data)
