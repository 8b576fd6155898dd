"""Writing publications to the sockets of a node: joined, in slices, in order.

- **Joined.** What arrives for a quiet channel goes out in the loop's next turn, so publications
  that were read together leave together. While the channel is busy the next ones wait until no
  more come, at most `join_wait_ms`, so that one write carries them all. A channel whose
  publications come in bursts is treated as busy from a burst's first one on, until it has waited
  in vain a few times.
- **Slices.** After `fanout_slice` sockets the loop gets a turn; a channel with 10,000 sockets does
  not stop anyone else. The channel's next batch waits until the slices of this one are done, so
  every socket keeps the channel's order.
- **Cheap.** One write per socket and batch, of the same bytes object: no task, no copy, no JSON
  per socket, and no transport where there is nothing for it to do.

Source: docs/decisions.md (measured), docs/architecture.md.
"""

from __future__ import annotations

from os import write
from typing import TYPE_CHECKING, Final

from gateway.frames import frame

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection

    from gateway.hub import Channel, Connection
    from gateway.settings import Settings

# A channel's batch is looked at so often while it may wait.
_WAIT_TICKS: Final = 4
# So often a channel waits in vain for more until it is written to at once again.
_BURSTY: Final = 3


class FanOut:
    """The fan-out of one node.

    Attributes:
        on_deliveries: Called with the number of publications written, once per batch.
        find: socket id -> connection of this node, for excluded senders.
    """

    __slots__ = (
        "_busy",
        "_fresh",
        "_gate_bytes",
        "_loop",
        "_slice_size",
        "_tick_s",
        "_ticking",
        "find",
        "on_deliveries",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        find: Callable[[str], Connection | None],
        on_deliveries: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._slice_size = settings.fanout_slice
        self._tick_s = settings.join_wait_ms / 1000 / _WAIT_TICKS
        self._gate_bytes = settings.send_buffer_bytes
        self.find = find
        self.on_deliveries = on_deliveries
        # Channels that were quiet until this turn of the loop.
        self._fresh: list[Channel] = []
        # Channels that have written lately, and what they got since waits in their batch.
        self._busy: list[Channel] = []
        self._ticking = False

    def push(self, channel: Channel, body: bytes, except_socket_id: str | None = None) -> None:
        """Sends `body` to everyone on the channel, but not to the excluded connection."""
        batch = channel.batch
        if batch is None:
            batch = channel.batch = []
            if channel.bursty:
                self._wait(channel)
            else:
                if not self._fresh:
                    self._loop.call_soon(self._flush_fresh)
                self._fresh.append(channel)
        if except_socket_id is not None:
            channel.excepts.append((len(batch), except_socket_id))
        batch.append(frame(body))

    def _flush_fresh(self) -> None:
        fresh, self._fresh = self._fresh, []
        for channel in fresh:
            self._write(channel)
            self._wait(channel)

    def _wait(self, channel: Channel) -> None:
        """Lets a tick write what the channel gets from now on."""
        channel.seen = channel.waited = 0
        self._busy.append(channel)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        """Writes what has waited long enough: nothing was added since the last tick, or too long.

        A channel for which nothing has come is quiet again.
        """
        still_busy = []
        for channel in self._busy:
            if channel.slicing:
                still_busy.append(channel)
            elif channel.batch:
                still_busy.append(channel)
                count = len(channel.batch)
                if count > channel.seen and channel.waited < _WAIT_TICKS - 1:
                    channel.seen = count
                    channel.waited += 1
                    continue
                channel.seen = channel.waited = 0
                self._write(channel)
            else:
                channel.batch = None
        self._busy = still_busy
        if still_busy:
            self._loop.call_later(self._tick_s, self._tick)
        else:
            self._ticking = False

    def _write(self, channel: Channel) -> None:
        """Writes the channel's batch to its first slice and schedules the others."""
        batch = channel.batch or []
        channel.batch = []
        # As long as waiting is worth it, the first one of the next burst waits, too.
        channel.bursty = _BURSTY if len(batch) > 1 else max(0, channel.bursty - 1)
        data = b"".join(batch) if len(batch) > 1 else batch[0]
        special = self._without_excluded(channel, batch)
        for connection, gate in list(channel.gates.items()):
            gate.hold(special.get(connection, data))
            if gate.size_bytes > self._gate_bytes:
                connection.abort_slow()
        self.on_deliveries(len(batch) * len(channel.live))
        for connection, rest in special.items():
            if rest and connection in channel.live:
                connection.write(rest)
        delivery = Delivery(channel, data, special)
        if delivery.goes_on(self._slice_size):
            channel.slicing = True
            self._loop.call_soon(self._next_slice, delivery)

    def _next_slice(self, delivery: Delivery) -> None:
        if delivery.goes_on(self._slice_size):
            self._loop.call_soon(self._next_slice, delivery)
            return
        channel = delivery.channel
        channel.slicing = False
        if channel.batch:
            self._write(channel)

    def _without_excluded(self, channel: Channel, batch: list[bytes]) -> dict[Connection, bytes]:
        """The bytes of each connection that must not get every frame of the batch."""
        if not channel.excepts:
            return {}
        skipped: dict[Connection, set[int]] = {}
        for index, socket_id in channel.excepts:
            connection = self.find(socket_id)
            if connection is not None:
                skipped.setdefault(connection, set()).add(index)
        channel.excepts = []
        return {
            connection: b"".join(one for index, one in enumerate(batch) if index not in indexes)
            for connection, indexes in skipped.items()
        }


class Delivery:
    """One batch on its way to a channel's sockets, those that were live when it began.

    A socket that keeps up is written to by its descriptor, past its transport and everything that
    would have to be looked up there: a ninth of what a delivery costs (decision 74). A
    descriptor is good for as long as the channel says so: whoever ends a connection, or finds that
    its peer doesn't keep up, takes it back before the system may give it to another one.
    """

    __slots__ = ("_at", "_connections", "_data", "_fds", "_removals", "channel")

    def __init__(
        self, channel: Channel, data: bytes, but_not_to: Collection[Connection] = ()
    ) -> None:
        self.channel = channel
        self._data = data
        self._at = 0
        live = channel.live
        self._connections = list(live)
        self._fds = list(live.values())
        self._removals = channel.removals
        if but_not_to:
            self._take([one for one in live if one not in but_not_to])

    def _take(self, connections: list[Connection]) -> None:
        live = self.channel.live
        self._connections = connections
        self._fds = [live[one] for one in connections]
        self._at = 0
        self._removals = self.channel.removals

    def goes_on(self, count: int) -> bool:
        """Writes to up to `count` more sockets; returns whether there are others behind them."""
        if self._removals != self.channel.removals:
            live = self.channel.live
            self._take([one for one in self._connections[self._at :] if one in live])
        data, size = self._data, len(self._data)
        begin, end = self._at, self._at + count
        for index, fd in enumerate(self._fds[begin:end], begin):
            if fd < 0:
                self._connections[index].write(data)
                continue
            try:
                sent = write(fd, data)
            except OSError:
                # Its buffer is full, or its peer is gone: the transport finds out which.
                sent = 0
            if sent < size:
                self._connections[index].write(data[sent:])
        self._at = end
        return end < len(self._fds)
