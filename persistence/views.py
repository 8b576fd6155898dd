"""Documents as they appear outside: JSON-ready, under the requirements' field names.

`id` is 24 hex digits, instants are RFC 3339 in UTC with milliseconds. What only Duet
needs (outbox, leases) does not appear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bson import Int64

from statemachine.instants import rfc3339

if TYPE_CHECKING:
    from datetime import datetime

    from persistence.documents import Goal, Pair, Session, ViewerPass

View = dict[str, Any]


def goal_view(goal: Goal) -> View:
    """A goal as a reply, a snapshot or `goal.added` shows it."""
    metadata: View = {
        "user_id": goal.metadata.user_id,
        "prepaid_duration": goal.metadata.prepaid_duration,
    }
    if goal.metadata.agreed is not None:
        metadata["agreed"] = rfc3339(goal.metadata.agreed)
    view: View = {
        "id": str(goal.id),
        "_cls": goal.cls,
        "active": goal.active,
        "progress": _plain(goal.progress),
        "levels": goal.levels,
        "conditions": {
            "session_id": str(goal.conditions.session_id),
            "exclusive_to": goal.conditions.exclusive_to,
        },
        "context": {"type": goal.context.type, "exclusive_to": goal.context.exclusive_to},
        "exp": rfc3339(goal.exp),
        "triggerer": goal.triggerer,
        "metadata": metadata,
        "breakdown": goal.breakdown,
        "amount": goal.amount,
        "state": goal.state.value,
        "reason": goal.reason.value if goal.reason else None,
        "outcome": goal.outcome.value if goal.outcome else None,
        "exclusive_goal": str(goal.exclusive_goal) if goal.exclusive_goal else None,
        "due_at": _instant(goal.due_at),
        "created_at": rfc3339(goal.created_at),
        "version": goal.version,
    }
    if goal.trigger_goal is not None:
        view["trigger_goal"] = str(goal.trigger_goal)
        view["rtc_sources"] = as_json(goal.rtc_sources)
    return view


def session_view(session: Session) -> View:
    """A Session as its streamer sees it."""
    return {
        "id": str(session.id),
        "user": {"id": session.user.id},
        "active": session.active,
        "status": {"exclusive_to": session.status.exclusive_to},
        "exclusive_goal_pairs": {
            viewer: _pair_view(pair) for viewer, pair in session.exclusive_goal_pairs.items()
        },
        "viewers": {viewer: pass_view(entry) for viewer, entry in session.viewers.items()},
        "rtc_sources": as_json(session.rtc_sources),
        "created_at": rfc3339(session.created_at),
        "ended_at": _instant(session.ended_at),
        "version": session.version,
    }


def pass_view(entry: ViewerPass) -> View:
    """When a viewer may watch."""
    return {
        "nbf": rfc3339(entry.nbf),
        "duration": _plain(entry.duration),
        "exp": rfc3339(entry.exp),
    }


def as_json(value: Any) -> Any:
    """A value without a schema, read from MongoDB, as it was before it was written.

    Whole numbers of more than 31 bits come back as a type of the driver's own, which no encoder
    of JSON knows.
    """
    if isinstance(value, dict):
        return {name: as_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_json(inner) for inner in value]
    return int(value) if isinstance(value, Int64) else value


def _pair_view(pair: Pair) -> View:
    view: View = {"trigger_exclusive_goal": str(pair.trigger_exclusive_goal)}
    if pair.trigger_exclusive_goal_agreed is not None:
        view["trigger_exclusive_goal_agreed"] = rfc3339(pair.trigger_exclusive_goal_agreed)
    if pair.trigger_exclusive_goal_ended is not None:
        view["trigger_exclusive_goal_ended"] = pair.trigger_exclusive_goal_ended
    if pair.exclusive_goal is not None:
        view["exclusive_goal"] = str(pair.exclusive_goal)
    if pair.exclusive_goal_ended is not None:
        view["exclusive_goal_ended"] = pair.exclusive_goal_ended
    return view


def _instant(at: datetime | None) -> str | None:
    return None if at is None else rfc3339(at)


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number
