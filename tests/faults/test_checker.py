"""The checker accepts what is right, and rejects every way in which a run can be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from bson import ObjectId

from tests.faults.checker import Rule, Timing, judge
from tests.faults.history import Answered, Asked
from tests.faults.tale import STREAMER, Tale
from tests.faults.tales import (
    agreed,
    asked_again,
    ended_by,
    goal_of,
    live,
    refunded,
    standing,
    told_again,
    two_shows_in_turn,
    whole_show,
)

if TYPE_CHECKING:
    from collections.abc import Callable

EARLY_S = -1.0


@pytest.mark.parametrize(
    "tell",
    [
        Tale,
        standing,
        agreed,
        live,
        refunded,
        whole_show,
        two_shows_in_turn,
        told_again,
        asked_again,
        *(ended_by(what) for what in ("disagree", "withdraw", "expire", "close")),
    ],
)
def test_a_run_that_kept_every_promise_is_accepted(tell: Callable[[], Tale]) -> None:
    tale = tell()

    assert judge(tale.history, tale.truth) == []


def test_an_invitation_that_expires_by_itself_does_so_when_it_is_due() -> None:
    tale = ended_by("expire")()
    del tale.history.asked[-1]

    assert judge(tale.history, tale.truth, Timing(invitation_ttl_s=1.0)) == []
    assert rules(tale, Timing(invitation_ttl_s=1000.0)) == {Rule.CAUSE}


def finished_by_the_timer() -> Tale:
    """Somebody asks for the end too, a moment after it has come."""
    tale = live()
    goal, show = tale.truth.goals
    tale.history.snapshots.clear()
    tale.finish(goal, show)
    asked = tale.history.asked[-1]
    tale.history.asked[-1] = replace(asked, at_s=tale.now_s + 1)
    tale.history.answered[-1] = Answered(asked.ask, tale.now_s + 2, ok=False, code="goal_ended")
    return tale


def refunded_by_the_timer() -> Tale:
    tale = refunded()
    del tale.history.asked[-1]
    return tale


@pytest.mark.parametrize("tell", [finished_by_the_timer, refunded_by_the_timer])
def test_what_the_timer_does_comes_when_it_is_due(tell: Callable[[], Tale]) -> None:
    tale = tell()

    assert judge(tale.history, tale.truth, Timing(refund_delay_s=1.0, show_s=1.0)) == []
    assert rules(tale, Timing(refund_delay_s=1000.0, show_s=1000.0)) == {Rule.CAUSE}


def rules(tale: Tale, timing: Timing | None = None) -> set[Rule]:
    return {violation.rule for violation in judge(tale.history, tale.truth, timing)}


# --- how to doctor a run ------------------------------------------------------------------------


def forget_the_goal(tale: Tale) -> None:
    goal = goal_of(tale)
    tale.truth.goals.remove(goal)
    tale.truth.postings.clear()
    tale.session["exclusive_goal_pairs"].clear()
    tale.history.heard.clear()
    tale.history.snapshots.clear()


def forget_the_withdrawal(tale: Tale) -> None:
    """Withdrawn and acknowledged, but it expired: somebody else's effect stands in its place."""
    goal = goal_of(tale)
    goal["reason"] = "expired"
    asked = tale.history.asked
    asked.append(Asked(len(asked), asked[-1].at_s, "timer", "expire", goal_id=str(goal["_id"])))


def go_back_to_an_older_version(tale: Tale) -> None:
    goal_of(tale)["version"] = 1
    tale.history.snapshots.clear()


def keep_the_session_open(tale: Tale) -> None:
    tale.session["active"] = True


def refuse_what_took_place(tale: Tale) -> None:
    answers = tale.history.answered
    answers[-1] = Answered(answers[-1].ask, answers[-1].at_s, ok=False, code="goal_expired")


def answer_twice(tale: Tale) -> None:
    asked, answered = tale.history.asked, tale.history.answered
    asked.append(replace(asked[0], ask=len(asked)))
    answered.append(Answered(len(asked) - 1, 99.0, ok=False, code="already_invited"))


def answer_with_another_goal(tale: Tale) -> None:
    asked, answered = tale.history.asked, tale.history.answered
    asked.append(replace(asked[0], ask=len(asked)))
    other = {**(answered[0].goal or {}), "version": 0}
    answered.append(replace(answered[0], ask=len(asked) - 1, goal=other))


def agree_before_the_other_ended(tale: Tale) -> None:
    released = next(row for row in tale.truth.postings if row["movement"] == "release")
    agreed_at = goal_of(tale, "bob")["metadata"]["agreed"]
    released["at"] = agreed_at + (agreed_at - released["at"])


def see_two_shows(tale: Tale) -> None:
    snapshot = tale.history.snapshots[0]
    goals = tuple({**goal, "state": "live"} for goal in snapshot.goals)
    tale.history.snapshots[0] = replace(snapshot, goals=goals, final=False)


def hear_the_end_before_anyone_asked(tale: Tale) -> None:
    heard = tale.history.heard
    at = next(number for number, one in enumerate(heard) if one.event == "goal.ended")
    heard[at] = replace(heard[at], at_s=EARLY_S)


