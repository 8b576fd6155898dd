"""Builders of facts, commands and occurrences: one plain case, and what a test wants different."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from statemachine.goal import Command, CommandName, GoalFacts, GoalState, Role
from statemachine.receivers import TRIGGER_EXCLUSIVE_GOAL, Occurrence, Signal

STREAMER = "anna"
VIEWER = "ben"
NOW = datetime(2026, 11, 22, 17, 25, 0, 123_000, UTC)
MILLISECOND = timedelta(milliseconds=1)

USER_OF: dict[Role, str | None] = {
    Role.STREAMER: STREAMER,
    Role.VIEWER: VIEWER,
    Role.TIMER: None,
    Role.SYSTEM: None,
}


def facts(state: GoalState = GoalState.INVITED, **different: Any) -> GoalFacts:
    """A goal of anna's Session that ben pays for, open for another minute."""
    plain = GoalFacts(
        state=state,
        streamer_id=STREAMER,
        viewer_id=VIEWER,
        amount_minor=500,
        prepaid_duration_s=30,
        expires_at=NOW + timedelta(seconds=60),
    )
    return replace(plain, **different)


def command(name: CommandName, role: Role) -> Command:
    """A command of the goal's own streamer or viewer, of the timer or of the system."""
    return Command(name, role, USER_OF[role])


def occurrence(signal: Signal = Signal.GOAL_ENDED, **different: Any) -> Occurrence:
    """The signal of an invitation that anna has agreed."""
    plain = Occurrence(
        signal=signal,
        event_id=f"{'a' * 24}:2:{signal}",
        goal_type=TRIGGER_EXCLUSIVE_GOAL,
        goal_id="a" * 24,
        session_id="b" * 24,
        streamer_id=STREAMER,
        viewer_id=VIEWER,
        breakdown=(VIEWER,),
        prepaid_duration_s=30,
        show_grace_s=60.0,
        refund_delay_s=65.0,
        at=NOW,
        exp=NOW,
        agreed_at=NOW,
        args={"goal_id": "a" * 24, "active": False},
    )
    return replace(plain, **different)
