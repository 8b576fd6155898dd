"""What a person reads when a server can't run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from persistence.embedded_process import (
    EmbeddedError,
    PortLostError,
    ServerGuard,
    ServerProcess,
    explain_exit,
    require_space,
)

if TYPE_CHECKING:
    from pathlib import Path

FATAL = (
    '{"t":{"$date":"2026-01-02T03:04:05.678+00:00"},"s":"E","c":"CONTROL","id":20557,"ctx":'
    '"initandlisten","msg":"DBException in initAndListen, terminating","attr":{"error":'
    '"NonExistentPath: Data directory /data/db not found."}}'
)
FAREWELL = '{"t":{"$date":"2026-01-02T03:04:05.679+00:00"},"s":"I","c":"-","msg":"Bye","attr":{}}'


@pytest.mark.parametrize(
    ("log_text", "line"),
    [
        pytest.param(
            "/opt/mongod: error while loading shared libraries: libcurl.so.4: cannot open shared"
            " object file: No such file or directory\n",
            "mongod needs the library libcurl.so.4: install it (Debian: libcurl4)",
            id="library in a known package",
        ),
        pytest.param(
            "mongod: error while loading shared libraries: libfoo.so.1: cannot open shared object",
            "mongod needs the library libfoo.so.1: install it (Debian: the package that has"
            " libfoo.so.1)",
            id="library in an unknown package",
        ),
        pytest.param(
            "mongod: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by)",
            "mongod needs a newer system (GLIBC_2.34): install mongod with the package manager, so"
            " that it is on PATH",
            id="old system",
        ),
        pytest.param(
            f"[1768000000:1] handle-open: write: No space left on device\n{FAREWELL}\n",
            "mongod has no disk space left: free some, or set TMPDIR",
            id="full disk",
        ),
        pytest.param(
            f"{FATAL}\n{FAREWELL}\n",
            "mongod ended with code 9: DBException in initAndListen, terminating NonExistentPath:"
            " Data directory /data/db not found.",
            id="error before the farewells in mongod's log",
        ),
        pytest.param(
            "usage\nError parsing command line\n",
            "mongod ended with code 9: Error parsing command line",
            id="plain text",
        ),
        pytest.param("", "mongod ended with code 9: it didn't say why", id="silence"),
    ],
)
def test_the_reason_is_one_line_with_the_remedy(log_text: str, line: str) -> None:
    error = explain_exit("mongod", 9, log_text)

    assert str(error) == line
    assert list(error.log_tail) == log_text.splitlines()


def test_a_lost_port_can_be_told_from_other_reasons() -> None:
    error = explain_exit("redis-server", 1, "bind: Address already in use")

    assert isinstance(error, PortLostError)


def test_a_program_for_another_machine_is_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    program = tmp_path_factory.mktemp("programs") / "mongod"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o700)
    with ServerGuard() as guard:
        process = ServerProcess(guard, "mongod", stop_grace_s=0)

        with pytest.raises(EmbeddedError, match=r"mongod can't be run \(Exec format error\)"):
            process.start([str(program)])


def test_no_temporary_directory_is_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path_factory.getbasetemp() / "missing"
    monkeypatch.setattr("tempfile.tempdir", str(missing))

    with pytest.raises(EmbeddedError, match=r"no temporary directory \(No such file or directory"):
        ServerGuard()


def test_a_disk_too_full_for_a_server_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError) as raised:
        require_space("mongod", tmp_path, 1 << 60)

    assert re.fullmatch(
        rf"mongod needs 1099511627776 MiB in {tmp_path}, \d+ are free: free some, set TMPDIR or"
        " choose another --data-dir",
        str(raised.value),
    )
