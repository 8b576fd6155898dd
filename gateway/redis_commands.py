"""Commands to Redis over one supervised link.

Those of one loop turn leave in one write, answers come back in order, and nobody waits longer than
the timeout: a frozen server fails calls, it does not block them. There is no pool to run dry and
no task per command.

Source: docs/decisions.md (measured).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hiredis
import structlog

from gateway.broker import BrokerUnavailable
from gateway.redis_link import Supervisor, packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gateway.redis_link import Answer, Argument, RedisAddress, RedisLink
    from gateway.tasks import Tasks

log = structlog.get_logger(__name__)

# How errors of a server begin, or a script's in it, that only follows another one.
_SAID_BY_REPLICAS: Final = ("READONLY ", "MASTERDOWN ")

# How long after a call was given up a link may still answer nothing, and be kept. The heartbeat of
# the broker notices a frozen server sooner; it is heard over another link, so that what takes away
# the answers of this one alone (a proxy that got stuck) would never be noticed.
_SILENT_MOST_S: Final = 4.0

# Commands without an answer; a frozen server must not make the queue grow for ever.
_WAITING_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of `gateway/lua`, whose KEYS and ARGV are commented there."""

    name: str
    source: str
    digest: str
    key_count: int

    @classmethod
    def load(cls, name: str, key_count: int, behind: Sequence[str] = ()) -> Script:
        """The script in `gateway/lua/{name}.lua`, put behind others whose functions it calls."""
        folder = Path(__file__).parent / "lua"
        files = [folder / f"{one}.lua" for one in (*behind, name)]
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        # Redis names scripts by SHA-1; nothing secret hangs on it.
        digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        return cls(name, source, digest, key_count)

    def call(self, *arguments: Argument) -> bytes:
        """The packed call by digest."""
        return packed("EVALSHA", self.digest, self.key_count, *arguments)


class _Batch:
    """Commands that were sent together, and their answers so far.

    Attributes:
        commands: As they were sent; empty when they are not to be sent again.
        done: None when nobody waits.
        due_at: When whoever waits is told that there is no answer, on the loop's clock.
        all_or_none: Whether an error as one of the answers fails the whole.
        refusal: The last error among the answers.
    """

    __slots__ = ("all_or_none", "answers", "commands", "count", "done", "due_at", "refusal")

    def __init__(
        self,
        commands: bytes,
        count: int,
        done: asyncio.Future[list[Answer]] | None,
        due_at: float,
        *,
        all_or_none: bool,
    ) -> None:
        self.commands = commands
        self.count = count
        self.answers: list[Answer] = []
        self.done = done
        self.due_at = due_at
        self.all_or_none = all_or_none
        self.refusal: hiredis.ReplyError | None = None

    def settle(self) -> None:
        """Tells whoever waits, now that the last answer is here."""
        refusal = self.refusal
        if self.done is None:
            if refusal is not None:
                log.error("redis_refused", error=str(refusal))
        elif self.done.done():
            return
        elif refusal is not None and self.all_or_none:
            self.done.set_exception(BrokerUnavailable(f"Redis refused: {refusal}"))
        else:
            self.done.set_result(self.answers)

    def without_script(self) -> list[int]:
        """The places of the calls whose script Redis did not know, if anybody still waits."""
        if self.done is None or self.done.done():
            return []
        return [place for place, one in enumerate(self.answers) if _is_error(one, "NOSCRIPT")]

    def complete(self, places: list[int], again: asyncio.Future[list[Answer]]) -> None:
        """Puts the answers of the calls that were made again in their places, and settles."""
        if self.done is None or self.done.done():
            return
        error = again.exception()
        if error is not None:
            self.done.set_exception(error)
            return
        for place, answer in zip(places, again.result(), strict=True):
            self.answers[place] = answer
        refusals = [one for one in self.answers if isinstance(one, hiredis.ReplyError)]
        self.refusal = refusals[-1] if refusals else None
        self.settle()


