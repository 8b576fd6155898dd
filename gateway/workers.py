"""Several gateway processes behind one port, and the process that keeps them running.

Each worker is an ordinary gateway (`gateway.worker`) with a listener of its own on the same port.
The listeners are bound here and handed down, so they outlive their worker: what connects while a
worker is being replaced waits in the listener's queue instead of being refused.

- **Spread.** Linux spreads connections over the listeners of a port by a hash of both addresses.
  Other systems don't; there all workers accept from one listener.
- **A worker that dies** is replaced at once, one that dies again after growing pauses. Before a
  pause its listener is replaced as well: one that nobody listens on gets no connections.
- **A worker that drains by itself**, because it was sent SIGTERM, is replaced when it begins to.
- **A worker that can't start** ends everything when no other one serves.
- **No health checks.** A worker that is busy for seconds holds sockets that are worth more than
  its punctuality, and nothing in it waits without a deadline.

Workers end when this process does, however that ends: they notice that their line is cut.

Source: decisions 61 to 63.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from itertools import count
from typing import TYPE_CHECKING, Final

import structlog

from gateway.tasks import Tasks
from gateway.wiring import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.settings import Settings

log = structlog.get_logger(__name__)

# What a worker says on its line, one word or sentence a line.
SERVING: Final = "serving"
DRAINING: Final = "draining"

_PAUSE_LEAST_S: Final = 0.5
_PAUSE_MOST_S: Final = 30.0
# A worker that has served this long has not failed, whatever it dies of.
_PROVEN_S: Final = 60.0


class Listeners:
    """The bound sockets of one port, one for each worker where the system spreads connections."""

    def __init__(self, bind: Callable[[int, bool], socket.socket], port: int, number: int) -> None:
        """Binds them.

        Args:
            bind: Makes a bound socket for a port, shared with others or not.
            port: 0 takes a free one.
            number: How many workers there are.

        Raises:
            StartError: From `bind`.
        """
        self._bind = bind
        # Whoever shares a port is never told that others use it; so first alone.
        alone = bind(port, False)
        self.port: int = alone.getsockname()[1]
        self._spread = sys.platform == "linux"
        if self._spread:
            alone.close()
            self._sockets = [bind(self.port, True) for _ in range(number)]
        else:
            self._sockets = [alone] * number

    def __getitem__(self, place: int) -> socket.socket:
        """The listener of the worker at this place."""
        return self._sockets[place]

    def renew(self, place: int) -> None:
        """Puts a socket that nobody listens on in the place of one that has lost its worker.

        When there is none to be had, who connects meanwhile waits for the successor.
        """
        if self._spread:
            try:
                new = self._bind(self.port, True)
            except (OSError, StartError) as error:
                log.warning("listener_not_renewed", why=str(error))
                return
            self._sockets[place].close()
            self._sockets[place] = new

    def close(self) -> None:
        """Lets go of all of them; a worker's own copy stays."""
        for one in self._sockets:
            one.close()


