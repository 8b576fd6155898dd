"""What MongoDB holds: the documents under the requirements' own field names, and their indexes.

Schema only, no behaviour. Beanie validates what is read and creates the indexes;
`persistence.store` says why writes are atomic updates on the collections instead of `save()`.

Source: requirements (field names), docs/decisions.md, docs/architecture.md.
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from beanie import Document
from bson import ObjectId
from pydantic import BaseModel, ConfigDict, Field
from pymongo import ASCENDING, IndexModel

from statemachine.goal import CommandName, GoalState, Movement, Outcome, Reason
from statemachine.receivers import EXCLUSIVE_GOAL, TRIGGER_EXCLUSIVE_GOAL

SCHEMA_VERSION = 1

OPEN_STATES: Final = [
    state.value for state in GoalState if state not in (GoalState.NONE, GoalState.ENDED)
]


def _of_open_goals(name: str, path: str) -> IndexModel:
    """An index in which a goal stands once, from its invitation to its end.

    With the state in its key each command would move the goal in it, and an ended one would stay.
    """
    return IndexModel(
        [(path, ASCENDING)],
        name=name,
        partialFilterExpression={"state": {"$in": OPEN_STATES}},
    )


class _Part(BaseModel):
    """A part of a document; fields that only a newer node knows are left out."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="ignore")


class _Parsed:
    """Reads fields as they are. Beanie's documents look each time whether they were parsed yet.

    None of Duet's is read lazily, and the looks are a thirtieth of an agreement.
    """

    if not TYPE_CHECKING:
        __getattribute__ = object.__getattribute__


class Conditions(_Part):
    """On what the goal hangs: the Session, and the viewer for whom it is exclusive."""

    session_id: ObjectId
    exclusive_to: str


class Context(_Part):
    """What kind of goal, and for whom."""

    type: Literal["trigger-exclusive", "exclusive"]
    exclusive_to: str


class Metadata(_Part):
    """The streamer, the paid seconds and, once agreed, when."""

    user_id: str
    prepaid_duration: int
    agreed: datetime | None = None


class OutboxEntry(_Part):
    """One signal that a commit sent and whose deliver-phase receivers have not all run.

    Attributes:
        pending: names of the receivers still to run, in order.
        occurrence: the fields of `statemachine.receivers.Occurrence`.
    """

    event_id: str
    pending: list[str]
    occurrence: dict[str, Any]


class Goal(_Parsed, Document):
    """An invitation (`TriggerExclusiveGoal`) or the show that follows it (`ExclusiveGoal`).

    Attributes:
        breakdown: who paid how much, in minor units.
        exclusive_goal: of an invitation that was started, its show.
        trigger_goal: of a show, its invitation.
        due_at: when the timer may claim `due_command`; a claim stands beside it, in
            `due_lease_until` and `due_owner`, until the command has moved the goal on.
        outbox_due_at: when another process may take over the outbox; absent when it is empty.
        outbox_owner: the node that delivers at present.
        held_by: `service` when the platform's payment service holds the money as well; the goal
            is then settled by its acknowledgement. Absent: the ledger alone.
        version: grows by one with each commit.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="ignore")

    cls: Literal["TriggerExclusiveGoal", "ExclusiveGoal"] = Field(alias="_cls")
    active: bool
    progress: float = 1
    levels: list[Any] = Field(default_factory=list)
    conditions: Conditions
    context: Context
    exp: datetime
    triggerer: str | None = None
    metadata: Metadata
    breakdown: dict[str, int]
    amount: int
    state: GoalState
    reason: Reason | None = None
    outcome: Outcome | None = None
    exclusive_goal: ObjectId | None = None
    trigger_goal: ObjectId | None = None
    rtc_sources: list[Any] = Field(default_factory=list)
    created_at: datetime
    due_at: datetime | None = None
    due_command: CommandName | None = None
    outbox: list[OutboxEntry] = Field(default_factory=list)
    outbox_due_at: datetime | None = None
    outbox_owner: str | None = None
    held_by: str | None = None
    version: int = 1
    schema_version: int = SCHEMA_VERSION

    class Settings:
        """Collection and indexes, one for each query."""

        name = "goals"
        keep_nulls = False
        indexes: ClassVar = [
            # goal.snapshot: the open goals of a user, as streamer and as viewer
            _of_open_goals("open_goals_of_streamer", "metadata.user_id"),
            _of_open_goals("open_goals_of_viewer", "conditions.exclusive_to"),
            # the goals of a Session: closing it, and its one agreed or live goal
            _of_open_goals("open_goals_of_session", "conditions.session_id"),
            # an invariant that no bug can break: one agreed or live goal a Session
            IndexModel(
                [("conditions.session_id", ASCENDING)],
                name="one_show_per_session",
                unique=True,
                partialFilterExpression={
                    "_cls": TRIGGER_EXCLUSIVE_GOAL,
                    "state": {"$in": [GoalState.AGREED.value, GoalState.LIVE.value]},
                },
            ),
            IndexModel(
                [("due_at", ASCENDING)],
                partialFilterExpression={"due_at": {"$exists": True}},
            ),
            IndexModel(
                [("outbox_due_at", ASCENDING)],
                partialFilterExpression={"outbox_due_at": {"$exists": True}},
            ),
        ]


class SessionUser(_Part):
    """The streamer: the requirements' `session.user.id`."""

    id: str


class SessionStatus(_Part):
    """For whom the stream is exclusive at present; empty: for nobody."""

    exclusive_to: list[str] = Field(default_factory=list)


