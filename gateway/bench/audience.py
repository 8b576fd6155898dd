"""A process full of listening sockets that counts what they receive, told what to do in lines.

Run as `python -m gateway.bench.audience`. It decodes nothing: all events of a round are known and
equally long, so bytes are counted, and a round is over when the last byte of it has arrived. One
thread, one `epoll`, and one read a burst that drops the bytes in the kernel where it can: what is
left is the kernel's work, 6 to 7 µs of CPU a read (10 with a protocol object per socket that is
handed the bytes, at bursts of 64 events).

What it is told and answers is in `orders`. It ends when its standard input does, so it never
outlives who started it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from gateway.bench import orders
from gateway.bench.door import Door
from gateway.bench.errors import BenchError
from gateway.bench.poller import READABLE, new_poller
from gateway.bench.tally import Tally, tell

if TYPE_CHECKING:
    from collections.abc import Callable

_PROGRESS_STEP: Final = 50
# What the last pings are given to be answered.
_PONGS_WITHIN_S: Final = 2.0
_PIPE_BYTES: Final = 1_048_576
_BUFFER_BYTES: Final = 1_048_576
# Of a TCP socket: the bytes are counted and dropped without being copied (Linux, tcp(7)).
_DROP: Final = socket.MSG_TRUNC if sys.platform == "linux" else 0


class Audience:
    """All sockets of this process, what they await, and who tells them what to do."""

    def __init__(self, commands_fd: int) -> None:
        self._poller = new_poller()
        self._poller.register(commands_fd, READABLE)
        self._commands_fd = commands_fd
        self._line = b""
        self._sockets: dict[int, socket.socket] = {}
        self._takes: dict[int, Callable[[bytearray, int, int], int]] = {}
        self._buffer = bytearray(_BUFFER_BYTES)
        self._tally = Tally()
        self._join: orders.Join | None = None
        self._door: Door | None = None
        self._wakings: deque[int] = deque()
        self._every_s = 0.0
        self._due_s = 0.0
        self._pongs_by_s = 0.0
        self._pings = self._pongs = self._lost = 0

    def run(self) -> None:
        """Does what it is told until its commands end.

        Raises:
            BenchError: A socket failed that must not.
        """
        tell(orders.Joined(0))
        is_over = False
        while not is_over:
            is_over = self.turn(self._until_due())

    def turn(self, timeout_s: float | None) -> bool:
        """Reads every socket that is ready, once; tells whether the commands have ended."""
        is_over = False
        takes, tally, buffer = self._takes, self._tally, self._buffer
        is_read = tally.is_timed or self._every_s > 0
        flags = 0 if is_read else _DROP
        for fd, _ in self._poller.poll(timeout_s):
            take = takes.get(fd)
            if take is None:
                is_over |= self._other(fd)
                continue
            try:
                count = take(buffer, 0, flags)
            except BlockingIOError:
                continue
            except OSError:
                count = 0
            if not count:
                self._lose(fd)
                continue
            if is_read:
                self._read(fd, count)
            tally.counts[fd] += count
            tally.total_bytes += count
            if tally.total_bytes >= tally.target_bytes:
                tally.end_round()
        return is_over

    def _read(self, fd: int, count: int) -> None:
        if self._tally.is_timed:
            self._tally.time(self._tally.counts[fd], self._buffer, count)
        if self._every_s and self._join is not None:
            manners = self._join.manners
            self._pongs += self._buffer.count(manners.pong, 0, count)
            if manners.asked and self._buffer.find(manners.asked, 0, count) >= 0:
                self._sockets[fd].send(manners.reply)

    def _other(self, fd: int) -> bool:
        """A socket that is not in yet, or a command; True when there will be no more."""
        if fd != self._commands_fd:
            if self._door is not None:
                self._door.ready(fd)
                self._look_at_door()
            return False
        data = os.read(fd, _PIPE_BYTES)
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._obey(orders.decode_command(line))
        return not data

    def _obey(self, command: orders.Command) -> None:
        match command:
            case orders.Join():
                self._join = command
                self._door = Door(command, self._poller, self._admit)
                self._look_at_door()
            case orders.Leave():
                self._leave()
                tell(orders.Left(time.monotonic()))
            case orders.Count():
                self._tally.begin(command)
                tell(orders.Counting(time.process_time()))
            case orders.Tell(expected_bytes):
                told = self._tally.result(expected_bytes)
                self._tally.is_timed = False
                tell(told)
            case orders.Keep(every_s):
                self._keep(every_s)
                tell(orders.Counting(time.process_time()))
            case orders.Kept():
                self._wakings.clear()
                self._pongs_by_s = time.monotonic() + _PONGS_WITHIN_S

    def _admit(self, newcomer: socket.socket) -> None:
        fd = newcomer.fileno()
        self._sockets[fd] = newcomer
        self._takes[fd] = newcomer.recv_into
        self._tally.counts[fd] = 0

    def _look_at_door(self) -> None:
        if self._door is None:
            return
        admitted = self._door.admitted
        within = self._door.within()
        if within is not None:
            self._door = None
            tell(orders.Joined(admitted))
            tell(within)
        elif admitted and admitted % _PROGRESS_STEP == 0:
            tell(orders.Joined(admitted))

    def _lose(self, fd: int) -> None:
        # Not closed yet: its number must not be another socket's while there is a count under it.
        del self._takes[fd]
        self._poller.unregister(fd)
        self._lost += 1

    def _leave(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None
        for fd in self._takes:
            self._poller.unregister(fd)
        for left in self._sockets.values():
            left.close()
        self._sockets.clear()
        self._takes.clear()
        self._tally = Tally()
        self._every_s = 0.0

    # A silent client pings; evenly spread, as of clients that came at different times.

    def _keep(self, every_s: float) -> None:
        self._wakings = deque(self._takes)
        self._every_s = every_s
        self._due_s = time.monotonic()
        self._pings = self._pongs = self._lost = 0

    def _until_due(self) -> float | None:
        """Pings and lets in whose time has come; returns the seconds until the next."""
        until_s = None if self._door is None else self._door.let_in()
        if self._door is not None:
            self._look_at_door()
        if not self._every_s:
            return until_s
        now_s = time.monotonic()
        if not self._wakings:
            return self._until_answered(now_s)
        while self._due_s <= now_s:
            self._ping(self._wakings[0])
            self._wakings.rotate(-1)
            self._due_s += self._every_s / len(self._wakings)
        return min(self._due_s - now_s, self._every_s if until_s is None else until_s)

    def _until_answered(self, now_s: float) -> float | None:
        left_s = self._pongs_by_s - now_s
        if self._pongs < self._pings and left_s > 0:
            return left_s
        self._every_s = 0.0
        tell(orders.Awake(time.process_time(), self._pings, self._pongs, self._lost))
        return None

    def _ping(self, fd: int) -> None:
        if self._join is None or fd not in self._takes:
            return
        with contextlib.suppress(OSError):  # the next read finds it closed
            self._sockets[fd].send(self._join.manners.ping)
            self._pings += 1


def main() -> None:
    """Runs until standard input ends."""
    with contextlib.suppress(BrokenPipeError):
        try:
            Audience(sys.stdin.fileno()).run()
        except BenchError as error:
            tell(orders.Failed(str(error)))


if __name__ == "__main__":
    main()
