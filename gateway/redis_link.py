"""Connections to Redis that never block anyone: one parser, pipelined, supervised for ever.

`RedisLink` is one connection: an `asyncio.Protocol` around hiredis' parser. `Supervisor` keeps one
link standing, with growing, jittered pauses between attempts. `RedisCommands` runs commands over
one link: those of one loop turn leave in one write, answers come back in order, and nobody waits
longer than the timeout. There is no pool to run dry and no task per command.

Source: FINDINGS (Redis), DESIGN 4.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import hiredis
import structlog
from redis.asyncio.connection import SSLConnection, parse_url

from gateway.broker import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.tasks import Tasks

log = structlog.get_logger(__name__)

# What hiredis makes of an answer: bytes, int, None, list, or a ReplyError as a value.
Answer: TypeAlias = Any
Argument: TypeAlias = bytes | str | int

_RETRY_LEAST_S: Final = 0.05
_RETRY_MOST_S: Final = 2.0
# Commands without an answer; a frozen server must not make the queue grow for ever.
_WAITING_MAX: Final = 20_000


def packed(*arguments: Argument) -> bytes:
    """One command as Redis reads it."""
    # The stub asks for a tuple of exactly one argument.
    command: bytes = hiredis.pack_command(arguments)  # type: ignore[arg-type]
    return command


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is and how to get in.

    Attributes:
        path: Of a unix socket; then host and port mean nothing.
        greeting: The packed commands that open a connection (AUTH, SELECT), and their number.
    """

    host: str
    port: int
    path: str | None
    tls: ssl.SSLContext | None
    greeting: tuple[bytes, ...]

    @classmethod
    def of(cls, url: str) -> RedisAddress:
        """The address that a `redis://`, `rediss://` or `unix://` URL means, as redis-py reads it.

        Raises:
            ValueError: It is no such URL.
        """
        # Untyped there: host, port, username, password, db, path, ssl_* options.
        parts: dict[str, Any] = dict(parse_url(url))
        greeting = []
        if parts.get("password") is not None:
            user = [parts["username"]] if parts.get("username") else []
            greeting.append(packed("AUTH", *user, parts["password"]))
        if parts.get("db"):
            greeting.append(packed("SELECT", parts["db"]))
        tls = _tls_context(parts) if parts.get("connection_class") is SSLConnection else None
        return cls(
            host=parts.get("host", "localhost"),
            port=parts.get("port", 6379),
            path=parts.get("path"),
            tls=tls,
            greeting=tuple(greeting),
        )


