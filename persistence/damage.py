"""Documents that can't be read: told in log and metric, and gone round.

Somebody has changed one by hand, or a version of Duet that this one does not understand wrote it.
It is left as it is, for a person to look at; whoever reads many goes on with the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from persistence.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from persistence.rows import Row

M = TypeVar("M", bound=BaseModel)

_log = structlog.get_logger(__name__)

# What is due is met again within a lease; what was mended is forgotten after this.
_REMEMBERED_S: Final = 60.0
_REMEMBERED_MOST: Final = 10_000


class Damage:
    """The documents that this process could not read of late."""

    __slots__ = ("_met_at_s", "_now_s")

    def __init__(self, now_s: Callable[[], float] = Clock.monotonic_s) -> None:
        self._now_s = now_s
        # (collection, id) -> when it was met last.
        self._met_at_s: dict[tuple[str, str], float] = {}

    @property
    def count(self) -> int:
        """How many were met within the last minute."""
        since_s = self._now_s() - _REMEMBERED_S
        self._met_at_s = {one: at_s for one, at_s in self._met_at_s.items() if at_s > since_s}
        return len(self._met_at_s)

    def met(self, collection: str, document_id: object, why: Exception) -> None:
        """Remembers a document, and logs it unless it was met a moment ago."""
        key = (collection, str(document_id))
        now_s = self._now_s()
        last_s = self._met_at_s.get(key)
        if last_s is None and len(self._met_at_s) >= _REMEMBERED_MOST:
            return
        self._met_at_s[key] = now_s
        if last_s is None or now_s - last_s >= _REMEMBERED_S:
            _log.error("document_damaged", collection=collection, id=key[1], why=_line(why))


# One for the process, as its log is.
damage: Final = Damage()


def readable(model: type[M], collection: str, rows: Iterable[Row]) -> list[M]:
    """Those of the rows that can be read."""
    found = []
    for row in rows:
        try:
            found.append(model.model_validate(row))
        except ValidationError as error:
            damage.met(collection, row.get("_id"), error)
    return found


def _line(error: Exception) -> str:
    """What is wrong, without the values: they are somebody's data."""
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3]
        )
    return f"{type(error).__name__}: {error}"
