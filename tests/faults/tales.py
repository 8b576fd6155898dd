"""Whole runs as they should have been, for tests to doctor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.faults.tale import STREAMER, Tale

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.history import Row


def whole_show() -> Tale:
    """Two invite, one is agreed, starts and ends; then both see nothing."""
    tale = Tale()
    goal, rival = tale.invite("ana"), tale.invite("bob")
    tale.agree(goal, rival)
    tale.finish(goal, tale.start(goal))
    for user_id in ("ana", "bob", STREAMER):
        tale.look(user_id)
    return tale


def agreed() -> Tale:
    tale = Tale()
    goal = tale.invite("ana")
    tale.agree(goal)
    tale.look("ana", goal)
    return tale


def live() -> Tale:
    tale = Tale()
    goal = tale.invite("ana")
    tale.agree(goal)
    tale.start(goal)
    tale.look(STREAMER, goal)
    return tale


def refunded() -> Tale:
    tale = Tale()
    goal = tale.invite("ana")
    tale.agree(goal)
    tale.refund(goal)
    tale.look("ana")
    return tale


def ended_by(what: str) -> Callable[[], Tale]:
    def tell() -> Tale:
        tale = Tale()
        goal = tale.invite("ana")
        getattr(tale, what)(goal)
        tale.look("ana")
        return tale

    return tell


def standing() -> Tale:
    tale = Tale()
    goals = [tale.invite("ana"), tale.invite("bob")]
    tale.look(STREAMER, *goals)
    tale.look("ana", goals[0], final=False)
    return tale


def two_shows_in_turn() -> Tale:
    tale = Tale()
    for viewer in ("ana", "bob"):
        goal = tale.invite(viewer)
        tale.agree(goal)
        tale.refund(goal)
    return tale


def told_again() -> Tale:
    """Deliveries that a crash interrupted come again, from the first of them on."""
    tale = whole_show()
    tale.history.heard += [
        replace(heard, at_s=heard.at_s + 1000) for heard in tale.history.heard[-5:]
    ]
    return tale


def asked_again() -> Tale:
    """The first asks got no answer; the last got one, and a repetition the same."""
    tale = agreed()
    agree = tale.history.asked[-1]
    (answer,) = (one for one in tale.history.answered if one.ask == agree.ask)
    for _ in range(2):
        number = len(tale.history.asked)
        tale.history.asked.append(replace(agree, ask=number, at_s=tale.now_s))
        tale.history.answered.append(replace(answer, ask=number, at_s=tale.now_s + 1))
    tale.history.answered.remove(answer)
    return tale


def looked_at_amid() -> Tale:
    """Everyone looks while two invitations stand; then one is agreed and the other superseded."""
    tale = Tale()
    goal, rival = tale.invite("ana"), tale.invite("bob")
    tale.look("ana", goal, final=False)
    tale.look(STREAMER, goal, rival, final=False)
    tale.agree(goal, rival)
    tale.look(STREAMER, goal, final=False)
    return tale


def goal_of(tale: Tale, viewer: str = "ana") -> Row:
    return next(
        goal
        for goal in tale.truth.goals
        if goal["_cls"] == "TriggerExclusiveGoal" and goal["conditions"]["exclusive_to"] == viewer
    )
