"""What the clients of one run asked, were answered and were told, and what the database holds.

All instants are readings of one monotonic clock, so they can be compared across processes' lives.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

Row = dict[str, Any]

TIMER = "timer"


@dataclass(frozen=True, slots=True)
class Asked:
    """A command on its way; whether it arrives, nobody knows.

    Attributes:
        ask: its number in the history; a repetition is another ask with the same `request_id`.
        user_id: who asks; `TIMER` when a test let a deadline come.
        session_id: of an invitation and of the end of a Session; else none.
        amount: of an invitation; none where the run does not say.
    """

    ask: int
    at_s: float
    user_id: str
    command: str
    request_id: str | None = None
    goal_id: str | None = None
    session_id: str | None = None
    amount: int | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """What an ask was answered."""

    ask: int
    at_s: float
    ok: bool
    goal: Row | None = None
    code: str | None = None
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """One push that a listener received."""

    at_s: float
    listener: str
    channel: str
    event: str
    data: Any

    @property
    def event_id(self) -> str | None:
        """What tells a repetition; none for pushes that come from no commit."""
        return self.data.get("event_id") if isinstance(self.data, dict) else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One `goal.snapshot`; `final` when everything had settled before it was asked for.

    Attributes:
        as_of: what it says of its own age, by the database's clock.
    """

    at_s: float
    asked_at_s: float
    user_id: str
    goals: tuple[Row, ...]
    final: bool
    as_of: datetime


@dataclass(slots=True)
class History:
    """The record of one run.

    Attributes:
        watched: (listener, channel) pairs that were heard from before the first command to the end
            without a gap; only of those it is known what never came.
    """

    asked: list[Asked] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    watched: set[tuple[str, str]] = field(default_factory=set)

    def ask(
        self,
        user_id: str,
        command: str,
        *,
        request_id: str | None = None,
        goal_id: str | None = None,
        session_id: str | None = None,
        amount: int | None = None,
    ) -> int:
        """Writes down that a command is being sent; returns its number."""
        number = len(self.asked)
        self.asked.append(
            Asked(
                number, time.monotonic(), user_id, command, request_id, goal_id, session_id, amount
            )
        )
        return number

    def answer(
        self,
        ask: int,
        *,
        ok: bool,
        goal: Row | None = None,
        code: str | None = None,
        retryable: bool = False,
    ) -> None:
        """Writes down what an ask was answered."""
        self.answered.append(Answered(ask, time.monotonic(), ok, goal, code, retryable))

    def hear(self, listener: str, channel: str, event: str, data: Any) -> None:
        """Writes down a push."""
        self.heard.append(Heard(time.monotonic(), listener, channel, event, data))

    def see(self, user_id: str, asked_at_s: float, said: Row, *, final: bool = False) -> None:
        """Writes down what a snapshot says."""
        as_of = datetime.fromisoformat(said["as_of"])
        self.snapshots.append(
            Snapshot(time.monotonic(), asked_at_s, user_id, tuple(said["goals"]), final, as_of)
        )

    def watch(self, listener: str, channels: Iterable[str]) -> None:
        """Says that a listener misses nothing on these channels from here on."""
        self.watched |= {(listener, channel) for channel in channels}


@dataclass(slots=True)
class Truth:
    """What MongoDB holds once everything has settled: whole documents."""

    goals: list[Row] = field(default_factory=list)
    sessions: list[Row] = field(default_factory=list)
    postings: list[Row] = field(default_factory=list)
    records: list[Row] = field(default_factory=list)
