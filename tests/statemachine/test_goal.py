"""The table of the goal's states, cell by cell, and what stands beside it: times, terms, people."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import pytest

from statemachine.goal import (
    _MACHINE,
    RULES,
    Command,
    CommandName,
    Decision,
    Due,
    GoalFacts,
    GoalState,
    Limits,
    Movement,
    Outcome,
    Reason,
    Rejection,
    RejectionCode,
    Role,
    decide,
    show_duration_s,
)
from tests.statemachine.builders import MILLISECOND, NOW, STREAMER, VIEWER, command, facts


class Cell(NamedTuple):
    """What the design says of an allowed command, in its own words."""

    target: str
    movement: str | None = None
    reason: str | None = None
    outcome: str | None = None


# Written down from the design and not derived from the code: state, command, role -> cell.
ALLOWED: dict[tuple[str, str, str], Cell] = {
    ("none", "invite", "viewer"): Cell("invited", "hold"),
    ("invited", "agree", "streamer"): Cell("agreed"),
    ("invited", "disagree", "streamer"): Cell("declined", "release", "disagreed"),
    ("invited", "withdraw", "viewer"): Cell("declined", "release", "withdrawn"),
    ("invited", "expire", "timer"): Cell("declined", "release", "expired"),
    ("invited", "supersede", "system"): Cell("declined", "release", "superseded"),
    ("invited", "close", "system"): Cell("declined", "release", "stream_ended"),
    ("agreed", "start", "streamer"): Cell("live", "capture"),
    ("agreed", "refund", "timer"): Cell("ended", "release", "not_started", "refunded"),
    ("live", "finish", "streamer"): Cell("ended", None, None, "captured"),
    ("live", "finish", "viewer"): Cell("ended", None, None, "captured"),
    ("live", "finish", "timer"): Cell("ended", None, None, "captured"),
    ("declined", "settle", "system"): Cell("ended", None, None, "refunded"),
}
ROLES_OF = {name: {role for _, of, role in ALLOWED if of == name} for name in map(str, CommandName)}

ANY_OTHER = {
    "invited": "goal_already_invited",
    "agreed": "goal_already_agreed",
    "live": "goal_already_live",
    "declined": "goal_already_declined",
    "ended": "goal_already_ended",
    "none": "goal_not_agreed",
}
# With which code the right person is refused at the wrong time, where it is not the one above.
REFUSED = {
    ("none", "finish"): "goal_not_live",
    ("none", "settle"): "goal_not_declined",
    ("invited", "start"): "goal_not_agreed",
    ("invited", "refund"): "goal_not_agreed",
    ("invited", "finish"): "goal_not_live",
    ("invited", "settle"): "goal_not_declined",
    ("agreed", "finish"): "goal_not_live",
    ("agreed", "settle"): "goal_not_declined",
    ("live", "settle"): "goal_not_declined",
    ("ended", "settle"): "goal_not_declined",
}

CELLS = [
    pytest.param(state, name, role, id=f"{state}-{name}-{role}")
    for state in GoalState
    for name in CommandName
    for role in Role
]
WHEN_OF = {CommandName.EXPIRE: timedelta(seconds=60)}


def decided(
    goal: GoalFacts, name: CommandName, role: Role, after: timedelta = timedelta()
) -> Decision:
    decision = decide(goal, command(name, role), NOW + after)
    assert isinstance(decision, Decision), decision
    return decision


def refused(
    goal: GoalFacts, name: CommandName, role: Role, after: timedelta = timedelta()
) -> Rejection:
    rejection = decide(goal, command(name, role), NOW + after)
    assert isinstance(rejection, Rejection), rejection
    return rejection


# The table


@pytest.mark.parametrize(("state", "name", "role"), CELLS)
def test_each_cell_of_the_table_is_as_the_design_says(
    state: GoalState, name: CommandName, role: Role
) -> None:
    answer = decide(
        facts(state), command(name, role), NOW + WHEN_OF.get(name, timedelta()), Limits()
    )

    cell = ALLOWED.get((state.value, name.value, role.value))
    if cell is not None:
        assert isinstance(answer, Decision)
        assert (answer.command, answer.source) == (name, state)
        assert Cell(answer.target, answer.movement, answer.reason, answer.outcome) == cell
        return
    assert isinstance(answer, Rejection)
    if role.value not in ROLES_OF[name.value]:
        assert answer.code.value == "wrong_role"
    else:
        expected = REFUSED.get((state.value, name.value), ANY_OTHER[state.value])
        assert answer.code.value == expected
    assert answer.state is state
    assert answer.message[0].isupper()
    assert answer.message.endswith(".")


def test_the_table_has_no_line_more_than_the_design() -> None:
    lines = {(rule.source, rule.command, role) for rule in RULES for role in rule.roles}

    assert lines == set(ALLOWED)
    assert len(RULES) == len({(rule.source, rule.command) for rule in RULES})


def test_nothing_leaves_ended() -> None:
    assert not [rule for rule in RULES if rule.source is GoalState.ENDED]
    assert not _MACHINE.get_triggers(GoalState.ENDED.name)


def test_the_machine_moves_exactly_as_the_rules_say() -> None:
    moves = {
        (transition.source, name, transition.dest)
        for name, event in _MACHINE.events.items()
        for source in event.transitions.values()
        for transition in source
    }

    assert moves == {(rule.source.name, rule.command.value, rule.target.name) for rule in RULES}


def test_the_machine_has_no_back_doors_and_keeps_no_model() -> None:
    assert set(_MACHINE.events) == {name.value for name in CommandName}
    assert _MACHINE.models == []
    assert set(_MACHINE.states) == {state.name for state in GoalState}


def test_only_leaving_the_invitation_runs_deactivate_goal() -> None:
    deactivating = {
        rule.command
        for rule in RULES
        for role in rule.roles
        if decided(
            facts(rule.source), rule.command, role, WHEN_OF.get(rule.command, timedelta())
        ).deactivates
    }

    assert deactivating == {"agree", "disagree", "withdraw", "expire", "supersede", "close"}


def test_only_an_invitation_is_active() -> None:
    active = {
        rule.command
        for rule in RULES
        for role in rule.roles
        if decided(
            facts(rule.source), rule.command, role, WHEN_OF.get(rule.command, timedelta())
        ).active
    }

    assert active == {"invite"}


# Times


@pytest.mark.parametrize("late", [timedelta(), MILLISECOND, timedelta(days=1)])
def test_an_invitation_cant_be_agreed_at_or_after_its_exp(late: timedelta) -> None:
    rejection = refused(facts(expires_at=NOW), CommandName.AGREE, Role.STREAMER, late)

    assert rejection == Rejection(
        RejectionCode.GOAL_EXPIRED, "This invitation has expired.", GoalState.INVITED
    )


def test_an_invitation_can_be_agreed_a_millisecond_before_its_exp() -> None:
    decision = decided(facts(expires_at=NOW + MILLISECOND), CommandName.AGREE, Role.STREAMER)

    assert decision.agreed_at == NOW
    assert decision.expires_at == NOW


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (CommandName.DISAGREE, Role.STREAMER),
        (CommandName.WITHDRAW, Role.VIEWER),
        (CommandName.SUPERSEDE, Role.SYSTEM),
        (CommandName.CLOSE, Role.SYSTEM),
    ],
)
def test_an_invitation_whose_timer_is_late_can_still_be_declined(
    name: CommandName, role: Role
) -> None:
    decision = decided(facts(expires_at=NOW), name, role, timedelta(seconds=5))

    assert decision.target is GoalState.DECLINED
    assert decision.expires_at == NOW


def test_an_invitation_doesnt_expire_early() -> None:
    rejection = refused(facts(expires_at=NOW + MILLISECOND), CommandName.EXPIRE, Role.TIMER)

    assert rejection.code is RejectionCode.TOO_EARLY


def test_an_invitation_expires_exactly_at_its_exp() -> None:
    decision = decided(facts(expires_at=NOW), CommandName.EXPIRE, Role.TIMER)

    assert (decision.target, decision.reason) == (GoalState.DECLINED, Reason.EXPIRED)


@pytest.mark.parametrize(
    ("state", "name"),
    [(GoalState.AGREED, CommandName.REFUND), (GoalState.LIVE, CommandName.FINISH)],
)
def test_the_timer_waits_for_its_deadline_and_not_a_millisecond_more(
    state: GoalState, name: CommandName
) -> None:
    goal = facts(state, due_at=NOW)

    assert refused(goal, name, Role.TIMER, -MILLISECOND).code is RejectionCode.TOO_EARLY
    assert decided(goal, name, Role.TIMER).target is GoalState.ENDED


def test_a_show_whose_time_is_over_cant_be_started() -> None:
    goal = facts(GoalState.AGREED, prepaid_duration_s=1, viewer_nbf=NOW)
    over = timedelta(seconds=60 + 1)

    rejection = refused(goal, CommandName.START, Role.STREAMER, over)

    assert rejection.code is RejectionCode.GOAL_EXPIRED
    decided(goal, CommandName.START, Role.STREAMER, over - MILLISECOND)


@pytest.mark.parametrize("role", [Role.STREAMER, Role.VIEWER])
def test_people_may_finish_a_show_before_its_time(role: Role) -> None:
    goal = facts(GoalState.LIVE, due_at=NOW + timedelta(seconds=90))

    assert decided(goal, CommandName.FINISH, role).outcome is Outcome.CAPTURED


def test_a_declined_goal_says_that_it_has_expired_when_it_has() -> None:
    goal = facts(GoalState.DECLINED, reason=Reason.EXPIRED)

    rejection = refused(goal, CommandName.AGREE, Role.STREAMER)

    assert (rejection.code, rejection.state) == (RejectionCode.GOAL_EXPIRED, GoalState.DECLINED)


def test_a_declined_goal_says_why() -> None:
    goal = facts(GoalState.DECLINED, reason=Reason.STREAM_ENDED)

    rejection = refused(goal, CommandName.AGREE, Role.STREAMER)

    assert rejection.message == "This goal has already been declined (stream ended)."


# Exp and deadlines that a decision sets


def test_an_invitation_stands_for_its_time_to_live() -> None:
    limits = Limits(invitation_ttl_s=42.5)

    decision = decide(facts(GoalState.NONE), command(CommandName.INVITE, Role.VIEWER), NOW, limits)

    assert isinstance(decision, Decision)
    assert decision.expires_at == NOW + timedelta(seconds=42.5)
    assert decision.due == Due(CommandName.EXPIRE, decision.expires_at)


@pytest.mark.parametrize(
    ("expires_after", "expected_after"),
    [(timedelta(seconds=60), timedelta()), (-timedelta(seconds=3), -timedelta(seconds=3))],
)
def test_an_inactive_goals_exp_is_the_earlier_of_exp_and_now(
    expires_after: timedelta, expected_after: timedelta
) -> None:
    goal = facts(expires_at=NOW + expires_after)

    decision = decided(goal, CommandName.DISAGREE, Role.STREAMER)

    assert decision.expires_at == NOW + expected_after
    assert decision.due is None


def test_agreeing_leaves_the_deadline_to_its_receiver() -> None:
    assert decided(facts(), CommandName.AGREE, Role.STREAMER).due is None


@pytest.mark.parametrize("name", [CommandName.DISAGREE, CommandName.CLOSE])
def test_only_an_agreement_sets_agreed(name: CommandName) -> None:
    role = Role.STREAMER if name is CommandName.DISAGREE else Role.SYSTEM

    assert decided(facts(), name, role).agreed_at is None


def test_a_show_ends_at_the_end_of_the_viewers_pass() -> None:
    nbf = NOW - timedelta(seconds=20)
    goal = facts(GoalState.AGREED, viewer_nbf=nbf, prepaid_duration_s=30)

    decision = decided(goal, CommandName.START, Role.STREAMER)

    assert decision.due == Due(CommandName.FINISH, nbf + timedelta(seconds=90))
    assert decision.expires_at == goal.expires_at


def test_a_show_without_a_pass_is_counted_from_its_start() -> None:
    decision = decided(facts(GoalState.AGREED), CommandName.START, Role.STREAMER)

    assert decision.due == Due(CommandName.FINISH, NOW + timedelta(seconds=90))


def test_the_pass_is_as_long_as_the_paid_time_and_the_grace() -> None:
    assert show_duration_s(30, Limits()) == 90
    assert show_duration_s(30, Limits(show_grace_s=1.5)) == 31.5


def test_the_constants_are_the_requirements() -> None:
    limits = Limits()

    assert (limits.invitation_ttl_s, limits.refund_delay_s, limits.show_grace_s) == (60, 65, 60)


# People


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (GoalState.INVITED, CommandName.AGREE),
        (GoalState.INVITED, CommandName.DISAGREE),
        (GoalState.AGREED, CommandName.START),
        (GoalState.LIVE, CommandName.FINISH),
    ],
)
def test_another_streamer_cant_touch_the_goal(state: GoalState, name: CommandName) -> None:
    answer = decide(facts(state), Command(name, Role.STREAMER, "eve"), NOW)

    assert answer == Rejection(
        RejectionCode.NOT_YOUR_GOAL, "This goal belongs to another streamer."
    )


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (GoalState.NONE, CommandName.INVITE),
        (GoalState.INVITED, CommandName.WITHDRAW),
        (GoalState.LIVE, CommandName.FINISH),
    ],
)
def test_another_viewer_cant_touch_the_goal(state: GoalState, name: CommandName) -> None:
    answer = decide(facts(state), Command(name, Role.VIEWER, "eve"), NOW)

    assert answer == Rejection(RejectionCode.NOT_YOUR_GOAL, "This goal belongs to another viewer.")


def test_a_stranger_hears_nothing_of_the_goals_state() -> None:
    for state in GoalState:
        answer = decide(facts(state), Command(CommandName.AGREE, Role.STREAMER, "eve"), NOW)

        assert isinstance(answer, Rejection)
        assert answer.state is None


def test_the_viewer_in_the_streamers_role_is_still_not_the_streamer() -> None:
    answer = decide(facts(), Command(CommandName.AGREE, Role.STREAMER, VIEWER), NOW)

    assert isinstance(answer, Rejection)
    assert answer.code is RejectionCode.NOT_YOUR_GOAL


def test_the_wrong_role_is_told_who_could() -> None:
    answer = decide(facts(GoalState.LIVE), Command(CommandName.FINISH, Role.SYSTEM), NOW)

    assert isinstance(answer, Rejection)
    assert answer.message == (
        "Only the streamer or timer or viewer can finish a goal, not the system."
    )


# The Session

WANTS_SESSION = [
    (GoalState.NONE, CommandName.INVITE, Role.VIEWER),
    (GoalState.INVITED, CommandName.AGREE, Role.STREAMER),
    (GoalState.AGREED, CommandName.START, Role.STREAMER),
]


@pytest.mark.parametrize(("state", "name", "role"), WANTS_SESSION)
def test_after_the_stream_nothing_new_begins(
    state: GoalState, name: CommandName, role: Role
) -> None:
    rejection = refused(facts(state, session_active=False), name, role)

    assert (rejection.code, rejection.state) == (RejectionCode.SESSION_ENDED, state)


@pytest.mark.parametrize(("state", "name", "role"), WANTS_SESSION)
def test_while_another_goal_has_the_session_nothing_new_begins(
    state: GoalState, name: CommandName, role: Role
) -> None:
    rejection = refused(facts(state, session_taken=True), name, role)

    assert (rejection.code, rejection.state) == (RejectionCode.SESSION_BUSY, state)


@pytest.mark.parametrize(
    ("state", "name", "role"),
    [
        (GoalState.INVITED, CommandName.DISAGREE, Role.STREAMER),
        (GoalState.INVITED, CommandName.WITHDRAW, Role.VIEWER),
        (GoalState.INVITED, CommandName.CLOSE, Role.SYSTEM),
        (GoalState.INVITED, CommandName.SUPERSEDE, Role.SYSTEM),
        (GoalState.AGREED, CommandName.REFUND, Role.TIMER),
        (GoalState.LIVE, CommandName.FINISH, Role.VIEWER),
        (GoalState.DECLINED, CommandName.SETTLE, Role.SYSTEM),
    ],
)
def test_what_gives_money_back_or_ends_a_show_doesnt_ask_for_the_session(
    state: GoalState, name: CommandName, role: Role
) -> None:
    goal = facts(state, session_active=False, session_taken=True)

    assert decided(goal, name, role).source is state


def test_nobody_invites_himself() -> None:
    goal = facts(GoalState.NONE, viewer_id=STREAMER)

    answer = decide(goal, Command(CommandName.INVITE, Role.VIEWER, STREAMER), NOW)

    assert isinstance(answer, Rejection)
    assert answer.code is RejectionCode.OWN_SESSION


# Terms

LIMITS = Limits(amount_max_minor=1000, prepaid_duration_max_s=600)


def invited(goal: GoalFacts) -> Decision | Rejection:
    return decide(goal, command(CommandName.INVITE, Role.VIEWER), NOW, LIMITS)


@pytest.mark.parametrize("amount_minor", [1, 1000])
def test_amounts_at_the_edges_are_taken(amount_minor: int) -> None:
    answer = invited(facts(GoalState.NONE, amount_minor=amount_minor))

    assert isinstance(answer, Decision)
    assert answer.movement is Movement.HOLD


@pytest.mark.parametrize("amount_minor", [-1, 0, 1001, 10**30])
def test_amounts_over_the_edges_are_not(amount_minor: int) -> None:
    answer = invited(facts(GoalState.NONE, amount_minor=amount_minor))

    assert answer == Rejection(
        RejectionCode.AMOUNT_OUT_OF_RANGE, "The amount must be from 1 to 1000 minor units."
    )


@pytest.mark.parametrize("duration_s", [1, 600])
def test_durations_at_the_edges_are_taken(duration_s: int) -> None:
    assert isinstance(invited(facts(GoalState.NONE, prepaid_duration_s=duration_s)), Decision)


@pytest.mark.parametrize("duration_s", [-1, 0, 601, 10**30])
def test_durations_over_the_edges_are_not(duration_s: int) -> None:
    answer = invited(facts(GoalState.NONE, prepaid_duration_s=duration_s))

    assert answer == Rejection(
        RejectionCode.DURATION_OUT_OF_RANGE,
        "The prepaid duration must be from 1 to 600 seconds.",
    )


def test_terms_are_asked_of_invitations_alone() -> None:
    """A goal that was put up under other limits can still be answered."""
    goal = facts(amount_minor=10**9, prepaid_duration_s=10**6)

    decision = decide(goal, command(CommandName.AGREE, Role.STREAMER), NOW, LIMITS)

    assert isinstance(decision, Decision)


# The order of the checks


def test_a_person_hears_first_of_what_became_of_the_goal_then_of_the_time_then_of_the_session() -> (
    None
):
    everything_wrong = facts(
        GoalState.DECLINED,
        reason=Reason.WITHDRAWN,
        expires_at=NOW,
        session_active=False,
        session_taken=True,
    )
    stands_again = replace(everything_wrong, state=GoalState.INVITED, reason=None)
    in_time = replace(stands_again, expires_at=NOW + MILLISECOND)
    stream_on = replace(in_time, session_active=True)

    codes = [
        refused(goal, CommandName.AGREE, Role.STREAMER).code
        for goal in (everything_wrong, stands_again, in_time, stream_on)
    ]

    assert codes == [
        RejectionCode.GOAL_ALREADY_DECLINED,
        RejectionCode.GOAL_EXPIRED,
        RejectionCode.SESSION_ENDED,
        RejectionCode.SESSION_BUSY,
    ]


def test_deciding_changes_nothing() -> None:
    goal = facts()

    first = decide(goal, command(CommandName.AGREE, Role.STREAMER), NOW)
    second = decide(goal, command(CommandName.AGREE, Role.STREAMER), NOW)

    assert first == second
    assert goal == facts()