def _tls_context(parts: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(
        cafile=parts.get("ssl_ca_certs"), capath=parts.get("ssl_ca_path")
    )
    if parts.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif str(parts.get("ssl_check_hostname", True)).lower() in {"false", "0", "no"}:
        context.check_hostname = False
    if parts.get("ssl_certfile"):
        context.load_cert_chain(parts["ssl_certfile"], parts.get("ssl_keyfile"))
    return context


class LinkRefused(Exception):
    """Redis answered the greeting with an error: wrong password, no such database, loading."""


class RedisLink(asyncio.Protocol):
    """One connection; hands every answer to `on_answer`, in order.

    Attributes:
        lost: Done when the connection has ended, whatever ended it.
    """

    __slots__ = ("_buffer", "_loop", "_on_answer", "_reader", "_transport", "lost")

    def __init__(self, on_answer: Callable[[Answer], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._on_answer = on_answer
        self._buffer: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(
        cls, address: RedisAddress, on_answer: Callable[[Answer], None], timeout_s: float
    ) -> RedisLink:
        """Connects and logs in.

        Raises:
            OSError, TimeoutError: It can't be reached.
            LinkRefused: It can, but won't have us.
        """
        loop = asyncio.get_running_loop()
        link = cls(on_answer)
        try:
            async with asyncio.timeout(timeout_s):
                if address.path is not None:
                    await loop.create_unix_connection(lambda: link, address.path)
                else:
                    await loop.create_connection(
                        lambda: link, address.host, address.port, ssl=address.tls
                    )
                await link._greet(address.greeting)
        except BaseException:
            link.abort()
            raise
        return link

    async def _greet(self, greeting: Sequence[bytes]) -> None:
        on_answer = self._on_answer
        # PING tells a server that still loads its data, which refuses it, from one that serves.
        for command in (*greeting, packed("PING")):
            answered: asyncio.Future[Answer] = self._loop.create_future()
            self._on_answer = answered.set_result
            self.send(command)
            await asyncio.wait([answered, self.lost], return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise ConnectionError("Redis closed the connection")
            if isinstance(answered.result(), hiredis.ReplyError):
                raise LinkRefused(str(answered.result()))
        self._on_answer = on_answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whoever keeps the link."""
        del exc
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Hands on every complete answer."""
        reader = self._reader
        reader.feed(data)
        try:
            # False is what hiredis returns when no answer is complete; RESP2 has no booleans.
            while (answer := reader.gets()) is not False:
                self._on_answer(answer)
        except hiredis.ProtocolError as error:
            log.error("redis_speaks_nonsense", error=str(error))  # noqa: TRY400
            self.abort()

    def send(self, command: bytes) -> None:
        """Queues packed commands; those of one loop turn leave in one write."""
        if not self._buffer:
            self._loop.call_soon(self._flush)
        self._buffer.append(command)

    def _flush(self) -> None:
        data = b"".join(self._buffer)
        self._buffer.clear()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        """Ends the connection at once; `lost` follows."""
        if self._transport is not None:
            self._transport.abort()
        elif not self.lost.done():
            self.lost.set_result(None)


class Supervisor:
    """Keeps one link standing until it is stopped.

    Attributes:
        link: The link that stands, None while there is none.
    """

    __slots__ = (
        "_address",
        "_on_answer",
        "_on_down",
        "_on_up",
        "_purpose",
        "_timeout_s",
        "first_try",
        "link",
    )

    def __init__(
        self,
        address: RedisAddress,
        purpose: str,
        timeout_s: float,
        on_answer: Callable[[Answer], None],
        on_up: Callable[[RedisLink], None],
        on_down: Callable[[], None],
    ) -> None:
        self._address = address
        self._purpose = purpose
        self._timeout_s = timeout_s
        self._on_answer = on_answer
        self._on_up = on_up
        self._on_down = on_down
        self.link: RedisLink | None = None
        # Set after the first attempt, well or not.
        self.first_try = asyncio.Event()

    async def run(self) -> None:
        """Connects, waits for the end, connects again; ends only by being cancelled."""
        pause_s = _RETRY_LEAST_S
        try:
            while True:
                if await self._connect():
                    pause_s = _RETRY_LEAST_S
                    await self._until_lost()
                self.first_try.set()
                # Jitter, so that a cluster of gateways doesn't return in one beat.
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
                pause_s = min(pause_s * 2, _RETRY_MOST_S)
        finally:
            if self.link is not None:
                self.link.abort()
                self._forget()

    async def _connect(self) -> bool:
        try:
            link = await RedisLink.open(self._address, self._on_answer, self._timeout_s)
        except (OSError, TimeoutError, LinkRefused) as error:
            log.warning("redis_unreachable", purpose=self._purpose, error=str(error) or "timeout")
            return False
        self.link = link
        log.info("redis_connected", purpose=self._purpose)
        self._on_up(link)
        self.first_try.set()
        return True

    async def _until_lost(self) -> None:
        assert self.link is not None  # noqa: S101  set by _connect
        await self.link.lost
        log.warning("redis_lost", purpose=self._purpose)
        self._forget()

    def _forget(self) -> None:
        self.link = None
        self._on_down()

    def abort(self) -> None:
        """Ends the link that stands; a new one is made."""
        if self.link is not None:
            self.link.abort()


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of `gateway/lua`, whose KEYS and ARGV are commented there."""

    name: str
    source: str
    digest: str
    key_count: int

    @classmethod
    def load(cls, name: str, key_count: int) -> Script:
        """The script in `gateway/lua/{name}.lua`."""
        source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")
        # Redis names scripts by SHA-1; nothing secret hangs on it.
        digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        return cls(name, source, digest, key_count)

    def call(self, *arguments: Argument) -> bytes:
        """The packed call by digest."""
        return packed("EVALSHA", self.digest, self.key_count, *arguments)


class _Batch:
    """Commands that were sent together, and their answers so far."""

    __slots__ = ("answers", "count", "done")

    def __init__(self, count: int, done: asyncio.Future[list[Answer]] | None) -> None:
        self.count = count
        self.answers: list[Answer] = []
        self.done = done


class RedisCommands:
    """Runs commands over one supervised link."""

    __slots__ = ("_scripts", "_supervisor", "_timeout_s", "_waiting")

    def __init__(self, address: RedisAddress, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._scripts: list[Script] = []
        self._waiting: deque[_Batch] = deque()
        self._supervisor = Supervisor(
            address, "commands", timeout_s, self._on_answer, self._on_up, self._on_down
        )

    def use_scripts(self, *scripts: Script) -> None:
        """Loads these scripts now and on every new link, before anything else is sent there.

        Calls then take effect in the order they are made: none has to be repeated because its
        script was missing, after others that were made later.
        """
        self._scripts += scripts
        for script in scripts:
            self.post(packed("SCRIPT", "LOAD", script.source))

    def _on_up(self, _link: RedisLink) -> None:
        for script in self._scripts:
            self.post(packed("SCRIPT", "LOAD", script.source))

    def post(self, command: bytes) -> None:
        """Sends one packed command without waiting for its answer; does nothing without a link."""
        link = self._supervisor.link
        if link is not None:
            self._waiting.append(_Batch(1, None))
            link.send(command)

    async def start(self, tasks: Tasks) -> None:
        """Begins to connect and waits for the outcome of the first attempt."""
        tasks.spawn(self._supervisor.run(), "redis_commands")
        await self._supervisor.first_try.wait()

    @property
    def connected(self) -> bool:
        """Whether there is a link; a frozen server still has one."""
        return self._supervisor.link is not None

    def abort(self) -> None:
        """Ends the link, whose server has stopped answering; a new one is made."""
        self._supervisor.abort()

    async def run(self, commands: bytes, count: int = 1) -> list[Answer]:
        """Sends packed commands and returns their answers; an error of one is a value.

        Cancelling is safe: the answers are dropped when they come.

        Raises:
            BrokerUnavailable: No link, too many waiting, or no answer in time. The commands may
                have been executed in the last case.
        """
        link = self._supervisor.link
        if link is None:
            raise BrokerUnavailable("Redis can't be reached")
        if len(self._waiting) >= _WAITING_MAX:
            raise BrokerUnavailable("Redis has not answered thousands of commands")
        done: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Batch(count, done))
        link.send(commands)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await done
        except TimeoutError:
            raise BrokerUnavailable("Redis does not answer") from None

    async def run_script(self, script: Script, *arguments: Argument) -> Answer:
        """Runs a Lua script and returns its answer.

        Raises:
            BrokerUnavailable: As `run`, or Redis refused the script.
        """
        [answer] = await self.run_scripts(script, [arguments])
        return answer

    async def run_scripts(
        self, script: Script, calls: Sequence[Sequence[Argument]]
    ) -> list[Answer]:
        """Runs a Lua script once for each of `calls`, in one pipeline.

        After a `SCRIPT FLUSH` by someone else the calls that found the script missing, which are
        all of them, are made again.

        Raises:
            BrokerUnavailable: As `run`, or Redis refused a call; others may have been executed.
        """
        commands = b"".join(script.call(*arguments) for arguments in calls)
        answers = await self.run(commands, len(calls))
        if _is_error(answers[0], "NOSCRIPT"):
            load = packed("SCRIPT", "LOAD", script.source)
            _, *answers = await self.run(load + commands, 1 + len(calls))
        for answer in answers:
            if isinstance(answer, hiredis.ReplyError):
                raise BrokerUnavailable(f"Redis refused {script.name}: {answer}")
        return answers

    def _on_answer(self, answer: Answer) -> None:
        if not self._waiting:
            log.error("redis_answers_unasked", answer=str(answer)[:100])
            return
        batch = self._waiting[0]
        batch.answers.append(answer)
        if len(batch.answers) == batch.count:
            self._waiting.popleft()
            if batch.done is None:
                if isinstance(answer, hiredis.ReplyError):
                    log.error("redis_refused", error=str(answer))
            elif not batch.done.done():
                batch.done.set_result(batch.answers)

    def _on_down(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            if batch.done is not None and not batch.done.done():
                batch.done.set_exception(BrokerUnavailable("Redis closed the connection"))


def _is_error(answer: Answer, kind: str) -> bool:
    return isinstance(answer, hiredis.ReplyError) and str(answer).startswith(kind)
