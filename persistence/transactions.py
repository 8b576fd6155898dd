"""Writes what commands have decided: each in a transaction of its own, or several in one.

Commands that come while transactions are under way share the next one, as databases do with their
logs. They are on different Sessions, or invitations to one. When one of them can't be written, none
is, and each is tried again alone: nobody is refused for another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bson.errors import InvalidDocument
from pymongo.errors import DuplicateKeyError, OperationFailure, WriteError

from persistence.documents import EscrowCall, EscrowEntry, Goal, RequestRecord, Session
from persistence.errors import Conflict, StoreDamaged
from persistence.faults import Step, reached
from persistence.sharing import Apart, Shared

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from beanie import Document
    from bson import ObjectId

    from persistence.store import Row, Store
    from statemachine.goal import CommandName

T = TypeVar("T")

# A filter and an update.
Update = tuple[dict[str, Any], Any]
# What says that one can't be written, or not with the others: the last three are what can't be
# encoded, or fits into a message only alone.
_ONES_OWN: Final = (
    Conflict,
    WriteError,
    StoreDamaged,
    ValueError,
    OverflowError,
    InvalidDocument,
)
# How long outboxes are.
Lengths = dict["ObjectId", int]


@dataclass(slots=True)
class Writes:
    """All that one command changes.

    Attributes:
        goals: compare-and-sets; each must find its document.
        sessions: as `goals`.
        new_goals: documents.
        ledger: postings; one that is there already is damage.
        calls: what is said to the payment service.
        requests: the answers to be kept.
        outbox_of: the goal of which is asked how long its outbox is afterwards.
    """

    command: CommandName
    goals: list[Update] = field(default_factory=list)
    sessions: list[Update] = field(default_factory=list)
    new_goals: list[Row] = field(default_factory=list)
    ledger: list[Row] = field(default_factory=list)
    calls: list[Row] = field(default_factory=list)
    requests: list[Row] = field(default_factory=list)
    outbox_of: ObjectId | None = None


class Transactions:
    """The transactions of this process's commands."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._shared = Shared(self._commit, store.options.at_once)

    async def commit(self, writes: Writes) -> Lengths:
        """Writes all of it, or raises and writes nothing.

        Raises:
            Conflict: a document is no longer as the command found it.
            DuplicateKeyError: what may stand only once stands already.
            StoreDamaged: the ledger has the posting already.
            StoreUnavailable: the transaction that it shared failed; it may have been written.
        """
        return await self._shared.do(writes)

    async def together(self, shared: Sequence[Writes]) -> None:
        """Writes several that want the same document, in this order and in one transaction.

        Where another process wants it too, all of them would have to be repeated alone.

        Raises:
            Apart: one of them can't be written with the others; none is.
            PyMongoError: the transaction failed; it may have been written.
        """
        await self._commit(shared, as_one=True)

    async def alone(self, writes: Writes, then: Callable[[Lengths], Awaitable[T]]) -> T:
        """Writes it in a transaction of its own, and runs `then` inside; raises as `commit`."""

        async def body() -> T:
            result = await then(await self._write([writes]))
            reached(Step.BEFORE_COMMIT, writes.command)
            return result

        return await self._store.transact(body)

    async def _commit(self, shared: Sequence[Writes], *, as_one: bool = False) -> Lengths:
        async def body() -> Lengths:
            try:
                lengths = await self._write(shared)
            except OperationFailure as error:
                # The driver would repeat it for all; alone only those repeat it who have to.
                transient = error.has_error_label("TransientTransactionError")
                if transient and len(shared) > 1 and not as_one:
                    raise Conflict from error
                raise
            for writes in shared:
                reached(Step.BEFORE_COMMIT, writes.command)
            return lengths

        try:
            return await self._store.transact(body)
        except _ONES_OWN as error:
            if len(shared) > 1 or as_one:
                raise Apart from error
            raise

    async def _write(self, shared: Sequence[Writes]) -> Lengths:
        """Writes inside a transaction, by one database command for each collection."""
        await self._update(Goal, [each for writes in shared for each in writes.goals])
        _halfway(writes for writes in shared if writes.goals)
        await self._update(Session, [each for writes in shared for each in writes.sessions])
        _halfway(writes for writes in shared if not writes.goals)
        await self._insert(Goal, [row for writes in shared for row in writes.new_goals])
        try:
            await self._insert(EscrowEntry, [row for writes in shared for row in writes.ledger])
        except DuplicateKeyError as error:
            raise StoreDamaged(f"the ledger has this posting already: {error}") from error
        await self._insert(EscrowCall, [row for writes in shared for row in writes.calls])
        await self._insert(RequestRecord, [row for writes in shared for row in writes.requests])
        return await self._lengths([writes.outbox_of for writes in shared if writes.outbox_of])

    async def _update(self, document: type[Document], updates: Sequence[Update]) -> None:
        if not updates:
            return
        found = await self._store.write(
            {
                "update": document.get_collection_name(),
                "updates": [{"q": guard, "u": update} for guard, update in updates],
            }
        )
        if found != len(updates):
            raise Conflict

    async def _insert(self, document: type[Document], rows: Sequence[Row]) -> None:
        if rows:
            await self._store.write({"insert": document.get_collection_name(), "documents": rows})

    async def _lengths(self, goal_ids: Sequence[ObjectId]) -> Lengths:
        if not goal_ids:
            return {}
        found = self._store.goals.find({"_id": {"$in": goal_ids}}, {"outbox.event_id": True})
        return {row["_id"]: len(row.get("outbox", ())) async for row in found}


def _halfway(written: Iterable[Writes]) -> None:
    for writes in written:
        reached(Step.IN_TRANSACTION, writes.command)
