"""Moves documents of an older schema on: ordered, in batches, resumable, one runner at a time.

Old documents are readable without it: fields that came later have defaults, and fields that only
a newer node knows are ignored and kept, since every write is an atomic update of single fields.
So gateways of two versions run side by side, and migrating may wait until the last old one has
gone. What an old gateway writes after a migration has run is found by the next run; until then no
later migration touches it, so each document takes every step, in order.

A document that an update does not fit, because somebody has changed it by hand, is left as it is
and told of; the others are not kept waiting for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from pymongo import ASCENDING, ReturnDocument
from pymongo.errors import DuplicateKeyError, WriteError

from persistence.documents import SCHEMA_VERSION
from persistence.errors import StoreError, in_short

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pymongo.asynchronous.collection import AsyncCollection

    from persistence.store import Row, Store

_LEASE_ID: Final = "lease"


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of one collection's schema.

    Attributes:
        name: for ever the same and unique, e.g. `0001_goals_…`.
        collection: whose documents it changes.
        version: the documents' `schema_version` after it. Those that the collection's migration
            before it has led to are changed, by the first one all below it or without one; each
            one once.
        update: the stages of an aggregation-pipeline update of one document. MongoDB runs it on
            the document as it is at that moment, so a running gateway loses nothing by it.
    """

    name: str
    collection: str
    version: int
    update: tuple[Row, ...]

    @property
    def pending(self) -> Row:
        """Filter of the documents that it has still to change, when those before it have."""
        return {
            "$or": [{"schema_version": None}, {"schema_version": {"$lt": self.version}}],
        }

    def stages(self) -> list[Row]:
        """The update, and the mark that it was made."""
        return [*self.update, {"$set": {"schema_version": self.version}}]


