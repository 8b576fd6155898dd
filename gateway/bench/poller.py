"""Which sockets of a generator process can be read: the system's own call, without wrapping."""

from __future__ import annotations

import select
import sys
from typing import Final, Protocol

READABLE: Final = 1  # POLLIN and EPOLLIN
WRITABLE: Final = 4  # POLLOUT and EPOLLOUT


class Poller(Protocol):
    """Descriptors and what is awaited of each; it tells as long as it is so."""

    def register(self, fd: int, events: int, /) -> None:
        """Begins to watch."""

    def modify(self, fd: int, events: int, /) -> None:
        """Watches for something else."""

    def unregister(self, fd: int, /) -> None:
        """Ends watching."""

    def poll(self, timeout_s: float | None, /) -> list[tuple[int, int]]:
        """The descriptors that are ready, and for what; waits until there is one."""


if sys.platform == "linux":

    def new_poller() -> Poller:
        """The best that this system has."""
        return select.epoll()

else:

    class _PortablePoller:
        """`poll(2)` in seconds: its time grows with all sockets, not only with the ready ones."""

        def __init__(self) -> None:
            self._poll = select.poll()
            self.register = self._poll.register
            self.modify = self._poll.modify
            self.unregister = self._poll.unregister

        def poll(self, timeout_s: float | None, /) -> list[tuple[int, int]]:
            """As `Poller.poll`."""
            return self._poll.poll(None if timeout_s is None else timeout_s * 1e3)

    def new_poller() -> Poller:
        """The best that this system has."""
        return _PortablePoller()
