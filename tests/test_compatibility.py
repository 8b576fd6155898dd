from __future__ import annotations

import pytest

from tests import compatibility
from tests.compatibility import MarkError, Proof

MARKED = """
@pytest.mark.parametrize("n", [1])
@pytest.mark.pusher("1.9", "4001 | unknown")
async def test_an_unknown_app_is_refused(n): ...

class TestMore:
    @pytest.mark.pusher("1.1", "first")
    def test_the_first(self): ...

def test_without_a_mark(): ...
"""


def test_the_page_is_what_the_tests_say() -> None:
    text = compatibility.PAGE.read_text()
    introduction, found, _ = text.partition(compatibility.BEGIN)

    assert found
    assert text == compatibility.page(introduction), "run: python -m tests.compatibility"


def test_marked_tests_are_found_in_functions_and_classes() -> None:
    found = list(compatibility.proofs_in(MARKED, "tests/test_x.py"))

    assert found == [
        Proof("1.9", "4001 | unknown", "tests/test_x.py", "test_an_unknown_app_is_refused"),
        Proof("1.1", "first", "tests/test_x.py", "test_the_first"),
    ]


def test_each_section_is_a_table_whose_rows_link_to_the_tests() -> None:
    tables = compatibility.tables(list(compatibility.proofs_in(MARKED, "tests/test_x.py")))

    assert tables.index("## 1.1 Connecting") < tables.index("## 1.9 Close codes")
    assert "| 4001 \\| unknown | [an unknown app is refused](../tests/test_x.py) |" in tables


@pytest.mark.parametrize("arguments", ['"9.9", "what"', '"1.1"'])
def test_a_mark_that_fits_no_table_is_an_error(arguments: str) -> None:
    source = f"@pytest.mark.pusher({arguments})\ndef test_x(): ...\n"

    with pytest.raises(MarkError):
        list(compatibility.proofs_in(source, "tests/test_x.py"))
