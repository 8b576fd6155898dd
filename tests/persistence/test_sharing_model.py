"""Sharing under every interleaving: callers come and leave, goes end well, badly or not at all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import strategies as st

from persistence import sharing
from persistence.errors import StoreOverloaded, StoreUnavailable
from persistence.sharing import Apart, Shared
from tests.persistence.test_sharing import Line

if TYPE_CHECKING:
    from collections.abc import Sequence

AT_ONCE = 2
AT_MOST = 16
# Of a go: done, refused for the company it has, failed, or without a place.
ENDS = ("done", "apart", "failed", "overloaded")
TURNS = 30

steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 24)),
        st.tuples(st.just("leave"), st.integers(0, 99)),
        st.tuples(st.sampled_from(ENDS), st.integers(0, 99)),
        st.tuples(st.just("turn"), st.integers(1, 4)),
        # Both in the same turn of the loop.
        st.tuples(st.just("end and leave"), st.integers(0, 99)),
    ),
    max_size=40,
)


class Failed(Exception):
    """What a go that the test ends so raises."""


@dataclass
class Go:
    items: list[int]
    ends: asyncio.Future[str]


@dataclass
class Play:
    """The goes, and what came of each."""

    under_way: list[Go] = field(default_factory=list)
    queue: Line | None = None
    done: list[int] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    callers: list[asyncio.Task[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = Shared(self.together, AT_ONCE, self.queue)

    async def together(self, items: Sequence[int]) -> list[int]:
        go = Go(list(items), asyncio.get_running_loop().create_future())
        assert len(items) <= AT_MOST
        self.under_way.append(go)
        try:
            end = await go.ends
        except asyncio.CancelledError:
            self.failed.update(items)
            raise
        finally:
            self.under_way.remove(go)
        if end == "apart" and len(items) > 1:
            raise Apart
        if end == "failed":
            self.failed.update(items)
            raise Failed
        if end == "overloaded":
            raise StoreOverloaded
        self.done += items
        return go.items

    def end(self, which: int, how: str) -> None:
        running = [go for go in self.under_way if not go.ends.done()]
        if running:
            running[which % len(running)].ends.set_result(how)

    def leave(self, which: int) -> None:
        if self.callers:
            self.callers[which % len(self.callers)].cancel()

    async def step(self, what: str, number: int) -> None:
        match what:
            case "ask":
                for _ in range(number):
                    ask = self.shared.do(len(self.callers))
                    self.callers.append(asyncio.create_task(ask))
            case "leave":
                self.leave(number)
            case "turn":
                for _ in range(number):
                    await asyncio.sleep(0)
            case "end and leave":
                self.end(number, "done")
                asyncio.get_running_loop().call_soon(self.leave, number // 2)
            case _:
                self.end(number, what)


async def turned() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def play_out(
    script: list[tuple[str, int]], *, patient: bool, most: int | None = None
) -> None:
    patience_s = 3600.0 if patient else 0.0
    play = Play(queue=None if most is None else Line(most, patience_s))
    for what, number in script:
        await play.step(what, number)
    await turned()
    waiting = sum(not caller.done() for caller in play.callers)
    at_work = sum(len(go.items) for go in play.under_way)
    # Nobody waits while there is room, nor at all when his patience is over.
    if waiting > at_work:
        assert patient
        assert len(play.under_way) >= AT_ONCE
    while play.under_way:
        play.end(0, "done")
        await turned()
    for item, caller in enumerate(play.callers):
        assert caller.done(), f"{item} waits for ever"
        if caller.cancelled():
            continue
        match caller.exception():
            case None:
                assert item in caller.result()
                assert item in play.done
            case StoreUnavailable() | Failed():
                assert item in play.failed
            case StoreOverloaded():
                assert item not in play.done
            case other:
                raise AssertionError(other)
    assert len(play.done) == len(set(play.done))
    assert play.queue is None or play.queue.waiting == 0
    await as_before(play, patient=patient)


async def as_before(play: Play, *, patient: bool) -> None:
    """Sees that nobody is counted any more who is gone: the next ones share as the first would."""
    if play.queue is not None:
        play.queue.most = 25
    again = {1: [1], 24: [12, 12], 25: [13, 12]} if patient else {1: [1]}
    for count, sizes in again.items():
        last = [asyncio.create_task(play.shared.do(-number)) for number in range(count)]
        await turned()
        assert [len(go.items) for go in play.under_way] == sizes
        while play.under_way:
            play.end(0, "done")
            await turned()
        assert all(task.done() and task.exception() is None for task in last)


# What was found once: he who was given the go for the last ones left in the same turn, and nobody
# told the others again that their patience was over.
@hypothesis.example(
    script=[("ask", number) for number in (1, 1, 1, 3, 12)]
    + [("turn", 1), ("turn", 1), ("leave", 61)],
    patient=False,
    most=None,
)
@hypothesis.given(steps, st.booleans(), st.one_of(st.none(), st.integers(1, 20)))
def test_each_item_is_done_once_or_its_caller_told_and_nobody_waits_for_ever(
    script: list[tuple[str, int]], patient: bool, most: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_PATIENCE_S", 3600.0 if patient else 0.0)
        asyncio.run(play_out(script, patient=patient, most=most))
