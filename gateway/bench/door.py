"""Lets the sockets of a generator process in: a bounded number at a time, again where it failed."""

from __future__ import annotations

import heapq
import random
import time
from typing import TYPE_CHECKING, Final

from gateway.bench.entrant import Entrant
from gateway.bench.errors import BenchError, RefusedError
from gateway.bench.orders import Within
from gateway.bench.poller import READABLE, WRITABLE
from gateway.bench.wire import upgrade_request

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from gateway.bench.orders import Join, Room
    from gateway.bench.poller import Poller

# Between two looks at the sockets that are on their way: answers must not wait for newcomers.
_BEGUN_AT_ONCE: Final = 64
_LOOK_AT_DEADLINES_S: Final = 0.5


class Door:
    """One `Join`.

    Attributes:
        admitted: Sockets that are subscribed by now.
    """

    def __init__(self, join: Join, poller: Poller, admit: Callable[[socket.socket], None]) -> None:
        self._join = join
        self._poller = poller
        self._admit = admit
        self._request = upgrade_request(join.host, join.port, join.path)
        # Taken from the end. Rooms are mixed as people are: not one channel after the other.
        self._outside = [room for room in join.rooms for _ in range(room.sockets)]
        random.shuffle(self._outside)
        self._wanted = len(self._outside)
        self._entrants: dict[int, Entrant] = {}
        self._again: list[tuple[float, int, Room]] = []
        self._latencies_us: list[int] = []
        self._failures = 0
        self._cpu_s = time.process_time()
        self.admitted = 0

    def within(self) -> Within | None:
        """The answer to the `Join` once every socket is subscribed."""
        if self.admitted < self._wanted:
            return None
        return Within(
            at_s=time.monotonic(),
            latencies_us=self._latencies_us,
            failures=self._failures,
            cpu_s=time.process_time() - self._cpu_s,
        )

    def let_in(self) -> float | None:
        """Begins what can be begun, gives up what is late; returns when it wants to be called.

        Returns:
            Seconds from now; None: only when a socket is ready.

        Raises:
            BenchError: A socket failed and is not to be tried again.
        """
        now_s = time.monotonic()
        while self._again and self._again[0][0] <= now_s:
            self._outside.append(heapq.heappop(self._again)[2])
        self._give_up(now_s)
        room_for = self._join.in_flight - len(self._entrants)
        for _ in range(min(room_for, len(self._outside), _BEGUN_AT_ONCE)):
            self._begin(self._outside.pop(), now_s)
        if self._outside and len(self._entrants) < self._join.in_flight:
            return 0.0
        if self._again:
            return min(self._again[0][0] - now_s, _LOOK_AT_DEADLINES_S)
        return _LOOK_AT_DEADLINES_S if self._entrants else None

    def _begin(self, room: Room, now_s: float) -> None:
        try:
            entrant = Entrant(self._join, self._request, room, now_s)
        except OSError as error:
            self._failed(room, BenchError(f"a socket can't be opened: {error.strerror}"))
            return
        fd = entrant.socket.fileno()
        self._entrants[fd] = entrant
        self._poller.register(fd, READABLE if entrant.writable else WRITABLE)

    def ready(self, fd: int) -> None:
        """Goes on with a socket that can be read or written.

        Raises:
            BenchError: It was refused, or it failed and is not to be tried again.
        """
        entrant = self._entrants.get(fd)
        if entrant is None:
            return  # it was given up a moment ago
        try:
            if not entrant.writable:
                if entrant.greet():
                    self._poller.modify(fd, READABLE)
            elif entrant.receive():
                self._subscribed(fd, entrant)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(fd, BenchError(f"a socket broke: {error.strerror or error}"))
        except RefusedError:
            raise
        except BenchError as error:
            self._fail(fd, error)

    def _subscribed(self, fd: int, entrant: Entrant) -> None:
        del self._entrants[fd]
        self._latencies_us.append(int((time.monotonic() - entrant.began_s) * 1e6))
        self.admitted += 1
        self._admit(entrant.socket)

    def _give_up(self, now_s: float) -> None:
        # In the order in which they were begun.
        late_s = now_s - self._join.deadline_s
        late = []
        for fd, entrant in self._entrants.items():
            if entrant.began_s > late_s:
                break
            late.append(fd)
        for fd in late:
            self._fail(fd, BenchError(f"a socket was not in within {self._join.deadline_s:g} s"))

    def _fail(self, fd: int, error: BenchError) -> None:
        entrant = self._entrants.pop(fd)
        self._poller.unregister(fd)
        entrant.socket.close()
        self._failed(entrant.room, error)

    def _failed(self, room: Room, error: BenchError) -> None:
        if self._join.retry_s is None:
            raise error
        self._failures += 1
        wait_s = self._join.retry_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        heapq.heappush(self._again, (time.monotonic() + wait_s, self._failures, room))

    def close(self) -> None:
        """Ends what is on its way."""
        for fd, entrant in self._entrants.items():
            self._poller.unregister(fd)
            entrant.socket.close()
        self._entrants.clear()
