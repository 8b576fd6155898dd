"""The audience processes of a run, spread over and spoken to as one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar, cast

from gateway.bench.audience import (
    Answer,
    Command,
    Count,
    Counting,
    Failed,
    Join,
    Joined,
    RoundOver,
    Tell,
    Told,
    decode_answer,
    encode_line,
)
from gateway.bench.errors import BenchError
from gateway.bench.target import import_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from gateway.bench.target import Target

_ANSWER_DEADLINE_S: Final = 30.0
_CONNECT_DEADLINE_S: Final = 30.0
_CONNECTING_AT_ONCE: Final = 64
_END_DEADLINE_S: Final = 5.0

A = TypeVar("A", Joined, Counting, RoundOver, Told)


class Member:
    """One audience process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        # Both are pipes: see `crowd_of`.
        self._commands = cast("asyncio.StreamWriter", process.stdin)
        self._answers = cast("asyncio.StreamReader", process.stdout)
        self._process = process
        self.cpu_at_count_s = 0.0

    def send(self, command: Command) -> None:
        """Tells the process what to do."""
        self._commands.write(encode_line(command))

    async def answer(self, kind: type[A], deadline_s: float = _ANSWER_DEADLINE_S) -> A:
        """The process's next answer of that kind; rounds that were given up are passed over.

        Raises:
            BenchError: It failed, ended or took too long.
        """
        while True:
            answer = await self._next(deadline_s)
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, Failed):
                raise BenchError(answer.message)

    async def _next(self, deadline_s: float) -> Answer:
        try:
            async with asyncio.timeout(deadline_s):
                line = await self._answers.readline()
        except TimeoutError:
            raise BenchError(f"the load generator is silent for {deadline_s:g} s") from None
        if not line:
            raise BenchError("a process of the load generator has ended")
        answer: Answer = decode_answer(line)
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
    """Many sockets in several processes, all on one channel."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.sockets = 0

    async def join(
        self, target: Target, channel: str, sockets: int, advance: Callable[[int], None]
    ) -> None:
        """Connects and subscribes all sockets; `advance` is told how many more there are.

        Raises:
            BenchError: The target refuses one or doesn't answer in time.
        """
        shares = [
            sockets // len(self._members) + (index < sockets % len(self._members))
            for index in range(len(self._members))
        ]
        async with asyncio.TaskGroup() as group:
            for member, share in zip(self._members, shares, strict=True):
                command = Join(
                    host=target.host,
                    port=target.port,
                    path=target.socket_path(),
                    subscribe_frame=target.subscribe_frame(channel),
                    sockets=share,
                    in_flight=_CONNECTING_AT_ONCE,
                    deadline_s=_CONNECT_DEADLINE_S,
                    dialect=target.dialect,
                )
                group.create_task(_joined(member, command, advance))
        self.sockets = sockets

    async def count(self, round_bytes: int) -> None:
        """Lets all begin to count from zero."""
        for member in self._members:
            member.send(Count(round_bytes))
        for member in self._members:
            member.cpu_at_count_s = (await member.answer(Counting)).cpu_s

    async def round_over(self, number: int, deadline_s: float) -> float | None:
        """When the last socket of all had everything of this round; None when some have not.

        Raises:
            BenchError: A process has ended.
        """
        at_s = 0.0
        try:
            async with asyncio.timeout(deadline_s):
                for member in self._members:
                    answer = await member.answer(RoundOver, deadline_s * 2)
                    while answer.number < number:
                        answer = await member.answer(RoundOver, deadline_s * 2)
                    at_s = max(at_s, answer.at_s)
        except TimeoutError:
            return None
        return at_s

    async def tell(self, expected_bytes: int) -> tuple[list[Told], list[float]]:
        """What each process counted, and the CPU seconds that each spent on it."""
        told: list[Told] = []
        cpu_s: list[float] = []
        for member in self._members:
            member.send(Tell(expected_bytes))
        for member in self._members:
            answer = await member.answer(Told)
            told.append(answer)
            cpu_s.append(answer.cpu_s - member.cpu_at_count_s)
        return told, cpu_s


async def _joined(member: Member, command: Join, advance: Callable[[int], None]) -> None:
    member.send(command)
    joined = 0
    while joined < command.sockets:
        answer = await member.answer(Joined)
        advance(answer.sockets - joined)
        joined = answer.sockets


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
                # Ctrl-C is for the process that started it, which then ends this one.
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": import_path()},
            )
            members.append(Member(process))
        for member in members:
            await member.answer(Joined)
        yield Crowd(members)
    finally:
        for member in members:
            await member.close()
