"""A streamer's Sessions: going live, ending, and who may watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from persistence.documents import Session, SessionUser
from persistence.errors import Conflict, StoreUnavailable
from persistence.faults import Step, reached
from persistence.rows import object_id
from statemachine.goal import CommandName, GoalState
from statemachine.receivers import SetOnSession

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from persistence.goals import Goals
    from persistence.intents import Delivery
    from persistence.store import Store
    from statemachine.receivers import Effect


class Sessions:
    """Sessions and the commands on them."""

    def __init__(self, store: Store, goals: Goals) -> None:
        self._store = store
        self._commits = goals.commits

    async def create(self, streamer_id: str, rtc_sources: list[Any]) -> tuple[Session, bool]:
        """Starts a streamer's Session, or finds the one that is live; tells whether it is new."""
        now = self._store.clock.now()
        session = Session(
            id=ObjectId(),
            user=SessionUser(id=streamer_id),
            rtc_sources=rtc_sources,
            created_at=now,
        )
        row = session.model_dump(by_alias=True, exclude_none=True, mode="python")
        async with self._store.reading(), self._store.turns.turn():
            try:
                await self._store.sessions.insert_one(row)
            except DuplicateKeyError:
                live = await self._live(streamer_id)
                if live is None:
                    raise StoreUnavailable("the session ended while it was looked up") from None
                return live, False
        return session, True

    async def session(self, session_id: str) -> Session | None:
        """Reads one Session; none if there is none or the id is no id."""
        key = object_id(session_id)
        if key is None:
            return None
        async with self._store.viewing():
            row = await self._store.settled_sessions.find_one({"_id": key})
        return Session.model_validate(row) if row else None

    async def live_session_of(self, streamer_id: str) -> Session | None:
        """The Session in which a streamer is live at present."""
        # A client whose subscription is refused does not ask again.
        async with self._store.viewing(patient=True):
            return await self._live(streamer_id)

    async def end(self, session: Session) -> tuple[Session, tuple[Delivery, ...]]:
        """Ends a Session and declines its standing invitations, in one transaction.

        An agreed show that has not started is refunded by its own deadline; a live one has to be
        finished first, by the caller.
        """
        assert session.id is not None
        session_id = session.id
        reached(Step.BEFORE_LOAD, CommandName.CLOSE)
        async with (
            self._store.reading(),
            self._store.turns.session_turn(session_id),
        ):
            while True:
                row = await self._store.sessions.find_one({"_id": session_id})
                current = Session.model_validate(row)
                if not current.active:
                    certain = await self._certain(current)
                    if certain.active:
                        continue
                    return certain, ()
                now = self._store.clock.now()
                reached(Step.AFTER_DECIDE, CommandName.CLOSE)

                async def body(
                    current: Session = current, now: Any = now
                ) -> tuple[Session, list[Delivery]]:
                    return await self._end(current, now)

                try:
                    ended, deliveries = await self._store.transact(body)
                except Conflict:
                    continue
                reached(Step.AFTER_COMMIT, CommandName.CLOSE)
                return ended, tuple(deliveries)

    async def _end(self, session: Session, now: datetime) -> tuple[Session, list[Delivery]]:
        """Declines what stands, and ends the Session with what the receivers mark on its pairs."""
        standing = await self._store.goals.find(
            {"conditions.session_id": session.id, "state": GoalState.INVITED.value}, {"_id": True}
        ).to_list()
        deliveries, effects = await self._commits.decline_all(
            [goal["_id"] for goal in standing], CommandName.CLOSE, session, now
        )
        row = await self._store.sessions.find_one_and_update(
            {"_id": session.id, "version": session.version},
            {
                "$set": {"active": False, "ended_at": now, **_marks(session, effects)},
                "$inc": {"version": 1},
            },
            return_document=ReturnDocument.AFTER,
        )
        if row is None:
            raise Conflict
        reached(Step.BEFORE_COMMIT, CommandName.CLOSE)
        return Session.model_validate(row), deliveries

    async def _certain(self, session: Session) -> Session:
        """A Session as a majority has it: a primary without one may be alone in what it read."""
        row = await self._store.certain_sessions.find_one({"_id": session.id})
        certain: Session = Session.model_validate(row)
        return certain

    async def _live(self, streamer_id: str) -> Session | None:
        row = await self._store.sessions.find_one({"user.id": streamer_id, "active": True})
        return Session.model_validate(row) if row else None


def _marks(session: Session, effects: Iterable[Effect]) -> dict[str, object]:
    """What the receivers set on pairs that name their goal (the requirements' filter)."""
    marks: dict[str, object] = {}
    for effect in effects:
        if isinstance(effect, SetOnSession):
            pair = session.exclusive_goal_pairs.get(effect.viewer_id)
            if pair is not None and str(pair.trigger_exclusive_goal) == effect.goal_id:
                marks |= effect.fields
    return marks
