from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import fallback_lines as lines
from gateway.frames import frame


@given(st.lists(st.one_of(st.text(), st.integers(120, 130).map("x".__mul__)), max_size=5))
def test_joined_frames_become_one_line_of_their_bodies(texts: list[str]) -> None:
    frames = b"".join(frame(text.encode()) for text in texts)

    line = lines.messages_line(frames)

    assert line[:1] == b"a"
    assert line.count(b"\n") == 1
    assert json.loads(line[1:]) == texts


@pytest.mark.parametrize("length", [0, 125, 126, 65_535, 65_536])
def test_each_form_of_a_frames_length_is_read(length: int) -> None:
    body = b"x" * length

    assert list(lines.bodies_of(frame(body) + frame(b"{}"))) == [body, b"{}"]


def test_a_close_carries_code_and_reason() -> None:
    assert lines.close_line(4200, 'the "reason"') == b'c[4200,"the \\"reason\\""]\n'


@pytest.mark.parametrize(("text", "units"), [("abc", 3), ("ä", 1), ("😀", 2)])
def test_a_line_is_as_long_as_a_browser_counts_it(text: str, units: int) -> None:
    assert lines.length_in_browser(text.encode()) == units


def test_a_line_is_made_once_for_all_who_get_the_same_frames() -> None:
    shared = lines.SharedLines()
    frames = frame(b'{"event":"e"}')

    first = shared.of(frames)

    assert shared.of(frames) is first
    assert shared.of(frame(b'{"event":"f"}')) != first
