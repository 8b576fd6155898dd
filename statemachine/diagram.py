"""Draws the table of `statemachine.goal` for `docs/state-machine.md`; nothing there is by hand.

`python -m statemachine.diagram` writes the file, and a test fails when it is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from statemachine.goal import RULES, CommandName, GoalState, Movement, Role
from statemachine.receivers import (
    EXCLUSIVE_GOAL,
    TRIGGER_EXCLUSIVE_GOAL,
    Phase,
    Signal,
    standard_receivers,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from statemachine.goal import Rule

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "state-machine.md"

_START_AND_END: Final = "[*]"
_MOVES: Final = {
    None: "",
    Movement.HOLD: "hold: viewer → escrow",
    Movement.CAPTURE: "capture: escrow → streamer",
    Movement.RELEASE: "release: escrow → viewer",
}


def diagram(rules: Sequence[Rule] = RULES) -> str:
    """The table as a Mermaid state diagram: commands with who gives them, and the escrow's part."""
    lines = ["stateDiagram-v2"]
    for rule in rules:
        source = _START_AND_END if rule.source is GoalState.NONE else rule.source.value
        label = f"{rule.command.value} ({_roles(rule.roles)})"
        if rule.movement is not None:
            label += f" / {rule.movement.value}"
        lines.append(f"    {source} --> {rule.target.value}: {label}")
    sources = {rule.source for rule in rules}
    lines += [
        f"    {state.value} --> {_START_AND_END}"
        for state in GoalState
        if state not in sources and any(rule.target is state for rule in rules)
    ]
    return "\n".join(lines)


def commands_table(rules: Sequence[Rule] = RULES) -> str:
    """The table with everything that a line decides."""
    return _table(
        ("from", "command", "by", "to", "escrow", "reason", "outcome"),
        (
            (
                "none" if rule.source is GoalState.NONE else rule.source.value,
                f"`{rule.command.value}`",
                _roles(rule.roles),
                rule.target.value,
                _MOVES[rule.movement],
                f"`{rule.reason.value}`" if rule.reason else "",
                f"`{rule.outcome.value}`" if rule.outcome else "",
            )
            for rule in rules
        ),
    )


def cells_table(rules: Sequence[Rule] = RULES) -> str:
    """Every state against every command: where it leads, and nothing where it is refused."""
    target_of = {(rule.source, rule.command): rule.target.value for rule in rules}
    return _table(
        ("", *(f"`{name.value}`" for name in CommandName)),
        (
            (
                f"**{state.value}**",
                *(target_of.get((state, name), "") for name in CommandName),
            )
            for state in GoalState
        ),
    )


def receivers_table() -> str:
    """Who runs for which signal of which goal, in order."""
    registry = standard_receivers()
    return _table(
        ("signal", "of a", "phase", "receivers, in order"),
        (
            (
                f"`{signal.value}`",
                f"`{goal_type}`",
                phase.value,
                ", ".join(f"`{receiver.name}`" for receiver in found),
            )
            for signal in Signal
            for goal_type in (TRIGGER_EXCLUSIVE_GOAL, EXCLUSIVE_GOAL)
            for phase in Phase
            if (found := registry.of(signal, goal_type, phase))
        ),
    )


def document() -> str:
    """The whole of `docs/state-machine.md`."""
    return f"""# The state machine of a goal

Generated from the table in `statemachine/goal.py` and the registry in `statemachine/receivers.py`
by `python -m statemachine.diagram`. Change those and run it again; a test compares.

```mermaid
{diagram()}
```

## What may follow what

{commands_table()}

A goal that is *invited* can't be agreed from its `exp` on, even if the timer is late. The timer's
commands are refused before their time. `invite`, `agree` and `start` need a live stream that no
other goal has taken.

## Every state against every command

An empty cell is refused, with a code and a sentence. Nothing leaves *ended*.

{cells_table()}

## Who hears of it

Receivers of the commit phase run inside the transaction that changes the goal, those of the
deliver phase after it, until each has succeeded.

{receivers_table()}
"""


def _roles(roles: Iterable[Role]) -> str:
    """Names who may, in the order in which the roles are declared."""
    wanted = frozenset(roles)
    return ", ".join(role.value for role in Role if role in wanted)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [_row(row) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Writes the document and says where."""
    DOCUMENT.write_text(document(), encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT}\n")


if __name__ == "__main__":
    main()