class RedisCommands:
    """Runs commands over one supervised link."""

    __slots__ = (
        "_connected_callbacks",
        "_demoted_callbacks",
        "_loop",
        "_overdue_timer",
        "_scripts",
        "_silence_timer",
        "_supervisor",
        "_timeout_s",
        "_waiting",
    )

    def __init__(self, address: RedisAddress, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._scripts: list[Script] = []
        self._connected_callbacks: list[Callable[[], None]] = []
        self._demoted_callbacks: list[Callable[[], None]] = []
        self._waiting: deque[_Batch] = deque()
        self._overdue_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._supervisor = Supervisor(
            address, "commands", timeout_s, self._on_answer, self._on_up, self._on_down
        )

    def use_scripts(self, *scripts: Script) -> None:
        """Loads these scripts now and on every new link, before anything else is sent there.

        Calls then take effect in the order they are made: none has to be repeated because its
        script was missing, after others that were made later.
        """
        self._scripts += scripts
        self._load(scripts)

    def _load(self, scripts: Iterable[Script]) -> None:
        for script in scripts:
            self.post(packed("SCRIPT", "LOAD", script.source))

    def _on_up(self, _link: RedisLink) -> None:
        self._load(self._scripts)
        for callback in self._connected_callbacks:
            callback()

    def when_connected(self, callback: Callable[[], None]) -> None:
        """Calls `callback` for every new link, behind which Redis may be another or empty."""
        self._connected_callbacks.append(callback)

    def when_demoted(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when Redis has become a replica, which this link leaves."""
        self._demoted_callbacks.append(callback)

    def post(self, command: bytes) -> None:
        """Sends one packed command without waiting for its answer; does nothing without a link."""
        link = self._supervisor.link
        if link is not None:
            self._waiting.append(_Batch(b"", 1, None, math.inf, all_or_none=False))
            link.send(command)

    async def start(self, tasks: Tasks) -> None:
        """Begins to connect and waits for the outcome of the first attempt."""
        self._loop = asyncio.get_running_loop()
        tasks.spawn(self._supervisor.run(), "redis_commands")
        await self._supervisor.first_try.wait()

    @property
    def connected(self) -> bool:
        """Whether there is a link; a frozen server still has one."""
        return self._supervisor.link is not None

    def abort(self) -> None:
        """Ends the link, whose server has stopped answering; a new one is made."""
        self._supervisor.abort()

    def send(
        self, commands: bytes, count: int = 1, *, all_or_none: bool = False
    ) -> asyncio.Future[list[Answer]]:
        """Sends packed commands; the future brings their answers.

        Calls whose script somebody has flushed are made once more, behind all scripts.

        Waiting costs no task and no timer: answers come in order, so one timer for the oldest
        tells everyone in time.

        Args:
            commands: Packed, one behind the other.
            count: How many they are.
            all_or_none: Whether an error of one fails the future; else it is a value.

        Raises:
            BrokerUnavailable: No link, or too many waiting. The future fails with it when there is
                no answer in time; the commands may have been executed then.
        """
        link = self._supervisor.link
        if link is None:
            raise BrokerUnavailable("Redis can't be reached")
        if len(self._waiting) >= _WAITING_MAX:
            raise BrokerUnavailable("Redis has not answered thousands of commands")
        done: asyncio.Future[list[Answer]] = self._loop.create_future()
        due_at = self._loop.time() + self._timeout_s
        self._waiting.append(_Batch(commands, count, done, due_at, all_or_none=all_or_none))
        if self._overdue_timer is None:
            self._overdue_timer = self._loop.call_at(due_at, self._tell_overdue)
        link.send(commands)
        return done

    def _tell_overdue(self) -> None:
        """Fails what has had no answer for too long; the answers are dropped when they come."""
        self._overdue_timer = None
        # uvloop's clock has whole milliseconds.
        now = self._loop.time() + 0.001
        for batch in self._waiting:
            if batch.done is None or batch.done.done():
                continue
            if batch.due_at > now:
                self._overdue_timer = self._loop.call_at(batch.due_at, self._tell_overdue)
                return
            batch.done.set_exception(BrokerUnavailable("Redis does not answer"))
            self._watch()

    def _watch(self) -> None:
        """Begins to wait for an answer to what was sent first, if there is nobody who does."""
        if self._silence_timer is None:
            first = self._waiting[0]
            self._silence_timer = self._loop.call_later(
                _SILENT_MOST_S, self._leave_if_silent, first, len(first.answers)
            )

    def _leave_if_silent(self, first: _Batch, answers: int) -> None:
        """Ends a link on which nothing was answered since; a new one is made."""
        self._silence_timer = None
        if self._waiting and self._waiting[0] is first and len(first.answers) == answers:
            log.error("redis_answers_nothing", waiting=len(self._waiting))
            self.abort()

    async def run(self, commands: bytes, count: int = 1) -> list[Answer]:
        """Sends packed commands and returns their answers; an error of one is a value.

        Cancelling is safe: the answers are dropped when they come.

        Raises:
            BrokerUnavailable: No link, too many waiting, or no answer in time. The commands may
                have been executed in the last case.
        """
        return await self.send(commands, count)

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

        Raises:
            BrokerUnavailable: As `run`, or Redis refused a call; others may have been executed.
        """
        commands = b"".join(script.call(*arguments) for arguments in calls)
        answers = await self.run(commands, len(calls))
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
        if isinstance(answer, hiredis.ReplyError):
            batch.refusal = answer
        if len(batch.answers) == batch.count:
            self._waiting.popleft()
            if batch.refusal is None or not self._made_again(batch):
                batch.settle()

    def _made_again(self, batch: _Batch) -> bool:
        """Looks at what Redis refused; tells whether some of it is asked once more."""
        if any(word in str(batch.refusal) for word in _SAID_BY_REPLICAS):
            # A failover that has left us here; the address may lead to the new primary by now.
            log.error("redis_demoted", error=str(batch.refusal))
            for callback in self._demoted_callbacks:
                callback()
            self.abort()
            return False
        places = batch.without_script()
        if not places or not batch.commands:
            return False
        # Somebody has flushed the scripts. None of the calls has done anything.
        calls = _apart(batch.commands)
        self._load(self._scripts)
        try:
            again = self.send(b"".join(calls[place] for place in places), len(places))
        except BrokerUnavailable:
            return False
        # Once is enough: whoever flushes them all the time is told so by errors.
        self._waiting[-1].commands = b""
        again.add_done_callback(partial(batch.complete, places))
        return True

    def _on_down(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            if batch.done is not None and not batch.done.done():
                batch.done.set_exception(BrokerUnavailable("Redis closed the connection"))


def _is_error(answer: Answer, kind: str) -> bool:
    return isinstance(answer, hiredis.ReplyError) and str(answer).startswith(kind)


def _apart(commands: bytes) -> list[bytes]:
    """Packed commands, each by itself."""
    reader = hiredis.Reader()
    reader.feed(commands)
    found = []
    while (command := reader.gets()) is not False:
        found.append(packed(*command))
    return found
