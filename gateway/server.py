"""The gateway under uvicorn: as a process of its own, or inside another program's event loop.

WebSockets are handed to `GatewayProtocol` at the upgrade and are no business of uvicorn's from
then on; the order of stopping is therefore ours: who waits in the listener's queue is still
accepted, then nobody; calls in flight end and newcomers are answered while the node closes its
sockets over `drain_s`; and when every connection has ended, the application stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
from typing import TYPE_CHECKING, Final

import uvicorn

from gateway.app import GatewayApp, StartError
from gateway.arrival import Arrival
from gateway.drain import FIRST_WORDS_S, something_waits
from gateway.socket import GatewayProtocol
from gateway.tasks import Tasks
from gateway.workers import Listeners, Workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from types import FrameType

    from starlette.routing import BaseRoute

    from gateway.apps import Apps
    from gateway.parts import Parts
    from gateway.settings import Settings
    from persistence.clock import Clock

_BACKLOG: Final = 2048
# How long those who wait in the listeners' queues are accepted, if ever more of them come.
_QUEUE_S: Final = 1.0
# Turns of the loop in which nobody may have come before a listener is closed: asyncio makes a
# connection of what it has accepted in a later one, and no more once the listener is closed.
_QUIET_TURNS: Final = 3
# How long after the drain, and after a newcomer's first words, the last connection has ended, be it
# over HTTP with a close to fetch, or is cut.
_LAST_WORDS_S: Final = 4.0
# Objects that are made before the collector looks at the young ones; Python's own is 700.
_COLLECT_AFTER: Final = 10_000


class GatewayServer(uvicorn.Server):
    """The server with our order of stopping, and errors instead of `sys.exit`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        # Set once it listens, or once `fault` says why it never will.
        self.settled = asyncio.Event()
        self.fault: StartError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application and listens; `fault` says why not, no `SystemExit`."""
        try:
            await super().startup(sockets)
        except SystemExit:
            app = self.config.loaded_app
            known = app.fault if isinstance(app, GatewayApp) else None
            self.fault = known or StartError("the gateway did not start; its log says why")
            self.should_exit = True
        finally:
            self.settled.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, lets every connection have its answer and end, stops the application.

        uvicorn's own would close the idle ones at once, whatever they have just sent.
        """
        listeners = sockets or []
        app = self.config.loaded_app
        drain_s = app.begin_drain() if isinstance(app, GatewayApp) else 0.0
        for connection in list(self.server_state.connections):
            connection.shutdown()
        waiting = Tasks()
        # Whoever asks only once it is closed is told that all have gone; they haven't.
        gone = [waiting.spawn(one.wait_closed(), "connections end") for one in self.servers]
        await _let_in(listeners)
        for server in self.servers:
            server.close()
        for listener in listeners:
            listener.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(drain_s, FIRST_WORDS_S) + _LAST_WORDS_S):
                await asyncio.wait(gone)
                await self._calls_ended()
        await waiting.stop()
        for task in list(self.server_state.tasks):
            task.cancel()
        await self.lifespan.shutdown()

    async def _calls_ended(self) -> None:
        while self.server_state.tasks and not self.force_exit:
            await asyncio.wait(list(self.server_state.tasks))


async def _let_in(listeners: Sequence[socket.socket]) -> None:
    """Has the loop accept everyone who waits; closing a listener resets those in its queue.

    The loop turns at least once, and not between the last look at the queues and the return.
    """
    give_up_at = asyncio.get_running_loop().time() + _QUEUE_S
    quiet_turns = 0
    while asyncio.get_running_loop().time() < give_up_at:
        if any(something_waits(listener.fileno()) for listener in listeners):
            quiet_turns = 0
        elif quiet_turns == _QUIET_TURNS:
            return
        else:
            quiet_turns += 1
        await asyncio.sleep(0)


class _EmbeddedServer(GatewayServer):
    """Leaves signals to the program that it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class _SoleServer(GatewayServer):
    """The only gateway of its process."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, ends at once at the second."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)


def bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket at this address, which does not listen yet.

    Args:
        host: An address of this machine.
        port: 0 takes a free one.
        shared: Whether other sockets of this user may be bound to the same port.

    Raises:
        StartError: The port is taken or not ours to use, or the host is not this machine's.
    """
    one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind((host, port))
    except OSError as error:
        one.close()
        why = {
            errno.EADDRINUSE: "is taken by another program; set DUET_PORT to a free one",
            errno.EACCES: "needs privileges; set DUET_PORT to 1024 or higher",
            errno.EADDRNOTAVAIL: "can't be used; DUET_HOST is no address of this machine",
            socket.EAI_NONAME: "can't be used; DUET_HOST is no address and no known name",
        }.get(error.errno or 0, f"can't be used: {error.strerror or error}")
        raise StartError(f"port {port} on {host} {why}") from None
    one.setblocking(False)
    return one


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything else is started.

    Raises:
        StartError: As `bound`.
    """
    listener = bound(host, port)
    listener.listen(_BACKLOG)
    return listener


def server_config(settings: Settings, app: GatewayApp) -> uvicorn.Config:
    """What uvicorn is told.

    Raises:
        StartError: The certificate or its key can't be used.
    """
    config = uvicorn.Config(
        app,
        ws=GatewayProtocol,
        http=Arrival,
        loop="auto",
        lifespan="on",
        backlog=_BACKLOG,
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        # Addresses are for logs alone, so no proxy's word is needed for them.
        proxy_headers=False,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_keep_alive=75,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError among them
        raise StartError(f"DUET_TLS_CERT, DUET_TLS_KEY: {error.strerror or error}") from None
    return config


def serve(settings: Settings, apps: Apps) -> None:
    """Runs `duet serve` until a signal ends it.

    Raises:
        StartError: It can't be started; the message is for a person.
    """
    if settings.workers > 1:
        _serve_with_workers(settings)
        return
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        survive_hangup()
        calm_collector()
        config = server_config(settings, GatewayApp(settings, apps, reloads=True))
        server = _SoleServer(config)
        server.run([listener])
    if server.fault is not None:
        raise server.fault


def _serve_with_workers(settings: Settings) -> None:
    def bind(port: int, shared: bool) -> socket.socket:
        return bound(settings.host, port, shared=shared)

    with contextlib.closing(Listeners(bind, settings.port, settings.workers)) as listeners:
        asyncio.run(Workers(settings, listeners).run())


def calm_collector() -> None:
    """Has Python's collector look less often, and never at what was made before the work began.

    That lives as long as the process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


def survive_hangup() -> None:
    """Until the gateway listens to SIGHUP, one must not end it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class RunningGateway:
    """A gateway inside this event loop.

    Attributes:
        port: The port that it listens on, chosen by the system when the settings said 0.
        parts: What it consists of.
    """

    __slots__ = ("host", "parts", "port")

    def __init__(self, host: str, port: int, parts: Parts) -> None:
        self.host = host
        self.port = port
        self.parts = parts

    @property
    def url(self) -> str:
        """Base of HTTP addresses."""
        return f"http://{self.host}:{self.port}"

    @property
    def ws_url(self) -> str:
        """Base of WebSocket addresses."""
        return f"ws://{self.host}:{self.port}"


@contextlib.asynccontextmanager
async def running_gateway(
    settings: Settings,
    apps: Apps,
    clock: Clock | None = None,
    routes: Sequence[BaseRoute] = (),
) -> AsyncIterator[RunningGateway]:
    """Runs a gateway in this event loop; leaving the block stops it cleanly.

    Args:
        settings: Port 0 takes a free one.
        apps: The first carries the invitations' channels.
        clock: Another one than the process's, for tests that shift it.
        routes: Further HTTP routes, such as the demo page's.

    Raises:
        StartError: It can't be started; the message is for a person.
    """
    listener = listen(settings.host, settings.port)
    port: int = listener.getsockname()[1]
    app = GatewayApp(settings.model_copy(update={"port": port}), apps, clock, routes)
    tasks = Tasks()
    with contextlib.closing(listener):
        server = _EmbeddedServer(server_config(settings, app))
        serving = tasks.spawn(server.serve([listener]), "gateway")
        await server.settled.wait()
        if server.fault is not None:
            await serving
            raise server.fault
        try:
            yield RunningGateway(settings.host, port, app.parts)
        finally:
            server.should_exit = True
            await serving
