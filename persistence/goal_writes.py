"""From a decision to what is written: filters, updates, ledger rows and outbox entries. Pure.

`persistence.commits` gathers all that one command changes, and it goes into one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bson import ObjectId

from persistence.clock import milliseconds
from persistence.documents import SCHEMA_VERSION, Goal, OutboxEntry, Session
from persistence.escrow_port import SERVICE, closing_calls
from persistence.intents import Delivery
from persistence.occurrences import Occurrences, kept, reason_of
from statemachine.escrow import posting
from statemachine.goal import CommandName, Decision, Due, GoalFacts, GoalState, Limits
from statemachine.receivers import (
    Effect,
    KeepSources,
    MakeDue,
    Occurrence,
    Phase,
    Registry,
    SetOnSession,
    SyncViewers,
    UnsetOtherPairs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from persistence.rows import Row


@dataclass(slots=True)
class SessionWrite:
    """One update of the Session: `stages` of a pipeline behind a guard on its version."""

    guard: Row = field(default_factory=dict)
    set_fields: Row = field(default_factory=dict)
    unset_fields: list[str] = field(default_factory=list)
    sync: SyncViewers | None = None
    cleans_up: bool = False

    def pipeline(self) -> list[Row]:
        """The update; every value that is not an expression is a literal."""
        stages: list[Row] = [
            {
                "$set": {
                    **{name: {"$literal": value} for name, value in self.set_fields.items()},
                    "version": {"$add": ["$version", 1]},
                }
            }
        ]
        if self.sync is not None:
            stages.extend(_viewer_stages(self.sync))
        if self.unset_fields:
            stages.append({"$unset": list(self.unset_fields)})
        return stages


def _free_session(
    write: SessionWrite, session: Session, viewer_id: str, command: CommandName, pair_is_ours: bool
) -> None:
    """Gives the stream back to everyone when a show is over, or never began.

    The viewer's pass goes too: `nbf` is kept if there (requirements), so a pass left behind would
    end his next show before it began.
    """
    path = f"exclusive_goal_pairs.{viewer_id}"
    write.unset_fields.append(f"viewers.{viewer_id}")
    if session.status.exclusive_to == [viewer_id]:
        write.set_fields["status.exclusive_to"] = []
    if pair_is_ours and command is CommandName.FINISH:
        write.set_fields[f"{path}.exclusive_goal_ended"] = True
    elif pair_is_ours:
        write.unset_fields.append(path)


def _viewer_stages(sync: SyncViewers) -> list[Row]:
    """`viewers.{id}` of the requirements: `nbf` kept if there, `exp` from it."""
    first: Row = {}
    second: Row = {}
    for viewer_id in sync.viewer_ids:
        path = f"viewers.{viewer_id}"
        first[f"{path}.nbf"] = {"$ifNull": [f"${path}.nbf", {"$literal": sync.nbf}]}
        first[f"{path}.duration"] = {"$literal": sync.duration_s}
        second[f"{path}.exp"] = {"$add": [f"${path}.nbf", round(sync.duration_s * 1000)]}
    return [{"$set": first}, {"$set": second}]


@dataclass(slots=True)
class GoalWrite:
    """One goal's part in a command: compare-and-set, ledger row, outbox entries.

    `calls` says the ledger rows to the payment service, when that holds the goal's money.
    `outbox_before` is how long its outbox was when it was read.
    """

    goal_id: ObjectId
    guard: Row
    set_fields: Row
    unset_fields: list[str]
    entries: list[OutboxEntry]
    lease: Row
    ledger: list[Row]
    calls: list[Row]
    after: Goal
    outbox_before: int

    def update(self) -> Row | list[Row]:
        """The update of the compare-and-set.

        New entries queue up behind those that are still on their way, and then owner and lease
        stay theirs: whoever delivers them goes on with these. An outbox that was empty is so
        still, since only what raises the version adds to it.
        """
        return self._pipeline() if self.outbox_before else self._plain()

    def _plain(self) -> Row:
        added: Row = {}
        if self.entries:
            added = {"outbox": [entry.model_dump() for entry in self.entries], **self.lease}
        update: Row = {"$set": self.set_fields | added, "$inc": {"version": 1}}
        if self.unset_fields:
            update["$unset"] = dict.fromkeys(self.unset_fields, "")
        return update

    def _pipeline(self) -> list[Row]:
        """What comes from outside is a literal in it."""
        changes: Row = {name: {"$literal": value} for name, value in self.set_fields.items()}
        changes["version"] = {"$add": ["$version", 1]}
        if self.entries:
            waiting = {"$ifNull": ["$outbox", []]}
            under_way = {"$gt": [{"$size": waiting}, 0]}
            added = [entry.model_dump() for entry in self.entries]
            changes["outbox"] = {"$concatArrays": [waiting, {"$literal": added}]}
            for name, value in self.lease.items():
                changes[name] = {"$cond": [under_way, f"${name}", {"$literal": value}]}
        stages: list[Row] = [{"$set": changes}]
        if self.unset_fields:
            stages.append({"$unset": self.unset_fields})
        return stages

    def deliveries(self, before_outbox: int) -> list[Delivery]:
        """What this process delivers; nothing when earlier entries are still on their way.

        Whoever delivers those goes on with these: one goal's events keep their order.
        """
        if not self.entries or before_outbox:
            return []
        return [Delivery(self.goal_id, tuple(self.entries))]


def facts_of(goal: Goal, session: Session, *, taken: bool = False) -> GoalFacts:
    """What the state machine wants to know of a stored goal.

    Args:
        goal: the goal.
        session: its Session.
        taken: whether another goal of the Session is known to be agreed or live.
    """
    viewer_id = goal.conditions.exclusive_to
    mine = {GoalState.AGREED: [viewer_id], GoalState.LIVE: [viewer_id]}.get(goal.state)
    exclusive_to = session.status.exclusive_to
    held_pass = session.viewers.get(viewer_id)
    return GoalFacts(
        state=goal.state,
        streamer_id=goal.metadata.user_id,
        viewer_id=viewer_id,
        amount_minor=goal.amount,
        prepaid_duration_s=goal.metadata.prepaid_duration,
        expires_at=goal.exp,
        reason=goal.reason,
        due_at=goal.due_at,
        session_active=session.active,
        session_taken=taken or (bool(exclusive_to) and exclusive_to != mine),
        viewer_nbf=held_pass.nbf if held_pass else None,
    )


class Writer:
    """Builds the writes of each command; holds nothing but the registry and the limits."""

    def __init__(self, registry: Registry, limits: Limits, owner: str, lease_s: float) -> None:
        self._registry = registry
        self._occurrences = Occurrences(limits)
        self._owner = owner
        self._lease_s = lease_s

    def goal_write(
        self, before: Goal, decision: Decision, now: datetime, client_id: str | None
    ) -> tuple[GoalWrite, list[Effect]]:
        """The compare-and-set of an existing goal and the commit-phase effects of its signals."""
        assert before.id is not None
        after = _after(before, decision, client_id)
        occurrences = self._occurrences.of(before, after, decision, now)
        effects: list[Effect] = []
        for occurrence in occurrences:
            for receiver in self._registry.of(
                occurrence.signal, occurrence.goal_type, Phase.COMMIT
            ):
                effects.extend(receiver.react(occurrence))
        due = next((effect.due for effect in effects if isinstance(effect, MakeDue)), decision.due)
        _set_due(after, due)
        set_fields = _changed_fields(after, decision)
        unset_fields = ["due_lease_until", "due_owner"]
        if due is None:
            unset_fields += ["due_at", "due_command"]
        else:
            set_fields |= {"due_at": due.at, "due_command": due.command.value}
        entries = self._outbox_entries(occurrences)
        ledger = self.ledger_rows(before, decision, now)
        write = GoalWrite(
            goal_id=before.id,
            guard=_guard(before, decision),
            set_fields=set_fields,
            unset_fields=unset_fields,
            entries=entries,
            lease=self.outbox_lease(now),
            ledger=ledger,
            calls=closing_calls(ledger) if before.held_by == SERVICE else [],
            after=after,
            outbox_before=len(before.outbox),
        )
        return write, effects

    def session_write(
        self, session: Session, goal: Goal, decision: Decision, effects: Iterable[Effect]
    ) -> SessionWrite | None:
        """The one update of the Session that a command and its receivers make."""
        viewer_id = goal.conditions.exclusive_to
        pair = session.exclusive_goal_pairs.get(viewer_id)
        pair_is_ours = pair is not None and pair.trigger_exclusive_goal == goal.id
        write = SessionWrite(guard={"_id": session.id, "version": session.version})
        for effect in effects:
            match effect:
                # The requirements' filter: a pair that names another goal is left alone.
                case SetOnSession() if pair_is_ours:
                    write.guard[f"exclusive_goal_pairs.{viewer_id}.trigger_exclusive_goal"] = (
                        goal.id
                    )
                    write.set_fields |= effect.fields
                case SyncViewers():
                    write.sync = effect
                case UnsetOtherPairs():
                    write.cleans_up = len(session.exclusive_goal_pairs) > 1
                case _:
                    pass
        if pair_is_ours and decision.command is CommandName.START:
            path = f"exclusive_goal_pairs.{viewer_id}.exclusive_goal"
            write.set_fields[path] = goal.exclusive_goal
        if decision.command in (CommandName.FINISH, CommandName.REFUND):
            _free_session(write, session, viewer_id, decision.command, pair_is_ours)
        if not (write.set_fields or write.unset_fields or write.sync):
            return None
        return write

    def outbox_lease(self, now: datetime) -> Row:
        """The fields that keep other processes from an outbox that this one delivers."""
        return {
            "outbox_due_at": now + milliseconds(self._lease_s),
            "outbox_owner": self._owner,
        }

    def invitation_entries(
        self, goal: Goal, decision: Decision, now: datetime
    ) -> list[OutboxEntry]:
        """What a new invitation puts into its outbox."""
        return self._outbox_entries(self._occurrences.invited(goal, decision, now))

    def _outbox_entries(self, occurrences: Iterable[Occurrence]) -> list[OutboxEntry]:
        """One entry for each signal that anyone receives."""
        entries = []
        for occurrence in occurrences:
            receivers = self._registry.of(occurrence.signal, occurrence.goal_type, Phase.DELIVER)
            if receivers:
                entries.append(
                    OutboxEntry(
                        event_id=occurrence.event_id,
                        pending=[receiver.name for receiver in receivers],
                        occurrence=kept(occurrence),
                    )
                )
        return entries

    def ledger_rows(self, goal: Goal, decision: Decision, now: datetime) -> list[Row]:
        """The posting that the decision makes, as the ledger keeps it."""
        if decision.movement is None:
            return []
        entry = posting(
            decision.movement,
            goal_id=str(goal.id),
            viewer_id=goal.conditions.exclusive_to,
            streamer_id=goal.metadata.user_id,
            amount_minor=goal.amount,
        )
        return [
            {
                "_id": entry.key,
                "goal_id": goal.id,
                "session_id": goal.conditions.session_id,
                "viewer_id": goal.conditions.exclusive_to,
                "streamer_id": goal.metadata.user_id,
                "movement": entry.movement.value,
                "debit": entry.debit,
                "credit": entry.credit,
                "amount": entry.amount_minor,
                "reason": reason_of(decision),
                "at": now,
                "schema_version": SCHEMA_VERSION,
            }
        ]


def keeps_sources(effects: Iterable[Effect]) -> bool:
    """Whether the Session's media sources are to be kept on the show that ended."""
    return any(isinstance(effect, KeepSources) for effect in effects)


