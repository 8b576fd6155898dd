"""One of the processes of `duet serve --workers N`: `python -m gateway.worker`.

Its settings come from the environment as `gateway.workers` has prepared it, its listener and its
line to that process are handed down as open files.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.app import GatewayApp, StartError
from gateway.preflight import apps_of
from gateway.server import GatewayServer, calm_collector, server_config, survive_hangup
from gateway.settings import SettingsError, load_settings
from gateway.telemetry import configure_logging
from gateway.workers import DRAINING, SERVING

if TYPE_CHECKING:
    import uvicorn


class _Line:
    """The worker's line to the process that started it."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(False)

    def say(self, text: str) -> None:
        """Says one line; nobody may be left to hear it."""
        with contextlib.suppress(OSError):
            self.socket.send(f"{' '.join(text.split())}\n".encode())


class WorkerServer(GatewayServer):
    """Says when it serves and when it begins to drain; drains when its line is cut."""

    def __init__(self, config: uvicorn.Config, line: _Line) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts as every gateway, and says how that went."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._line.socket, self._cut, loop)
        await super().startup(sockets)
        self._line.say(SERVING if self.fault is None else str(self.fault))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops as every gateway; whoever started it need not wait for that."""
        self._line.say(DRAINING)
        await super().shutdown(sockets)

    def _cut(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing is ever sent here, so it is the end of the process at the other end."""
        loop.remove_reader(self._line.socket)
        self.should_exit = True


def main(line_fd: int, listener_fd: int, folder: str, number: int) -> None:
    """Runs one worker until a signal, or the end of its supervisor, ends it."""
    survive_hangup()
    calm_collector()
    line = _Line(line_fd)
    try:
        settings = load_settings()
        configure_logging(settings)
        app = GatewayApp(settings, apps_of(settings), reloads=True, worker=(Path(folder), number))
        server = WorkerServer(server_config(settings, app), line)
    except (SettingsError, StartError) as error:
        line.say(str(error))
        raise SystemExit(1) from None
    listener = socket.socket(fileno=listener_fd)
    listener.setblocking(False)
    server.run([listener])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