class _Worker:
    """One process.

    Attributes:
        number: The lowest that no other living worker has; part of its node's name.
        served_at: When it began to serve, in the loop's time.
        fault: Why it could not start.
        leaves: Whether it has begun to drain.
    """

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.number = number
        self.process = process
        self._line, self._our_end = line
        self.served_at: float | None = None
        self.fault: str | None = None
        self.leaves = False
        self._hangup_due = False

    def kill(self, number: int) -> None:
        """Sends it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def hang_up(self) -> None:
        """Sends it SIGHUP, at the latest when it serves: before, that would end it."""
        self._hangup_due = self.served_at is None
        if not self._hangup_due:
            self.kill(signal.SIGHUP)

    async def listen(self, now: Callable[[], float]) -> None:
        """Follows what it says until it drains or has ended."""
        async for line in self._line:
            match line.decode().strip():
                case said if said == SERVING:
                    self.served_at = now()
                    log.info("worker_serves", worker=self.number, pid=self.process.pid)
                    if self._hangup_due:
                        self.hang_up()
                case said if said == DRAINING:
                    self.leaves = True
                    return
                case said:
                    self.fault = said
        await self.ended()

    async def ended(self) -> None:
        """Waits for its end."""
        await self.process.wait()
        self._our_end.close()


class Workers:
    """Keeps `settings.workers` processes running until a signal ends them."""

    def __init__(self, settings: Settings, listeners: Listeners) -> None:
        self._settings = settings
        self._listeners = listeners
        self._living: set[_Worker] = set()
        # Of those that live and those that are being started.
        self._numbers: set[int] = set()
        self._tasks = Tasks()
        self._why: StartError | None = None

    async def run(self) -> None:
        """Runs them.

        Raises:
            StartError: One could not start while no other one served.
        """
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        with tempfile.TemporaryDirectory(prefix="duet-") as self._folder:
            places = [
                self._tasks.spawn(self._keep(place), f"worker place {place}")
                for place in range(self._settings.workers)
            ]
            await asyncio.wait(places)
            leaving = [self._tasks.spawn(one.ended(), "goodbye") for one in self._living]
            if leaving:
                await asyncio.wait(leaving)
        if self._why is not None:
            raise self._why

    def _stop(self) -> None:
        """Drains all; a second signal kills them."""
        number = signal.SIGKILL if self._stopping.is_set() else signal.SIGTERM
        self._stopping.set()
        # Whoever comes now is refused and goes elsewhere, instead of waiting for nobody.
        self._listeners.close()
        for worker in self._living:
            worker.kill(number)

    def _hang_up(self) -> None:
        for worker in self._living:
            worker.hang_up()

    async def _keep(self, place: int) -> None:
        """Has a worker at one place, again and again."""
        pause_s = 0.0
        while not self._stopping.is_set():
            try:
                worker = await self._start(place)
            except OSError as error:
                self._failed_to_start(f"no worker can be started: {error}")
                log.error("worker_not_started", why=str(error))  # noqa: TRY400  no fault of ours
                pause_s = _PAUSE_MOST_S
            else:
                await worker.listen(self._now)
                pause_s = self._after(worker, pause_s)
            if pause_s > 0:
                await self._pause(place, pause_s)
            pause_s = min(max(_PAUSE_LEAST_S, pause_s * 2), _PAUSE_MOST_S)

    def _after(self, worker: _Worker, pause_s: float) -> float:
        """Notes that a worker has gone; returns the pause before its successor's start."""
        if worker.leaves:
            self._tasks.spawn(self._see_off(worker), "worker leaves")
        else:
            self._forget(worker)
        if self._stopping.is_set():
            return 0.0
        code = worker.process.returncode
        if worker.served_at is None:
            self._failed_to_start(worker.fault or f"a worker ended with {code}; its log says why")
        elif worker.leaves or self._now() - worker.served_at >= _PROVEN_S:
            pause_s = 0.0
        log.warning(
            "worker_replaced",
            worker=worker.number,
            exit_code=code,
            why=worker.fault,
            pause_s=pause_s,
        )
        return pause_s

    async def _pause(self, place: int, pause_s: float) -> None:
        if self._stopping.is_set():
            return
        self._listeners.renew(place)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()

    async def _see_off(self, worker: _Worker) -> None:
        await worker.ended()
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        self._living.discard(worker)
        self._numbers.discard(worker.number)

    def _failed_to_start(self, why: str) -> None:
        """Ends everything when no other worker serves."""
        serving = any(one.served_at is not None and not one.leaves for one in self._living)
        if serving or self._stopping.is_set():
            return
        self._why = self._why or StartError(why)
        self._stop()

    async def _start(self, place: int) -> _Worker:
        number = next(one for one in count(1) if one not in self._numbers)
        # Before anything is waited for, or two would take it.
        self._numbers.add(number)
        try:
            worker = await self._spawn(place, number)
        except OSError:
            self._numbers.discard(number)
            raise
        self._living.add(worker)
        if self._stopping.is_set():
            # Told so while it was being started.
            worker.kill(signal.SIGTERM)
        return worker

    async def _spawn(self, place: int, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        listener = self._listeners[place]
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    # Not from the working directory: no stray file may take a module's place.
                    "-P",
                    "-m",
                    "gateway.worker",
                    str(theirs.fileno()),
                    str(listener.fileno()),
                    self._folder,
                    str(number),
                    pass_fds=(theirs.fileno(), listener.fileno()),
                    env=self._environment(number),
                )
        except OSError:
            ours.close()
            raise
        return _Worker(number, process, await asyncio.open_connection(sock=ours))

    def _environment(self, number: int) -> dict[str, str]:
        """The environment in which the worker is a gateway of one process, with its own name."""
        base = self._settings.node_name or f"{socket.gethostname()}:{self._listeners.port}"
        own = {
            "DUET_WORKERS": "1",
            "DUET_PORT": str(self._listeners.port),
            "DUET_NODE_NAME": f"{base[:120]}:{number}",
        }
        # Settings are read in any case.
        kept = {name: text for name, text in os.environ.items() if name.upper() not in own}
        return kept | own
