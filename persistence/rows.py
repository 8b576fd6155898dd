"""Documents as MongoDB keeps them, and the ids by which they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bson import ObjectId
from bson.errors import InvalidId

if TYPE_CHECKING:
    from persistence.documents import Goal

Row = dict[str, Any]


def object_id(text: str) -> ObjectId | None:
    """Reads 24 hex digits; none for anything else."""
    try:
        return ObjectId(text)
    except (InvalidId, TypeError):
        return None


def goal_row(goal: Goal) -> Row:
    """A goal as MongoDB keeps it; what is none is left out, since `$min` on null stays null."""
    row: dict[str, Any] = goal.model_dump(by_alias=True, exclude_none=True, mode="python")
    row["_id"] = row.pop("id", None) or row["_id"]
    for name in ("state", "reason", "outcome", "due_command"):
        if name in row:
            row[name] = row[name].value
    return row