def hear_of_an_end_that_nobody_asked_for(tale: Tale) -> None:
    tale.history.asked.pop()
    tale.history.answered.pop()


def hear_of_a_goal_that_is_none(tale: Tale) -> None:
    heard = tale.history.heard[0]
    data = {"event_id": f"{ObjectId()}:1:goal.added"}
    tale.history.heard.append(replace(heard, listener="stranger", data=data))


def drop_posting(movement: str) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.truth.postings = [row for row in tale.truth.postings if row["movement"] != movement]

    return doctor


def post_also(movement: str) -> Callable[[Tale], None]:
    """Another posting of the goal, between the right accounts."""

    def doctor(tale: Tale) -> None:
        accounts = {
            "hold": ("viewer:ana", "escrow"),
            "capture": ("escrow", f"streamer:{STREAMER}"),
            "release": ("escrow", "viewer:ana"),
        }
        debit, credit = accounts[movement]
        first = tale.truth.postings[0]
        tale.truth.postings.append(
            first | {"_id": "more", "movement": movement, "debit": debit, "credit": credit}
        )

    return doctor


def change_posting(**changes: object) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.truth.postings[-1] |= changes

    return doctor


def pay_for_no_goal(tale: Tale) -> None:
    tale.truth.postings.append(tale.truth.postings[0] | {"goal_id": ObjectId()})


def end_without_an_outcome(tale: Tale) -> None:
    del goal_of(tale)["outcome"]


def change_session(**changes: object) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.session |= changes

    return doctor


def change_pair(**changes: object) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.session["exclusive_goal_pairs"]["ana"] |= changes

    return doctor


def leave_the_rivals_pair(tale: Tale) -> None:
    tale.session["exclusive_goal_pairs"]["bob"] = {
        "trigger_exclusive_goal": goal_of(tale, "bob")["_id"],
        "trigger_exclusive_goal_ended": True,
    }


def change_goal(**changes: object) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        goal_of(tale).update(changes)

    return doctor


def never_settle(tale: Tale) -> None:
    goal = goal_of(tale)
    goal["state"] = "declined"
    del goal["outcome"]
    tale.history.snapshots.clear()


def lose_the_show(tale: Tale) -> None:
    tale.truth.goals = [goal for goal in tale.truth.goals if goal["_cls"] != "ExclusiveGoal"]


def let_the_show_run_on(tale: Tale) -> None:
    show = next(goal for goal in tale.truth.goals if goal["_cls"] == "ExclusiveGoal")
    show |= {"state": "live", "active": True}


def see_nothing(tale: Tale) -> None:
    tale.history.snapshots[0] = replace(tale.history.snapshots[0], goals=())


def see_an_older_version(tale: Tale) -> None:
    snapshot = tale.history.snapshots[-1]
    goals = tuple({**goal, "version": 0} for goal in snapshot.goals)
    tale.history.snapshots[-1] = replace(snapshot, goals=goals)


def miss_what_was_acknowledged(tale: Tale) -> None:
    tale.history.snapshots[-1] = replace(tale.history.snapshots[-1], goals=())


def drop_heard(event: str) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        heard = next(one for one in tale.history.heard if one.event == event)
        tale.history.heard.remove(heard)

    return doctor


def hear_it_on_a_strangers_channel(tale: Tale) -> None:
    heard = tale.history.heard[0]
    tale.history.heard.append(replace(heard, at_s=999.0, channel="private-user@zoe"))


def hear_it_under_a_new_id(tale: Tale) -> None:
    """Delivered again as if it were another event: nobody can tell the repetition."""
    heard = tale.history.heard[0]
    event_id = heard.data["event_id"].replace(":1:", ":3:")
    data = {**heard.data, "event_id": event_id}
    tale.history.heard.append(replace(heard, at_s=999.0, data=data))


def hear_it_in_two_ways(tale: Tale) -> None:
    heard = tale.history.heard[0]
    data = {**heard.data, "amount": 1}
    tale.history.heard.append(replace(heard, at_s=999.0, data=data))


def hear_in_the_wrong_order(tale: Tale) -> None:
    heard = tale.history.heard
    on_stream = [number for number, one in enumerate(heard) if "private-stream" in one.channel]
    first, *_, last = on_stream
    heard[first], heard[last] = (
        replace(heard[last], at_s=heard[last].at_s),
        replace(heard[first], at_s=heard[last].at_s),
    )


def forget_a_record(tale: Tale) -> None:
    tale.truth.records.pop()


def record_what_never_was(tale: Tale) -> None:
    record = tale.truth.records[0]
    tale.truth.records.append(record | {"_id": f"{ObjectId()}:2:goal.ended"})


def acknowledge_the_same_to_two_requests(tale: Tale) -> None:
    asked, answered = tale.history.asked, tale.history.answered
    asked.append(replace(asked[-1], ask=len(asked), request_id="another"))
    answered.append(replace(answered[-1], ask=len(asked) - 1))


def let_the_viewer_agree(tale: Tale) -> None:
    tale.history.asked[-1] = replace(tale.history.asked[-1], user_id="ana")


