"""The listeners of several workers; `tests/e2e/test_workers.py` has the workers themselves."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from gateway.server import bound
from gateway.workers import Listeners

if TYPE_CHECKING:
    import socket


def test_a_listener_that_cannot_be_renewed_stays() -> None:
    exhausted = False

    def bind(port: int, shared: bool) -> socket.socket:
        if exhausted:
            raise OSError(errno.EMFILE, "Too many open files")
        return bound("127.0.0.1", port, shared=shared)

    with contextlib.closing(Listeners(bind, 0, 2)) as listeners:
        before = listeners[0]
        exhausted = True
        listeners.renew(0)

        assert listeners[0] is before
        assert before.getsockname() == ("127.0.0.1", listeners.port)
