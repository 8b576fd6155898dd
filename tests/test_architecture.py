"""`docs/architecture.md` has a place for every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["statemachine", "persistence", "gateway"])
def test_every_module_has_its_place_in_the_architecture(package: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## The modules\n")[2].partition("\n## ")[0]
    # `package/`: names in backticks, up to the next package or the end of the cell.
    lists = re.findall(rf"`{package}/`: ([^;|]*)", section)
    named = re.findall(r"`(\w+)`", " ".join(lists))

    modules = [path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__"]

    assert sorted(named) == sorted(modules)
