"""The shape `agree`: streamers agree on their sockets, viewers hear of it on theirs.

Three rows: at a fixed rate, where the latency is what counts; flat out over distinct sessions,
where the transactions a second count; and, when asked for, one hot session whose viewers all
invite at once and are all answered at once. Invitations are made before the clock runs.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.bench.crowd import crowd_of
from gateway.bench.parties import Answer, Pair, Parties, Party, each, invitation, parties_of, show
from gateway.bench.results import Row, measures_of, percentile
from gateway.bench.stage import no_bar
from gateway.bench.watch import Watch
from gateway.bench.witnesses import Witnesses

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.bench.results import Figures, Report
    from gateway.bench.stage import Plan, Stage
    from gateway.bench.target import GatewayTarget
    from gateway.bench.watch import Cost

_PUSH_DEADLINE_S: Final = 5.0
# Sent later than this after its turn, an agree says more about the generator than the gateway.
_LATE_S: Final = 0.02


class AgreeOptions(msgspec.Struct, frozen=True):
    """The load.

    Attributes:
        rate: Agrees a second of the row with a fixed rate.
        in_flight: Unanswered agrees of the row that runs flat out.
        pairs: Agrees of one repeat that runs flat out, each in a session of its own.
        callers: Viewers of the hot session; 0 leaves that row out.
        listeners: Sockets that get events while the row with a fixed rate is measured.
        events: A second, to each of them.
        processes: Processes that the listeners are spread over.
    """

    rate: float
    in_flight: int
    pairs: int
    callers: int
    listeners: int = 0
    events: float = 10
    processes: int = 1


def pairs_needed(plan: Plan, options: AgreeOptions) -> int:
    """How many streamers with a viewer each the largest row needs."""
    return max(
        options.pairs, _paced_count(plan.seconds, options), _paced_count(plan.warmup_s, options)
    )


def _paced_count(seconds: float, options: AgreeOptions) -> int:
    return max(1, math.ceil(options.rate * seconds)) if seconds else 0


class Agreed:
    """The latencies of one repeat's agrees.

    Attributes:
        retries: How often an agree was sent again, because it was refused for now.
        late_s: The longest that an agree was sent after its turn.
    """

    def __init__(self) -> None:
        self.replies_s: list[float] = []
        self.pushes_s: list[float] = []
        self.late_s = 0.0
        self.retries = 0

    async def agree(self, pair: Pair) -> None:
        """Agrees on a pair's invitation, and waits for the reply and the viewer's push."""
        sent_at_s = time.monotonic()
        answer = await pair.streamer.command("client-goal.agree", goal_id=pair.goal_id)
        self.replies_s.append(answer.latency_s)
        self.retries += answer.retries
        try:
            async with asyncio.timeout(_PUSH_DEADLINE_S):
                await pair.authorized.wait()
        except TimeoutError:
            return  # lost: it is missing among `pushes_s`
        self.pushes_s.append(pair.authorized_at_s - sent_at_s)

    async def paced(self, pairs: Sequence[Pair], rate: float) -> None:
        """Agrees on all pairs, evenly spread, without waiting for the one before."""
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for index, pair in enumerate(pairs):
                turn_s = started_s + index / rate
                await asyncio.sleep(turn_s - time.monotonic())
                self.late_s = max(self.late_s, time.monotonic() - turn_s)
                group.create_task(self.agree(pair))

    async def flat_out(self, pairs: Sequence[Pair], in_flight: int) -> None:
        """Agrees on all pairs, the next as soon as one of `in_flight` is done."""
        await each([partial(self.agree, pair) for pair in pairs], no_bar, in_flight)


def repeat_of(cost: Cost, transactions: int, found: Figures) -> Figures:
    """What was found, with what it cost."""
    return [
        ("transactions/s", transactions / cost.elapsed_s, 1),
        *found,
        ("server CPU ms/transaction", cost.server_cpu_s / transactions * 1e3, 2),
        *cost.figures(),
    ]


async def run(target: GatewayTarget, stage: Stage, options: AgreeOptions) -> Report:
    """Runs the shape.

    Raises:
        BenchError: It can't be measured; a lost push is no error, it is in the report.
    """
    plan = stage.plan
    async with parties_of(target) as parties, AsyncExitStack() as stack:
        rows = AgreeRows(target, stage, options, parties)
        await rows.open(pairs_needed(plan, options), stack)
        done = [await rows.paced(), await rows.flat_out()]
        if options.callers:
            done.append(await rows.hot())
    ratio = rows.delivered / rows.expected
    return stage.report("agree", target.name, options, done, ratio)


class AgreeRows:
    """The rows of one run, over the same streamers and viewers.

    Attributes:
        expected: Agrees that were answered in all repeats, and events to the listeners.
        delivered: Those of which the viewer, or the listener, heard.
    """

    def __init__(
        self, target: GatewayTarget, stage: Stage, options: AgreeOptions, parties: Parties
    ) -> None:
        self._target = target
        self._stage = stage
        self._options = options
        self._parties = parties
        self._pairs: list[Pair] = []
        self._listeners: Witnesses | None = None
        self.expected = 0
        self.delivered = 0

    async def open(self, pairs: int, stack: AsyncExitStack) -> None:
        """Connects everybody and lets the viewers invite; listeners leave with the stack."""
        options = self._options
        if options.listeners:
            crowd = await stack.enter_async_context(crowd_of(options.processes))
            self._listeners = Witnesses(self._target, crowd, options.listeners, options.events)
            await self._listeners.open(stack, self._stage.bar("listeners", options.listeners))
        advance = self._stage.bar("inviting", pairs)
        self._pairs = await each([self._parties.pair] * pairs, advance)

    async def _measured(self, row: str, pairs: Sequence[Pair], rate: float | None) -> Figures:
        """Agrees on these pairs, at a rate or flat out, and lets them invite again."""
        agreed = Agreed()
        watch = Watch(self._target)
        witnessed = None
        if rate is None:
            await agreed.flat_out(pairs, self._options.in_flight)
        elif self._listeners is None:
            await agreed.paced(pairs, rate)
        else:
            async with asyncio.TaskGroup() as group:
                agreeing = group.create_task(agreed.paced(pairs, rate))
                witnessed = await self._listeners.during(agreeing)
        if agreed.late_s > _LATE_S:
            self._stage.doubts.add(f"{row}: an agree was sent {agreed.late_s * 1e3:.0f} ms late")
        found = _latencies(agreed)
        if witnessed is not None:
            found += witnessed.figures()
            self.expected += witnessed.expected
            self.delivered += witnessed.received
        cost = watch.cost(() if witnessed is None else witnessed.members_cpu_s)
        cost.doubt(self._stage, row)
        self.expected += len(agreed.replies_s)
        self.delivered += len(agreed.pushes_s)
        with self._stage.passing_bar("next round", len(pairs)) as advance:
            await each([pair.play_and_invite for pair in pairs], advance)
        return repeat_of(cost, len(pairs), found)

    async def paced(self) -> Row:
        """Agrees at the fixed rate."""
        plan, rate = self._stage.plan, self._options.rate
        name = f"{rate:g} a second"
        warmup = self._pairs[: _paced_count(plan.warmup_s, self._options)]
        pairs = self._pairs[: _paced_count(plan.seconds, self._options)]
        return await self._row(name, warmup, pairs, rate)

    async def flat_out(self) -> Row:
        """Agrees as fast as the gateway answers."""
        pairs = self._pairs[: self._options.pairs]
        warmup = pairs[: self._options.in_flight] if self._stage.plan.warmup_s else []
        return await self._row("flat out", warmup, pairs, None)

    async def _row(
        self, name: str, warmup: Sequence[Pair], pairs: Sequence[Pair], rate: float | None
    ) -> Row:
        advance = self._stage.bar(name, self._stage.plan.repeats)
        if warmup:
            await self._measured(name, warmup, rate)
        repeats = []
        for _ in range(self._stage.plan.repeats):
            repeats.append(await self._measured(name, pairs, rate))
            advance(1)
        return Row(name, measures_of(repeats))

    async def hot(self) -> Row:
        """Everybody on one session: all invite at once, all are answered at once."""
        plan, callers = self._stage.plan, self._options.callers
        advance = self._stage.bar("hot session", plan.repeats)
        streamer = await self._parties.party("streamer")
        session_id = await self._parties.session(streamer)
        viewers = await each([partial(self._parties.party, "viewer")] * callers, no_bar)
        if plan.warmup_s:
            await hot_round(streamer, viewers, session_id)
        repeats = []
        for _ in range(plan.repeats):
            watch = Watch(self._target)
            until_s = time.monotonic() + plan.seconds
            answers = await hot_round(streamer, viewers, session_id)
            while time.monotonic() < until_s:
                answers += await hot_round(streamer, viewers, session_id)
            latencies_s = [answer.latency_s for answer in answers]
            name = f"hot, {callers} callers"
            cost = watch.cost()
            cost.doubt(self._stage, name)
            found: Figures = [
                ("reply p50 ms", percentile(latencies_s, 50) * 1e3, 2),
                ("reply p99 ms", percentile(latencies_s, 99) * 1e3, 2),
                ("retries", sum(answer.retries for answer in answers), 0),
            ]
            repeats.append(repeat_of(cost, len(answers), found))
            advance(1)
        return Row(f"hot, {callers} callers", measures_of(repeats))


async def hot_round(streamer: Party, viewers: Sequence[Party], session_id: str) -> list[Answer]:
    """One round on the hot session; every command in it is a transaction on the same document.

    The streamer disagrees with all but one and agrees with that one last: an agree would supersede
    the other invitations, and then their answers were refusals without a transaction.

    Returns:
        The answer to each command, the show's start and finish among them.
    """
    invited = await _at_once([partial(invitation, viewer, session_id) for viewer in viewers])
    goal_ids = [answer.goal_id for answer in invited]
    refused = await _at_once(
        [
            partial(streamer.command, "client-goal.disagree", goal_id=goal_id)
            for goal_id in goal_ids[1:]
        ]
    )
    agreed = await streamer.command("client-goal.agree", goal_id=goal_ids[0])
    shown = await show(streamer, goal_ids[0])
    return [*invited, *refused, agreed, *shown]


async def _at_once(works: Sequence[Callable[[], Awaitable[Answer]]]) -> list[Answer]:
    return await each(works, no_bar, len(works))


def _latencies(agreed: Agreed) -> Figures:
    return [
        ("authorized p50 ms", percentile(agreed.pushes_s, 50) * 1e3, 2),
        ("authorized p99 ms", percentile(agreed.pushes_s, 99) * 1e3, 2),
        ("reply p50 ms", percentile(agreed.replies_s, 50) * 1e3, 2),
        ("reply p99 ms", percentile(agreed.replies_s, 99) * 1e3, 2),
        ("retries", agreed.retries, 0),
    ]
