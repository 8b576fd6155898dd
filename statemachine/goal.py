"""The life of a goal: which command may follow which state, by whom, and when.

The table in this module is the only place that knows. `decide` is pure: it takes the facts of a
goal, a command and the time, and returns a `Decision` (what to write) or a `Rejection` (what to
answer). Races are not decided here but by the database, which accepts a decision only when the
goal is still as it was.

Source: docs/state-machine.md, docs/decisions.md (how the requirements are read).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

from transitions import Machine, MachineError


class GoalState(StrEnum):
    """Where a goal stands. `NONE` is the goal that does not exist yet."""

    NONE = "none"
    INVITED = "invited"
    AGREED = "agreed"
    LIVE = "live"
    DECLINED = "declined"
    ENDED = "ended"


class CommandName(StrEnum):
    """What can be asked of a goal."""

    INVITE = "invite"
    AGREE = "agree"
    DISAGREE = "disagree"
    WITHDRAW = "withdraw"
    EXPIRE = "expire"
    SUPERSEDE = "supersede"
    CLOSE = "close"
    START = "start"
    REFUND = "refund"
    FINISH = "finish"
    SETTLE = "settle"


class Role(StrEnum):
    """Who asks: one of the two people, the clock, or Duet itself."""

    STREAMER = "streamer"
    VIEWER = "viewer"
    TIMER = "timer"
    SYSTEM = "system"


class Reason(StrEnum):
    """Why an invitation was declined, or an agreed show refunded."""

    DISAGREED = "disagreed"
    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    STREAM_ENDED = "stream_ended"
    NOT_STARTED = "not_started"


class Outcome(StrEnum):
    """Where the money went in the end."""

    CAPTURED = "captured"
    REFUNDED = "refunded"


class Movement(StrEnum):
    """What a transition does to the escrow."""

    HOLD = "hold"
    CAPTURE = "capture"
    RELEASE = "release"


class RejectionCode(StrEnum):
    """Why a command is refused; `gateway.errors` gives each its HTTP status."""

    NOT_YOUR_GOAL = "not_your_goal"
    WRONG_ROLE = "wrong_role"
    OWN_SESSION = "own_session"
    SESSION_ENDED = "session_ended"
    SESSION_BUSY = "session_busy"
    AMOUNT_OUT_OF_RANGE = "amount_out_of_range"
    DURATION_OUT_OF_RANGE = "duration_out_of_range"
    GOAL_EXPIRED = "goal_expired"
    GOAL_NOT_AGREED = "goal_not_agreed"
    GOAL_NOT_LIVE = "goal_not_live"
    GOAL_NOT_DECLINED = "goal_not_declined"
    GOAL_ALREADY_INVITED = "goal_already_invited"
    GOAL_ALREADY_AGREED = "goal_already_agreed"
    GOAL_ALREADY_LIVE = "goal_already_live"
    GOAL_ALREADY_DECLINED = "goal_already_declined"
    GOAL_ALREADY_ENDED = "goal_already_ended"
    TOO_EARLY = "too_early"


class Rule(NamedTuple):
    """One line of the table of docs/state-machine.md."""

    source: GoalState
    command: CommandName
    roles: frozenset[Role]
    target: GoalState
    movement: Movement | None = None
    reason: Reason | None = None
    outcome: Outcome | None = None


_STREAMER: Final = frozenset({Role.STREAMER})
_VIEWER: Final = frozenset({Role.VIEWER})
_TIMER: Final = frozenset({Role.TIMER})
_SYSTEM: Final = frozenset({Role.SYSTEM})


def _declines(command: CommandName, roles: frozenset[Role], reason: Reason) -> Rule:
    return Rule(
        GoalState.INVITED,
        command,
        roles,
        GoalState.DECLINED,
        movement=Movement.RELEASE,
        reason=reason,
    )


RULES: Final[tuple[Rule, ...]] = (
    Rule(GoalState.NONE, CommandName.INVITE, _VIEWER, GoalState.INVITED, Movement.HOLD),
    Rule(GoalState.INVITED, CommandName.AGREE, _STREAMER, GoalState.AGREED),
    _declines(CommandName.DISAGREE, _STREAMER, Reason.DISAGREED),
    _declines(CommandName.WITHDRAW, _VIEWER, Reason.WITHDRAWN),
    _declines(CommandName.EXPIRE, _TIMER, Reason.EXPIRED),
    _declines(CommandName.SUPERSEDE, _SYSTEM, Reason.SUPERSEDED),
    _declines(CommandName.CLOSE, _SYSTEM, Reason.STREAM_ENDED),
    Rule(GoalState.AGREED, CommandName.START, _STREAMER, GoalState.LIVE, Movement.CAPTURE),
    Rule(
        GoalState.AGREED,
        CommandName.REFUND,
        _TIMER,
        GoalState.ENDED,
        Movement.RELEASE,
        Reason.NOT_STARTED,
        Outcome.REFUNDED,
    ),
    Rule(
        GoalState.LIVE,
        CommandName.FINISH,
        _STREAMER | _VIEWER | _TIMER,
        GoalState.ENDED,
        outcome=Outcome.CAPTURED,
    ),
    Rule(
        GoalState.DECLINED,
        CommandName.SETTLE,
        _SYSTEM,
        GoalState.ENDED,
        outcome=Outcome.REFUNDED,
    ),
)

_RULE_OF: Final = {(rule.source, rule.command): rule for rule in RULES}
_ROLES_OF: Final[dict[CommandName, frozenset[Role]]] = {
    command: frozenset().union(*(rule.roles for rule in RULES if rule.command is command))
    for command in CommandName
}

# One shared synchronous machine and no model: nothing is retained and no `to_*` back door exists.
_MACHINE: Final = Machine(
    model=None,
    states=GoalState,
    initial=GoalState.NONE,
    transitions=[
        {"trigger": rule.command.value, "source": rule.source, "dest": rule.target}
        for rule in RULES
    ],
    auto_transitions=False,
)


class _Cursor:
    """The throw-away model that the machine moves."""

    __slots__ = ("state",)

    def __init__(self, state: GoalState) -> None:
        self.state = state


@dataclass(frozen=True, slots=True)
class Limits:
    """What an invitation may ask for, and the constants of time.

    `refund_delay_s` and `show_grace_s` are the requirements' 65 s and 60 s.
    """

    invitation_ttl_s: float = 60.0
    refund_delay_s: float = 65.0
    show_grace_s: float = 60.0
    amount_max_minor: int = 100_000_000
    prepaid_duration_max_s: int = 86_400


@dataclass(frozen=True, slots=True)
class Command:
    """One request: its name and who makes it. `user_id` is none for the timer and the system."""

    name: CommandName
    role: Role
    user_id: str | None = None


@dataclass(frozen=True, slots=True)
class GoalFacts:
    """All of a goal and its Session that a decision depends on.

    Attributes:
        expires_at: the goal's `exp`; for a goal that does not exist yet, ignored.
        due_at: when the refund check or the end of the show falls due, else none.
        session_active: whether the stream is on.
        session_taken: whether another goal of the Session is agreed or live.
        viewer_nbf: start of the pass that the viewer already has in the Session, if any.
    """

    state: GoalState
    streamer_id: str
    viewer_id: str
    amount_minor: int
    prepaid_duration_s: int
    expires_at: datetime
    reason: Reason | None = None
    due_at: datetime | None = None
    session_active: bool = True
    session_taken: bool = False
    viewer_nbf: datetime | None = None


@dataclass(frozen=True, slots=True)
class Due:
    """What the timer has to ask next, and when."""

    command: CommandName
    at: datetime


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be written when nobody was faster.

    Attributes:
        active: the requirements' field after the command.
        expires_at: `exp` after the command; `min(exp, now)` once a goal is inactive.
        agreed_at: set by agree, else none.
        due: the next deadline. None when there is none, and after agree, where the receiver
            `trigger_exclusive_goal_escrow_refund` sets it.
        deactivates: whether the command runs `deactivate_goal` and so signals `goal.ended`.
    """

    command: CommandName
    source: GoalState
    target: GoalState
    active: bool
    expires_at: datetime
    movement: Movement | None
    reason: Reason | None
    outcome: Outcome | None
    agreed_at: datetime | None
    due: Due | None
    deactivates: bool


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why not: a code for programs, a sentence for a person, the state that stood against it."""

    code: RejectionCode
    message: str
    state: GoalState | None = None


def show_duration_s(prepaid_duration_s: int, limits: Limits) -> float:
    """The length of the viewer's pass: the paid time and the grace.

    Source: requirements, `sync_trigger_goal_session_viewer`.
    """
    return limits.show_grace_s + prepaid_duration_s


def decide(
    goal: GoalFacts, command: Command, now: datetime, limits: Limits | None = None
) -> Decision | Rejection:
    """Says what `command` does to `goal` at `now`; it touches nothing.

    The order of the checks is the order in which a person wants to hear of them: whose goal it
    is, what became of it, whether it is too late or too early, what the Session allows.
    """
    limits = limits or Limits()
    refused = _refuse_actor(goal, command)
    if refused is None:
        refused = _refuse_state(goal, command)
    if refused is None:
        refused = _refuse_time(goal, command, now, limits) or _refuse_session(goal, command)
    if refused is None and command.name is CommandName.INVITE:
        refused = _refuse_terms(goal, limits)
    if refused is not None:
        return refused
    return _decision(goal, _RULE_OF[goal.state, command.name], now, limits)


def _refuse_actor(goal: GoalFacts, command: Command) -> Rejection | None:
    """Refuses strangers and the wrong party."""
    if command.role not in _ROLES_OF[command.name]:
        allowed = " or ".join(sorted(role.value for role in _ROLES_OF[command.name]))
        return Rejection(
            RejectionCode.WRONG_ROLE,
            f"Only the {allowed} can {command.name} a goal, not the {command.role}.",
            goal.state,
        )
    if command.role is Role.STREAMER and command.user_id != goal.streamer_id:
        return Rejection(RejectionCode.NOT_YOUR_GOAL, "This goal belongs to another streamer.")
    if command.role is Role.VIEWER and command.user_id != goal.viewer_id:
        return Rejection(RejectionCode.NOT_YOUR_GOAL, "This goal belongs to another viewer.")
    return None


_WANTED: Final = {
    CommandName.START: (RejectionCode.GOAL_NOT_AGREED, "has not been agreed"),
    CommandName.REFUND: (RejectionCode.GOAL_NOT_AGREED, "has not been agreed"),
    CommandName.FINISH: (RejectionCode.GOAL_NOT_LIVE, "is not live"),
    CommandName.SETTLE: (RejectionCode.GOAL_NOT_DECLINED, "has not been declined"),
}
_ALREADY: Final = {
    GoalState.NONE: (RejectionCode.GOAL_NOT_AGREED, "does not exist yet"),
    GoalState.INVITED: (RejectionCode.GOAL_ALREADY_INVITED, "already stands as an invitation"),
    GoalState.AGREED: (RejectionCode.GOAL_ALREADY_AGREED, "has already been agreed"),
    GoalState.LIVE: (RejectionCode.GOAL_ALREADY_LIVE, "is already live"),
    GoalState.DECLINED: (RejectionCode.GOAL_ALREADY_DECLINED, "has already been declined"),
    GoalState.ENDED: (RejectionCode.GOAL_ALREADY_ENDED, "has already ended"),
}


def _refuse_state(goal: GoalFacts, command: Command) -> Rejection | None:
    """Asks the machine; folds its `MachineError` and its `False` into one rejection."""
    cursor = _Cursor(goal.state)
    try:
        moved = _MACHINE.events[command.name.value].trigger(cursor)
    except MachineError:
        moved = False
    if moved:
        return None
    if goal.reason is Reason.EXPIRED:
        return Rejection(RejectionCode.GOAL_EXPIRED, "This invitation has expired.", goal.state)
    before_its_turn = goal.state in (GoalState.NONE, GoalState.INVITED, GoalState.AGREED)
    if command.name in _WANTED and (before_its_turn or command.name is CommandName.SETTLE):
        code, text = _WANTED[command.name]
    else:
        code, text = _ALREADY[goal.state]
    because = f" ({goal.reason.value.replace('_', ' ')})" if goal.reason else ""
    return Rejection(code, f"This goal {text}{because}.", goal.state)


def _refuse_time(
    goal: GoalFacts, command: Command, now: datetime, limits: Limits
) -> Rejection | None:
    """Refuses an agreement or a start that comes too late and a timer that comes too early."""
    match command.name:
        case CommandName.START if goal.viewer_nbf is not None:
            length_s = show_duration_s(goal.prepaid_duration_s, limits)
            if now >= goal.viewer_nbf + timedelta(seconds=length_s):
                # The viewer would pay for a show that is over when it starts.
                return Rejection(
                    RejectionCode.GOAL_EXPIRED, "The time of this show is over.", goal.state
                )
        case CommandName.AGREE if now >= goal.expires_at:
            return Rejection(RejectionCode.GOAL_EXPIRED, "This invitation has expired.", goal.state)
        case CommandName.EXPIRE if now < goal.expires_at:
            return Rejection(
                RejectionCode.TOO_EARLY, "This invitation has not expired yet.", goal.state
            )
        case CommandName.REFUND | CommandName.FINISH if command.role is Role.TIMER:
            if goal.due_at is not None and now < goal.due_at:
                return Rejection(RejectionCode.TOO_EARLY, "This goal is not due yet.", goal.state)
    return None


def _refuse_session(goal: GoalFacts, command: Command) -> Rejection | None:
    """Refuses what the streamer's Session does not allow."""
    wants_session = command.name in (CommandName.INVITE, CommandName.AGREE, CommandName.START)
    if not wants_session:
        return None
    if goal.streamer_id == goal.viewer_id:
        return Rejection(RejectionCode.OWN_SESSION, "You can't invite yourself.", goal.state)
    if not goal.session_active:
        return Rejection(RejectionCode.SESSION_ENDED, "The stream has ended.", goal.state)
    if goal.session_taken:
        return Rejection(
            RejectionCode.SESSION_BUSY,
            "The streamer has already agreed to a private show.",
            goal.state,
        )
    return None


