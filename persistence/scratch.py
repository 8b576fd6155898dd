"""Databases that a load test made and that nobody needs after it."""

from __future__ import annotations

from typing import Any, Final

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from persistence.errors import StoreUnavailable

_DEADLINE_MS: Final = 10_000


def drop_database(mongodb_url: str, name: str) -> None:
    """Removes a database with all its data; it blocks.

    Raises:
        StoreUnavailable: MongoDB did not do it.
    """
    try:
        with MongoClient[dict[str, Any]](
            mongodb_url, serverSelectionTimeoutMS=_DEADLINE_MS, socketTimeoutMS=_DEADLINE_MS
        ) as client:
            client.drop_database(name)
    except PyMongoError as error:
        raise StoreUnavailable(str(error)) from error
