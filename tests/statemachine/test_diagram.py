"""The diagram in the documentation is the table's."""

from __future__ import annotations

from statemachine.diagram import DOCUMENT, commands_table, diagram, document
from statemachine.goal import RULES, CommandName, GoalState, Role, Rule


def test_the_document_is_what_the_table_says_today() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), (
        "docs/state-machine.md is stale: run `python -m statemachine.diagram`"
    )


def test_a_new_line_of_the_table_makes_the_document_stale() -> None:
    """The comparison above can fail: the text follows the rules that it is given."""
    more = (
        *RULES,
        Rule(GoalState.ENDED, CommandName.INVITE, frozenset({Role.VIEWER}), GoalState.INVITED),
    )

    assert "    ended --> invited: invite (viewer)" in diagram(more).splitlines()
    assert "    ended --> [*]" not in diagram(more).splitlines()
    assert commands_table(more) != commands_table()


def test_the_diagram_begins_before_the_invitation_and_ends_when_nothing_is_left_to_do() -> None:
    lines = diagram().splitlines()

    assert lines[0] == "stateDiagram-v2"
    assert lines[1] == "    [*] --> invited: invite (viewer) / hold"
    assert lines[-1] == "    ended --> [*]"
    assert len(lines) == len(RULES) + 2


def test_the_table_names_role_reason_and_movement() -> None:
    rows = commands_table().splitlines()

    assert (
        "| invited | `withdraw` | viewer | declined | release: escrow → viewer | `withdrawn` |  |"
    ) in rows
    assert "| live | `finish` | streamer, viewer, timer | ended |  |  | `captured` |" in rows
