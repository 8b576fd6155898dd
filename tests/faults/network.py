"""A network of servers on loopback that can be cut: silence in both directions, and no reset.

Each server is known to the others and to its clients by the address of a proxy. Who is at the other
end of a connection Linux tells (`/proc`), so a cut parts two processes whoever called the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from persistence.embedded_mongod import Mongod, ReplicaSet
from persistence.embedded_process import LOOPBACK, START_DEADLINE_S
from tests.faults.trouble import takes_writes

if TYPE_CHECKING:
    from persistence.embedded_process import ServerGuard

SOCKETS = Path("/proc/net/tcp")
_CHUNK_BYTES = 65_536
_SETTINGS = {
    # So long a primary that hears of nobody believes that it leads.
    "electionTimeoutMillis": 5_000,
    "catchUpTimeoutMillis": 0,
    "heartbeatIntervalMillis": 250,
    # How long a member waits for an answer that a cut has swallowed.
    "heartbeatTimeoutSecs": 1,
}


class Member(Mongod):
    """A mongod that everybody reaches through its proxy.

    Attributes:
        proxy: The address of the proxy.
        behind: Where it really listens.
    """

    proxy = ""
    behind = ""

    def start(self, deadline_s: float = START_DEADLINE_S) -> None:
        """See `Mongod`."""
        super().start(deadline_s)
        self.behind, self.host = self.host, self.proxy


class Network:
    """Three members of a replica set and the lines between them and everybody else."""

    def __init__(self, guard: ServerGuard) -> None:
        self.members = [Member(guard, name=f"networked-{number}") for number in range(3)]
        self.servers = ReplicaSet(self.members)
        self._cut_off: Mongod | None = None
        self._is_cut_from_clients = False
        self._whole = asyncio.Event()
        self._lines: set[asyncio.Task[None]] = set()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._whole.set()
        for member in self.members:
            server = await asyncio.start_server(partial(self._accept, member), LOOPBACK, 0)
            self._stack.callback(server.close)
            member.proxy = f"{LOOPBACK}:{server.sockets[0].getsockname()[1]}"
        await asyncio.to_thread(self.servers.start, settings=_SETTINGS)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def primary(self) -> Member:
        """The member that leads, when nobody has been cut off yet."""
        return next(member for member in self.members if takes_writes(member))

    def cut_off(self, member: Mongod, *, from_clients: bool) -> None:
        """Parts a member from the others, and from its clients too."""
        self._cut_off, self._is_cut_from_clients = member, from_clients
        self._whole.clear()

    def mend(self) -> None:
        """Lets everything pass again, what was sent in between first."""
        self._cut_off = None
        self._whole.set()

    async def _passage(self, source: Mongod | None, target: Mongod) -> None:
        """Waits until something may pass; the source is none when it is a client's."""
        while self._is_cut(source, target):
            await self._whole.wait()

    def _is_cut(self, source: Mongod | None, target: Mongod) -> bool:
        if self._cut_off is None:
            return False
        if source is None:
            return self._is_cut_from_clients and target is self._cut_off
        return (source is self._cut_off) != (target is self._cut_off)

    def _accept(
        self, target: Member, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        line = asyncio.create_task(self._connect(target, reader, writer))
        self._lines.add(line)
        line.add_done_callback(self._lines.discard)
        # One that is cancelled before it has begun closes nothing itself.
        line.add_done_callback(lambda _: writer.close())

    async def _connect(
        self, target: Member, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carries one connection until either side ends it."""
        port = writer.get_extra_info("peername")[1]
        source = next((one for one in self.members if _connects_from(one, port)), None)
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await self._passage(source, target)
            far_reader, far_writer = await asyncio.open_connection(*_address(target.behind))
            with contextlib.closing(far_writer):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._carry(source, target, reader, far_writer))
                    tasks.create_task(self._carry(source, target, far_reader, writer))

    async def _carry(
        self,
        source: Mongod | None,
        target: Mongod,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._passage(source, target)
                writer.write(data)
                await writer.drain()
            # Nor does an end pass a cut.
            await self._passage(source, target)


def _address(host: str) -> tuple[str, int]:
    name, _, port = host.rpartition(":")
    return name, int(port)


def _connects_from(member: Member, port: int) -> bool:
    """Whether it is this process that connects from a port of loopback."""
    inodes = {
        f"socket:[{fields[9]}]"
        for fields in map(str.split, SOCKETS.read_text().splitlines()[1:])
        if fields[1].endswith(f":{port:04X}")
    }
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for link in Path(f"/proc/{member.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(link.readlink()) in inodes:
                    return True
    return False
