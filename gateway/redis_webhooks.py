"""The queues of webhooks in Redis: a stream for each endpoint, under a claim while it is sent.

Redis and not MongoDB, because what is told of happens there: presence, occupancy and cache channels
change in scripts and client events travel through it, and only in the same script can a fact and
its record be one step. What Redis loses is lost with the facts themselves; `appendonly yes` keeps
both (`docs/backends.md`).

Names, behind the prefix: `{app}:hooks:{endpoint}` (events in order), `hooks:due` (queue -> when it
may be sent), `hooks:claims` (queue -> who sends it), `hooks:failures` (queue -> in a row),
`hooks:leaving` (ends that wait for a return), `hooks:dropped` (queue -> events that did not fit).

Source: `gateway.webhooks`.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import hiredis
import msgspec
import structlog

from gateway.broker import BrokerUnavailable
from gateway.redis_commands import Script
from gateway.redis_link import packed
from gateway.webhooks import BEHIND, END_OF, Endpoint, endpoints, event_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.apps import App
    from gateway.redis_commands import RedisCommands

_FIRE: Final = Script.load("webhook_fire", 1, BEHIND)
_CLAIM: Final = Script.load("webhook_claim", 5, BEHIND)
_SETTLE: Final = Script.load("webhook_settle", 5, BEHIND)

# Events and bytes of one call; a single event may be longer.
_BATCH_EVENTS: Final = 100
_BATCH_BYTES: Final = 262_144
_FACTS_AT_ONCE: Final = 200

# A queue whose endpoint this node does not know may be one that it has not heard of yet: a new apps
# file comes to one node after the other. Then it is told of, and again as often as this.
_ORPHAN_AFTER_S: Final = 60.0
_ORPHAN_AGAIN_S: Final = 3_600.0

_encode = msgspec.json.Encoder().encode

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HookTiming:
    """How patient webhooks are.

    Attributes:
        delay_s: How long an end waits for a return.
        give_up_s: The age at which an event that can't be told is given up.
        claim_s: After which another node may send what a dead one was sending.
        retry_first_s: The wait after a first failure; it doubles with each further one.
        retry_most_s: The longest wait.
    """

    delay_s: float
    give_up_s: float
    claim_s: float
    retry_first_s: float = 1.0
    retry_most_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A queue that this node may send from, for a while.

    Attributes:
        app: Whose events they are.
        queue: The stream's name.
    """

    app: App
    endpoint: Endpoint
    queue: bytes
    token: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The events at the head of a queue.

    Attributes:
        events: JSON, in order.
        behind: The first stream id that is not of this batch.
    """

    events: list[bytes]
    behind: str


class Settled(NamedTuple):
    """What the end of a claim has brought about, and to light.

    Attributes:
        removed: Events that were sent, or given up.
        dropped: Events that did not fit into the queue since the end of the last claim.
        begins: Whether these are the first ones since the queue was half empty, 1 or 0.
    """

    removed: int
    dropped: int
    begins: int


class Orphans:
    """Queues without an endpoint, and when the log has to tell of each."""

    __slots__ = ("_say_at",)

    def __init__(self) -> None:
        self._say_at: dict[bytes, float] = {}

    def met(self, queue: bytes, now: float) -> bool:
        """Whether to tell of a queue that was found without an endpoint."""
        # Those that were not met for so long have got one, or are no more.
        current = {one: at for one, at in self._say_at.items() if now < at + _ORPHAN_AGAIN_S}
        self._say_at = current
        say_at = current.setdefault(queue, now + _ORPHAN_AFTER_S)
        if now < say_at:
            return False
        current[queue] = now + _ORPHAN_AGAIN_S
        return True

    def found(self, queue: bytes) -> None:
        """Forgets a queue that has an endpoint."""
        self._say_at.pop(queue, None)


class RedisWebhooks:
    """The queues of every app; implements `gateway.webhooks.Webhooks`.

    Whoever has something to tell gives `hook` to the script that does it.
    """

    __slots__ = ("_app", "_commands", "_orphans", "_prefix", "_timing")

    def __init__(
        self,
        commands: RedisCommands,
        prefix: str,
        app: Callable[[str], App | None],
        timing: HookTiming,
    ) -> None:
        """`app` gives the app of an id."""
        self._commands = commands
        self._prefix = prefix
        self._app = app
        self._timing = timing
        self._orphans = Orphans()
        commands.use_scripts(_FIRE, _CLAIM, _SETTLE)

    # Telling

    def hook(self, app_id: str, event: str) -> bytes:
        """What a script is given that may see `event` or its end happen; empty: nobody asks."""
        app = self._app(app_id)
        if app is None or not app.webhooks:
            return b""
        wanted = {event, END_OF.get(event, event)}
        if not any(wanted & endpoint.events for endpoint in endpoints(app)):
            return b""
        return self._hook(app, event)

    def _hook(self, app: App, event: str) -> bytes:
        return _encode(
            {
                "due": self._name("due"),
                "leaving": self._name("leaving"),
                "dropped": self._name("dropped"),
                "queues": [
                    self._queue(app, endpoint)
                    for endpoint in endpoints(app)
                    if event in endpoint.events
                ],
                "after_ms": int(self._timing.delay_s * 1000),
            }
        )

    # Sending

    async def claim(self, most: int) -> list[Claim]:
        """Queues for this node to send from; queues the ends that count by now.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        token = secrets.token_hex(8)
        queues, facts = await self._commands.run_script(
            _CLAIM,
            *(self._name("due"), self._name("claims"), self._name("failures")),
            *(self._name("leaving"), self._name("dropped"), token),
            *(int(self._timing.claim_s * 1000), most, _FACTS_AT_ONCE),
        )
        if facts:
            await self._fire(facts)
        claims = []
        for queue in queues:
            known = self._endpoint(queue.decode())
            if known is None:
                await self._leave_orphan(queue)
                continue
            self._orphans.found(queue)
            claims.append(Claim(*known, queue, token))
        return claims

    async def _leave_orphan(self, queue: bytes) -> None:
        """Leaves a queue to whoever knows its endpoint; what is in it is not lost in silence."""
        if not self._orphans.met(queue, asyncio.get_running_loop().time()):
            return
        question = packed("XLEN", queue) + packed("PTTL", queue)
        events, kept_ms = await self._commands.run(question, 2)
        if not isinstance(events, int) or not isinstance(kept_ms, int):
            raise BrokerUnavailable(f"Redis refused to tell of a queue: {events}, {kept_ms}")
        log.warning(
            "webhooks_without_endpoint",
            app=self._app_id(queue.decode()),
            events=events,
            dropped_in_s=kept_ms // 1000,
            remedy="put the endpoint back into the apps file to have them sent",
        )

    async def _fire(self, facts: list[bytes]) -> None:
        calls = []
        for fact in facts:
            app_id, name, channel, user_id = fact.decode().split(" ", 3)
            app = self._app(app_id)
            hook = b"" if app is None else self._hook(app, name)
            event = event_bytes(name, channel, user_id or None)
            calls.append((self._name("leaving"), hook, fact, event))
        await self._commands.run_scripts(_FIRE, calls)

    async def read(self, claim: Claim) -> Batch | None:
        """The events at the head of a claimed queue, None when there are none.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        question = packed("XRANGE", claim.queue, "-", "+", "COUNT", _BATCH_EVENTS)
        [entries] = await self._commands.run(question)
        if isinstance(entries, hiredis.ReplyError):
            raise BrokerUnavailable(f"Redis refused to read a queue: {entries}")
        events: list[bytes] = []
        size_bytes = 0
        last = b""
        for entry_id, (_, event) in entries:
            size_bytes += len(event)
            if events and size_bytes > _BATCH_BYTES:
                break
            events.append(event)
            last = entry_id
        if not events:
            return None
        milliseconds, _, number = last.decode().partition("-")
        return Batch(events, f"{milliseconds}-{int(number) + 1}")

    async def sent(self, claim: Claim, batch: Batch) -> Settled | None:
        """Removes a batch and ends the claim; None when another node had taken the queue over.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        return await self._settle(claim, batch.behind)

    async def failed(self, claim: Claim) -> Settled | None:
        """Lets a queue wait, longer with each failure in a row, and gives up what is too old.

        Returns none when another node had taken the queue over.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        return await self._settle(claim, "")

    async def _settle(self, claim: Claim, behind: str) -> Settled | None:
        timing = self._timing
        answer = await self._commands.run_script(
            _SETTLE,
            *(self._name("due"), self._name("claims"), self._name("failures"), claim.queue),
            *(self._name("dropped"), claim.token, behind),
            *(int(timing.retry_first_s * 1000), int(timing.retry_most_s * 1000)),
            int(timing.give_up_s * 1000),
        )
        return None if answer[0] < 0 else Settled(*answer)

    # Names

    def _name(self, what: str) -> str:
        return f"{self._prefix}:hooks:{what}"

    def _queue(self, app: App, endpoint: Endpoint) -> str:
        return f"{self._prefix}:{app.id}:hooks:{endpoint.digest}"

    def _endpoint(self, queue: str) -> tuple[App, Endpoint] | None:
        digest = queue.rpartition(":")[2]
        app = self._app(self._app_id(queue))
        if app is None:
            return None
        found = (one for one in endpoints(app) if one.digest == digest)
        endpoint = next(found, None)
        return None if endpoint is None else (app, endpoint)

    def _app_id(self, queue: str) -> str:
        return queue.removeprefix(f"{self._prefix}:").partition(":")[0]
