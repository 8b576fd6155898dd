"""What a node knows of its connections, whatever carries them: a WebSocket or HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gateway.hub import Connection

if TYPE_CHECKING:
    from gateway.node import Node


class Deadlined(Protocol):
    """Whatever of the network has deadlines on the node's wheel.

    Attributes:
        bucket: The wheel's.
    """

    bucket: int

    def abort(self) -> None:
        """Ends the connection without a word; unsent data is lost."""

    def on_deadline(self, now: float) -> float | None:
        """Does what is due at `now` (monotonic); returns the next deadline, if there is one."""


class NodeConnection(Connection, Deadlined, Protocol):
    """An accepted connection with its life: deadlines, end, and what is done for its messages."""

    @property
    def node(self) -> Node:
        """Where the connection lives."""

    @property
    def is_open(self) -> bool:
        """Whether messages may come and go: from `connection_established` to the close."""

    def resume_reading(self) -> None:
        """Takes messages again, if they were held up because too many waited."""

    def disconnect(self, code: int, message: str | None = None) -> None:
        """Ends the connection with `pusher:error` and a close; nothing on a second call."""
