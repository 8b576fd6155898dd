"""The checker hears what replies, snapshots, events and books say, not only that they are there."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId

from tests.faults.checker import Rule, judge
from tests.faults.history import Answered, Asked
from tests.faults.tale import STREAMER, Tale
from tests.faults.tales import (
    agreed,
    ended_by,
    goal_of,
    live,
    looked_at_amid,
    refunded,
    standing,
    whole_show,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.history import Row, Snapshot


def test_a_run_that_was_looked_at_amid_is_accepted() -> None:
    tale = looked_at_amid()

    assert judge(tale.history, tale.truth) == []


# --- events ---------------------------------------------------------------------------------------


def say(event: str, **changes: Any) -> Callable[[Tale], None]:
    """Every telling of an event says something else, everywhere the same."""

    def doctor(tale: Tale) -> None:
        tale.history.heard = [
            replace(one, data=one.data | changes) if one.event == event else one
            for one in tale.history.heard
        ]

    return doctor


def say_on(channel: str, **changes: Any) -> Callable[[Tale], None]:
    """One event says something else on one of its channels."""

    def doctor(tale: Tale) -> None:
        heard = tale.history.heard
        number = next(number for number, one in enumerate(heard) if one.channel == channel)
        heard[number] = replace(heard[number], data=heard[number].data | changes)

    return doctor


def tell_without_an_id(tale: Tale) -> None:
    """Told once more without an id: nobody can tell the repetition."""
    heard = next(one for one in tale.history.heard if one.event == "escrow.held")
    data = {name: value for name, value in heard.data.items() if name != "event_id"}
    tale.history.heard.append(replace(heard, data=data))


def tell_one_party_only(channel: str) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.history.heard = [one for one in tale.history.heard if one.channel != channel]

    return doctor


def authorize_the_rival(tale: Tale) -> None:
    (heard,) = (one for one in tale.history.heard if one.event == "stream.authorized")
    channel = heard.channel.replace(".ana", ".bob")
    tale.history.heard.append(
        replace(heard, channel=channel, data=heard.data | {"viewer_id": "bob"})
    )


def tell_another_streamer(tale: Tale) -> None:
    heard = next(one for one in tale.history.heard if one.event == "goal.ended")
    tale.history.heard.append(replace(heard, channel="private-stream@zoe"))


# --- replies --------------------------------------------------------------------------------------


def reply(**changes: Any) -> Callable[[Tale], None]:
    """The last reply shows the goal otherwise."""

    def doctor(tale: Tale) -> None:
        answered = tale.history.answered
        answered[-1] = replace(answered[-1], goal=(answered[-1].goal or {}) | changes)

    return doctor


def reply_with_the_rivals_goal(tale: Tale) -> None:
    answered = tale.history.answered
    answered[-1] = replace(answered[-1], goal=answered[1].goal)


def answer_an_ask_twice(tale: Tale) -> None:
    answered = tale.history.answered
    answered.append(replace(answered[0], ok=False, code="unavailable", goal=None, retryable=True))


def acknowledge_both(tale: Tale) -> None:
    """Agreed and withdrawn: each was told that it was he who was faster."""
    goal = goal_of(tale)
    goal["metadata"]["agreed"] = tale.at
    asked = tale.history.asked
    asked.append(Asked(len(asked), tale.now_s, STREAMER, "agree", "both", str(goal["_id"])))
    view = tale.history.answered[-1].goal
    tale.history.answered.append(Answered(len(asked) - 1, tale.now_s + 1, ok=True, goal=view))


def acknowledge_then_deny(tale: Tale) -> None:
    """Answered with an older version than he was shown before, after a newer one."""
    goal, asked = goal_of(tale), tale.history.asked
    asked.append(Asked(len(asked), 500.0, "ana", "withdraw", "late", str(goal["_id"])))
    before = tale.history.answered[0].goal
    late = Answered(len(asked) - 1, 501.0, ok=False, code="too_early", goal=before)
    tale.history.answered.append(late)


def refuse_what_stands(tale: Tale) -> None:
    answered = tale.history.answered
    answered[0] = Answered(answered[0].ask, answered[0].at_s, ok=False, code="session_busy")


def show_a_stranger(tale: Tale) -> None:
    goal, asked = goal_of(tale), tale.history.asked
    asked.append(Asked(len(asked), 500.0, "zoe", "agree", "spy", str(goal["_id"])))
    view = tale.history.answered[0].goal
    shown = Answered(len(asked) - 1, 501.0, ok=False, code="not_your_goal", goal=view)
    tale.history.answered.append(shown)


def ask_as(user_id: str) -> Callable[[Tale], None]:
    """The last command was somebody else's."""

    def doctor(tale: Tale) -> None:
        tale.history.asked[-1] = replace(tale.history.asked[-1], user_id=user_id)

    return doctor


