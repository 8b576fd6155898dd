"""Putting up an invitation: decided on the Session, its money held, then written in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from persistence.commits import Commits, damaged
from persistence.documents import (
    TRIGGER_EXCLUSIVE_GOAL,
    Conditions,
    Context,
    Goal,
    Metadata,
    Pair,
    Session,
)
from persistence.errors import Conflict, EscrowUnavailable
from persistence.escrow_port import SERVICE, Verdict
from persistence.faults import Step, reached
from persistence.goal_writes import facts_of
from persistence.holds import Hold, Holds
from persistence.intents import Answer, Delivery, Done, Intent, Refused
from persistence.rows import goal_row, object_id
from persistence.session_reads import of_invitations
from persistence.transactions import Writes
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

    from persistence.requests import RequestRecords
    from persistence.store import Row, Store

_NO_SESSION = Refused("unknown_session", "There is no such session.")
_INVITED_ALREADY = Refused("already_invited", "Your invitation to this streamer still stands.")


@dataclass(frozen=True, eq=False, slots=True)
class _Asked:
    """An invitation that waits for its Session; two of the same request are two."""

    intent: Intent
    session_id: ObjectId


class _Weighed(NamedTuple):
    """An invitation that may stand, as decided on the Session at `now`."""

    goal: Goal
    session: Session
    decision: Decision
    now: datetime


class _Unsaid(NamedTuple):
    """A refusal that has not been written down yet, or found given before."""

    refused: Refused


class _Invitation(NamedTuple):
    """What is written of an invitation, and what is answered when it stands."""

    writes: Writes
    done: Done


class Invitations:
    """The command that makes a goal."""

    def __init__(
        self,
        store: Store,
        commits: Commits,
        limits: Limits,
        requests: RequestRecords,
        holds: Holds | None,
    ) -> None:
        self._store = store
        self._commits = commits
        self._writer = commits.writer
        self._limits = limits
        self._requests = requests
        self._holds = holds

    async def execute(self, intent: Intent) -> Answer:
        """Carries out an invitation, or says why not."""
        if self._holds is not None:
            return await self._invite_with_hold(intent, self._holds)
        return await self._invite(intent)

    async def _invite_with_hold(self, intent: Intent, holds: Holds) -> Answer:
        """Has the payment service hold the money, then puts up the invitation.

        Neither the Session's lock nor a place in front of the pool is taken while it is asked.
        """
        began_at_s = self._store.clock.monotonic_s()
        async with self._store.turns.turn():
            weighed = await self._weigh(intent, ObjectId())
            now = self._store.clock.now()
            hold = (
                weighed
                if isinstance(weighed, Refused)
                else await holds.open(intent, weighed.goal, now)
            )
        if isinstance(weighed, Refused):
            return await self._requests.refuse(intent, weighed, now)
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
        asked = _Asked(intent, session_id)
        if hold is not None:
            found = await self._invite_alone(asked, hold)
        else:
            found = (await self._store.turns.share(session_id, asked, self._invite_all))[asked]
        if isinstance(found, _Unsaid):
            # A majority is asked once the next in line has the turn.
            now = self._store.clock.now()
            return await self._requests.refuse(intent, found.refused, now)
        return found

    async def _invite_all(self, asked: Sequence[_Asked]) -> dict[_Asked, Answer | _Unsaid]:
        """Puts up the invitations of several viewers to one Session, or one as any other."""
        if len(asked) == 1:
            return {asked[0]: await self._invite_alone(asked[0], admitted=True)}
        session_id = asked[0].session_id
        viewers = {each.intent.user_id for each in asked if each.intent.user_id}
        async with self._store.turns.session_turn(session_id, admitted=True):
            session = await self._session(session_id, viewers)
            found: dict[_Asked, Answer | _Unsaid] = {}
            writes: list[Writes] = []
            for each in asked:
                weighed = (
                    self._decided(each.intent, session, ObjectId()) if session else _NO_SESSION
                )
                if not isinstance(weighed, Refused) and each.intent.user_id not in viewers:
                    # He is there twice, and his first invitation stands by then.
                    weighed = _INVITED_ALREADY
                if isinstance(weighed, Refused):
                    found[each] = _Unsaid(weighed)
                    continue
                viewers.discard(each.intent.user_id)
                reached(Step.AFTER_DECIDE, each.intent.command)
                invitation = self._invitation(each.intent, weighed, None)
                found[each] = invitation.done
                writes.append(invitation.writes)
            if writes:
                await self._commits.transactions.together(writes)
        for written in writes:
            reached(Step.AFTER_COMMIT, written.command)
        return found

    async def _invite_alone(
        self, asked: _Asked, hold: Hold | None = None, *, admitted: bool = False
    ) -> Answer | _Unsaid:
        intent = asked.intent
        async with self._store.turns.session_turn(asked.session_id, admitted=admitted) as line:
            while True:
                # Others' invitations change nothing that this one is decided by, and the write
                # is guarded by all of it: in a line of many only the first one reads.
                known, line.known = line.known, None
                weighed = await self._weigh(intent, hold.goal_id if hold else ObjectId(), known)
                if isinstance(weighed, Refused):
                    if known is None:
                        return _Unsaid(weighed)
                    continue
                reached(Step.AFTER_DECIDE, intent.command)
                try:
                    done = await self._commit_invitation(intent, weighed, hold)
                except Conflict:
                    continue
                except DuplicateKeyError as error:
                    answer = await self._requests.answer_of(intent)
                    if answer is None:
                        raise damaged(error) from error
                    return answer
                line.known = weighed.session
                return done

    async def _weigh(
        self, intent: Intent, goal_id: ObjectId, known: Session | None = None
    ) -> _Weighed | Refused:
        """Decides an invitation on the Session as it is now, or was known to be; writes nothing."""
        assert intent.terms is not None
        assert intent.user_id is not None
        if known is not None:
            # He may have a pair all the same; then the write finds it.
            session: Session | None = known.model_copy(update={"exclusive_goal_pairs": {}})
            assert session is not None
            return self._decided(intent, session, goal_id)
        session_id = object_id(intent.terms.session_id)
        session = await self._session(session_id, [intent.user_id]) if session_id else None
        return self._decided(intent, session, goal_id) if session else _NO_SESSION

    def _decided(self, intent: Intent, session: Session, goal_id: ObjectId) -> _Weighed | Refused:
        assert intent.user_id is not None
        now = self._store.clock.now()
        goal = self._new_goal(intent, session, goal_id, now)
        command = Command(CommandName.INVITE, intent.role or Role.VIEWER, intent.user_id)
        decision = decide(facts_of(goal, session), command, now, self._limits)
        if isinstance(decision, Rejection):
            return Refused(decision.code, decision.message)
        pair = session.exclusive_goal_pairs.get(intent.user_id)
        if pair is not None and pair.trigger_exclusive_goal_ended is None:
            return _INVITED_ALREADY
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
        invitation = self._invitation(intent, weighed, hold)
        if hold is not None and self._holds is not None:
            stands = self._holds.stands
            await self._commits.transactions.alone(invitation.writes, lambda _: stands(hold))
        else:
            await self._commits.transactions.commit(invitation.writes)
        reached(Step.AFTER_COMMIT, intent.command)
        return invitation.done

    def _invitation(self, intent: Intent, weighed: _Weighed, hold: Hold | None) -> _Invitation:
        """What is written, and what is answered when it stands."""
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
        entries = self._writer.invitation_entries(standing, decision, now)
        row = goal_row(standing) | {"outbox": [entry.model_dump() for entry in entries]}
        if entries:
            row |= self._writer.outbox_lease(now)
        pair = Pair(trigger_exclusive_goal=goal.id).model_dump(exclude_none=True)
        deliveries = (Delivery(goal.id, tuple(entries)),) if entries else ()
        done = Done(goal_view(standing), str(session.id), deliveries)
        paired = {
            "$set": {f"exclusive_goal_pairs.{intent.user_id}": pair},
            "$inc": {"version": 1},
        }
        writes = Writes(
            intent.command,
            sessions=[(_guard(weighed), paired)],
            new_goals=[row],
            ledger=self._writer.ledger_rows(standing, decision, now),
            requests=self._requests.kept(intent, done, now),
        )
        return _Invitation(writes, done)

    async def _session(self, session_id: ObjectId, viewers: Iterable[str]) -> Session | None:
        row = await self._store.sessions.find_one({"_id": session_id}, of_invitations(viewers))
        return Session.model_validate(row) if row else None


def _guard(weighed: _Weighed) -> Row:
    """What the invitation was decided by. Others' invitations raise the version and change nothing.

    A stream that was taken would have refused it.
    """
    viewer_id = weighed.goal.conditions.exclusive_to
    path = f"exclusive_goal_pairs.{viewer_id}"
    guard: Row = {
        "_id": weighed.session.id,
        "active": True,
        "status.exclusive_to": {"$in": [[], None]},
    }
    pair = weighed.session.exclusive_goal_pairs.get(viewer_id)
    if pair is None:
        guard[path] = {"$exists": False}
    else:
        guard[f"{path}.trigger_exclusive_goal"] = pair.trigger_exclusive_goal
        guard[f"{path}.trigger_exclusive_goal_ended"] = pair.trigger_exclusive_goal_ended
    return guard