class Pair(_Part):
    """One viewer's invitation and show, `exclusive_goal_pairs.{user}`."""

    trigger_exclusive_goal: ObjectId
    trigger_exclusive_goal_agreed: datetime | None = None
    trigger_exclusive_goal_ended: bool | None = None
    exclusive_goal: ObjectId | None = None
    exclusive_goal_ended: bool | None = None


class ViewerPass(_Part):
    """When one viewer may watch, `viewers.{user}`; `duration` in seconds."""

    nbf: datetime
    duration: float
    exp: datetime


class Session(_Parsed, Document):
    """A streamer's live broadcast."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="ignore")

    user: SessionUser
    active: bool = True
    status: SessionStatus = Field(default_factory=SessionStatus)
    exclusive_goal_pairs: dict[str, Pair] = Field(default_factory=dict)
    viewers: dict[str, ViewerPass] = Field(default_factory=dict)
    rtc_sources: list[Any] = Field(default_factory=list)
    created_at: datetime
    ended_at: datetime | None = None
    version: int = 1
    schema_version: int = SCHEMA_VERSION

    class Settings:
        """Collection and indexes."""

        name = "sessions"
        keep_nulls = False
        indexes: ClassVar = [
            IndexModel(
                [("user.id", ASCENDING)],
                name="one_live_session_per_streamer",
                unique=True,
                partialFilterExpression={"active": True},
            ),
        ]


class EscrowEntry(Document):
    """One posting of the ledger; its `_id` is the posting's idempotency key."""

    id: str  # type: ignore[assignment]
    goal_id: ObjectId
    session_id: ObjectId
    viewer_id: str
    streamer_id: str
    movement: Movement
    debit: str
    credit: str
    amount: int
    reason: str
    at: datetime
    schema_version: int = SCHEMA_VERSION

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="ignore")

    class Settings:
        """Collection and indexes."""

        name = "escrow"
        indexes: ClassVar = [
            IndexModel([("goal_id", ASCENDING)]),
            IndexModel([("viewer_id", ASCENDING), ("at", ASCENDING)]),
        ]


class EscrowCall(Document):
    """What must be said to the platform's payment service; `_id` is the posting's key.

    Attributes:
        call: `hold`, `capture` or `release`.
        reason: as in the ledger; `no_invitation` when a hold is given back that led to none.
        status: see `persistence.escrow_calls.CallStatus`.
        request_key: of a hold whose request has not been answered; no second one can be begun.
        since: when it was first to be said, or was taken up again; give-up counts from here.
        due_at: when it is said next; a claim moves it on by the lease.
        due_owner: the process that claimed it last.
        attempts: how often the service was asked in vain.
        answer: what the service answered last, cut to a line.
    """

    id: str  # type: ignore[assignment]
    call: Movement
    goal_id: ObjectId
    session_id: ObjectId
    viewer_id: str
    streamer_id: str
    amount: int
    reason: str
    at: datetime
    status: str
    since: datetime
    due_at: datetime | None = None
    due_owner: str | None = None
    attempts: int = 0
    answer: str | None = None
    request_key: str | None = None
    fingerprint: str | None = None
    schema_version: int = SCHEMA_VERSION

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="ignore")

    class Settings:
        """Collection and indexes."""

        name = "escrow_calls"
        keep_nulls = False
        indexes: ClassVar = [
            IndexModel(
                [("due_at", ASCENDING)],
                partialFilterExpression={"due_at": {"$exists": True}},
            ),
            IndexModel([("status", ASCENDING), ("since", ASCENDING)]),
            # an invariant that no bug can break: one hold under way for a request
            IndexModel(
                [("request_key", ASCENDING)],
                name="one_hold_per_request",
                unique=True,
                partialFilterExpression={"request_key": {"$exists": True}},
            ),
        ]


class RequestRecord(Document):
    """The answer that a `request_id` was given, kept for a day; `_id` is `{user}:{request_id}`."""

    id: str  # type: ignore[assignment]
    fingerprint: str
    goal: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    at: datetime

    class Settings:
        """Collection and indexes."""

        name = "requests"
        indexes: ClassVar = [IndexModel([("at", ASCENDING)], expireAfterSeconds=86_400)]


class GoalRecord(Document):
    """The analytics record of an ended goal; `_id` is the event id."""

    id: str  # type: ignore[assignment]
    goal_type: str
    goal_id: str
    session_id: str
    streamer_id: str
    viewer_id: str
    agreed: bool
    at: datetime

    class Settings:
        """Collection and indexes."""

        name = "goal_records"
        indexes: ClassVar = [
            IndexModel([("streamer_id", ASCENDING), ("at", ASCENDING)]),
            IndexModel([("at", ASCENDING)]),
        ]


class MigrationRecord(Document):
    """How far a migration has come; `_id` is its name. `lease` is held by whoever migrates.

    Attributes:
        last_id: the last document of the run that was looked at; a later run goes on behind it.
        migrated: documents changed so far, by all runs.
    """

    id: str  # type: ignore[assignment]
    last_id: Any = None
    migrated: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    owner: str | None = None
    lease_until: datetime | None = None

    class Settings:
        """Collection."""

        name = "migrations"
        keep_nulls = False


DOCUMENTS: tuple[type[Document], ...] = (
    Goal,
    Session,
    EscrowEntry,
    EscrowCall,
    RequestRecord,
    GoalRecord,
    MigrationRecord,
)

__all__ = [
    "DOCUMENTS",
    "EXCLUSIVE_GOAL",
    "OPEN_STATES",
    "TRIGGER_EXCLUSIVE_GOAL",
    "EscrowCall",
    "EscrowEntry",
    "Goal",
    "GoalRecord",
    "MigrationRecord",
    "OutboxEntry",
    "Pair",
    "RequestRecord",
    "Session",
    "ViewerPass",
]
