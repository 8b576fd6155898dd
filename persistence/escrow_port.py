"""The platform's payment service as Duet sees it: three calls, three possible answers.

The ledger stays the truth. What has to be said to the service is a record in `escrow_calls`,
written in the transaction that moves the ledger; its key is the posting's, so that a goal is held
once and closed once with the service as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from persistence.documents import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable

    from persistence.documents import EscrowCall
    from persistence.rows import Row

# `held_by` of a goal whose money the payment service holds too.
SERVICE: Final = "service"
# Why a hold is given back that no invitation came of; the ledger never knew of it.
NO_INVITATION: Final = "no_invitation"

_BACKOFF_MAX_S: Final = 60.0
_LEAST_JITTER: Final = 0.5


class CallStatus(StrEnum):
    """Where a call stands.

    `PENDING` is to be said, or said again. `ABANDONED` is a hold that was given back. `DEAD` waits
    for an operator: a refused capture or release, or one that got no answer until give-up.
    """

    PENDING = "pending"
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    ABANDONED = "abandoned"
    DEAD = "dead"


class Verdict(StrEnum):
    """What the service said; `UNKNOWN` covers everything that is neither yes nor no."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class EscrowAnswer:
    """One answer; `why` is one line for an operator, empty when acknowledged."""

    verdict: Verdict
    why: str = ""


class EscrowPort(Protocol):
    """How a call reaches the service."""

    async def ask(self, call: EscrowCall, within_s: float) -> EscrowAnswer:
        """Says `call` once; never raises for what the service or the network does.

        Cancelling is safe: the same call may be said again, and has one effect.
        """


def closing_calls(ledger: Iterable[Row]) -> list[Row]:
    """The calls that say these postings of goals to the service that holds their money."""
    return [
        {name: row[name] for name in _FROM_LEDGER}
        | {
            "call": row["movement"],
            "status": CallStatus.PENDING.value,
            "since": row["at"],
            "due_at": row["at"],
            "attempts": 0,
            "schema_version": SCHEMA_VERSION,
        }
        for row in ledger
    ]


def backoff_s(attempts: int, first_s: float) -> float:
    """How long to wait after `attempts` calls in vain: doubled each time, up to a minute, spread.

    The spread keeps a service that comes back from being asked everything at once.
    """
    whole_s = min(_BACKOFF_MAX_S, first_s * 2.0 ** min(attempts - 1, 16))
    return whole_s * random.uniform(_LEAST_JITTER, 1.0)  # noqa: S311 - it guards nothing


_FROM_LEDGER: Final = (
    "_id",
    "goal_id",
    "session_id",
    "viewer_id",
    "streamer_id",
    "amount",
    "reason",
    "at",
)
