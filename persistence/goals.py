"""The unit of work of a command: load, decide, one transaction, again if somebody was faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bson import ObjectId
from bson.errors import InvalidId
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from persistence.documents import (
    EXCLUSIVE_GOAL,
    TRIGGER_EXCLUSIVE_GOAL,
    Conditions,
    Context,
    Goal,
    Metadata,
    Pair,
    Session,
)
from persistence.errors import Conflict, EscrowUnavailable, StoreDamaged, StoreUnavailable
from persistence.escrow_port import SERVICE, Verdict
from persistence.faults import Step, reached
from persistence.goal_writes import (
    GoalWrite,
    SessionWrite,
    Writer,
    facts_of,
    keeps_sources,
    show_of,
)
from persistence.holds import Hold, Holds
from persistence.intents import Answer, Delivery, Done, Intent, Refused
from persistence.requests import RequestRecords
from persistence.views import goal_view
from statemachine.goal import (
    Command,
    CommandName,
    Decision,
    GoalState,
    Limits,
    Rejection,
    Role,
    decide,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from persistence.escrow_port import EscrowPort
    from persistence.store import Row, Store
    from statemachine.receivers import Effect, Registry

_NO_SESSION = Refused("unknown_session", "There is no such session.")
# MongoDB's code of a key that is there already.
_DUPLICATE = 11000

# Unwound, the join costs MongoDB two thirds of what it costs with a list of one.
_WITH_SESSION: list[Row] = [
    {
        "$lookup": {
            "from": Session.Settings.name,
            "localField": "conditions.session_id",
            "foreignField": "_id",
            "as": "session",
        }
    },
    {"$unwind": "$session"},
]
OPEN_STATES = [state.value for state in GoalState if state not in (GoalState.NONE, GoalState.ENDED)]


class _Weighed(NamedTuple):
    """An invitation that may stand, as decided on the Session at `now`."""

    goal: Goal
    session: Session
    decision: Decision
    now: datetime


class Goals:
    """Goals and the commands on them.

    Attributes:
        holds: none without a payment service.
    """

    def __init__(
        self, store: Store, registry: Registry, limits: Limits, port: EscrowPort | None = None
    ) -> None:
        self._store = store
        self._limits = limits
        self._requests = RequestRecords(store)
        self.holds = Holds(store, self._requests, port) if port is not None else None
        self.writer = Writer(registry, limits, store.owner, store.options.lease_s)

    async def execute(self, intent: Intent) -> Answer:
        """Carries out one command, or says why not.

        Cancelling is safe: the command then either happened as a whole or not at all.

        Raises:
            StoreUnavailable: MongoDB did not answer in time; asking again is safe with a
                `request_id`.
            StoreOverloaded: too many commands wait.
        """
        reached(Step.BEFORE_LOAD, intent.command)
        async with self._store.reading():
            if intent.terms is not None:
                if self.holds is not None:
                    return await self._invite_with_hold(intent, self.holds)
                return await self._invite(intent)
            # Reads take their turn as well: a flood of them would use up the time of all.
            async with self._store.turns.turn():
                found = await self._goal_of(intent)
            if found is None:
                refused = Refused("unknown_goal", "There is no such goal.")
                return await self._requests.refuse(intent, refused, self._store.clock.now())
            return await self._advance(intent, *found)

    async def goal(self, goal_id: str) -> Goal | None:
        """Reads one goal; none if there is none or the id is no id."""
        key = object_id(goal_id)
        if key is None:
            return None
        async with self._store.reading():
            return _parsed(await self._store.settled_goals.find_one({"_id": key}))

    async def open_goals(self, user_id: str) -> list[Goal]:
        """Every invitation of a user, as streamer or viewer, that has not ended; oldest first."""
        async with self._store.reading():
            rows = await self._store.settled_goals.find(
                {
                    "_cls": TRIGGER_EXCLUSIVE_GOAL,
                    "state": {"$in": OPEN_STATES},
                    "$or": [{"metadata.user_id": user_id}, {"conditions.exclusive_to": user_id}],
                }
            ).to_list()
        return sorted((Goal.model_validate(row) for row in rows), key=lambda goal: goal.created_at)

    async def show_goal_id(self, session_id: str) -> str | None:
        """The id of the Session's agreed or live goal, if it has one."""
        key = object_id(session_id)
        async with self._store.reading():
            row = await self._store.goals.find_one(
                {
                    "_cls": TRIGGER_EXCLUSIVE_GOAL,
                    "conditions.session_id": key,
                    "state": {"$in": [GoalState.AGREED.value, GoalState.LIVE.value]},
                },
                {"_id": True},
            )
        return str(row["_id"]) if row else None

    async def _goal_of(self, intent: Intent) -> tuple[Goal, Session] | None:
        """The invitation that an intent names by its own id or by its show's, and its Session.

        Read by one round trip; each is a sixth of what an agreement costs.
        """
        key = object_id(intent.goal_id or "")
        while key is not None:
            rows = await (
                await self._store.goals.aggregate([{"$match": {"_id": key}}, *_WITH_SESSION])
            ).to_list()
            if not rows:
                return None
            session = rows[0].pop("session")
            goal = Goal.model_validate(rows[0])
            if goal.cls != EXCLUSIVE_GOAL:
                return goal, Session.model_validate(session)
            key = goal.trigger_goal
        return None

    async def _advance(self, intent: Intent, goal: Goal, session: Session) -> Answer:
        """Moves an existing goal on."""
        session_id = goal.conditions.session_id
        stale = self._store.turns.session_busy(session_id)
        taken = False
        refused: Refused | None = None
        async with self._store.turns.session_turn(session_id):
            while refused is None:
                if stale:
                    session = await self._current(session_id)
                    goal = await self._reloaded(goal)
                now = self._store.clock.now()
                command = _command_of(intent, goal)
                facts = facts_of(goal, session, taken=taken)
                decision = decide(facts, command, now, self._limits)
                # A commit is guarded by both versions, a refusal by nothing. So it is only given
                # on a goal that was read after its Session: else a Session that has just been
                # taken by this very goal would look taken by another.
                was_stale, stale = stale, True
                if isinstance(decision, Rejection):
                    if was_stale:
                        refused = _refused(decision, goal, command)
                    continue
                reached(Step.AFTER_DECIDE, intent.command)
                try:
                    return await self._commit(intent, goal, session, decision, now)
                except Conflict:
                    continue
                except DuplicateKeyError as error:
                    # The request was answered by another node, or another goal of the Session
                    # was agreed first: the one is read, the other decided anew, knowing that
                    # the Session is taken whatever its own fields say.
                    answer = await self._requests.answer_of(intent)
                    if answer is not None:
                        return answer
                    taken = _another_show(error)
                    if not taken:
                        raise _damaged(error) from error
        # A majority is asked once the next in line has the turn.
        return await self._requests.refuse(intent, refused, self._store.clock.now())

    async def _commit(
        self, intent: Intent, goal: Goal, session: Session, decision: Decision, now: datetime
    ) -> Done:
        """Writes all that a decision changes, or raises and writes nothing."""
        write, effects = self.writer.goal_write(goal, decision, now, intent.client_id)
        session_write = self.writer.session_write(session, write.after, decision, effects)
        done = Done(goal=goal_view(write.after), session_id=str(session.id))

        async def body() -> list[Delivery]:
            deliveries = await self._apply(write)
            reached(Step.IN_TRANSACTION, intent.command)
            if session_write is not None:
                await self._apply_to_session(session_write)
                if session_write.cleans_up:
                    deliveries += await self._supersede_others(session, now)
            if write.ledger:
                await self._post(write.ledger)
            if write.calls:
                await self._store.escrow_calls.insert_many(write.calls)
            await self._apply_to_show(write.after, session, decision, effects, now)
            await self._requests.remember(intent, done, now)
            reached(Step.BEFORE_COMMIT, intent.command)
            return deliveries

        deliveries = await self._store.transact(body)
        reached(Step.AFTER_COMMIT, intent.command)
        return Done(done.goal, done.session_id, tuple(deliveries))

    async def _apply(self, write: GoalWrite) -> list[Delivery]:
        """The compare-and-set of `deactivate_goal`, on the document as it was before."""
        before = await self._store.goals.find_one_and_update(
            write.guard,
            write.update(),
            projection={"outbox.event_id": True},
            return_document=ReturnDocument.BEFORE,
        )
        if before is None:
            raise Conflict
        delivery = write.delivery(len(before.get("outbox", ())))
        return [delivery] if delivery else []

    async def _apply_to_session(self, write: SessionWrite) -> None:
        updated = await self._store.sessions.update_one(write.guard, write.pipeline())
        if updated.matched_count == 0:
            raise Conflict

    async def _apply_to_show(
        self,
        goal: Goal,
        session: Session,
        decision: Decision,
        effects: Sequence[Effect],
        now: datetime,
    ) -> None:
        """Creates the ExclusiveGoal when a show starts, deactivates it when it ends."""
        if decision.command is CommandName.START:
            assert decision.due is not None
            await self._store.goals.insert_one(goal_row(show_of(goal, decision.due.at, now)))
        elif decision.command is CommandName.FINISH:
            changes: Row = {
                "active": False,
                "state": GoalState.ENDED.value,
                "outcome": goal.outcome.value if goal.outcome else None,
            }
            if keeps_sources(effects):
                changes["rtc_sources"] = session.rtc_sources
            updated = await self._store.goals.update_one(
                {"_id": goal.exclusive_goal, "active": True},
                {"$set": changes, "$min": {"exp": now}, "$inc": {"version": 1}},
            )
            if updated.matched_count == 0:
                raise Conflict

    async def _supersede_others(self, session: Session, now: datetime) -> list[Delivery]:
        """Unsets the other pairs of the Session and declines their invitations.

        Source: requirements, `cleanup_expired_exclusive_goal_pairs`; the aggregation is theirs.
        """
        pairs = await (
            await self._store.sessions.aggregate(
                [
                    {"$match": {"_id": session.id}},
                    {"$project": {"pairs": {"$objectToArray": "$exclusive_goal_pairs"}}},
                    {"$unwind": "$pairs"},
                    {
                        "$match": {
                            "$or": [
                                {"pairs.v.exclusive_goal_ended": {"$ne": None}},
                                {
                                    "$and": [
                                        {"pairs.v.exclusive_goal": None},
                                        {"pairs.v.trigger_exclusive_goal_agreed": None},
                                        {"pairs.v.trigger_exclusive_goal_ended": None},
                                    ]
                                },
                            ]
                        }
                    },
                    {
                        "$project": {
                            "_id": False,
                            "user_id": "$pairs.k",
                            "goal_id": "$pairs.v.trigger_exclusive_goal",
                        }
                    },
                ]
            )
        ).to_list()
        if not pairs:
            return []
        paths = {f"exclusive_goal_pairs.{pair['user_id']}": pair["goal_id"] for pair in pairs}
        unset = await self._store.sessions.update_one(
            {"_id": session.id}
            | {f"{path}.trigger_exclusive_goal": goal_id for path, goal_id in paths.items()},
            {"$unset": dict.fromkeys(paths, "")},
        )
        if unset.matched_count == 0:
            raise Conflict
        # What the declined goals' receivers would mark on their pairs went with the pairs.
        deliveries, _ = await self.decline_all(
            list(paths.values()), CommandName.SUPERSEDE, session, now
        )
        return deliveries

    async def decline_all(
        self, goal_ids: Iterable[ObjectId], command: CommandName, session: Session, now: datetime
    ) -> tuple[list[Delivery], list[Effect]]:
        """Declines, inside a transaction, those of the goals that are still invited.

        Returns:
            What is left to deliver, and what the commit-phase receivers want of the Session.
        """
        rows = await self._store.goals.find(
            {"_id": {"$in": list(goal_ids)}, "state": GoalState.INVITED.value}
        ).to_list()
        deliveries: list[Delivery] = []
        effects: list[Effect] = []
        updates: list[UpdateOne] = []
        ledger: list[Row] = []
        calls: list[Row] = []
        for row in rows:
            goal = Goal.model_validate(row)
            decision = decide(
                facts_of(goal, session), Command(command, Role.SYSTEM), now, self._limits
            )
            assert isinstance(decision, Decision)
            write, wanted = self.writer.goal_write(goal, decision, now, None)
            effects += wanted
            updates.append(UpdateOne(write.guard, write.update()))
            ledger += write.ledger
            calls += write.calls
            delivery = write.delivery(len(goal.outbox))
            if delivery is not None:
                deliveries.append(delivery)
        if updates:
            written = await self._store.goals.bulk_write(updates, ordered=False)
            if written.matched_count != len(updates):
                raise Conflict
            reached(Step.IN_TRANSACTION, command)
            await self._post(ledger)
            if calls:
                await self._store.escrow_calls.insert_many(calls)
        return deliveries, effects

    async def _invite_with_hold(self, intent: Intent, holds: Holds) -> Answer:
        """Has the payment service hold the money, then puts up the invitation.

        Neither the Session's lock nor a place in front of the pool is taken while it is asked.
        """
        began_at_s = self._store.clock.monotonic_s()
        weighed = await self._weigh(intent, ObjectId())
        now = self._store.clock.now()
        if isinstance(weighed, Refused):
            return await self._requests.refuse(intent, weighed, now)
        hold = await holds.open(intent, weighed.goal, now)
        if not isinstance(hold, Hold):
            return hold
        held = await holds.ask(hold, began_at_s)
        if held.verdict is Verdict.REFUSED:
            await holds.refused(hold.call, held.why)
            refused = Refused("payment_refused", "The payment was refused.")
            return await self._requests.refuse(intent, refused, self._store.clock.now())
        try:
            answer = await self._invite(intent, hold)
        except EscrowUnavailable:
            # Another attempt of the same request may have come first, with this very hold.
            before = await self._requests.answer_of(intent)
            if before is None:
                raise
            answer = before
        if isinstance(answer, Refused):
            await holds.abandon(hold.call)
        return answer

    async def _invite(self, intent: Intent, hold: Hold | None = None) -> Answer:
        """Puts up a new invitation: goal, pair of the Session and held escrow together."""
        assert intent.terms is not None
        session_id = object_id(intent.terms.session_id)
        if session_id is None:
            return await self._requests.refuse(intent, _NO_SESSION, self._store.clock.now())
        async with self._store.turns.session_turn(session_id):
            while True:
                weighed = await self._weigh(intent, hold.goal_id if hold else ObjectId())
                if isinstance(weighed, Refused):
                    break
                reached(Step.AFTER_DECIDE, intent.command)
                try:
                    return await self._commit_invitation(intent, weighed, hold)
                except Conflict:
                    continue
                except DuplicateKeyError as error:
                    answer = await self._requests.answer_of(intent)
                    if answer is None:
                        raise _damaged(error) from error
                    return answer
        return await self._requests.refuse(intent, weighed, self._store.clock.now())

    async def _weigh(self, intent: Intent, goal_id: ObjectId) -> _Weighed | Refused:
        """Decides an invitation on the Session as it is now; writes nothing."""
        assert intent.terms is not None
        assert intent.user_id is not None
        session_id = object_id(intent.terms.session_id)
        session = await self._session(session_id) if session_id is not None else None
        if session is None:
            return _NO_SESSION
        now = self._store.clock.now()
        goal = self._new_goal(intent, session, goal_id, now)
        command = Command(CommandName.INVITE, intent.role or Role.VIEWER, intent.user_id)
        decision = decide(facts_of(goal, session), command, now, self._limits)
        if isinstance(decision, Rejection):
            return Refused(decision.code, decision.message)
        pair = session.exclusive_goal_pairs.get(intent.user_id)
        if pair is not None and pair.trigger_exclusive_goal_ended is None:
            return Refused("already_invited", "Your invitation to this streamer still stands.")
        return _Weighed(goal, session, decision, now)

    def _new_goal(self, intent: Intent, session: Session, goal_id: ObjectId, now: datetime) -> Goal:
        assert intent.terms is not None
        assert intent.user_id is not None
        assert session.id is not None
        viewer_id = intent.user_id
        return Goal(
            id=goal_id,
            cls=TRIGGER_EXCLUSIVE_GOAL,
            active=True,
            conditions=Conditions(session_id=session.id, exclusive_to=viewer_id),
            context=Context(type="trigger-exclusive", exclusive_to=viewer_id),
            exp=now,
            triggerer=intent.client_id,
            metadata=Metadata(
                user_id=session.user.id, prepaid_duration=intent.terms.prepaid_duration_s
            ),
            breakdown={viewer_id: intent.terms.amount_minor},
            amount=intent.terms.amount_minor,
            state=GoalState.NONE,
            created_at=now,
        )

    async def _commit_invitation(
        self, intent: Intent, weighed: _Weighed, hold: Hold | None
    ) -> Done:
        goal, session, decision, now = weighed
        assert goal.id is not None
        assert decision.due is not None
        standing = goal.model_copy(
            update={
                "state": decision.target,
                "exp": decision.expires_at,
                "due_at": decision.due.at,
                "due_command": decision.due.command,
                "held_by": SERVICE if hold else None,
            }
        )
        entries = self.writer.outbox_entries(self.writer.invited(standing, decision, now))
        row = goal_row(standing) | {"outbox": [entry.model_dump() for entry in entries]}
        if entries:
            row |= self.writer.outbox_lease(now)
        pair = Pair(trigger_exclusive_goal=goal.id).model_dump(exclude_none=True)
        done = Done(goal=goal_view(standing), session_id=str(session.id))
        goal_id = goal.id

        async def body() -> None:
            updated = await self._store.sessions.update_one(
                {"_id": session.id, "version": session.version, "active": True},
                {
                    "$set": {f"exclusive_goal_pairs.{intent.user_id}": pair},
                    "$inc": {"version": 1},
                },
            )
            if updated.matched_count == 0:
                raise Conflict
            reached(Step.IN_TRANSACTION, intent.command)
            await self._store.goals.insert_one(row)
            await self._post(self.writer.ledger_rows(standing, decision, now))
            if hold is not None and self.holds is not None:
                await self.holds.stands(hold)
            await self._requests.remember(intent, done, now)
            reached(Step.BEFORE_COMMIT, intent.command)

        await self._store.transact(body)
        reached(Step.AFTER_COMMIT, intent.command)
        deliveries = (Delivery(goal_id, tuple(entries)),) if entries else ()
        return Done(done.goal, done.session_id, deliveries)

    async def _post(self, rows: list[Row]) -> None:
        """Writes postings into the ledger.

        Raises:
            StoreDamaged: one is there already, although its goal says that it can't be.
        """
        try:
            await self._store.escrow.insert_many(rows)
        except BulkWriteError as error:
            if any(each["code"] == _DUPLICATE for each in error.details["writeErrors"]):
                raise StoreDamaged(f"the ledger has this posting already: {error}") from error
            raise

    async def _session(self, session_id: ObjectId) -> Session | None:
        row = await self._store.sessions.find_one({"_id": session_id})
        return Session.model_validate(row) if row else None

    async def _current(self, session_id: ObjectId) -> Session:
        session = await self._session(session_id)
        if session is None:
            raise StoreUnavailable("a session vanished while its goal was being changed")
        return session

    async def _reloaded(self, goal: Goal) -> Goal:
        reloaded = _parsed(await self._store.goals.find_one({"_id": goal.id}))
        if reloaded is None:
            raise StoreUnavailable("a goal vanished while it was being changed")
        return reloaded


def _another_show(error: DuplicateKeyError) -> bool:
    """Whether it was the index `one_show_per_session` that refused a write."""
    return "conditions.session_id" in (error.details or {}).get("keyPattern", {})


def _damaged(error: DuplicateKeyError) -> StoreDamaged:
    """A key that no command may meet twice is there already: somebody has to look."""
    return StoreDamaged(str(error).partition(", full error")[0])


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


def _parsed(row: Row | None) -> Goal | None:
    return Goal.model_validate(row) if row else None


def _command_of(intent: Intent, goal: Goal) -> Command:
    """Names the actor; who came without a role is what the goal says he is."""
    role = intent.role
    if role is None:
        is_streamer = intent.user_id == goal.metadata.user_id
        role = Role.STREAMER if is_streamer else Role.VIEWER
    return Command(intent.command, role, intent.user_id)


def _refused(rejection: Rejection, goal: Goal, command: Command) -> Refused:
    """Shows the goal to its parties only."""
    parties = (goal.metadata.user_id, goal.conditions.exclusive_to)
    view = goal_view(goal) if command.user_id in parties else None
    return Refused(rejection.code, rejection.message, view)


__all__ = ["Goals", "goal_row", "object_id"]
