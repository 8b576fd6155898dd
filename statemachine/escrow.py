"""Money rules: each movement of the escrow as one balanced posting in integer minor units.

Three accounts take part in a goal: the viewer's, the escrow's and the streamer's. A posting moves
an amount from one to another, so the sum over all accounts never changes. Its `key` is the
posting's identity in the ledger: a goal is held once, and afterwards closed once, since capture
and release share the key `close`.
"""

from __future__ import annotations

from dataclasses import dataclass

from statemachine.goal import Movement

ESCROW_ACCOUNT = "escrow"


@dataclass(frozen=True, slots=True)
class Posting:
    """One entry of the ledger: `amount_minor` goes from the account `debit` to `credit`."""

    key: str
    goal_id: str
    movement: Movement
    debit: str
    credit: str
    amount_minor: int


def viewer_account(viewer_id: str) -> str:
    """The account that a hold is taken from and a release goes back to."""
    return f"viewer:{viewer_id}"


def streamer_account(streamer_id: str) -> str:
    """The account that a capture pays into."""
    return f"streamer:{streamer_id}"


def posting(
    movement: Movement, *, goal_id: str, viewer_id: str, streamer_id: str, amount_minor: int
) -> Posting:
    """Builds the one posting that `movement` makes for a goal.

    Raises:
        ValueError: the amount is not a positive whole number.
    """
    if amount_minor <= 0:
        message = f"a posting needs a positive amount, not {amount_minor}"
        raise ValueError(message)
    viewer = viewer_account(viewer_id)
    if movement is Movement.HOLD:
        key, debit, credit = "hold", viewer, ESCROW_ACCOUNT
    elif movement is Movement.CAPTURE:
        key, debit, credit = "close", ESCROW_ACCOUNT, streamer_account(streamer_id)
    else:
        key, debit, credit = "close", ESCROW_ACCOUNT, viewer
    return Posting(
        key=f"{goal_id}:{key}",
        goal_id=goal_id,
        movement=movement,
        debit=debit,
        credit=credit,
        amount_minor=amount_minor,
    )
