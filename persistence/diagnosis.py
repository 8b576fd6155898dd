"""What MongoDB says of itself, for `duet doctor` and before `duet serve` starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure, PyMongoError

from persistence.documents import DOCUMENTS
from persistence.errors import UNUSABLE_ADDRESS, in_short
from persistence.logins import UNAUTHORIZED

# What Duet does with its collections; MongoDB's role `readWrite` allows all of it and more.
_ACTIONS: Final = frozenset({"find", "insert", "update", "createIndex", "listIndexes"})


@dataclass(frozen=True, slots=True)
class MongodbReport:
    """What answered at an address, or why nothing did.

    Attributes:
        fault: One line, when there was no usable answer.
        transactions: Whether it is a replica set or a sharded cluster, which transactions need.
        stranger: Whether it lets nobody in without a user, and the address names none.
        lacking: What the address's user may not do in Duet's database and would have to.
    """

    fault: str | None = None
    version: str = ""
    transactions: bool = False
    writable: bool = False
    stranger: bool = False
    lacking: tuple[str, ...] = ()


async def examine_mongodb(url: str, database: str, timeout_s: float) -> MongodbReport:
    """Asks the server at `url`; never raises for what it finds there."""
    milliseconds = max(1, int(timeout_s * 1000))
    try:
        client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
            url,
            serverSelectionTimeoutMS=milliseconds,
            connectTimeoutMS=milliseconds,
            socketTimeoutMS=milliseconds,
            appname="duet",
        )
    except UNUSABLE_ADDRESS as error:
        return MongodbReport(fault=in_short(error))
    try:
        hello = await client.admin.command("hello")
        build = await client.admin.command("buildInfo")
        status = await client.admin.command("connectionStatus", showPrivileges=True)
        user = status["authInfo"]
        stranger = not user["authenticatedUsers"] and not await _lets_in(client, database)
    except PyMongoError as error:
        return MongodbReport(fault=in_short(error))
    finally:
        await client.close()
    return MongodbReport(
        version=str(build.get("version", "")),
        transactions="setName" in hello or hello.get("msg") == "isdbgrid",
        writable=bool(hello.get("isWritablePrimary")),
        stranger=stranger,
        lacking=_lacking(user, database),
    )


async def _lets_in(client: AsyncMongoClient[dict[str, Any]], database: str) -> bool:
    """Whether one may look around without a user."""
    try:
        await client[database].command("listCollections", nameOnly=True)
    except OperationFailure as error:
        if error.code != UNAUTHORIZED:
            raise
        return False
    return True


def _lacking(user: dict[str, Any], database: str) -> tuple[str, ...]:
    """What a user may not do in some of Duet's collections, by the privileges he has.

    Nothing, when there is no user, or a server that does not tell.
    """
    privileges = user.get("authenticatedUserPrivileges")
    if privileges is None or not user["authenticatedUsers"]:
        return ()
    lacking: set[str] = set()
    for document in DOCUMENTS:
        allowed = {
            action
            for privilege in privileges
            if _covers(privilege["resource"], database, document.Settings.name)
            for action in privilege["actions"]
        }
        lacking |= _ACTIONS - allowed
    return tuple(sorted(lacking))


def _covers(resource: dict[str, Any], database: str, collection: str) -> bool:
    """Whether a privilege's resource holds a collection; an empty name there is any."""
    return resource.get("anyResource", False) or (
        resource.get("db") in {"", database} and resource.get("collection") in {"", collection}
    )
