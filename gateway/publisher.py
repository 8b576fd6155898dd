"""The node as the deliver phase sees it: what publishes, and what owns the deliverer's loops."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

    from gateway.broker import Publication
    from gateway.node import Node
    from gateway.presence import Presence

# How long a cancelled loop may take to end before it is asked again.
_ASK_AGAIN_S: Final = 0.2


class NodePublisher:
    """What the deliver phase needs of the node and of presence.

    Attributes:
        loops: What the deliverer spawns when it starts: tasks that end only by being cancelled.
    """

    __slots__ = ("_node", "_presence", "_starting", "loops")

    def __init__(self, node: Node, presence: Presence) -> None:
        self._node = node
        self._presence = presence
        self._starting = True
        self.loops: list[asyncio.Task[None]] = []

    def started(self) -> None:
        """From here on tasks end by themselves."""
        self._starting = False

    async def publish(self, publications: Sequence[Publication]) -> None:
        """Publishes what commits tell, recoverably; raises `BrokerUnavailable`."""
        await self._node.publish_recoverable(publications)

    async def drop_channel_data(self, streamer_id: str) -> None:
        """Drops cached channel data on every node; raises `BrokerUnavailable`."""
        await self._node.drop_channel_data(streamer_id)

    async def presence_user_ids(self, app_id: str, channel: str) -> list[str]:
        """The users present in a channel; raises `BrokerUnavailable`."""
        return list(await self._presence.members(app_id, channel))

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Runs a task that the node owns."""
        task = self._node.spawn(coroutine, name)
        if self._starting:
            self.loops.append(task)

    async def stop_loops(self) -> None:
        """Ends the loops before the node, which would give them its whole grace to end.

        A library may lose a cancellation that comes with an answer, as PyMongo did on Python 3.11
        before it was mended (`persistence.driver_wait`), so each is asked until it is done. Without
        this a stop once took for ever.
        """
        while running := [task for task in self.loops if not task.done()]:
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=_ASK_AGAIN_S)
