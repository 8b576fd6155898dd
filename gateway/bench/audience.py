"""A process full of listening sockets that counts what they receive, told what to do in lines.

Run as `python -m gateway.bench.audience`. It decodes nothing: all events of a round are known and
equally long, so bytes are counted, and a round is over when the last byte of it has arrived. The
clock is monotonic and one for all processes of a machine.

Commands come as JSON lines on standard input (`Command`), answers go to standard output
(`Answer`). The process ends when its standard input does, so it never outlives who started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from typing import Final

import msgspec

from gateway.bench.errors import BenchError
from gateway.bench.loop import run
from gateway.bench.peers.dialects import DIALECTS
from gateway.bench.wire import open_socket

_PROGRESS_STEP: Final = 50
_LINE_BYTES: Final = 65_536


class Join(msgspec.Struct, frozen=True, tag=True):
    """Open `sockets` connections, `in_flight` at a time, and subscribe each; brings `Joined`s.

    Attributes:
        dialect: What the server speaks, a key of `DIALECTS`.
    """

    host: str
    port: int
    path: str
    subscribe_frame: bytes
    sockets: int
    in_flight: int
    deadline_s: float
    dialect: str


class Count(msgspec.Struct, frozen=True, tag=True):
    """Count from zero, in rounds of `round_bytes` per socket; answered by `Counting`."""

    round_bytes: int


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Tell what came since `Count`, of `expected_bytes` per socket; answered by `Told`."""

    expected_bytes: int


class Joined(msgspec.Struct, frozen=True, tag=True):
    """So many sockets are subscribed by now; 0, unasked, once the process is there."""

    sockets: int


class Counting(msgspec.Struct, frozen=True, tag=True):
    """Counting has begun; `cpu_s` is this process's CPU time so far."""

    cpu_s: float


class RoundOver(msgspec.Struct, frozen=True, tag=True):
    """The last byte of the round, numbered from 1, arrived at that monotonic time."""

    number: int
    at_s: float


class Told(msgspec.Struct, frozen=True, tag=True):
    """What all sockets together received of what was expected.

    Attributes:
        received_bytes: Counted up to what was expected, socket by socket, so that what one socket
            got twice doesn't hide what another lost.
        surplus_bytes: What came beyond that.
        incomplete_sockets: Those that did not get all, closed ones among them.
    """

    cpu_s: float
    received_bytes: int
    surplus_bytes: int
    incomplete_sockets: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why this process can't go on."""

    message: str


Command = Join | Count | Tell
Answer = Joined | Counting | RoundOver | Told | Failed

_encode = msgspec.json.Encoder().encode
_decode_command = msgspec.json.Decoder(Command).decode
decode_answer = msgspec.json.Decoder(Answer).decode


def encode_line(message: Command | Answer) -> bytes:
    """One command or answer as it goes through the pipe."""
    return _encode(message) + b"\n"


def _tell(answer: Answer) -> None:
    os.write(sys.stdout.fileno(), encode_line(answer))


class Audience:
    """All sockets of this process, and the count over them."""

    __slots__ = ("listeners", "round_bytes", "rounds", "target_bytes", "total_bytes")

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.total_bytes = 0
        self.round_bytes = 0
        self.target_bytes = sys.maxsize
        self.rounds = 0

    def begin(self, round_bytes: int) -> None:
        """Counts from zero."""
        for listener in self.listeners:
            listener.received_bytes = 0
        self.total_bytes = 0
        self.rounds = 0
        self.round_bytes = self.target_bytes = round_bytes * len(self.listeners)

    def end_round(self) -> None:
        """Reports the rounds whose last byte has come."""
        at_s = time.monotonic()
        while self.total_bytes >= self.target_bytes:
            self.rounds += 1
            self.target_bytes += self.round_bytes
            _tell(RoundOver(self.rounds, at_s))

    def result(self, expected_bytes: int) -> Told:
        """What came, compared socket by socket with what had to come."""
        counts = [listener.received_bytes for listener in self.listeners]
        received = sum(min(count, expected_bytes) for count in counts)
        return Told(
            cpu_s=time.process_time(),
            received_bytes=received,
            surplus_bytes=sum(counts) - received,
            incomplete_sockets=sum(count < expected_bytes for count in counts),
        )


class Listener(asyncio.Protocol):
    """A subscribed socket: what comes is counted and dropped."""

    __slots__ = ("audience", "received_bytes")

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        self.received_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Counts."""
        count = len(data)
        self.received_bytes += count
        audience = self.audience
        audience.total_bytes += count
        if audience.total_bytes >= audience.target_bytes:
            audience.end_round()


async def _join(audience: Audience, command: Join) -> None:
    turn = asyncio.Semaphore(command.in_flight)

    async def join_one() -> None:
        async with turn:
            socket = await open_socket(
                command.host,
                command.port,
                command.path,
                command.deadline_s,
                DIALECTS[command.dialect],
            )
            await socket.subscribe(command.subscribe_frame, command.deadline_s)
            listener = Listener(audience)
            socket.transport.set_protocol(listener)
            audience.listeners.append(listener)
            count = len(audience.listeners)
            if count % _PROGRESS_STEP == 0 or count == command.sockets:
                _tell(Joined(count))

    async with asyncio.TaskGroup() as group:
        for _ in range(command.sockets):
            group.create_task(join_one())


async def _obey(commands: asyncio.StreamReader) -> None:
    audience = Audience()
    _tell(Joined(0))
    while line := await commands.readline():
        match _decode_command(line):
            case Join() as command:
                await _join(audience, command)
            case Count(round_bytes):
                audience.begin(round_bytes)
                _tell(Counting(time.process_time()))
            case Tell(expected_bytes):
                _tell(audience.result(expected_bytes))


async def _run() -> None:
    commands = asyncio.StreamReader(limit=_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    try:
        await _obey(commands)
    except* BenchError as errors:
        _tell(Failed(str(_first(errors))))


def _first(errors: BaseExceptionGroup[BenchError]) -> BenchError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def main() -> None:
    """Runs until standard input ends."""
    with contextlib.suppress(BrokenPipeError):
        run(_run())


if __name__ == "__main__":
    main()
