"""Money rules: every posting balanced, each goal held once and closed once."""

from __future__ import annotations

from collections import Counter

import pytest

from statemachine.escrow import (
    ESCROW_ACCOUNT,
    Posting,
    posting,
    streamer_account,
    viewer_account,
)
from statemachine.goal import Movement


def made(movement: Movement, amount_minor: int = 500, goal_id: str = "g1") -> Posting:
    return posting(
        movement,
        goal_id=goal_id,
        viewer_id="ben",
        streamer_id="anna",
        amount_minor=amount_minor,
    )


def accounts_after(*postings: Posting) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for entry in postings:
        sums[entry.debit] -= entry.amount_minor
        sums[entry.credit] += entry.amount_minor
    return dict(sums)


def test_a_hold_takes_from_the_viewer_into_escrow() -> None:
    assert made(Movement.HOLD) == Posting(
        key="g1:hold",
        goal_id="g1",
        movement=Movement.HOLD,
        debit="viewer:ben",
        credit="escrow",
        amount_minor=500,
    )


def test_a_capture_pays_the_streamer_out_of_escrow() -> None:
    entry = made(Movement.CAPTURE)

    assert (entry.debit, entry.credit) == (ESCROW_ACCOUNT, streamer_account("anna"))


def test_a_release_gives_the_viewer_his_money_back() -> None:
    entry = made(Movement.RELEASE)

    assert (entry.debit, entry.credit) == (ESCROW_ACCOUNT, viewer_account("ben"))


@pytest.mark.parametrize("closing", [Movement.CAPTURE, Movement.RELEASE])
def test_held_and_closed_money_leaves_nothing_in_escrow(closing: Movement) -> None:
    after = accounts_after(made(Movement.HOLD), made(closing))

    assert after["escrow"] == 0
    assert sum(after.values()) == 0


def test_capture_and_release_have_one_key_and_so_exclude_each_other() -> None:
    assert made(Movement.CAPTURE).key == made(Movement.RELEASE).key == "g1:close"
    assert made(Movement.HOLD).key != made(Movement.CAPTURE).key


def test_the_same_movement_has_the_same_key_again() -> None:
    assert made(Movement.HOLD) == made(Movement.HOLD)


def test_two_goals_never_share_a_key() -> None:
    keys = {made(movement, goal_id=goal_id).key for movement in Movement for goal_id in ("1", "2")}

    assert len(keys) == 4


@pytest.mark.parametrize("amount_minor", [0, -1, -500])
@pytest.mark.parametrize("movement", list(Movement))
def test_a_posting_of_nothing_or_less_is_a_fault(movement: Movement, amount_minor: int) -> None:
    with pytest.raises(ValueError, match=f"positive amount, not {amount_minor}"):
        made(movement, amount_minor)
