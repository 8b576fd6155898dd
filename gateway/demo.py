"""`duet demo`: the whole of Duet on one machine, from real servers to the page in a browser.

Starts a MongoDB and a Redis of its own, the gateway with the demo's public app and secret, plays
one invitation over real sockets and then serves the demo page until a signal ends it.

Source: README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

import uvloop
from rich.console import Console

from gateway.apps import DEMO_APP, Apps
from gateway.demo_page import page_routes
from gateway.demo_play import PlayError, play
from gateway.preflight import check_servers
from gateway.server import running_gateway
from gateway.settings import DEMO_JWT_SECRET, Settings, load_settings
from gateway.telemetry import configure_logging
from gateway.wiring import StartError
from persistence.embedded import EmbeddedError, start_embedded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gateway.server import RunningGateway
    from persistence.embedded import EmbeddedServers

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
# Open pages reconnect by themselves, so there is no crowd to send away slowly.
_DRAIN_S: Final = 0.2


def run(
    *,
    host: str | None = None,
    port: int | None = None,
    data_dir: Path | None = None,
    exit_after_play: bool = False,
) -> None:
    """Runs the demo; returns when Ctrl-C or SIGTERM has ended it in order.

    Args:
        host: Overrides `DUET_HOST`.
        port: Overrides `DUET_PORT`.
        data_dir: Keeps the data of the embedded servers between runs.
        exit_after_play: Ends once the invitation has been played.

    Raises:
        StartError: Something that it needs is missing or taken, or the invitation did not go as
            it should; the message is one line for a person.
        SettingsError: A variable of the environment can't be used.
    """
    given = load_settings()
    settings = _demo_settings(given, host or given.host, given.port if port is None else port)
    configure_logging(settings)
    console = Console(highlight=False, soft_wrap=True)
    _check_port(settings.host, settings.port)
    routes = page_routes(settings)
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(_servers(settings, data_dir, console))
        settings = settings.model_copy(
            update={"mongodb_url": servers.mongodb_url, "redis_url": servers.redis_url}
        )
        serving = _Demo(console, exit_after_play=exit_after_play)

        async def main() -> None:
            if given.mongodb_url or given.redis_url:
                await _check_servers(settings)
            async with running_gateway(settings, Apps([DEMO_APP]), routes=routes) as gateway:
                await serving.show(gateway)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    console.print("Duet demo has ended.")


class _Demo:
    """What happens while the gateway runs: the played invitation, then the page."""

    def __init__(self, console: Console, *, exit_after_play: bool) -> None:
        self._console = console
        self._exit_after_play = exit_after_play

    async def show(self, gateway: RunningGateway) -> None:
        """Plays and serves until a signal comes, which is the way to end it and no failure."""
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        try:
            async with asyncio.TaskGroup() as group:
                working = group.create_task(self._play_and_serve(gateway))
                waiting = group.create_task(stopped.wait())
                await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
                working.cancel()
                waiting.cancel()
        except* PlayError as faults:
            why = faults.exceptions[0]
            raise StartError(f"the played invitation went wrong: {why}") from None

    async def _play_and_serve(self, gateway: RunningGateway) -> None:
        await play(gateway, self._console)
        if self._exit_after_play:
            return
        self._console.print(f"\nDuet demo is ready: [bold]{gateway.url}/[/]  (Ctrl-C ends it)")
        if gateway.host not in _LOOPBACK:
            self._console.print("Whoever reaches this address can act as the demo's users.")
        await asyncio.Event().wait()


def _demo_settings(given: Settings, host: str, port: int) -> Settings:
    """The environment's settings with the demo's own identity, which is public."""
    return given.model_copy(
        update={
            "host": host,
            "port": port,
            "workers": 1,
            "tls_cert": None,
            "tls_key": None,
            "path_prefix": "",
            "apps_file": None,
            "jwt_secret": DEMO_JWT_SECRET,
            "jwt_public_key": None,
            "jwt_jwks_url": None,
            "jwt_issuer": None,
            "jwt_audience": None,
            "drain_s": min(given.drain_s, _DRAIN_S),
            # The played invitation is what the terminal shows; a log would bury it.
            "log_level": given.log_level if "DUET_LOG_LEVEL" in os.environ else "warning",
            "log_format": given.log_format if "DUET_LOG_FORMAT" in os.environ else "console",
        }
    )


def _check_port(host: str, port: int) -> None:
    """Finds out before the servers are started, which takes a second.

    Raises:
        StartError: The gateway could not listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {port} on {host} is taken by another program; choose another with --port"
            ) from None
        why = error.strerror or str(error)
        raise StartError(f"port {port} on {host} can't be used: {why}") from None


async def _check_servers(settings: Settings) -> None:
    """Finds out about servers that are not our own.

    Raises:
        StartError: One can't be reached, or is none that Duet can use.
    """
    for finding in await check_servers(settings):
        if finding.fatal:
            raise StartError(f"{finding.what}: {finding.text}")


@contextlib.contextmanager
def _servers(
    settings: Settings, data_dir: Path | None, console: Console
) -> Iterator[EmbeddedServers]:
    """A real MongoDB and Redis for as long as the block runs.

    Raises:
        StartError: They can't run here.
    """
    try:
        with console.status("Starting MongoDB and Redis"):
            servers = start_embedded(
                data_dir, mongodb_url=settings.mongodb_url, redis_url=settings.redis_url
            )
    except EmbeddedError as error:
        raise StartError(str(error)) from None
    with servers:
        yield servers
