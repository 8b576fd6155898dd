"""Occupancy in Redis: numbers of connections per node and their sums, changed by one script.

Names, behind the prefix, for each `space` (what is counted): `{app}:{space}` (name -> sum over
all nodes), `{app}:{space}:shown` (name -> its published count), `{space}:node:{node}` (that node's
numbers, under its lease).

What is reported within `FLUSH_AFTER_S` is written in one pipeline. Numbers that could not be
written are kept, the last one of each name, and written when Redis answers again.

Source: `gateway.occupancy`.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

import hiredis
import structlog

from gateway import frames
from gateway.broker import BrokerUnavailable, Publication
from gateway.occupancy import (
    FLUSH_AFTER_S,
    THROTTLE_ABOVE,
    THROTTLE_S,
    Count,
    Handlers,
    Turns,
    nothing_announced,
)
from gateway.redis_broker import encoded, redis_name
from gateway.redis_commands import Script
from gateway.redis_lease import EPOCH_IS_ANOTHER, NODE_IS_ALIVE, Entering
from gateway.redis_link import packed
from gateway.tasks import Tasks, for_ever
from gateway.webhooks import BEHIND, NoWebhooks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from gateway.occupancy import Announce, Key
    from gateway.redis_commands import RedisCommands
    from gateway.redis_lease import RedisLease
    from gateway.redis_link import Answer, Argument
    from gateway.webhooks import Webhooks

log = structlog.get_logger(__name__)

_WRITE: Final = Script.load("occupancy_write", 5, BEHIND)

# Names in one call of the script: Redis does nothing else meanwhile, about 20 us for each.
_AT_ONCE: Final = 64
# Of a listing in one answer.
_SCAN_COUNT: Final = 1000
_ANY_EPOCH: Final = b""
# What the script is told of numbers that are written again.
_QUIET: Final = {Entering.UNTOLD: "1", Entering.QUIETLY: "2", Entering.ANNOUNCED: ""}
# Characters with a meaning in a pattern.
_MEANT: Final = re.compile(r"[*?\[\]\\^]")


class RedisOccupancy:
    """See `gateway.occupancy` for what it promises.

    Attributes:
        handlers: See `Occupancy`.
    """

    __slots__ = (
        "_announce",
        "_commands",
        "_dirty",
        "_flushing",
        "_hooks",
        "_late",
        "_lease",
        "_mine",
        "_pause_s",
        "_prefix",
        "_reported",
        "_space",
        "_tasks",
        "handlers",
    )

    def __init__(
        self,
        commands: RedisCommands,
        prefix: str,
        lease: RedisLease,
        space: str,
        announce: Announce = nothing_announced,
        throttle_s: float = THROTTLE_S,
        hooks: Webhooks | None = None,
    ) -> None:
        self._commands = commands
        commands.use_scripts(_WRITE)
        self._prefix = prefix
        self._space = space
        self._lease = lease
        lease.add(self)
        self._announce = announce
        self._pause_s = throttle_s
        self._hooks = hooks or NoWebhooks()
        self._tasks = Tasks()
        # What this node has written, to write it again.
        self._mine: dict[Key, int] = {}
        # Names whose count waits to be published.
        self._late: set[Key] = set()
        # What has been reported and not been written.
        self._dirty: dict[Key, int] = {}
        self._reported = asyncio.Event()
        # Numbers of one name must not overtake each other.
        self._flushing = asyncio.Lock()
        self.handlers = Handlers()

    async def start(self) -> None:
        """See `Occupancy`; when Redis can't be reached the lease is taken later."""
        await self._lease.start(self)
        name = f"{self._space}_flush"
        self._tasks.spawn(for_ever(self._keep_flushing, name), name)

    async def stop(self) -> None:
        """See `Occupancy`."""
        await self._tasks.stop()
        try:
            await self._flush()
        except BrokerUnavailable as error:
            log.warning("occupancy_left", names=len(self._dirty), error=str(error))
        await self._lease.stop(self)

    def report(self, app_id: str, name: str, count: int) -> None:
        """See `Occupancy`."""
        self._dirty[app_id, name] = count
        self._reported.set()

    async def counts(self, app_id: str, names: Collection[str]) -> dict[str, int]:
        """See `Occupancy`."""
        if not names:
            return {}
        question = packed("HMGET", self._sums(app_id), *names)
        answer = await self._ask(question)
        return {name: int(sum_ or 0) for name, sum_ in zip(names, answer, strict=True)}

    async def occupied(self, app_id: str, prefix: str = "") -> dict[str, int]:
        """See `Occupancy`."""
        found: dict[str, int] = {}
        pattern = _MEANT.sub(r"\\\g<0>", prefix) + "*"
        cursor = b"0"
        while True:
            question = packed(
                *("HSCAN", self._sums(app_id), cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT)
            )
            cursor, flat = await self._ask(question)
            found |= {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}
            if cursor == b"0":
                return found

    async def _ask(self, question: bytes) -> Answer:
        """What Redis answers when everything that this node has reported is written."""
        lease = self._lease
        while True:
            await self._flush()
            await lease.when_settled()
            # A renewal may learn of the next epoch while the answer is on its way.
            known = lease.epoch
            epoch, answer = await self._commands.run(packed("GET", lease.epoch_key) + question, 2)
            if isinstance(answer, hiredis.ReplyError):
                raise BrokerUnavailable(f"Redis refused to tell sums: {answer}")
            if not known or epoch == known:
                return answer
            await lease.lost()

    # Writing

    async def _keep_flushing(self) -> None:
        while True:
            await self._reported.wait()
            await asyncio.sleep(FLUSH_AFTER_S)
            try:
                await self._flush()
            except BrokerUnavailable:
                # Still dirty: written with the next report, or when the lease is renewed.
                self._reported.clear()

    async def _flush(self) -> None:
        """Writes what was reported.

        Raises:
            BrokerUnavailable: Redis did not answer in time; what may not be written stays dirty.
        """
        async with self._flushing:
            self._reported.clear()
            dirty = self._dirty
            for app_id, names in _by_app(list(dirty)):
                # Before all nodes have entered their numbers again, each change could seem a turn.
                await self._lease.when_settled()
                numbers = {name: dirty[app_id, name] for name in names}
                if not await self._write(app_id, numbers):
                    self._reported.set()
                    return
                for name, number in numbers.items():
                    if dirty.get((app_id, name)) == number:
                        del dirty[app_id, name]

    async def _write(self, app_id: str, numbers: Mapping[str, int]) -> bool:
        """Writes numbers of this node, unless Redis has lost its data."""
        epoch = self._lease.epoch
        call = self._call(app_id, numbers, self._lease.node_id, epoch=epoch)
        answer = await self._commands.run_script(_WRITE, *call)
        if answer[0] == EPOCH_IS_ANOTHER:
            self._lease.look()
            return False
        for name, number in numbers.items():
            self._mine[app_id, name] = number
            if not number:
                del self._mine[app_id, name]
        self._tell(app_id, numbers, answer)
        return True

    def _tell(self, app_id: str, names: Iterable[str], answer: Answer) -> None:
        """Tells the handlers what has changed, and comes back to counts that have to wait."""
        for index, name in enumerate(names):
            before, after, shown = answer[1 + 3 * index : 4 + 3 * index]
            key = (app_id, name)
            self.handlers.changed(key, before, after)
            if shown > 0 and key not in self._late:
                self._late.add(key)
                self._tasks.spawn(self._show_later(key, shown / 1000), "count_later")

    async def _show_later(self, key: Key, wait_s: float) -> None:
        """Reports a number again, so that the count is published that had to wait."""
        await asyncio.sleep(wait_s)
        self._late.discard(key)
        if key not in self._dirty:
            self.report(*key, self._mine.get(key, 0))

    # Under the lease

    def node_key(self, node_id: str) -> str:
        """See `Tenant`."""
        return f"{self._prefix}:{self._space}:node:{node_id}"

    async def enter_again(self, entering: Entering) -> None:
        """See `Tenant`."""
        for app_id, names in _by_app(list(self._mine)):
            numbers = {
                name: self._mine[app_id, name] for name in names if (app_id, name) in self._mine
            }
            call = self._call(app_id, numbers, self._lease.node_id, again=entering)
            answer = await self._commands.run_script(_WRITE, *call)
            if entering is Entering.ANNOUNCED:
                self._tell(app_id, numbers, answer)
        await self._report_strays()

    async def _report_strays(self) -> None:
        """Reports none for names of which Redis still has a number, or has one again."""
        question = packed("HGETALL", self.node_key(self._lease.node_id))
        [flat] = await self._commands.send(question, all_or_none=True)
        for entry in flat[::2]:
            app_id, _, name = entry.decode().partition(" ")
            if (app_id, name) not in self._mine and (app_id, name) not in self._dirty:
                self.report(app_id, name, 0)

    async def catch_up(self) -> None:
        """See `Tenant`: what is dirty is written by the flush."""
        if self._dirty:
            self._reported.set()

    async def reap(self, node_id: str) -> bool:
        """See `Tenant`."""
        key = self.node_key(node_id)
        while True:
            question = packed("HRANDFIELD", key, _AT_ONCE)
            [some] = await self._commands.send(question, all_or_none=True)
            if not some:
                return True
            keys: list[Key] = []
            for entry in some:
                app_id, _, name = entry.decode().partition(" ")
                keys.append((app_id, name))
            for app_id, names in _by_app(keys):
                numbers = dict.fromkeys(names, 0)
                call = self._call(app_id, numbers, node_id, dead=True)
                answer = await self._commands.run_script(_WRITE, *call)
                if answer[0] == NODE_IS_ALIVE:
                    return False
                self._tell(app_id, numbers, answer)
            log.info("occupancy_reaped", space=self._space, dead_node=node_id, names=len(some))

    # Calls

    def _sums(self, app_id: str) -> str:
        return f"{self._prefix}:{app_id}:{self._space}"

    def _call(
        self,
        app_id: str,
        numbers: Mapping[str, int],
        node_id: str,
        *,
        dead: bool = False,
        again: Entering = Entering.ANNOUNCED,
        epoch: bytes = _ANY_EPOCH,
    ) -> list[Argument]:
        call: list[Argument] = [
            self.node_key(node_id),
            self._sums(app_id),
            f"{self._sums(app_id)}:shown",
            self._lease.key,
            self._lease.epoch_key,
            app_id,
            node_id if dead else "",
            epoch,
            _QUIET[again],
            THROTTLE_ABOVE,
            int(self._pause_s * 1000),
            self._hooks.hook(app_id, "channel_occupied"),
            self._hooks.hook(app_id, "subscription_count"),
        ]
        for name, number in numbers.items():
            call += [name, number, *self._announced(app_id, name)]
        return call

    def _announced(self, app_id: str, name: str) -> tuple[bytes, bytes, bytes]:
        """Where and what the script is to publish."""
        match self._announce(app_id, name):
            case Count():
                # The body around a number that stands nowhere else in it.
                body = frames.subscription_count_body(name, 0).rpartition(b"0")
                head = encoded(Publication(app_id, name, body[0]))
                return redis_name(self._prefix, app_id, name), head, b"#" + body[2]
            case Turns(channel, first, last):
                target = redis_name(self._prefix, app_id, channel)
                return (
                    target,
                    encoded(Publication(app_id, channel, first)),
                    encoded(Publication(app_id, channel, last)),
                )
            case _:
                return b"", b"", b""


def _by_app(keys: list[Key]) -> Iterable[tuple[str, list[str]]]:
    """The names of each app, in portions for one call of the script."""
    apps: dict[str, list[str]] = {}
    for app_id, name in keys:
        apps.setdefault(app_id, []).append(name)
    for app_id, names in apps.items():
        for start in range(0, len(names), _AT_ONCE):
            yield app_id, names[start : start + _AT_ONCE]
