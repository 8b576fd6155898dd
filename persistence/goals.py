"""The unit of work of a command: load, decide, one transaction, again if somebody was faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymongo.errors import DuplicateKeyError

from persistence.commits import Commits, damaged
from persistence.damage import readable
from persistence.documents import (
    EXCLUSIVE_GOAL,
    OPEN_STATES,
    TRIGGER_EXCLUSIVE_GOAL,
    Goal,
    Session,
)
from persistence.errors import Conflict, StoreUnavailable
from persistence.faults import Step, reached
from persistence.goal_writes import facts_of
from persistence.holds import Holds
from persistence.intents import Answer, Intent, Refused
from persistence.invitations import Invitations
from persistence.requests import RequestRecords
from persistence.rows import object_id
from persistence.session_reads import of_goal, with_session
from persistence.sharing import Shared
from persistence.turns import Lane
from persistence.views import goal_view
from statemachine.goal import Command, GoalState, Limits, Rejection, Role, decide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bson import ObjectId

    from persistence.escrow_port import EscrowPort
    from persistence.store import Row, Store
    from statemachine.receivers import Registry

_WITH_SESSION = with_session()


class Goals:
    """Goals and the commands on them.

    Attributes:
        commits: the transactions on goals that exist.
        holds: none without a payment service.
    """

    def __init__(
        self, store: Store, registry: Registry, limits: Limits, port: EscrowPort | None = None
    ) -> None:
        self._store = store
        self._limits = limits
        self._requests = RequestRecords(store)
        self.holds = Holds(store, self._requests, port) if port is not None else None
        self._loads = Shared(self._load, store.options.at_once)
        self.commits = Commits(store, registry, limits, self._requests)
        self._invitations = Invitations(store, self.commits, limits, self._requests, self.holds)

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
                return await self._invitations.execute(intent)
            # Reads take their turn as well: a flood of them would use up the time of all.
            async with self._store.turns.turn(lane_of(intent)):
                found = await self._goal_of(intent)
            if found is None:
                refused = Refused("unknown_goal", "There is no such goal.")
                return await self._requests.refuse(intent, refused, self._store.clock.now())
            return await self._advance(intent, *found)

    async def goal(self, goal_id: str) -> Goal | None:
        """Reads one goal; none if there is none or the id is no id.

        Raises:
            StoreUnavailable: MongoDB did not answer in time.
            StoreOverloaded: too many wait to be shown something; as with every view.
        """
        key = object_id(goal_id)
        if key is None:
            return None
        async with self._store.viewing():
            return _parsed(await self._store.settled_goals.find_one({"_id": key}))

    async def open_goals(self, user_id: str) -> list[Goal]:
        """Every invitation of a user, as streamer or viewer, that has not ended; oldest first."""
        # Thousands of sockets come back at once, and each waits for its own.
        async with self._store.viewing(patient=True):
            rows = await self._store.settled_goals.find(
                {
                    "_cls": TRIGGER_EXCLUSIVE_GOAL,
                    "state": {"$in": OPEN_STATES},
                    "$or": [{"metadata.user_id": user_id}, {"conditions.exclusive_to": user_id}],
                }
            ).to_list()
        return sorted(readable(Goal, "goals", rows), key=lambda goal: goal.created_at)

    async def show_goal_id(self, session_id: str) -> str | None:
        """The id of the Session's agreed or live goal, if it has one."""
        key = object_id(session_id)
        async with self._store.reading(), self._store.turns.turn():
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
            row = (await self._loads.do(key)).get(key)
            if row is None:
                return None
            goal = Goal.model_validate(row)
            if goal.cls != EXCLUSIVE_GOAL:
                return goal, Session.model_validate(row["session"])
            key = goal.trigger_goal
        return None

    async def _load(self, keys: Sequence[ObjectId]) -> dict[ObjectId, Row]:
        """Reads goals, each with its Session."""
        match = {"$match": {"_id": {"$in": keys} if len(keys) > 1 else keys[0]}}
        rows = await self._store.goals.aggregate([match, *_WITH_SESSION])
        return {row["_id"]: row async for row in rows}

    async def _advance(self, intent: Intent, goal: Goal, session: Session) -> Answer:
        """Moves an existing goal on."""
        session_id = goal.conditions.session_id
        stale = self._store.turns.session_busy(session_id)
        taken = False
        refused: Refused | None = None
        async with self._store.turns.session_turn(session_id, lane_of(intent)):
            while refused is None:
                if stale:
                    session = await self._current(goal)
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
                    return await self.commits.commit(intent, goal, session, decision, now)
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
                        raise damaged(error) from error
        # A majority is asked once the next in line has the turn.
        return await self._requests.refuse(intent, refused, self._store.clock.now())

    async def _current(self, goal: Goal) -> Session:
        row = await self._store.sessions.find_one(
            {"_id": goal.conditions.session_id}, of_goal(goal.conditions.exclusive_to)
        )
        if row is None:
            raise StoreUnavailable("a session vanished while its goal was being changed")
        session: Session = Session.model_validate(row)
        return session

    async def _reloaded(self, goal: Goal) -> Goal:
        reloaded = _parsed(await self._store.goals.find_one({"_id": goal.id}))
        if reloaded is None:
            raise StoreUnavailable("a goal vanished while it was being changed")
        return reloaded


def lane_of(intent: Intent) -> Lane:
    """The lane in which a command goes: what is due does not wait behind a flood of what is not."""
    return Lane.TIMERS if intent.role in {Role.TIMER, Role.SYSTEM} else Lane.COMMANDS


def _another_show(error: DuplicateKeyError) -> bool:
    """Whether it was the index `one_show_per_session` that refused a write."""
    return "conditions.session_id" in (error.details or {}).get("keyPattern", {})


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
