"""The connection to MongoDB: its collections, transactions, and a deadline on everything.

Writes are atomic updates on PyMongo's collections, and reads are validated by the Beanie documents:
Beanie's own `save()` would overwrite concurrent changes, and its query layer costs about a third
of the transactions a second (docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import uuid
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pymongo
import structlog
from beanie import init_beanie
from pymongo import AsyncMongoClient, ReadPreference, _csot
from pymongo.errors import (
    ConnectionFailure,
    DuplicateKeyError,
    PyMongoError,
    WriteError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from persistence.documents import (
    DOCUMENTS,
    EscrowCall,
    EscrowEntry,
    Goal,
    GoalRecord,
    MigrationRecord,
    RequestRecord,
    Session,
)
from persistence.driver_wait import mend_driver_wait
from persistence.errors import UNUSABLE_ADDRESS, Conflict, StoreUnavailable, in_short
from persistence.indexes import make_indexes
from persistence.logins import Logins
from persistence.turns import Lane, Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.collection import AsyncCollection
    from pymongo.asynchronous.database import AsyncDatabase

    from persistence.clock import Clock

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Row = dict[str, Any]

# MongoDB's code of a key that is there already.
DUPLICATE = 11000
# What the driver is given of a command's deadline; the rest is for the answer.
_DRIVER_SHARE = 0.9
# What a command may wait of it for its Session, and for a place in front of the pool, before it
# is refused as one too many.
_WAITING_SHARE = 0.4
# How long is waited until a transaction that ran out of time is ended, and for the next attempt.
_END_TRANSACTION_S = 0.25
_END_AGAIN_S = 0.05


_in_transaction: ContextVar[bool] = ContextVar("duet_in_transaction", default=False)


@dataclass(frozen=True, slots=True)
class _Collections:
    goals: AsyncCollection[Row]
    sessions: AsyncCollection[Row]
    escrow: AsyncCollection[Row]
    escrow_calls: AsyncCollection[Row]
    requests: AsyncCollection[Row]
    goal_records: AsyncCollection[Row]
    migrations: AsyncCollection[Row]

    @classmethod
    def of(cls, database: AsyncDatabase[Row]) -> _Collections:
        return cls(
            goals=database[Goal.Settings.name],
            sessions=database[Session.Settings.name],
            escrow=database[EscrowEntry.Settings.name],
            escrow_calls=database[EscrowCall.Settings.name],
            requests=database[RequestRecord.Settings.name],
            goal_records=database[GoalRecord.Settings.name],
            migrations=database[MigrationRecord.Settings.name],
        )


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Bounds in front of the database.

    Attributes:
        pool_size: connections of the driver's pool.
        concurrency: commands that use the database at the same time; the others wait in order.
        at_once: loads, and transactions, under way from which on commands share the next one.
        queue_size: commands that may wait, at most a quarter of them for one Session; one more is
            refused at once.
        deadline_s: for one command as a whole, waiting included.
        lease_s: how long a claim of an outbox or a deadline lasts.
    """

    pool_size: int = 64
    concurrency: int = 32
    at_once: int = 2
    queue_size: int = 1000
    deadline_s: float = 2.0
    lease_s: float = 5.0
    node_name: str = "node"


