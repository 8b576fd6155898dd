"""What MongoDB says of itself, for `duet doctor` and before `duet serve` starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError


@dataclass(frozen=True, slots=True)
class MongodbReport:
    """What answered at an address, or why nothing did.

    Attributes:
        fault: One line, when there was no usable answer.
        transactions: Whether it is a replica set or a sharded cluster, which transactions need.
    """

    fault: str | None = None
    version: str = ""
    transactions: bool = False
    writable: bool = False


async def examine_mongodb(url: str, timeout_s: float) -> MongodbReport:
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
    except (PyMongoError, ValueError) as error:
        return MongodbReport(fault=_first_line(error))
    try:
        hello = await client.admin.command("hello")
        build = await client.admin.command("buildInfo")
    except PyMongoError as error:
        return MongodbReport(fault=_first_line(error))
    finally:
        await client.close()
    return MongodbReport(
        version=str(build.get("version", "")),
        transactions="setName" in hello or hello.get("msg") == "isdbgrid",
        writable=bool(hello.get("isWritablePrimary")),
    )


def _first_line(error: Exception) -> str:
    """The driver's messages go on for lines with timeouts and topologies."""
    return str(error).partition(", Timeout:")[0].partition("\n")[0][:200] or type(error).__name__