def _refuse_terms(goal: GoalFacts, limits: Limits) -> Rejection | None:
    """Refuses money and times that no invitation may carry."""
    if not 1 <= goal.amount_minor <= limits.amount_max_minor:
        return Rejection(
            RejectionCode.AMOUNT_OUT_OF_RANGE,
            f"The amount must be from 1 to {limits.amount_max_minor} minor units.",
        )
    if not 1 <= goal.prepaid_duration_s <= limits.prepaid_duration_max_s:
        return Rejection(
            RejectionCode.DURATION_OUT_OF_RANGE,
            f"The prepaid duration must be from 1 to {limits.prepaid_duration_max_s} seconds.",
        )
    return None


def _decision(goal: GoalFacts, rule: Rule, now: datetime, limits: Limits) -> Decision:
    """Works out times and deadlines of an allowed command."""
    invites = rule.command is CommandName.INVITE
    agrees = rule.command is CommandName.AGREE
    if invites:
        expires_at = now + timedelta(seconds=limits.invitation_ttl_s)
    elif rule.source is GoalState.INVITED:
        expires_at = min(goal.expires_at, now)
    else:
        expires_at = goal.expires_at
    due: Due | None = None
    if invites:
        due = Due(CommandName.EXPIRE, expires_at)
    elif rule.command is CommandName.START:
        begins_at = goal.viewer_nbf or now
        length_s = show_duration_s(goal.prepaid_duration_s, limits)
        due = Due(CommandName.FINISH, begins_at + timedelta(seconds=length_s))
    return Decision(
        command=rule.command,
        source=rule.source,
        target=rule.target,
        active=invites,
        expires_at=expires_at,
        movement=rule.movement,
        reason=rule.reason,
        outcome=rule.outcome,
        agreed_at=now if agrees else None,
        due=due,
        deactivates=rule.source is GoalState.INVITED,
    )
