"""What a command reads of a Session: what concerns its own viewer.

A popular stream's Session has a thousand pairs, and each of the thousand commands on them would
carry, decode and validate them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from persistence.documents import Session

if TYPE_CHECKING:
    from collections.abc import Iterable

    from persistence.store import Row

_WHOLE: Final = (
    "user",
    "active",
    "status",
    "rtc_sources",
    "created_at",
    "ended_at",
    "version",
    "schema_version",
)


def of_invitations(viewers: Iterable[str]) -> list[str]:
    """The projection by which invitations are weighed: the viewers' own pairs and passes."""
    parts = ("exclusive_goal_pairs", "viewers")
    return [*_WHOLE, *(f"{part}.{viewer_id}" for viewer_id in viewers for part in parts)]


def of_goal(viewer_id: str) -> Row:
    """The projection of `with_session`, for a Session that is read on its own."""
    return dict.fromkeys(_WHOLE, True) | _own("", {"$literal": viewer_id})


def with_session() -> list[Row]:
    """The stages that put its Session beside a goal, as `session`.

    In it stand the viewer's own pass and pair, and of the other pairs one, if there is any: there
    is something to clean up then, and the transaction looks for what.
    """
    return [
        {
            "$lookup": {
                "from": Session.Settings.name,
                "localField": "conditions.session_id",
                "foreignField": "_id",
                "as": "session",
            }
        },
        # Unwound, the join costs MongoDB two thirds of what it costs with a list of one.
        {"$unwind": "$session"},
        {"$set": _own("session.", "$conditions.exclusive_to")},
    ]


def _own(prefix: str, viewer_id: Any) -> Row:
    pairs = _entries(f"${prefix}exclusive_goal_pairs")
    return {
        f"{prefix}exclusive_goal_pairs": {
            "$arrayToObject": {
                "$concatArrays": [
                    _filtered(pairs, {"$eq": ["$$this.k", viewer_id]}),
                    {"$slice": [_filtered(pairs, {"$ne": ["$$this.k", viewer_id]}), 1]},
                ]
            }
        },
        f"{prefix}viewers": {
            "$arrayToObject": _filtered(
                _entries(f"${prefix}viewers"), {"$eq": ["$$this.k", viewer_id]}
            )
        },
    }


def _entries(path: str) -> Row:
    return {"$objectToArray": {"$ifNull": [path, {}]}}


def _filtered(entries: Row, condition: Row) -> Row:
    return {"$filter": {"input": entries, "cond": condition}}
