"""What is asked of a goal and what came of it: the seam between the gateway and the database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bson import ObjectId

    from persistence.documents import OutboxEntry
    from persistence.views import View
    from statemachine.goal import CommandName, Role


@dataclass(frozen=True, slots=True)
class Terms:
    """What an invitation offers: paid seconds and an amount in minor units."""

    session_id: str
    prepaid_duration_s: int
    amount_minor: int


@dataclass(frozen=True, slots=True)
class Intent:
    """One command with its arguments.

    Attributes:
        role: none when only a signature proved the user: then he is what the goal says he is.
        goal_id: 24 hex digits; none for an invitation.
        client_id: the requirements' `request.client.id`, the `triggerer`.
        request_id: chosen by the caller; the same one again gives the same answer.
    """

    command: CommandName
    role: Role | None
    user_id: str | None
    goal_id: str | None = None
    terms: Terms | None = None
    client_id: str | None = None
    request_id: str | None = None

    @property
    def request_key(self) -> str | None:
        """Identity of the request in the database."""
        return f"{self.user_id}:{self.request_id}" if self.request_id is not None else None

    @property
    def fingerprint(self) -> str:
        """What the request asked, so that its id is not taken for something else."""
        if self.terms is None:
            return f"{self.command}:{self.goal_id}"
        terms = self.terms
        return f"{self.command}:{terms.session_id}:{terms.prepaid_duration_s}:{terms.amount_minor}"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A goal whose outbox this process has to deliver now."""

    goal_id: ObjectId
    entries: tuple[OutboxEntry, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The command is committed.

    Attributes:
        goal: the goal after it.
        deliveries: what the commit left to do; empty when the answer is a repeated one.
    """

    goal: View
    session_id: str
    deliveries: tuple[Delivery, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Refused:
    """The command changed nothing: a code of `gateway.errors`, a sentence, the goal as it is."""

    code: str
    message: str
    goal: View | None = None


Answer = Done | Refused
