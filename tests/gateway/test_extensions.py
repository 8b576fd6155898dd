"""The platform's own receivers come in by `DUET_RECEIVERS`, or stop the start with a reason."""

import sys
import types

import pytest

from gateway.extensions import ExtensionError, receivers_with
from statemachine.receivers import (
    EXCLUSIVE_GOAL,
    TRIGGER_EXCLUSIVE_GOAL,
    Phase,
    Receiver,
    Registry,
    Signal,
)


def _receiver(serves: str) -> Receiver:
    return Receiver(
        "trigger_show_escrow_refund",
        Signal.GOAL_ENDED,
        Phase.DELIVER,
        frozenset({serves}),
        lambda _occurrence: (),
    )


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("platform_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_without_an_extension_there_are_duets_receivers() -> None:
    registry = receivers_with(None)

    assert registry.named("notify_goal_ended", Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL)


def test_a_platforms_receiver_runs_behind_duets(platform: types.ModuleType) -> None:
    def register(registry: Registry) -> None:
        registry.register(_receiver(EXCLUSIVE_GOAL))

    vars(platform)["register"] = register

    registry = receivers_with("platform_of_a_test:register")

    names = [r.name for r in registry.of(Signal.GOAL_ENDED, EXCLUSIVE_GOAL, Phase.DELIVER)]
    assert names[-1] == "trigger_show_escrow_refund"
    assert "notify_goal_ended" in names


def test_a_returned_receiver_is_refused_for_an_invitation(platform: types.ModuleType) -> None:
    def register(registry: Registry) -> None:
        registry.register(_receiver(TRIGGER_EXCLUSIVE_GOAL))

    vars(platform)["register"] = register

    with pytest.raises(ExtensionError, match="does not serve a TriggerExclusiveGoal"):
        receivers_with("platform_of_a_test:register")


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        ("nowhere", "not of the form"),
        ("no.such.module:register", "can't be imported"),
        ("platform_of_a_test:missing", "can't be imported"),
        ("platform_of_a_test:__name__", "not a function"),
    ],
)
def test_a_wrong_name_is_one_clear_line(
    platform: types.ModuleType, extension: str, reason: str
) -> None:
    with pytest.raises(ExtensionError, match=reason):
        receivers_with(extension)
