from __future__ import annotations

from pathlib import Path

import pytest

from gateway.settings import Settings
from gateway.settings_table import TARGET, page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_says_what_the_code_says() -> None:
    written = (ROOT / TARGET).read_text(encoding="utf-8")

    assert written == page(), "stale: run python -m gateway.settings_table"


NUMBERS = [
    name for name, field in Settings.model_fields.items() if field.annotation in (int, float)
]


def cells_of(field: str) -> list[str]:
    (line,) = [each for each in page().splitlines() if each.startswith(f"| `DUET_{field.upper()}`")]
    return [cell.strip() for cell in line.replace("\\|", "").split("|")[1:-1]]


@pytest.mark.parametrize("field", list(Settings.model_fields))
def test_every_setting_has_a_line_with_unit_default_and_meaning(field: str) -> None:
    _, unit, default, _, meaning = cells_of(field)

    assert unit
    assert default
    assert meaning.endswith(".")


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_has_bounds(field: str) -> None:
    assert " to " in cells_of(field)[3]