# In the order in which they are run. The schema has had one version so far.
MIGRATIONS: Final[tuple[Migration, ...]] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration has come in this run.

    Attributes:
        done: documents that it has changed.
        total: those that waited when the run began.
    """

    migration: Migration
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Unfit:
    """A document that an update did not fit; it is as it was.

    Attributes:
        why: what MongoDB says, in a line.
    """

    collection: str
    document_id: Any
    why: str


class MigrationRefused(StoreError):
    """Migrating is not possible now; the message is one line for a person."""


class Migrator:
    """Runs migrations on one database.

    Attributes:
        unfit: what this run had to leave as it is, by collection and id.
    """

    def __init__(
        self,
        store: Store,
        migrations: Sequence[Migration] = MIGRATIONS,
        *,
        batch_size: int = 500,
        lease_s: float = 30.0,
    ) -> None:
        _check(migrations)
        self._store = store
        self._migrations = tuple(migrations)
        self._batch_size = batch_size
        self._lease_s = lease_s
        self._ready = _ready(self._migrations)
        self.unfit: dict[tuple[str, str], Unfit] = {}

    async def plan(self) -> list[Progress]:
        """What waits, migration by migration; writes nothing."""
        return [
            Progress(migration, 0, await self._count(migration, migration.pending))
            for migration in self._migrations
        ]

    async def strangers(self) -> list[str]:
        """Migrations that a newer version of Duet has run on this database."""
        known = [_LEASE_ID, *(migration.name for migration in self._migrations)]
        async with self._store.reading():
            rows = await self._store.migrations.find({"_id": {"$nin": known}}).to_list()
        return sorted(row["_id"] for row in rows)

    async def run(self) -> AsyncIterator[Progress]:
        """Runs what waits, and tells the progress after each batch.

        Ended half-way, by a signal or a crash, it goes on where it stopped when it is run again.

        Raises:
            MigrationRefused: somebody else migrates this database.
            StoreUnavailable: MongoDB did not answer in time; run again.
        """
        await self._take_lease()
        try:
            for migration in self._migrations:
                async for progress in self._run_one(migration):
                    yield progress
        finally:
            await self._give_lease_back()

    async def _run_one(self, migration: Migration) -> AsyncIterator[Progress]:
        total = await self._count(migration, self._ready[migration.name])
        last_id = await self._begin(migration)
        done = in_this_pass = 0
        resumed = last_id is not None
        yield Progress(migration, done, total)
        while True:
            ids = await self._batch(migration, last_id)
            if not ids:
                if not (in_this_pass or resumed):
                    break
                # Once more from the beginning: documents that an old gateway wrote meanwhile.
                last_id, in_this_pass, resumed = None, 0, False
                continue
            await self._take_lease()
            last_id = ids[-1]
            changed = await self._change(migration, ids, last_id)
            in_this_pass += changed
            done += changed
            yield Progress(migration, done, max(total, done))
        await self._finish(migration)

    async def _count(self, migration: Migration, wanted: Row) -> int:
        async with self._store.unbounded():
            return await self._documents(migration).count_documents(wanted)

    async def _begin(self, migration: Migration) -> Any:
        """The last document of a run that did not come to its end; none otherwise."""
        async with self._store.reading():
            record = await self._store.migrations.find_one_and_update(
                {"_id": migration.name},
                {
                    "$set": {"started_at": self._store.clock.now()},
                    "$setOnInsert": {"migrated": 0},
                    "$unset": {"finished_at": ""},
                },
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        assert record is not None
        return record.get("last_id")

    async def _batch(self, migration: Migration, last_id: Any) -> list[Any]:
        wanted = self._ready[migration.name]
        pending = self._documents(migration).find(wanted, {"_id": True}).sort("_id")
        if last_id is not None:
            # Where the index goes on; a comparison would find ids of the same type alone.
            pending = pending.min([("_id", last_id)]).hint([("_id", ASCENDING)])
        async with self._store.unbounded():
            rows = await pending.limit(self._batch_size + 1).to_list()
        ids = [row["_id"] for row in rows if row["_id"] != last_id]
        return ids[: self._batch_size]

    async def _change(self, migration: Migration, ids: list[Any], last_id: Any) -> int:
        """Changes a batch, then writes down how far it came; repeating it changes nothing."""
        try:
            changed = await self._update(migration, ids)
        except WriteError:
            # One of them does not fit. Those before it are changed by now.
            changed = 0
            for document_id in ids:
                if await self._change_alone(migration, document_id):
                    changed += 1
        async with self._store.reading():
            await self._store.migrations.update_one(
                {"_id": migration.name},
                {"$set": {"last_id": last_id}, "$inc": {"migrated": changed}},
            )
        return changed

    async def _change_alone(self, migration: Migration, document_id: Any) -> bool:
        """Tells whether the update fits."""
        key = (migration.collection, repr(document_id))
        try:
            await self._update(migration, [document_id])
        except WriteError as error:
            self.unfit[key] = Unfit(migration.collection, document_id, in_short(error))
            return False
        self.unfit.pop(key, None)
        return True

    async def _update(self, migration: Migration, ids: list[Any]) -> int:
        """Raises `WriteError` when one of the documents does not fit."""
        wanted = {"_id": {"$in": ids}, **self._ready[migration.name]}
        async with self._store.reading():
            try:
                changed = await self._documents(migration).update_many(wanted, migration.stages())
            except WriteError as error:
                if error.timeout:
                    raise
                unfit = error
            else:
                return changed.modified_count
        raise unfit

    async def _finish(self, migration: Migration) -> None:
        async with self._store.reading():
            await self._store.migrations.update_one(
                {"_id": migration.name},
                {"$set": {"finished_at": self._store.clock.now()}, "$unset": {"last_id": ""}},
            )

    async def _take_lease(self) -> None:
        """Takes the lease, or renews it."""
        async with self._store.reading():
            now = self._store.clock.now()
            try:
                await self._store.migrations.update_one(
                    {
                        "_id": _LEASE_ID,
                        "$or": [
                            {"owner": self._store.owner},
                            {"owner": {"$exists": False}},
                            {"lease_until": {"$lte": now}},
                        ],
                    },
                    {
                        "$set": {
                            "owner": self._store.owner,
                            "lease_until": now + timedelta(seconds=self._lease_s),
                        }
                    },
                    upsert=True,
                )
            except DuplicateKeyError:
                held = await self._store.migrations.find_one({"_id": _LEASE_ID}) or {}
                raise MigrationRefused(
                    f"{held.get('owner', 'somebody else')} migrates this database; "
                    f"after a crash wait {self._lease_s:g} s"
                ) from None

    async def _give_lease_back(self) -> None:
        async with self._store.reading():
            await self._store.migrations.update_one(
                {"_id": _LEASE_ID, "owner": self._store.owner},
                {"$unset": {"owner": "", "lease_until": ""}},
            )

    def _documents(self, migration: Migration) -> AsyncCollection[Row]:
        return self._store.collection(migration.collection)


def _check(migrations: Sequence[Migration]) -> None:
    """Refuses a list in which a migration would be skipped or shadowed.

    Raises:
        ValueError: a name is there twice, or a collection's versions do not rise.
    """
    names: set[str] = set()
    version_of: dict[str, int] = {}
    for migration in migrations:
        if migration.name in names or migration.name == _LEASE_ID:
            raise ValueError(f"the migration's name {migration.name} is taken")
        names.add(migration.name)
        if migration.version <= version_of.get(migration.collection, 1):
            raise ValueError(f"{migration.name}: versions of {migration.collection} must rise")
        version_of[migration.collection] = migration.version


def _ready(migrations: Sequence[Migration]) -> dict[str, Row]:
    """Filters, by the migrations' names, of the documents that are ready for each."""
    ready: dict[str, Row] = {}
    version_of: dict[str, int] = {}
    for migration in migrations:
        before = version_of.get(migration.collection)
        ready[migration.name] = (
            migration.pending
            if before is None
            else {"schema_version": {"$gte": before, "$lt": migration.version}}
        )
        version_of[migration.collection] = migration.version
    return ready


def _newest(migrations: Sequence[Migration]) -> int:
    return max((migration.version for migration in migrations), default=1)


if _newest(MIGRATIONS) != SCHEMA_VERSION:
    raise ValueError("persistence.documents.SCHEMA_VERSION and the newest migration must agree")