class Store:
    """MongoDB as the rest of Duet uses it.

    Attributes:
        owner: this process: the node's name, by which a restarted node knows what its predecessor
            had claimed, and a part that is new in each process.
        turns: the queues in front of the database.
    """

    def __init__(
        self,
        client: AsyncMongoClient[Row],
        database: str,
        owner: str,
        clock: Clock,
        options: StoreOptions,
    ) -> None:
        self.clock = clock
        self.options = options
        self.owner = owner
        self._client = client
        self._logins = Logins(client)
        self._endings: set[asyncio.Task[None]] = set()
        self._database = client.get_database(database)
        # Inside a transaction a write may not name its own write concern; alone it must.
        self._joining = _Collections.of(self._database)
        self._alone = _Collections.of(
            client.get_database(database, write_concern=WriteConcern("majority"))
        )
        # What a majority has and nothing can undo, as far as this member knows of it.
        self._settled = client.get_database(database, read_concern=ReadConcern("majority"))
        # Asks a majority before it answers, so that what it finds can't be undone.
        self._certain = client.get_database(database, read_concern=ReadConcern("linearizable"))
        self.turns = Turns(
            options.concurrency, options.queue_size, options.deadline_s * _WAITING_SHARE
        )

    @property
    def goals(self) -> AsyncCollection[Row]:
        """Invitations and shows."""
        return self._collections.goals

    @property
    def sessions(self) -> AsyncCollection[Row]:
        """The streamers' Sessions."""
        return self._collections.sessions

    @property
    def settled_goals(self) -> AsyncCollection[Row]:
        """Goals as they are shown to people: what is read here is not undone later."""
        return self._settled[Goal.Settings.name]

    @property
    def settled_sessions(self) -> AsyncCollection[Row]:
        """Sessions as they are shown to people: what is read here is not undone later."""
        return self._settled[Session.Settings.name]

    @property
    def escrow(self) -> AsyncCollection[Row]:
        """The ledger."""
        return self._collections.escrow

    @property
    def escrow_calls(self) -> AsyncCollection[Row]:
        """What is said to the platform's payment service."""
        return self._collections.escrow_calls

    @property
    def requests(self) -> AsyncCollection[Row]:
        """The answers given to requests."""
        return self._collections.requests

    @property
    def certain_requests(self) -> AsyncCollection[Row]:
        """The answers given to requests, as a majority has them; not inside a transaction.

        A primary that has lost its majority shows what it alone has written, until it learns that
        it is none any more. What was read there before such a read is certain with it.
        """
        return self._certain[RequestRecord.Settings.name]

    @property
    def certain_goals(self) -> AsyncCollection[Row]:
        """Goals as `certain_requests`: nothing that is told of what is read here is undone."""
        return self._certain[Goal.Settings.name]

    @property
    def certain_sessions(self) -> AsyncCollection[Row]:
        """Sessions as `certain_requests`: that one has ended is told only when it stays so."""
        return self._certain[Session.Settings.name]

    @property
    def certain_escrow_calls(self) -> AsyncCollection[Row]:
        """Payment calls as `certain_requests`: nothing that is said of them is undone."""
        return self._certain[EscrowCall.Settings.name]

    @property
    def goal_records(self) -> AsyncCollection[Row]:
        """Analytics."""
        return self._collections.goal_records

    @property
    def migrations(self) -> AsyncCollection[Row]:
        """How far migrations have come."""
        return self._collections.migrations

    def collection(self, name: str) -> AsyncCollection[Row]:
        """Any collection of the database, for migrations and indexes alone."""
        return self._alone.goals.database[name]

    @property
    def database_name(self) -> str:
        """The name of Duet's database."""
        return self._database.name

    @property
    def admin(self) -> AsyncDatabase[Row]:
        """MongoDB's own database, for commands about the server."""
        return self._client.get_database("admin", read_concern=ReadConcern("local"))

    @property
    def _collections(self) -> _Collections:
        return self._joining if _in_transaction.get() else self._alone

    @classmethod
    async def open(
        cls,
        url: str,
        database: str,
        clock: Clock,
        options: StoreOptions | None = None,
        *,
        with_indexes: bool = True,
    ) -> Store:
        """Connects, makes missing indexes unless told not to, and takes over the database's time.

        Raises:
            StoreUnavailable: `url` is none, nothing answers there within ten times the command
                deadline, what answers is no replica set (transactions need one), or an index can't
                be made in that time.
        """
        options = options or StoreOptions()
        owner = f"{options.node_name}/{uuid.uuid4().hex[:12]}"
        client = _client(url, application_name(database, owner), options)
        store = cls(client, database, owner, clock, options)
        try:
            with pymongo.timeout(options.deadline_s * 10):
                _check_replica_set(await client.admin.command("hello"))
                await init_beanie(
                    database=store._database, document_models=list(DOCUMENTS), skip_indexes=True
                )
                if with_indexes:
                    await make_indexes(store)
            await store.follow_time()
        except PyMongoError as error:
            await client.close()
            raise StoreUnavailable(f"MongoDB can't be used: {in_short(error)}") from error
        except StoreUnavailable:
            await client.close()
            raise
        return store

    async def close(self) -> None:
        """Closes every connection."""
        endings = tuple(self._endings)
        for ending in endings:
            ending.cancel()
        if endings:
            await asyncio.wait(endings)
        await self._client.close()

    async def follow_time(self) -> None:
        """Measures the database's time and sets the process's clock by it; warns of a jump."""
        asked_at_s = self.clock.monotonic_s()
        async with self.reading():
            # A command ignores the client's tz_aware unless it is told: the instant would be naive,
            # and so read in this machine's own time zone.
            hello = await self._client.admin.command(
                "hello", codec_options=self._client.codec_options
            )
        jump = self.clock.follow(hello["localTime"], asked_at_s, self.clock.monotonic_s())
        if jump is not None:
            _log.warning(
                "database_time_jumped",
                from_offset_s=round(jump.from_offset_s, 3),
                to_offset_s=round(jump.to_offset_s, 3),
                by_s=round(jump.to_offset_s - jump.from_offset_s, 3),
            )

    async def ping(self) -> None:
        """Asks the primary for an answer.

        Raises:
            StoreUnavailable: there is none within the deadline.
        """
        async with self.reading():
            await self._client.admin.command("ping", read_preference=ReadPreference.PRIMARY)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Bounds the database calls inside by the deadline and folds their errors into one."""
        try:
            with _folded_errors():
                async with asyncio.timeout(self.options.deadline_s):
                    with pymongo.timeout(self.options.deadline_s * _DRIVER_SHARE):
                        yield
        except StoreUnavailable as error:
            await self._logins.refused(error.__cause__)
            raise

    @asynccontextmanager
    async def viewing(self, *, patient: bool = False) -> AsyncIterator[None]:
        """As `reading`, in the lane of what is shown to people; `patient` as for a turn.

        Raises:
            StoreOverloaded: too many wait in it.
        """
        async with self.reading(), self.turns.turn(Lane.VIEWS, patient=patient):
            yield

    @asynccontextmanager
    async def unbounded(self) -> AsyncIterator[None]:
        """As `reading`, without a deadline: for what looks at a whole collection."""
        with _folded_errors():
            yield

    async def transact(self, body: Callable[[], Awaitable[T]]) -> T:
        """Runs `body` in one transaction; each database call inside joins it.

        `body` may run more than once: PyMongo retries it on `TransientTransactionError`, and the
        commit on `UnknownTransactionCommitResult`, within the deadline in force.
        """

        async def joined(session: AsyncClientSession) -> T:
            token = _in_transaction.set(True)
            try:
                async with session.bind(end_session=False):
                    return await body()
            finally:
                _in_transaction.reset(token)

        session = self._client.start_session()
        open_on_server = False
        try:
            return await session.with_transaction(
                joined,
                read_concern=ReadConcern("snapshot"),
                write_concern=WriteConcern("majority"),
                read_preference=ReadPreference.PRIMARY,
            )
        except (Conflict, DuplicateKeyError):
            open_on_server = _out_of_time()
            raise
        except BaseException:
            open_on_server = True
            raise
        finally:
            await (self._end_transaction(session) if open_on_server else session.end_session())

    async def write(self, command: Row) -> int:
        """Sends `insert` or `update` as it is, inside a transaction.

        The driver's own methods cost a tenth of an agreement more, and find less in one round trip.

        Returns:
            How many documents it found, or inserted.

        Raises:
            DuplicateKeyError: a key is there already.
            WriteError: the database refused a document.
        """
        answer = await self._database.command(command)
        for error in answer.get("writeErrors", ()):
            kind = DuplicateKeyError if error["code"] == DUPLICATE else WriteError
            raise kind(error["errmsg"], error["code"], error)
        return int(answer["n"])

    async def _end_transaction(self, session: AsyncClientSession) -> None:
        """Ends what a transaction that ran out of time may have left open on the server.

        Only then the session: the driver lends its id to the next one, whose transaction would be
        ended in its stead.

        The deadline that has passed holds for the driver's own abort too: that fails, silently,
        and the documents would stay locked. So this is asked without it. The caller waits a moment
        for it; while MongoDB can't be reached it is tried on, for another command's time. What it
        misses `persistence.abandoned` finds.
        """

        async def kill() -> None:
            while True:
                with contextlib.suppress(ConnectionFailure):
                    named = [{"id": session.session_id["id"]}]
                    await self._client.admin.command("killSessions", named)
                    return
                await asyncio.sleep(_END_AGAIN_S)

        async def end() -> None:
            try:
                with contextlib.suppress(PyMongoError, TimeoutError):
                    async with asyncio.timeout(self.options.deadline_s):
                        await kill()
            finally:
                await session.end_session()

        # A context of its own: without the deadline and without the session.
        loop = asyncio.get_running_loop()
        ending = loop.create_task(end(), context=contextvars.Context())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        await asyncio.wait({ending}, timeout=_END_TRANSACTION_S)


def _out_of_time() -> bool:
    """Whether the driver sends nothing more for want of time, an abort neither."""
    left_s = _csot.remaining()
    return left_s is not None and left_s <= 0


def application_name(database: str, owner: str) -> str:
    """The name under which a process connects; MongoDB allows 128 bytes."""
    return f"duet/{database}/{owner}"[:128]


def _client(url: str, name: str, options: StoreOptions) -> AsyncMongoClient[Row]:
    """The driver's client; it connects when it is first used."""
    mend_driver_wait()
    try:
        return AsyncMongoClient(
            url,
            tz_aware=True,
            maxPoolSize=options.pool_size,
            retryWrites=True,
            retryReads=True,
            # What an address prefers for other programs: a secondary's answers are too old to
            # decide by, and it gives none that is certain.
            readPreference="primary",
            appname=name,
            serverSelectionTimeoutMS=int(options.deadline_s * 1000),
            connectTimeoutMS=int(options.deadline_s * 1000),
            heartbeatFrequencyMS=2000,
        )
    except UNUSABLE_ADDRESS as error:
        raise StoreUnavailable(f"MongoDB can't be used: {in_short(error)}") from error


class _folded_errors:  # noqa: N801 - reads as a keyword
    """Turns the driver's and the deadline's errors into `StoreUnavailable`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DuplicateKeyError):
            return
        if isinstance(error, PyMongoError):
            raise StoreUnavailable(in_short(error)) from error
        if isinstance(error, TimeoutError):
            raise StoreUnavailable("MongoDB did not answer in time") from error


def _check_replica_set(hello: Row) -> None:
    """Refuses a lone mongod: only a replica set or a sharded cluster has transactions."""
    if "setName" not in hello and hello.get("msg") != "isdbgrid":
        raise StoreUnavailable(
            "MongoDB must run as a replica set, since transactions need one: "
            "start mongod with --replSet and run rs.initiate()"
        )
