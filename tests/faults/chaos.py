"""Gateways that are killed at random, again and again, while their clients go on as they would.

`duet bench chaos` runs it by the hour, a test for some seconds. Every stream is a run of its own
for the checker: it is judged, and forgotten, as soon as it has come to rest.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import httpx
from websockets.exceptions import WebSocketException

from persistence.faults import Step
from tests.e2e.books import Books
from tests.faults.checker import Timing, judge
from tests.faults.forked_gateway import DIED, CrashPoint, ForkedGateway
from tests.faults.history import History
from tests.faults.players import Act, Witness, ask, read_truth, see

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.gateway_process import Stores
    from tests.faults.history import Answered

# Deadlines so short that they come by themselves within a stream's life.
INVITATION_TTL_S: Final = 2.0
_REFUND_DELAY_S: Final = 1.0
_SHOW_GRACE_S: Final = 0.5
_PREPAID_S: Final = 1
SETTINGS: Final = {
    "lease_s": 1.0,
    "poll_interval_s": 0.05,
    "command_timeout_s": 1.0,
    "invitation_ttl_s": INVITATION_TTL_S,
    "refund_delay_s": _REFUND_DELAY_S,
    "show_grace_s": _SHOW_GRACE_S,
    "log_level": "warning",
}
# Processes set their clocks by the database's; on a busy machine that is this exact.
TIMING: Final = Timing(
    invitation_ttl_s=INVITATION_TTL_S,
    refund_delay_s=_REFUND_DELAY_S,
    show_s=_SHOW_GRACE_S + _PREPAID_S,
    clock_doubt_s=0.5,
)

_LONGEST_LIFE_S: Final = 0.6
_LONGEST_ABSENCE_S: Final = 1.0
# A process whose step does not come is killed where it is.
_STEP_WITHIN_S: Final = 1.5
_DEEPEST_STEP: Final = 25
_RETRY_AFTER_S: Final = 0.05
_REST_WITHIN_S: Final = 60.0
_REST_POLL_S: Final = 0.1
_MOST_ROUNDS: Final = 3
_UNANSWERED: Final = (*DIED, httpx.TimeoutException)


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """How much chaos.

    Attributes:
        kills: after so many no process is killed any more.
        seed: of everything that is random; what the operating system makes of it is not.
        gateways: processes, each killed and started again on its own.
        streams: at the same time, each with its viewers.
    """

    kills: int = 1000
    seed: int = 0
    gateways: int = 2
    streams: int = 6


@dataclass(slots=True)
class ChaosResult:
    """What came of it; `violations` empty is the verdict that everybody wants."""

    kills: int = 0
    killed_at: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    goals: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    unanswered: int = 0
    told: int = 0
    told_again: int = 0
    longest_rest_s: float = 0.0
    elapsed_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    @property
    def kills_per_minute(self) -> float:
        return self.kills / self.elapsed_s * 60 if self.elapsed_s else 0.0


class Stream:
    """One streamer, his viewers and what they do to each other, until he has had enough."""

    def __init__(self, chaos: Chaos, dice: random.Random) -> None:
        self._chaos = chaos
        self._dice = dice
        self.history = History()
        suffix = secrets.token_hex(5)
        self.streamer = f"s-{suffix}"
        self.viewers = [f"v{number}-{suffix}" for number in range(dice.randint(1, 3))]
        self.session_id = ""

    @property
    def channels(self) -> list[str]:
        streamer = self.streamer
        return [
            f"private-stream@{streamer}",
            f"presence-stream@{streamer}",
            *(f"private-user@{user_id}" for user_id in (streamer, *self.viewers)),
            *(f"presence-stream-viewer@{streamer}.preview.{viewer}" for viewer in self.viewers),
        ]

    async def play(self) -> None:
        """Some rounds of invitations; the stream may end, or simply go on without any."""
        await self._open()
        for _ in range(self._dice.randint(1, _MOST_ROUNDS)):
            await self._round()
            if self._dice.random() < 0.3:
                await self._look()
        if self._dice.random() < 0.6:
            await self._ask("close", self.streamer)

    async def _open(self) -> None:
        await self._chaos.witness.watch(self.history, self.channels)
        while True:
            try:
                response = await self._chaos.any_gateway().call(
                    "POST", "/sessions", user_id=self.streamer, role="streamer", body={}
                )
            except _UNANSWERED:
                await asyncio.sleep(_RETRY_AFTER_S)
                continue
            if response.status_code in {200, 201}:
                self.session_id = response.json()["id"]
                return

    async def _round(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            invites = [tasks.create_task(self._ask("invite", viewer)) for viewer in self.viewers]
        goals = {
            viewer: answer.goal["id"]
            for viewer, task in zip(self.viewers, invites, strict=True)
            if (answer := task.result()).ok and answer.goal is not None
        }
        async with asyncio.TaskGroup() as tasks:
            for viewer, goal_id in goals.items():
                tasks.create_task(self._answer(viewer, goal_id))

    async def _answer(self, viewer: str, goal_id: str) -> None:
        """What becomes of one invitation: often two things at once."""
        choice = self._dice.random()
        if choice < 0.55:
            answer = await self._ask("agree", self.streamer, goal_id)
            if answer.ok and self._dice.random() < 0.75:
                await self._show(viewer, goal_id)
        elif choice < 0.7:
            await self._ask("disagree", self.streamer, goal_id)
        elif choice < 0.8:
            await self._ask("withdraw", viewer, goal_id)
        elif choice < 0.9:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._ask("withdraw", viewer, goal_id))
                tasks.create_task(self._ask("agree", self.streamer, goal_id))
        else:
            await asyncio.sleep(INVITATION_TTL_S)

    async def _show(self, viewer: str, goal_id: str) -> None:
        started = await self._ask("start", self.streamer, goal_id)
        if started.ok and self._dice.random() < 0.7:
            ender = self._dice.choice([viewer, self.streamer])
            await self._ask("finish", ender, goal_id)

    async def _ask(self, command: str, user_id: str, goal_id: str | None = None) -> Answered:
        """Sends a command, to any gateway and under one `request_id`, until it is answered."""
        act = Act(
            command,
            user_id,
            "streamer" if user_id == self.streamer else "viewer",
            self.session_id,
            goal_id,
            None if command == "close" else secrets.token_hex(8),
            prepaid_s=_PREPAID_S,
        )
        while True:
            try:
                answer = await ask(self.history, self._chaos.any_gateway(), act)
            except httpx.TimeoutException:
                answer = None
            if answer is not None and not answer.retryable:
                return answer
            await asyncio.sleep(_RETRY_AFTER_S)

    async def _look(self) -> None:
        """Connects a socket for its snapshot, as long as the gateway lets it."""
        user_id = self._dice.choice([self.streamer, *self.viewers])
        role = "streamer" if user_id == self.streamer else "viewer"
        try:
            await see(self.history, self._chaos.any_gateway(), user_id, role)
        except (OSError, EOFError, AssertionError, WebSocketException):
            # It died over the handshake, or before it had sent everything.
            return


class Chaos:
    """One run: gateways, the hands that kill them, the streams in front."""

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
        self.witness = Witness(stores)

    def any_gateway(self) -> ForkedGateway:
        """One of those that live, if any does: what a load balancer would pick."""
        living = [gateway for gateway in self._gateways if gateway.is_running]
        return self._dice.choice(living or self._gateways)

    async def run(self) -> ChaosResult:
        """Kills until it has killed enough, then lets everything come to rest."""
        async with AsyncExitStack() as stack:
            books = await stack.enter_async_context(Books(self._stores))
            await stack.enter_async_context(self.witness)
            for _ in range(self._options.gateways):
                gateway = ForkedGateway(self._stores, self._apps_file, self._log, SETTINGS)
                self._gateways.append(await stack.enter_async_context(gateway))
                await gateway.start()
            started_at_s = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                killers = [
                    tasks.create_task(self._kill_again_and_again(gateway))
                    for gateway in self._gateways
                ]
                for _ in range(self._options.streams):
                    tasks.create_task(self._stream_after_stream(books, killers))
                await asyncio.wait(killers)
                self.result.elapsed_s = time.monotonic() - started_at_s
            await self._look_for_strays(books)
            if self.witness.gaps:
                self.result.violations.append("the witness lost Redis and may have missed events")
        return self.result

    async def _kill_again_and_again(self, gateway: ForkedGateway) -> None:
        while self.result.kills < self._options.kills:
            point = self._point()
            if not await self._start(gateway, point):
                self._count("while starting")
                self._look_at_start(gateway)
                continue
            if point is None:
                await asyncio.sleep(self._dice.uniform(0, _LONGEST_LIFE_S))
            elif await gateway.until_dead(_STEP_WITHIN_S):
                self._count(point.step)
                continue
            await gateway.kill()
            self._count("anywhere")
            if self._dice.random() < 0.2:
                await asyncio.sleep(self._dice.uniform(0, _LONGEST_ABSENCE_S))
        if not await self._start(gateway, None):
            self._look_at_start(gateway)

    def _look_at_start(self, gateway: ForkedGateway) -> None:
        """A process that ends before it is ready was killed; anything else is a fault."""
        assert gateway.process is not None
        if gateway.process.exitcode != -signal.SIGKILL:
            self.result.violations.append(f"{gateway.name} did not start: {gateway.log_text()}")

    async def _start(self, gateway: ForkedGateway, point: CrashPoint | None) -> bool:
        """Starts it, unless it still runs; false when it died before it was ready."""
        if gateway.is_running:
            return True
        await gateway.launch(point)
        return await gateway.until_ready()

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
        while not all(killer.done() for killer in killers):
            stream = Stream(self, random.Random(self._dice.random()))
            await stream.play()
            await self._judge(books, stream)

    async def _judge(self, books: Books, stream: Stream) -> None:
        """Waits until the stream has come to rest, and has it judged."""
        began_at_s = time.monotonic()
        give_up_at_s = began_at_s + _REST_WITHIN_S
        while True:
            truth = await read_truth(books, [stream.session_id])
            if all(row["state"] == "ended" and not row.get("outbox") for row in truth.goals):
                break
            if time.monotonic() > give_up_at_s:
                break
            await asyncio.sleep(_REST_POLL_S)
        await self.witness.barrier()
        history, result = stream.history, self.result
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
            "longest_rest_s": round(result.longest_rest_s, 2),
            "elapsed_s": round(result.elapsed_s, 1),
            "violations": result.violations,
        },
        indent=2,
    )


__all__ = ["Chaos", "ChaosOptions", "ChaosResult", "result_json"]
