"""Standard error, written to so that a reader who has stopped to read holds up nobody.

Who writes to a full pipe waits until it is read: with a log, the whole event loop would, with all
sockets and leases of the process. Here a line that finds no room is dropped, and how many that
were is told as soon as there is room again.
"""

from __future__ import annotations

import os
import socket
import stat
from functools import partial
from typing import TYPE_CHECKING, Final, TextIO

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

# Opening it makes a description of our own of the same pipe: other processes, which share the
# first one, don't find theirs changed to non-blocking.
_AGAIN: Final = "/proc/self/fd/{}"


class LogStream:
    """A stream for `logging.StreamHandler` that never waits."""

    __slots__ = ("_dropped", "_rest", "_send", "close")

    def __init__(self, send: Callable[[bytes], int], close: Callable[[], None]) -> None:
        """Writes by `send`, which tells how much it took, or raises `BlockingIOError`."""
        self._send = send
        self.close = close
        # What is left of a line that was only taken in part.
        self._rest = b""
        self._dropped = 0

    def write(self, text: str) -> None:
        """Writes a line, or drops it."""
        self.flush()
        if self._rest or not self._put(text.encode(errors="backslashreplace")):
            self._dropped += 1
        elif self._dropped:
            dropped, self._dropped = self._dropped, 0
            log.warning("log_lines_dropped", lines=dropped)
            if self._dropped:
                # There was no room for that line.
                self._dropped = dropped

    def flush(self) -> None:
        """Writes on what was only taken in part, as far as there is room."""
        if self._rest:
            self._put(self._rest)

    def _put(self, data: bytes) -> bool:
        """Writes what there is room for and keeps the rest; false when nothing was written."""
        try:
            taken = self._send(data)
        except BlockingIOError:
            return False
        self._rest = data[taken:]
        return True


def unblocked(stream: TextIO | None) -> TextIO | LogStream | None:
    """A stream to the same place that never waits, if that is a pipe or a socket.

    A file and a terminal are left as they are; so is none, of a process that has no such stream.
    """
    if stream is None:
        return None
    try:
        fd = stream.fileno()
        kind = os.fstat(fd).st_mode
        if stat.S_ISFIFO(kind):
            own = os.open(_AGAIN.format(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return LogStream(partial(os.write, own), partial(os.close, own))
        if stat.S_ISSOCK(kind):
            end = socket.socket(fileno=os.dup(fd))
            return LogStream(lambda data: end.send(data, socket.MSG_DONTWAIT), end.close)
    except OSError:
        # No such way on this system, or a pipe that was made by another user.
        pass
    return stream
