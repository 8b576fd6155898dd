"""Finds and runs a real mongod and a real Redis for the demo and the tests."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Self

from persistence.embedded_mongod import ReplicaSet, mongod_path, start_replica_set
from persistence.embedded_process import EmbeddedError, ServerGuard
from persistence.embedded_redis import RedisServer, redis_server_path

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "EmbeddedError",
    "EmbeddedServers",
    "mongod_path",
    "redis_server_path",
    "start_embedded",
]

# How long the servers of a killed process may take to end and give their data directory free.
_HANDOVER_S: Final = 20.0
_HANDOVER_POLL_S: Final = 0.05


class EmbeddedServers:
    """A MongoDB and a Redis that end with this process, `kill -9` included.

    Attributes:
        mongodb_url: What a MongoDB driver connects to.
        redis_url: What a Redis client connects to; `unix://…` for a Unix socket.
        mongodb: The replica set behind `mongodb_url`; None when a URL was given.
        redis: The server behind `redis_url`; None when a URL was given.
    """

    def __init__(
        self,
        mongodb: ReplicaSet | str,
        redis: RedisServer | str,
        stack: ExitStack,
    ) -> None:
        self.mongodb = mongodb if isinstance(mongodb, ReplicaSet) else None
        self.redis = redis if isinstance(redis, RedisServer) else None
        self.mongodb_url = mongodb.url if isinstance(mongodb, ReplicaSet) else mongodb
        self.redis_url = redis.url if isinstance(redis, RedisServer) else redis
        self._stack = stack

    def close(self) -> None:
        """Ends the servers and removes what was temporary; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_embedded(
    data_directory: Path | None = None,
    *,
    mongodb_url: str | None = None,
    redis_url: str | None = None,
) -> EmbeddedServers:
    """Starts what is not given and waits until it takes writes; some second and a half.

    It blocks: call it before the event loop runs, or in a thread.

    Args:
        data_directory: Where both keep their data from run to run; one process at a time.
            Without it the data is gone at the end.
        mongodb_url: A MongoDB to use instead of starting one.
        redis_url: A Redis to use instead of starting one.

    Raises:
        EmbeddedError: A server can't run here, or the data directory can't be used.
    """
    if mongodb_url and redis_url:
        return EmbeddedServers(mongodb_url, redis_url, ExitStack())
    with ExitStack() as stack:
        lock_fds: list[int] = []
        if data_directory is not None:
            data_directory = data_directory.absolute()
            lock_fds.append(_lock(data_directory))
            stack.callback(os.close, lock_fds[0])
        guard = stack.enter_context(ServerGuard(keep_fds=lock_fds))
        redis = redis_url or RedisServer(guard, data_directory=data_directory).start()
        mongodb = mongodb_url or start_replica_set(guard, data_directory=data_directory)
        return EmbeddedServers(mongodb, redis, stack.pop_all())


def _lock(data_directory: Path) -> int:
    """Takes the data directory for this process and the servers that it will start.

    The lock belongs to the open file, which the guard and the servers inherit: it is held until
    the last of them has ended, not only until this process has.
    """
    try:
        data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(data_directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EmbeddedError(
            f"{data_directory} can't be used ({error.strerror})", "choose another --data-dir"
        ) from error
    give_up_at = time.monotonic() + _HANDOVER_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode().strip()
            # A holder that was killed leaves servers that are about to end.
            if _is_alive(holder) or time.monotonic() > give_up_at:
                os.close(fd)
                raise EmbeddedError(
                    f"{data_directory} is in use by process {holder}",
                    "end that one or choose another --data-dir",
                ) from None
            time.sleep(_HANDOVER_POLL_S)
        else:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd


def _is_alive(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
