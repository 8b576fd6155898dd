"""The audience processes of a run, spread over and spoken to as one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar, cast

from gateway.bench import orders
from gateway.bench.errors import BenchError
from gateway.bench.peers.dialects import DIALECTS
from gateway.bench.target import import_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from gateway.bench.target import Target

_ANSWER_DEADLINE_S: Final = 30.0
_CONNECT_DEADLINE_S: Final = 30.0
_CONNECTING_AT_ONCE: Final = 64
_END_DEADLINE_S: Final = 5.0
# An answer holds a latency of every socket or event.
_LONGEST_ANSWER_BYTES: Final = 256 * 1024 * 1024

A = TypeVar("A", bound=orders.Answer)


@dataclass(frozen=True, slots=True)
class Entry:
    """How sockets join.

    Attributes:
        in_flight: On their way at the same time, over all processes.
        deadline_s: How long one attempt may take.
        retry_s: How long a socket waits before its next attempt; None: a failure ends the run.
        secret: What private channels are signed with.
    """

    in_flight: int = _CONNECTING_AT_ONCE
    deadline_s: float = _CONNECT_DEADLINE_S
    retry_s: float | None = None
    secret: str = ""


_AT_EASE: Final = Entry()


class Member:
    """One audience process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        # Both are pipes: see `crowd_of`.
        self._commands = cast("asyncio.StreamWriter", process.stdin)
        self._answers = cast("asyncio.StreamReader", process.stdout)
        self._process = process
        self.cpu_at_count_s = 0.0

    def send(self, command: orders.Command) -> None:
        """Tells the process what to do."""
        self._commands.write(orders.encode_line(command))

    async def answer(self, kind: type[A], deadline_s: float = _ANSWER_DEADLINE_S) -> A:
        """The process's next answer of that kind; rounds that were given up are passed over.

        Raises:
            BenchError: It failed, ended or took too long.
        """
        while True:
            answer = await self.next(deadline_s)
            if isinstance(answer, kind):
                return answer

    async def next(self, deadline_s: float = _ANSWER_DEADLINE_S) -> orders.Answer:
        """The process's next answer of any kind.

        Raises:
            BenchError: It failed, ended or took too long.
        """
        try:
            async with asyncio.timeout(deadline_s):
                line = await self._answers.readline()
        except TimeoutError:
            raise BenchError(f"the load generator is silent for {deadline_s:g} s") from None
        if not line:
            raise BenchError("a process of the load generator has ended")
        answer: orders.Answer = orders.decode_answer(line)
        if isinstance(answer, orders.Failed):
            raise BenchError(answer.message)
        return answer

    async def close(self) -> None:
        """Ends the process: its standard input's end is the sign."""
        self._commands.close()
        try:
            async with asyncio.timeout(_END_DEADLINE_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Crowd:
    """Many sockets in several processes, each on one channel."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.sockets = 0

    async def join(
        self, target: Target, channel: str, sockets: int, advance: Callable[[float], None]
    ) -> None:
        """Connects and subscribes all sockets to one channel; see `join_rooms`.

        Raises:
            BenchError: The target refuses one or doesn't answer in time.
        """
        room = orders.Room(channel, target.subscribe_frame(channel), sockets)
        await self.join_rooms(target, [room], advance)

    async def join_rooms(
        self,
        target: Target,
        rooms: Sequence[orders.Room],
        advance: Callable[[float], None],
        entry: Entry = _AT_EASE,
    ) -> list[orders.Within]:
        """Connects and subscribes all sockets; `advance` is told how many more there are.

        Raises:
            BenchError: The target refuses one or doesn't answer in time.
        """
        members = len(self._members)
        joining = []
        async with asyncio.TaskGroup() as group:
            for index, member in enumerate(self._members):
                command = orders.Join(
                    host=target.host,
                    port=target.port,
                    path=target.socket_path(),
                    rooms=share_of(rooms, index, members),
                    manners=DIALECTS[target.dialect],
                    in_flight=max(1, entry.in_flight // members),
                    deadline_s=entry.deadline_s,
                    retry_s=entry.retry_s,
                    secret=entry.secret,
                )
                joining.append(group.create_task(_joined(member, command, advance)))
        self.sockets = sum(room.sockets for room in rooms)
        return [task.result() for task in joining]

    async def leave(self) -> float:
        """Cuts every socket; returns when the first process had done it."""
        for member in self._members:
            member.send(orders.Leave())
        self.sockets = 0
        return min([(await member.answer(orders.Left)).at_s for member in self._members])

    async def count(self, round_bytes: int, event_bytes: int = 0, stamp: bytes = b"") -> None:
        """Lets all begin to count from zero; times each event when its length is given."""
        await self._begin(orders.Count(round_bytes, event_bytes, stamp))

    async def keep(self, every_s: float) -> None:
        """Lets every socket ping as a silent client does."""
        await self._begin(orders.Keep(every_s))

    async def _begin(self, command: orders.Count | orders.Keep) -> None:
        for member in self._members:
            member.send(command)
        for member in self._members:
            member.cpu_at_count_s = (await member.answer(orders.Counting)).cpu_s

    async def round_over(self, number: int, deadline_s: float) -> float | None:
        """When the last socket of all had everything of this round; None when some have not.

        Raises:
            BenchError: A process has ended.
        """
        at_s = 0.0
        try:
            async with asyncio.timeout(deadline_s):
                for member in self._members:
                    answer = await member.answer(orders.RoundOver, deadline_s * 2)
                    while answer.number < number:
                        answer = await member.answer(orders.RoundOver, deadline_s * 2)
                    at_s = max(at_s, answer.at_s)
        except TimeoutError:
            return None
        return at_s

    async def tell(self, expected_bytes: int) -> tuple[list[orders.Told], list[float]]:
        """What each process counted, and the CPU seconds that each spent on it."""
        for member in self._members:
            member.send(orders.Tell(expected_bytes))
        told = [await member.answer(orders.Told) for member in self._members]
        return told, self._spent(told)

    async def kept(self) -> tuple[list[orders.Awake], list[float]]:
        """Ends `keep`: what came of it, and the CPU seconds that each process spent on it."""
        for member in self._members:
            member.send(orders.Kept())
        awake = [await member.answer(orders.Awake) for member in self._members]
        return awake, self._spent(awake)

    def _spent(self, answers: Sequence[orders.Told | orders.Awake]) -> list[float]:
        return [
            answer.cpu_s - member.cpu_at_count_s
            for member, answer in zip(self._members, answers, strict=True)
        ]


def share_of(rooms: Sequence[orders.Room], index: int, members: int) -> tuple[orders.Room, ...]:
    """What one of the processes gets of each room, when all sockets are dealt out in turn."""
    shares = []
    dealt = 0
    for room in rooms:
        before = (dealt + members - 1 - index) // members
        dealt += room.sockets
        sockets = (dealt + members - 1 - index) // members - before
        if sockets:
            shares.append(orders.Room(room.channel, room.subscribe_frame, sockets))
    return tuple(shares)


async def _joined(
    member: Member, command: orders.Join, advance: Callable[[float], None]
) -> orders.Within:
    member.send(command)
    joined = 0
    silence_s = _ANSWER_DEADLINE_S + command.deadline_s + (command.retry_s or 0)
    while True:
        match await member.next(silence_s):
            case orders.Joined(sockets):
                advance(sockets - joined)
                joined = sockets
            case orders.Within() as within:
                return within


@asynccontextmanager
async def crowd_of(processes: int) -> AsyncIterator[Crowd]:
    """A crowd of that many processes, which end with the block."""
    members: list[Member] = []
    try:
        for _ in range(processes):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway.bench.audience",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LONGEST_ANSWER_BYTES,
                # Ctrl-C is for the process that started it, which then ends this one.
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": import_path()},
            )
            members.append(Member(process))
        for member in members:
            await member.answer(orders.Joined)
        yield Crowd(members)
    finally:
        for member in members:
            await member.close()
