"""A `request_id` is answered once: the answer is kept with what it asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymongo.errors import DuplicateKeyError

from persistence.intents import Answer, Done, Intent, Refused
from persistence.views import as_json

if TYPE_CHECKING:
    from datetime import datetime

    from persistence.store import Row, Store

REUSED = "request_id_reused"


class RequestRecords:
    """The answers given in the last day."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def kept(self, intent: Intent, answer: Answer, now: datetime) -> list[Row]:
        """The answer as it is kept; nothing of a request without an id."""
        key = intent.request_key
        if key is None:
            return []
        row: Row = {
            "_id": key,
            "fingerprint": intent.fingerprint,
            "goal": answer.goal,
            "at": now,
        }
        if isinstance(answer, Refused):
            row["error"] = {"code": answer.code, "message": answer.message}
        else:
            row["session_id"] = answer.session_id
        return [row]

    async def answer_of(self, intent: Intent) -> Answer | None:
        """The answer that this request was given before, if it was and can't be undone."""
        key = intent.request_key
        if key is None:
            return None
        row = await self._store.certain_requests.find_one({"_id": key})
        if row is None:
            return None
        if row["fingerprint"] != intent.fingerprint:
            return Refused(REUSED, "This request_id was used for another command.")
        if error := row.get("error"):
            return Refused(error["code"], error["message"], as_json(row["goal"]))
        return Done(goal=as_json(row["goal"]), session_id=row["session_id"])

    async def refuse(self, intent: Intent, refused: Refused, now: datetime) -> Answer:
        """Answers a request that changed nothing: as it was answered before, or as `refused`.

        What it is refused for has been read from a primary that may have lost its majority. The
        answer's own record waits for the majority, and one without a record asks for it.
        """
        kept = self.kept(intent, refused, now)
        if not kept:
            await self._store.certain_requests.find_one({"_id": None}, {"_id": True})
            return refused
        try:
            await self._store.requests.insert_one(kept[0])
        except DuplicateKeyError:
            return await self.answer_of(intent) or refused
        return refused
