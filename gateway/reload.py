"""The apps' file, read again while the gateway runs: on SIGHUP, without dropping a socket.

A new app can be used at once; new secrets count for sockets that were there before; sockets of an
app that was disabled (4003) or removed, or whose key was changed (4001), are closed. A file that
can't be used changes nothing. The first app carries the invitations of goals that are under way,
so it stays the first; the others may come and go.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Final

import structlog

from gateway.errors import CloseCode
from gateway.opening import app_now
from gateway.preflight import servable_apps
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.apps import Apps
    from gateway.connections import NodeConnection
    from gateway.node import Node
    from gateway.settings import Settings

# Sockets that are closed between two turns of the loop.
_SLICE: Final = 256

log = structlog.get_logger(__name__)


class AppsReload:
    """Brings the apps of one process up to date with their file."""

    __slots__ = ("_apps", "_done", "_lock", "_node", "_settings")

    def __init__(
        self, settings: Settings, apps: Apps, node: Node, done: Callable[[], None]
    ) -> None:
        """Watches nothing yet.

        Args:
            settings: Name the file.
            apps: What everybody who knows the apps holds; changed in place.
            node: Whose sockets follow.
            done: Called after each change.
        """
        self._settings = settings
        self._apps = apps
        self._node = node
        self._done = done
        self._lock = asyncio.Lock()

    def on_hangup(self) -> None:
        """Reads the file at each SIGHUP from now on."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.request)

    def request(self) -> asyncio.Task[bool]:
        """Begins to read the file."""
        return self._node.spawn(self.reload(), "reload_apps")

    async def reload(self) -> bool:
        """Reads the file and follows it, or says in one line of the log why not."""
        async with self._lock:
            try:
                new = await asyncio.to_thread(self._read)
            except SettingsError as error:
                log.warning("apps_kept", why=str(error))
                return False
            self._apps.become(new)
            self._done()
            closed = await self._follow()
            log.info("apps_reloaded", apps=len(new), sockets_closed=closed)
            return True

    def _read(self) -> Apps:
        new = servable_apps(self._settings)
        first = self._apps.first.id
        if new.first.id != first:
            why = f"only a restart moves the invitations from app {first!r} to {new.first.id!r}"
            raise SettingsError([f"DUET_APPS_FILE: the first app has changed; {why}"])
        return new

    async def _follow(self) -> int:
        """Gives each connection its app as it is now; returns how many had to be closed."""
        closed = 0
        for connection, code in list(self._unwanted()):
            connection.disconnect(code)
            closed += 1
            if closed % _SLICE == 0:
                await asyncio.sleep(0)
        return closed

    def _unwanted(self) -> Iterator[tuple[NodeConnection, CloseCode]]:
        for connection in self._node.connections():
            pusher = connection.pusher
            app = app_now(self._apps, pusher.app)
            if isinstance(app, CloseCode):
                yield connection, app
            else:
                pusher.app = app