def leave_it_to_a_stranger(tale: Tale) -> None:
    """The only one who ever asked to agree may not, and was not answered."""
    ask_as("zoe")(tale)
    tale.history.answered.pop()


def do_it_unheard(tale: Tale) -> None:
    """Nobody asked for the agreement, and nobody was told of it."""
    tale.history.asked.pop()
    tale.history.answered.pop()
    tale.history.heard = [one for one in tale.history.heard if ":2:" not in (one.event_id or "")]


# --- one effect -----------------------------------------------------------------------------------


def invite_twice_by_one_request(tale: Tale) -> None:
    """A repetition made another goal, whose answer was lost."""
    goal = goal_of(tale)
    again: Row = goal | {"_id": ObjectId()}
    tale.truth.goals.append(again)
    tale.truth.postings.append(tale.truth.postings[0] | {"_id": "again", "goal_id": again["_id"]})
    asked = tale.history.asked
    asked.append(replace(asked[0], ask=len(asked)))
    tale.history.watched.clear()


def offer(amount: int) -> Callable[[Tale], None]:
    """Another amount was offered than was acknowledged, held and told."""

    def doctor(tale: Tale) -> None:
        tale.history.asked[0] = replace(tale.history.asked[0], amount=amount)

    return doctor


# --- books ----------------------------------------------------------------------------------------


def post(**changes: Any) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.truth.postings[-1] |= changes

    return doctor


def keep(**changes: Any) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        goal_of(tale).update(changes)

    return doctor


def forget(*names: str) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        for name in names:
            del goal_of(tale)[name]

    return doctor


def give_a_pass(**changes: Any) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        entry = tale.session["viewers"]["ana"]
        entry |= {name: change(entry[name]) for name, change in changes.items()}

    return doctor


def record(**changes: Any) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        tale.truth.records[-1] |= changes

    return doctor


# --- snapshots ------------------------------------------------------------------------------------


def look(which: int, change: Callable[[Snapshot], Snapshot]) -> Callable[[Tale], None]:
    def doctor(tale: Tale) -> None:
        snapshots = tale.history.snapshots
        snapshots[which] = change(snapshots[which])

    return doctor


def seeing(**changes: Any) -> Callable[[Snapshot], Snapshot]:
    return lambda one: replace(one, goals=tuple(goal | changes for goal in one.goals))


def twice(one: Snapshot) -> Snapshot:
    return replace(one, goals=one.goals * 2)


def nothing(one: Snapshot) -> Snapshot:
    return replace(one, goals=())


def by(user_id: str) -> Callable[[Snapshot], Snapshot]:
    return lambda one: replace(one, user_id=user_id)


def as_of(seconds: float) -> Callable[[Snapshot], Snapshot]:
    return lambda one: replace(one, as_of=one.as_of + timedelta(seconds=seconds))


def forget_what_stood_long(tale: Tale) -> None:
    """Nobody was told of it, but the snapshot says that it is of a minute later."""
    tale.history.heard.clear()
    tale.history.watched.clear()
    look(1, nothing)(tale)
    look(1, as_of(60))(tale)


def know_only_by_event(tale: Tale) -> None:
    """The streamer asked nothing; he was told of the invitations and then saw none."""
    look(1, nothing)(tale)


