"""Gateways that are killed at random, again and again, while their clients go on as they would.

`duet bench chaos` runs it by the hour, a test for some seconds. Every stream is a run of its own
for the checker: it is judged, and forgotten, as soon as it has come to rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bson import ObjectId
from pymongo.read_concern import ReadConcern

from persistence.faults import Step
from tests.e2e.books import Books
from tests.faults.chaos_stream import INVITATION_TTL_S, PREPAID_S, Stream
from tests.faults.checker import Timing, judge
from tests.faults.forked_gateway import REFUSED, CrashPoint, ForkedGateway
from tests.faults.players import Witness, read_truth

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from tests.e2e.gateway_process import Stores

# Deadlines so short that they come by themselves within a stream's life.
_REFUND_DELAY_S: Final = 1.0
_SHOW_GRACE_S: Final = 0.5
_LEASE_S: Final = 1.0
SETTINGS: Final = {
    "lease_s": _LEASE_S,
    "invitation_ttl_s": INVITATION_TTL_S,
    "refund_delay_s": _REFUND_DELAY_S,
    "show_grace_s": _SHOW_GRACE_S,
    "log_level": "warning",
}
# Processes set their clocks by the database's; on a busy machine that is this exact.
TIMING: Final = Timing(
    invitation_ttl_s=INVITATION_TTL_S,
    refund_delay_s=_REFUND_DELAY_S,
    show_s=_SHOW_GRACE_S + PREPAID_S,
    clock_doubt_s=0.5,
)

# How long a process lives is counted in answers, of all processes together: on a machine that is
# busy with something else, kills would come before there is anything to interrupt.
_MOST_ANSWERS: Final = 6
_ANSWERED_WITHIN_S: Final = 3.0
# The moment after the last of them.
_LONGEST_PAUSE_S: Final = 0.1
# The share of the commands that a load balancer sends only to processes that are ready.
_BALANCED: Final = 0.8
_LONGEST_ABSENCE_S: Final = 1.0
# The share of the processes that are killed whether they are ready or not.
_KILLED_EARLY: Final = 0.15
# A start takes about a tenth of a second; on a busy machine several.
_LONGEST_START_S: Final = 0.3
# A process whose step does not come is killed where it is.
_STEP_WITHIN_S: Final = 3.0
_DEEPEST_STEP: Final = 8
_MOST_REFUSALS: Final = 4
# A stream that has not come to rest in this time has stalled, provided that the gateways were
# given the processor meanwhile, as the answers that others had from them show. The second limit
# holds whatever they were given.
_REST_WITHIN_S: Final = 60.0
_ANSWERS_MEANWHILE: Final = 200
_REST_AT_LAST_S: Final = 300.0
_REST_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """How much chaos.

    Attributes:
        kills: after so many no process is killed any more.
        seed: of everything that is random; what the operating system makes of it is not.
        gateways: processes, each killed and started again on its own.
        streams: at the same time, each with its viewers.
        command_timeout_s: of the gateways. A shorter one lets a busy machine refuse nearly
            everything, and then there is nothing to interrupt.
    """

    kills: int = 1000
    seed: int = 0
    gateways: int = 2
    streams: int = 6
    command_timeout_s: float = 3.0


@dataclass(slots=True)
class ChaosResult:
    """What came of it; `violations` empty is the verdict that everybody wants.

    Attributes:
        half_heard: streams of which the witness may have missed something; of them it was not
            judged whether each event was delivered.
        refused_starts: how often a process found that it can't be started.
    """

    kills: int = 0
    killed_at: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    goals: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    unanswered: int = 0
    told: int = 0
    told_again: int = 0
    half_heard: int = 0
    refused_starts: int = 0
    longest_rest_s: float = 0.0
    elapsed_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    @property
    def kills_per_minute(self) -> float:
        return self.kills / self.elapsed_s * 60 if self.elapsed_s else 0.0


class Chaos:
    """One run: gateways, the hands that kill them, the streams in front.

    Attributes:
        troubles: what else goes wrong meanwhile, each again and again.
        settings: of the gateways, beside those of every run.
    """

    def __init__(
        self,
        options: ChaosOptions,
        stores: Stores,
        apps_file: Path,
        log: Path,
        on_kill: Callable[[int], None] = lambda _kills: None,
    ) -> None:
        self._options = options
        self._stores = stores
        self._apps_file = apps_file
        self._log = log
        self._on_kill = on_kill
        self._dice = random.Random(options.seed)
        self._gateways: list[ForkedGateway] = []
        self.result = ChaosResult()
        self._ready: set[str] = set()
        self._refusals: Counter[str] = Counter()
        self._answers = 0
        self._answered = asyncio.Event()
        self.witness = Witness(stores)
        self.troubles: Sequence[Callable[[], Awaitable[None]]] = ()
        self.settings: Mapping[str, Any] = {}

    def any_gateway(self) -> ForkedGateway:
        """What a load balancer would pick: mostly one that was found ready, else one that lives."""
        living = [gateway for gateway in self._gateways if gateway.is_running]
        ready = [gateway for gateway in living if gateway.name in self._ready]
        if ready and self._dice.random() < _BALANCED:
            return self._dice.choice(ready)
        return self._dice.choice(living or self._gateways)

    def on_answer(self) -> None:
        """Counts that some gateway has answered."""
        self._answers += 1
        self._answered.set()

    async def run(self) -> ChaosResult:
        """Kills until it has killed enough, then lets everything come to rest."""
        async with contextlib.AsyncExitStack() as stack:
            books = await stack.enter_async_context(Books(self._stores))
            await stack.enter_async_context(self.witness)
            settings = SETTINGS | {"command_timeout_s": self._options.command_timeout_s}
            settings |= self.settings
            for _ in range(self._options.gateways):
                gateway = ForkedGateway(self._stores, self._apps_file, self._log, settings)
                self._gateways.append(await stack.enter_async_context(gateway))
                await gateway.start()
            async with asyncio.TaskGroup() as tasks:
                started_at_s = time.monotonic()
                killers = [
                    tasks.create_task(self._kill_again_and_again(gateway))
                    for gateway in self._gateways
                ]
                for trouble in self.troubles:
                    tasks.create_task(self._again_and_again(trouble, killers))
                for _ in range(self._options.streams):
                    tasks.create_task(self._stream_after_stream(books, killers))
                await asyncio.wait(killers)
                self.result.elapsed_s = time.monotonic() - started_at_s
            await self._look_for_strays(books)
        return self.result

    async def _kill_again_and_again(self, gateway: ForkedGateway) -> None:
        while self.result.kills < self._options.kills:
            if not gateway.is_running and self._dice.random() < _KILLED_EARLY:
                await self._launch(gateway, None)
                await asyncio.sleep(self._dice.uniform(0, _LONGEST_START_S))
                await self._kill(gateway, "soon after its launch")
                continue
            point = self._point()
            if not await self._start(gateway, point):
                if self._may_start_again(gateway):
                    continue
                return
            if point is None:
                await self._let_answer(self._dice.randint(0, _MOST_ANSWERS))
                await asyncio.sleep(self._dice.uniform(0, _LONGEST_PAUSE_S))
            elif await gateway.until_dead(_STEP_WITHIN_S):
                self._count(point.step)
                continue
            await self._kill(gateway, "anywhere")
            if self._dice.random() < 0.2:
                await asyncio.sleep(self._dice.uniform(0, _LONGEST_ABSENCE_S))
        while not await self._start(gateway, None):
            if not self._may_start_again(gateway):
                return

    async def stop_one(self) -> None:
        """Has a gateway stand still for longer than its claims last; then it goes on."""
        gateway = self.any_gateway()
        for send in (gateway.pause, gateway.resume):
            if gateway.is_running:
                # It may be killed at this moment.
                with contextlib.suppress(ProcessLookupError):
                    send()
            await asyncio.sleep(self._dice.uniform(1, 2) * _LEASE_S)

    async def _again_and_again(
        self, trouble: Callable[[], Awaitable[None]], killers: list[asyncio.Task[None]]
    ) -> None:
        while not all(killer.done() for killer in killers):
            await trouble()

    async def _kill(self, gateway: ForkedGateway, where: str) -> None:
        if gateway.is_running:
            await gateway.kill()
            self._count(where)

    async def _let_answer(self, count: int) -> None:
        """Returns when the gateways have given so many more answers, or give none."""
        enough = self._answers + count
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWERED_WITHIN_S):
                while self._answers < enough:
                    self._answered.clear()
                    await self._answered.wait()

    def _may_start_again(self, gateway: ForkedGateway) -> bool:
        """Looks at how a process has ended that did not get ready.

        It may have been killed. Or it found no usable MongoDB or its port taken, as may be on a
        busy machine: a supervisor would start it again, some times in a row. Anything else is a
        fault.
        """
        assert gateway.process is not None
        code = gateway.process.exitcode
        if code == -signal.SIGKILL:
            self._count("while starting")
            return True
        if code == REFUSED:
            self.result.refused_starts += 1
            self._refusals[gateway.name] += 1
            if self._refusals[gateway.name] < _MOST_REFUSALS:
                return True
        self.result.violations.append(
            f"{gateway.name} did not start, it ended with {code}: {gateway.log_text()}"
        )
        return False

    async def _start(self, gateway: ForkedGateway, point: CrashPoint | None) -> bool:
        """Starts it, unless it still runs; false when it died before it was ready."""
        if gateway.is_running:
            return True
        await self._launch(gateway, point)
        if not await gateway.until_ready():
            return False
        self._ready.add(gateway.name)
        self._refusals[gateway.name] = 0
        return True

    async def _launch(self, gateway: ForkedGateway, point: CrashPoint | None) -> None:
        self._ready.discard(gateway.name)
        await gateway.launch(point)

    def _point(self) -> CrashPoint | None:
        if self._dice.random() < 0.4:
            return None
        step = self._dice.choice(list(Step))
        return CrashPoint(step, nth=self._dice.randint(1, _DEEPEST_STEP))

    def _count(self, where: str) -> None:
        self.result.kills += 1
        self.result.killed_at[where] += 1
        self._on_kill(self.result.kills)

    async def _stream_after_stream(self, books: Books, killers: list[asyncio.Task[None]]) -> None:
        async with asyncio.TaskGroup() as judges:
            while not all(killer.done() for killer in killers):
                stream = Stream(self, random.Random(self._dice.random()))
                await stream.play()
                # It comes to rest while the next one is played.
                judges.create_task(self._judge(books, stream))

    async def _judge(self, books: Books, stream: Stream) -> None:
        """Waits until the stream has come to rest, and has it judged."""
        began_at_s = time.monotonic()
        await self._rest(books, stream)
        truth = await read_truth(books, [stream.session_id])
        await self.witness.barrier()
        history, result = stream.history, self.result
        if self.witness.gaps > stream.gaps_before:
            # The witness was without Redis for a while: what it did not hear may have been told.
            history.watched.clear()
            result.half_heard += 1
        found = judge(history, truth, TIMING)
        if found:
            result.violations += [f"stream of {stream.streamer}: {one}" for one in found]
        result.longest_rest_s = max(result.longest_rest_s, time.monotonic() - began_at_s)
        result.streams += 1
        result.goals.update(
            str(row.get("reason", row["outcome"]))
            for row in truth.goals
            if row["_cls"] == "TriggerExclusiveGoal" and row["state"] == "ended"
        )
        result.asked += len(history.asked)
        result.unanswered += len(history.asked) - len(history.answered)
        events = [(one.channel, one.event_id) for one in history.heard if one.event_id]
        result.told += len(set(events))
        result.told_again += len(events) - len(set(events))
        await self.witness.unwatch(stream.channels)

    async def _rest(self, books: Books, stream: Stream) -> None:
        """Returns when nothing is left to be done for a stream, or when it is clear that it stalls.

        Only what an index finds is asked for: the rest of the truth is looked for among everything
        that the run has left so far.
        """
        began_at_s, answers = time.monotonic(), self._answers
        # As the truth is read: what has come to rest on the primary may not have on a majority.
        majority = ReadConcern("majority")
        goals = books.database.get_collection("goals", read_concern=majority)
        of_stream = {"conditions.session_id": ObjectId(stream.session_id)}
        calls = books.database.get_collection("escrow_calls", read_concern=majority)
        unsaid = {"status": "pending", "session_id": ObjectId(stream.session_id)}
        while True:
            rows = await goals.find(of_stream, {"state": True, "outbox": True}).to_list()
            over = all(row["state"] == "ended" and not row.get("outbox") for row in rows)
            if over and await calls.find_one(unsaid) is None:
                return
            waited_s = time.monotonic() - began_at_s
            worked = self._answers - answers >= _ANSWERS_MEANWHILE
            if waited_s > (_REST_WITHIN_S if worked else _REST_AT_LAST_S):
                return
            await asyncio.sleep(_REST_POLL_S)

    async def _look_for_strays(self, books: Books) -> None:
        """Sums up the whole ledger, and looks for goals that no stream knows of."""
        accounts: Counter[str] = Counter()
        async for row in books.database["escrow"].find():
            accounts[row["debit"]] -= row["amount"]
            accounts[row["credit"]] += row["amount"]
        if accounts["escrow"] != 0:
            self.result.violations.append(f"{accounts['escrow']} are left in escrow")
        count = await books.database["goals"].count_documents({"_cls": "TriggerExclusiveGoal"})
        if count != self.result.goals.total():
            self.result.violations.append(
                f"{count} goals exist, and {self.result.goals.total()} were judged"
            )


def result_json(options: ChaosOptions, result: ChaosResult) -> str:
    """The whole result for machines."""
    return json.dumps(
        {
            "options": {
                "kills": options.kills,
                "seed": options.seed,
                "gateways": options.gateways,
                "streams": options.streams,
            },
            "kills": result.kills,
            "kills_per_minute": round(result.kills_per_minute, 1),
            "killed_at": dict(result.killed_at),
            "streams": result.streams,
            "goals": dict(result.goals),
            "commands_sent": result.asked,
            "commands_cut_off": result.unanswered,
            "events": result.told,
            "events_repeated": result.told_again,
            "refused_starts": result.refused_starts,
            "half_heard": result.half_heard,
            "longest_rest_s": round(result.longest_rest_s, 2),
            "elapsed_s": round(result.elapsed_s, 1),
            "violations": result.violations,
        },
        indent=2,
    )


__all__ = ["Chaos", "ChaosOptions", "ChaosResult", "result_json"]