def hear_of_another_amount(tale: Tale) -> None:
    for number, heard in enumerate(tale.history.heard):
        if heard.event == "escrow.held":
            tale.history.heard[number] = replace(heard, data=heard.data | {"amount": 1})


DOCTORED: list[tuple[Callable[[], Tale], Callable[[Tale], None], Rule]] = [
    (standing, forget_the_goal, Rule.ACKNOWLEDGED),
    (ended_by("withdraw"), forget_the_withdrawal, Rule.ACKNOWLEDGED),
    (agreed, go_back_to_an_older_version, Rule.ACKNOWLEDGED),
    (ended_by("close"), keep_the_session_open, Rule.ACKNOWLEDGED),
    (agreed, refuse_what_took_place, Rule.REFUSED),
    (standing, answer_twice, Rule.ONE_ANSWER),
    (standing, answer_with_another_goal, Rule.ONE_ANSWER),
    (agreed, acknowledge_the_same_to_two_requests, Rule.ONE_EFFECT),
    (agreed, let_the_viewer_agree, Rule.PARTIES),
    (standing, hear_of_another_amount, Rule.CONTENT),
    (two_shows_in_turn, agree_before_the_other_ended, Rule.ONE_SHOW),
    (standing, see_two_shows, Rule.ONE_SHOW),
    (agreed, hear_the_end_before_anyone_asked, Rule.CAUSE),
    (ended_by("disagree"), hear_of_an_end_that_nobody_asked_for, Rule.CAUSE),
    (standing, hear_of_a_goal_that_is_none, Rule.CAUSE),
    (standing, drop_posting("hold"), Rule.ESCROW),
    (live, drop_posting("capture"), Rule.ESCROW),
    (refunded, drop_posting("release"), Rule.ESCROW),
    (live, post_also("release"), Rule.ESCROW),
    (refunded, post_also("capture"), Rule.ESCROW),
    (agreed, post_also("release"), Rule.ESCROW),
    (agreed, post_also("hold"), Rule.ESCROW),
    (agreed, change_posting(amount=1), Rule.ESCROW),
    (live, change_posting(credit="streamer:zoe"), Rule.ESCROW),
    (agreed, pay_for_no_goal, Rule.ESCROW),
    (ended_by("disagree"), end_without_an_outcome, Rule.ESCROW),
    (agreed, change_session(status={"exclusive_to": []}), Rule.SESSION),
    (whole_show, change_session(status={"exclusive_to": ["ana"]}), Rule.SESSION),
    (whole_show, change_session(viewers={"ana": {}}), Rule.SESSION),
    (agreed, change_session(viewers={}), Rule.SESSION),
    (standing, change_session(exclusive_goal_pairs={}), Rule.SESSION),
    (standing, change_session(active=False), Rule.SESSION),
    (standing, change_pair(trigger_exclusive_goal_ended=True), Rule.SESSION),
    (whole_show, change_pair(trigger_exclusive_goal=ObjectId()), Rule.SESSION),
    (whole_show, change_pair(trigger_exclusive_goal_agreed=None), Rule.SESSION),
    (whole_show, change_pair(exclusive_goal=None), Rule.SESSION),
    (whole_show, change_pair(exclusive_goal_ended=None), Rule.SESSION),
    (whole_show, leave_the_rivals_pair, Rule.SESSION),
    (agreed, change_goal(outbox=[{"event_id": "e"}]), Rule.SETTLED),
    (agreed, change_goal(outbox_due_at=None), Rule.SETTLED),
    (agreed, change_goal(active=True), Rule.SETTLED),
    (ended_by("disagree"), never_settle, Rule.SETTLED),
    (live, lose_the_show, Rule.SETTLED),
    (whole_show, let_the_show_run_on, Rule.SETTLED),
    (standing, see_nothing, Rule.SNAPSHOT),
    (standing, see_an_older_version, Rule.SNAPSHOT),
    (standing, miss_what_was_acknowledged, Rule.SNAPSHOT),
    (agreed, drop_heard("stream.authorized"), Rule.DELIVERED),
    (agreed, drop_heard("goal.ended"), Rule.DELIVERED),
    (live, drop_heard("escrow.captured"), Rule.DELIVERED),
    (standing, hear_it_on_a_strangers_channel, Rule.DELIVERED),
    (live, hear_it_under_a_new_id, Rule.DELIVERED),
    (standing, hear_it_in_two_ways, Rule.DELIVERED),
    (whole_show, hear_in_the_wrong_order, Rule.ORDER),
    (whole_show, forget_a_record, Rule.RECORDS),
    (whole_show, record_what_never_was, Rule.RECORDS),
]


@pytest.mark.parametrize(("tell", "doctor", "rule"), DOCTORED)
def test_a_doctored_run_is_rejected_by_the_rule_that_it_breaks(
    tell: Callable[[], Tale], doctor: Callable[[Tale], None], rule: Rule
) -> None:
    tale = tell()
    doctor(tale)

    assert rule in rules(tale)


def test_every_rule_has_a_run_that_breaks_it() -> None:
    assert {rule for _, _, rule in DOCTORED} == set(Rule)