def _after(before: Goal, decision: Decision, client_id: str | None) -> Goal:
    update: Row = {
        "active": decision.active,
        "exp": decision.expires_at,
        "state": decision.target,
        "reason": decision.reason or before.reason,
        "outcome": decision.outcome or before.outcome,
        "version": before.version + 1,
    }
    if decision.deactivates:
        update["triggerer"] = client_id
    if decision.agreed_at is not None:
        update["metadata"] = before.metadata.model_copy(update={"agreed": decision.agreed_at})
    if decision.command is CommandName.START:
        update["exclusive_goal"] = ObjectId()
    after: Goal = before.model_copy(update=update)
    return after


def _guard(before: Goal, decision: Decision) -> Row:
    """The filter of the compare-and-set: the requirements' own, and the goal as it was decided."""
    guard: Row = {
        "_id": before.id,
        "metadata.user_id": before.metadata.user_id,
        "state": before.state.value,
        "version": before.version,
    }
    if decision.deactivates:
        guard["active"] = True
    return guard


def _changed_fields(after: Goal, decision: Decision) -> Row:
    """What a decision sets on the goal, deadlines and outbox aside."""
    fields: Row = {"active": after.active, "exp": after.exp, "state": after.state.value}
    if after.reason is not None:
        fields["reason"] = after.reason.value
    if after.outcome is not None:
        fields["outcome"] = after.outcome.value
    if decision.deactivates:
        fields["triggerer"] = after.triggerer
    if decision.agreed_at is not None:
        fields["metadata.agreed"] = decision.agreed_at
    if decision.command is CommandName.START:
        fields["exclusive_goal"] = after.exclusive_goal
    return fields


def _set_due(goal: Goal, due: Due | None) -> None:
    goal.due_at = due.at if due else None
    goal.due_command = due.command if due else None
