"""A missing real part is a skip for a person and a failure on CI."""

from __future__ import annotations

import pytest

from tests.conftest import require


def test_a_missing_part_skips_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUET_REQUIRE_REAL_PARTS", raising=False)

    with pytest.raises(pytest.skip.Exception, match="there is no Chromium"):
        require(part_present=False, reason="there is no Chromium")


def test_a_missing_part_fails_where_all_parts_must_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DUET_REQUIRE_REAL_PARTS", "1")

    with pytest.raises(pytest.fail.Exception, match="there is no Chromium"):
        require(part_present=False, reason="there is no Chromium")


def test_a_part_that_is_there_lets_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_REQUIRE_REAL_PARTS", "1")

    require(part_present=True, reason="there is no Chromium")
