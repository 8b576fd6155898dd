"""What a command tells: the signals of its goals, and how the outbox keeps them. Pure."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Final

from persistence.views import goal_view
from statemachine.goal import CommandName, Decision, GoalState, Limits, Movement
from statemachine.instants import rfc3339
from statemachine.receivers import EXCLUSIVE_GOAL, TRIGGER_EXCLUSIVE_GOAL, Occurrence, Signal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from persistence.documents import Goal, OutboxEntry
    from persistence.rows import Row

_SIGNAL_OF_MOVEMENT: Final = {
    Movement.HOLD: Signal.ESCROW_HELD,
    Movement.CAPTURE: Signal.ESCROW_CAPTURED,
    Movement.RELEASE: Signal.ESCROW_RELEASED,
}
_REASON_OF_MOVEMENT: Final = {Movement.HOLD: "invited", Movement.CAPTURE: "started"}


class Occurrences:
    """Makes the occurrences of each command's signals."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def invited(self, goal: Goal, decision: Decision, now: datetime) -> list[Occurrence]:
        """The signals of a new invitation: the goal is added, its escrow held."""
        added = self._occurrence(Signal.GOAL_ADDED, goal, now, goal_view(goal))
        return [added, *self._of_escrow(goal, decision, now)]

    def of(self, before: Goal, after: Goal, decision: Decision, now: datetime) -> list[Occurrence]:
        """The signals of a decision on an existing goal, in order."""
        found: list[Occurrence] = []
        if decision.deactivates:
            args = goal_ended_args(before, after)
            found.append(self._occurrence(Signal.GOAL_ENDED, after, now, args))
        if decision.command in (CommandName.START, CommandName.FINISH):
            starts = decision.command is CommandName.START
            signal = Signal.EXCLUSIVE_STARTED if starts else Signal.EXCLUSIVE_ENDED
            args = {
                "session_id": str(after.conditions.session_id),
                "goal_id": str(after.id),
                "exclusive_to": after.conditions.exclusive_to,
            }
            found.append(self._occurrence(signal, after, now, args, EXCLUSIVE_GOAL))
            if not starts:
                # The show is a goal of its own, and no longer active.
                ends_at = min(before.due_at or now, now)
                show = show_of(after, ends_at, now)
                ended = goal_ended_args(show, show)
                found.append(self._occurrence(Signal.GOAL_ENDED, after, now, ended, EXCLUSIVE_GOAL))
        return [*found, *self._of_escrow(after, decision, now)]

    def _of_escrow(self, goal: Goal, decision: Decision, now: datetime) -> list[Occurrence]:
        if decision.movement is None:
            return []
        args = {"goal_id": str(goal.id), "amount": goal.amount, "reason": reason_of(decision)}
        return [self._occurrence(_SIGNAL_OF_MOVEMENT[decision.movement], goal, now, args)]

    def _occurrence(
        self,
        signal: Signal,
        goal: Goal,
        now: datetime,
        args: Mapping[str, object],
        goal_type: str = TRIGGER_EXCLUSIVE_GOAL,
    ) -> Occurrence:
        return Occurrence(
            signal=signal,
            event_id=f"{goal.id}:{goal.version}:{signal}",
            goal_type=goal_type,
            goal_id=str(goal.id),
            session_id=str(goal.conditions.session_id),
            streamer_id=goal.metadata.user_id,
            viewer_id=goal.conditions.exclusive_to,
            breakdown=tuple(goal.breakdown),
            prepaid_duration_s=goal.metadata.prepaid_duration,
            show_grace_s=self._limits.show_grace_s,
            refund_delay_s=self._limits.refund_delay_s,
            at=now,
            exp=goal.exp,
            agreed_at=goal.metadata.agreed if signal is Signal.GOAL_ENDED else None,
            args=args,
        )


_OCCURRENCE_FIELDS: Final = tuple(one.name for one in fields(Occurrence))


def kept(occurrence: Occurrence) -> Row:
    """An occurrence as the outbox keeps it; nothing in it changes later, so nothing is copied."""
    row = {name: getattr(occurrence, name) for name in _OCCURRENCE_FIELDS}
    row["signal"] = occurrence.signal.value
    return row


def occurrence_of(entry: OutboxEntry) -> Occurrence:
    """Reads an outbox entry back."""
    # A newer version may have written a field that this one does not know.
    known = Occurrence.__dataclass_fields__
    values = {name: value for name, value in entry.occurrence.items() if name in known}
    values["signal"] = Signal(values["signal"])
    values["breakdown"] = tuple(values["breakdown"])
    return Occurrence(**values)


def goal_ended_args(before: Goal, after: Goal) -> Row:
    """The arguments of `goal.ended`, all of them.

    Source: requirements, Task `deactivate_goal`.
    """
    metadata: Row = {
        "user_id": before.metadata.user_id,
        "prepaid_duration": before.metadata.prepaid_duration,
    }
    if after.metadata.agreed is not None:
        metadata["agreed"] = rfc3339(after.metadata.agreed)
    return {
        "goal_id": str(before.id),
        "_cls": before.cls,
        "active": False,
        "progress": 1,
        "levels": [],
        "conditions": {
            "session_id": str(before.conditions.session_id),
            "exclusive_to": before.conditions.exclusive_to,
        },
        "context": {
            "type": before.context.type,
            "exclusive_to": before.context.exclusive_to,
        },
        "exp": rfc3339(after.exp),
        "triggerer": after.triggerer,
        "metadata": metadata,
    }


def show_of(goal: Goal, exp: datetime, now: datetime) -> Goal:
    """The ExclusiveGoal that follows an agreed invitation, as it is at `now`."""
    show: Goal = goal.model_copy(
        update={
            "id": goal.exclusive_goal,
            "cls": EXCLUSIVE_GOAL,
            "active": goal.state is GoalState.LIVE,
            "context": goal.context.model_copy(update={"type": "exclusive"}),
            "exp": exp,
            "exclusive_goal": None,
            "trigger_goal": goal.id,
            "created_at": now,
            "due_at": None,
            "due_command": None,
            "outbox": [],
            "outbox_due_at": None,
            "outbox_owner": None,
            "held_by": None,
            "version": 1,
        },
    )
    return show


def reason_of(decision: Decision) -> str:
    """Why a decision moves the money, as the ledger and the viewer are told."""
    assert decision.movement is not None
    if decision.reason is not None:
        return decision.reason.value
    return _REASON_OF_MOVEMENT[decision.movement]
