from __future__ import annotations

import resource

import pytest
from structlog.testing import capture_logs

from gateway.open_files import KEPT_FREE, OpenFiles, files_allowed, files_for_sockets


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A thousand files may be open."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1_000, 4_000))
    return 1_000


def test_the_last_files_are_not_for_newcomers(limit: int) -> None:
    files = OpenFiles()

    assert files.has_room(limit - KEPT_FREE - 1, 0.0)
    assert not files.has_room(limit - KEPT_FREE, 0.0)


def test_newcomers_that_are_sent_away_are_told_of_at_once_and_then_seldom(limit: int) -> None:
    files = OpenFiles()
    with capture_logs() as logs:
        for second in range(25):
            for _ in range(100):
                files.has_room(limit - 1, float(second))

    assert [line["sent_away"] for line in logs] == [1, 1_000, 1_000]
    assert logs[0]["allowed"] == limit
    assert "LimitNOFILE" in logs[0]["remedy"]


def test_a_limit_that_is_raised_while_the_process_runs_counts_at_once(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = OpenFiles()
    assert not files.has_room(limit, 0.0)

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (2 * limit, 4_000))

    assert files.has_room(limit, 0.0)


def test_without_a_limit_there_is_always_room(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: unlimited)

    assert OpenFiles().has_room(10**9, 0.0)


def test_a_low_limit_leaves_half_for_sockets() -> None:
    assert files_for_sockets(100) == 50


def test_the_limit_is_the_one_that_this_process_has() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    assert files_allowed() == soft or soft == resource.RLIM_INFINITY
