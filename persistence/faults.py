"""Named steps at which a test may stop or kill the process; off, and next to free, in production.

`reached` costs one comparison while nothing is installed. Tests install a hook in a child process
of their own; nothing in the settings can.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Step(StrEnum):
    """Each step of a command at which a crash must be survived, in order."""

    BEFORE_LOAD = "before_load"
    AFTER_DECIDE = "after_decide"
    IN_TRANSACTION = "in_transaction"
    BEFORE_COMMIT = "before_commit"
    AFTER_COMMIT = "after_commit"
    BEFORE_RECEIVER = "before_receiver"
    AFTER_RECEIVER = "after_receiver"
    BEFORE_OUTBOX_REMOVAL = "before_outbox_removal"
    AFTER_OUTBOX_REMOVAL = "after_outbox_removal"
    BEFORE_REPLY = "before_reply"


_hook: Callable[[Step, str], None] | None = None


def install(hook: Callable[[Step, str], None] | None) -> None:
    """Sets what runs at each step: called with the step and a detail (command or receiver)."""
    global _hook  # noqa: PLW0603 - one hook a process is the whole point
    _hook = hook


def reached(step: Step, detail: str = "") -> None:
    """Tells the hook, if there is one, that the process has come this far."""
    if _hook is not None:
        _hook(step, detail)
