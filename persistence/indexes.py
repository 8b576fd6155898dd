"""The indexes that the documents ask for, made where they are missing.

A gateway makes them when it starts, within a bound: whoever waits for it wants to know. On a large
database one takes longer than that, and MongoDB gives up what is not finished in time. There
`duet migrate` makes them first, however long it takes; those who serve meanwhile go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pymongo.errors import OperationFailure, PyMongoError

from persistence.documents import (
    EscrowCall,
    EscrowEntry,
    Goal,
    GoalRecord,
    RequestRecord,
    Session,
)
from persistence.errors import StoreUnavailable, in_short

if TYPE_CHECKING:
    from pymongo import IndexModel

    from persistence.store import Store

# Collection -> what its document asks for.
_WANTED: Final[dict[str, list[IndexModel]]] = {
    Goal.Settings.name: Goal.Settings.indexes,
    Session.Settings.name: Session.Settings.indexes,
    EscrowEntry.Settings.name: EscrowEntry.Settings.indexes,
    EscrowCall.Settings.name: EscrowCall.Settings.indexes,
    RequestRecord.Settings.name: RequestRecord.Settings.indexes,
    GoalRecord.Settings.name: GoalRecord.Settings.indexes,
}

# What older versions made and the above have taken the place of, for their queries too.
_REPLACED: Final[dict[str, list[str]]] = {
    Goal.Settings.name: [
        "metadata.user_id_1_state_1",
        "conditions.exclusive_to_1_state_1",
        "conditions.session_id_1_state_1",
    ],
}

# MongoDB's codes of an index that is there with other options, or with other keys.
_ANOTHER: Final = frozenset({85, 86})


async def missing_indexes(store: Store) -> list[str]:
    """The names of those that are not there, as `collection.index`."""
    missing = []
    for name, wanted in _WANTED.items():
        there = await _names(store, name)
        names = [index.document["name"] for index in wanted]
        missing += [f"{name}.{one}" for one in names if one not in there]
    return missing


async def replaced_indexes(store: Store) -> list[str]:
    """The names of those that no version needs beside the present ones, as `collection.index`."""
    replaced = []
    for name, old in _REPLACED.items():
        there = await _names(store, name)
        replaced += [f"{name}.{one}" for one in old if one in there]
    return replaced


async def drop_replaced_indexes(store: Store) -> None:
    """Drops them; to be called when the present ones are there."""
    for path in await replaced_indexes(store):
        collection, _, name = path.partition(".")
        async with store.reading():
            await store.collection(collection).drop_index(name)


async def _names(store: Store, collection: str) -> set[str]:
    async with store.reading():
        return set(await store.collection(collection).index_information())


async def make_indexes(store: Store) -> None:
    """Makes those that are not there; one that is costs a question.

    Raises:
        StoreUnavailable: one can't be made, or not in the time in force.
    """
    for name, wanted in _WANTED.items():
        try:
            await store.collection(name).create_indexes(wanted)
        except PyMongoError as error:
            raise StoreUnavailable(_why_not(name, error)) from error


def _why_not(collection: str, error: PyMongoError) -> str:
    if error.timeout:
        return (
            f"the indexes of {collection} were not made in time; "
            "`duet migrate` makes them, however long it takes"
        )
    text = in_short(error)
    if isinstance(error, OperationFailure) and error.code in _ANOTHER:
        return f"{collection} has another index in the place of Duet's, to be dropped: {text}"
    return f"the indexes of {collection} can't be made: {text}"