DOCTORED: list[tuple[Callable[[], Tale], Callable[[Tale], None], Rule]] = [
    # wrong amounts
    (standing, say("escrow.held", amount=499), Rule.CONTENT),
    (live, say("escrow.captured", amount=5_000), Rule.CONTENT),
    (standing, say("goal.added", amount=1), Rule.CONTENT),
    (standing, reply(amount=1), Rule.CONTENT),
    (standing, offer(9), Rule.CONTENT),
    (standing, look(0, seeing(amount=1)), Rule.CONTENT),
    (standing, keep(breakdown={"ana": 1}), Rule.ESCROW),
    (standing, keep(breakdown={"bob": 500}), Rule.ESCROW),
    # wrong recipients, and wrong ones named
    (live, say("escrow.captured", goal_id=str(ObjectId())), Rule.CONTENT),
    (live, say("exclusive.started", exclusive_to="bob"), Rule.CONTENT),
    (agreed, say("stream.authorized", viewer_id="bob"), Rule.CONTENT),
    (agreed, say("goal.ended", goal_id=str(ObjectId())), Rule.CONTENT),
    (agreed, say("goal.ended", metadata={"user_id": STREAMER}), Rule.CONTENT),
    (agreed, say("goal.ended", active=True), Rule.CONTENT),
    (ended_by("withdraw"), say("escrow.released", reason="expired"), Rule.CONTENT),
    (looked_at_amid, authorize_the_rival, Rule.DELIVERED),
    (agreed, tell_another_streamer, Rule.DELIVERED),
    # for one party only
    (standing, tell_one_party_only(f"private-user@{STREAMER}"), Rule.DELIVERED),
    (whole_show, tell_one_party_only("private-user@bob"), Rule.DELIVERED),
    (agreed, say_on(f"presence-stream@{STREAMER}", progress=0.5), Rule.DELIVERED),
    (standing, tell_without_an_id, Rule.CONTENT),
    # replies that contradict each other, or the truth
    (agreed, reply(state="invited"), Rule.CONTENT),
    (agreed, reply(version=1, state="invited"), Rule.CONTENT),
    (ended_by("disagree"), reply(reason="withdrawn"), Rule.CONTENT),
    (looked_at_amid, reply_with_the_rivals_goal, Rule.CONTENT),
    (standing, answer_an_ask_twice, Rule.ONE_ANSWER),
    (ended_by("withdraw"), acknowledge_both, Rule.ACKNOWLEDGED),
    (agreed, acknowledge_then_deny, Rule.ACKNOWLEDGED),
    # deduplication
    (standing, refuse_what_stands, Rule.ONE_EFFECT),
    (standing, invite_twice_by_one_request, Rule.ONE_EFFECT),
    # who may what
    (standing, ask_as("zoe"), Rule.PARTIES),
    (live, ask_as("ana"), Rule.PARTIES),
    (ended_by("withdraw"), ask_as(STREAMER), Rule.PARTIES),
    (ended_by("close"), ask_as("ana"), Rule.PARTIES),
    (whole_show, ask_as("zoe"), Rule.PARTIES),
    (standing, show_a_stranger, Rule.PARTIES),
    (standing, look(1, by("bob")), Rule.PARTIES),
    (agreed, leave_it_to_a_stranger, Rule.CAUSE),
    (agreed, do_it_unheard, Rule.CAUSE),
    # the books
    (ended_by("withdraw"), post(reason="expired"), Rule.ESCROW),
    (live, post(viewer_id="bob"), Rule.ESCROW),
    (live, post(session_id=ObjectId()), Rule.ESCROW),
    (refunded, keep(version=2), Rule.SETTLED),
    (standing, forget("due_at", "due_command"), Rule.SETTLED),
    (agreed, keep(due_command="expire"), Rule.SETTLED),
    (agreed, forget("due_at"), Rule.SETTLED),
    (refunded, keep(due_at=None), Rule.SETTLED),
    (agreed, give_a_pass(nbf=lambda at: at + timedelta(seconds=1)), Rule.SESSION),
    (agreed, give_a_pass(exp=lambda at: at + timedelta(seconds=1)), Rule.SESSION),
    (agreed, give_a_pass(duration=lambda _: 1.0), Rule.SESSION),
    (whole_show, record(agreed=False), Rule.RECORDS),
    (whole_show, record(viewer_id="bob"), Rule.RECORDS),
    # snapshots
    (standing, look(1, twice), Rule.SNAPSHOT),
    (standing, look(1, seeing(state="ended")), Rule.SNAPSHOT),
    (standing, look(1, seeing(state="live")), Rule.CONTENT),
    (standing, look(1, seeing(version=7)), Rule.CONTENT),
    (looked_at_amid, look(0, nothing), Rule.SNAPSHOT),
    (looked_at_amid, know_only_by_event, Rule.SNAPSHOT),
    (looked_at_amid, look(2, seeing(version=1, state="invited")), Rule.SNAPSHOT),
    (looked_at_amid, forget_what_stood_long, Rule.SNAPSHOT),
    (looked_at_amid, look(1, as_of(-60)), Rule.SNAPSHOT),
]


@pytest.mark.parametrize(("tell", "doctor", "rule"), DOCTORED)
def test_a_run_of_which_something_false_is_said_is_rejected(
    tell: Callable[[], Tale], doctor: Callable[[Tale], None], rule: Rule
) -> None:
    tale = tell()
    doctor(tale)

    assert rule in {violation.rule for violation in judge(tale.history, tale.truth)}
