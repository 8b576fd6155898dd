"""Each receiver by its name: whom it serves, when it runs, and precisely what it causes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from statemachine.goal import CommandName, Due
from statemachine.receivers import (
    EXCLUSIVE_GOAL,
    RETURNED_FOR_TRIGGER_EXCLUSIVE,
    TRIGGER_EXCLUSIVE_GOAL,
    AuthorizeRoom,
    DropChannelData,
    DropSessionToken,
    Effect,
    Invoke,
    KeepSources,
    MakeDue,
    Occurrence,
    Phase,
    Push,
    Receiver,
    Registry,
    SetOnSession,
    Settle,
    Signal,
    SyncViewers,
    Track,
    UnsetOtherPairs,
    authorization,
    standard_receivers,
)
from tests.statemachine.builders import NOW, occurrence

if TYPE_CHECKING:
    from collections.abc import Sequence

# Signal, `_cls` and phase -> who runs, in order. From the requirements, not from the code.
RUNS: dict[tuple[str, str, str], list[str]] = {
    ("goal.ended", "TriggerExclusiveGoal", "commit"): [
        "set_embedded_goal_ended",
        "cleanup_expired_exclusive_goal_pairs",
        "sync_trigger_goal_session_viewer",
        "trigger_exclusive_goal_escrow_refund",
    ],
    ("goal.ended", "TriggerExclusiveGoal", "deliver"): [
        "invalidate_get_session_token_view_cache",
        "invalidate_cached_pusher_channel_data",
        "notify_stream_authorized_for_agreed_trigger_goal",
        "notify_goal_ended",
        "track_goals",
    ],
    ("goal.ended", "ExclusiveGoal", "commit"): ["snapshot_rtc_sources"],
    ("goal.ended", "ExclusiveGoal", "deliver"): [
        "invalidate_get_session_token_view_cache",
        "invalidate_cached_pusher_channel_data",
        "notify_goal_ended",
        "notify_stream_authorized_for_ended_exclusive_goal",
        "track_goals",
    ],
    ("goal.added", "TriggerExclusiveGoal", "deliver"): ["notify_goal_added"],
    ("exclusive.started", "ExclusiveGoal", "deliver"): [
        "invalidate_get_session_token_view_cache",
        "notify_exclusive",
    ],
    ("exclusive.ended", "ExclusiveGoal", "deliver"): [
        "invalidate_get_session_token_view_cache",
        "notify_exclusive",
    ],
    ("escrow.held", "TriggerExclusiveGoal", "deliver"): ["notify_escrow"],
    ("escrow.captured", "TriggerExclusiveGoal", "deliver"): ["notify_escrow"],
    ("escrow.released", "TriggerExclusiveGoal", "deliver"): [
        "invalidate_get_session_token_view_cache",
        "notify_escrow",
        "settle_escrow",
    ],
}

# The requirements' "returned" list.
RETURNED = [
    "trigger_exclusive_on_close_notification",
    "notify_stream_authorized_for_ended_exclusive_goal",
    "trigger_show_escrow_refund",
    "handle_trigger_private_goal_escrow",
    "snapshot_rtc_sources",
]

AGREED = occurrence()
# Disagree: the requirements' task carries no metadata, so no `agreed`.
DISAGREED = occurrence(agreed_at=None)
SHOW_ENDED = occurrence(goal_type=EXCLUSIVE_GOAL, agreed_at=NOW - timedelta(seconds=40))


def effects_of(name: str, about: Occurrence, registry: Registry | None = None) -> Sequence[Effect]:
    receiver = (registry or standard_receivers()).named(name, about.signal, about.goal_type)
    assert receiver is not None, f"{name} does not serve {about.signal} of {about.goal_type}"
    return receiver.react(about)


# Who runs


@pytest.mark.parametrize("signal", list(Signal))
@pytest.mark.parametrize("goal_type", [TRIGGER_EXCLUSIVE_GOAL, EXCLUSIVE_GOAL])
@pytest.mark.parametrize("phase", list(Phase))
def test_each_signal_has_exactly_its_receivers_in_order(
    signal: Signal, goal_type: str, phase: Phase
) -> None:
    found = standard_receivers().of(signal, goal_type, phase)

    names = [receiver.name for receiver in found]
    assert names == RUNS.get((signal.value, goal_type, phase.value), [])


def test_the_returned_ones_are_the_requirements() -> None:
    assert frozenset(RETURNED) == RETURNED_FOR_TRIGGER_EXCLUSIVE


@pytest.mark.parametrize("name", RETURNED)
def test_a_returned_receiver_is_not_run_for_an_invitation(name: str) -> None:
    registry = standard_receivers()

    assert registry.named(name, Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL) is None
    for phase in Phase:
        run = {
            found.name for found in registry.of(Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL, phase)
        }
        assert name not in run


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("signal", list(Signal))
def test_a_returned_receiver_cant_be_registered_for_an_invitation(
    name: str, signal: Signal
) -> None:
    registry = Registry()
    receiver = Receiver(
        name,
        signal,
        Phase.DELIVER,
        frozenset({TRIGGER_EXCLUSIVE_GOAL, "TriggerShowGoal"}),
        lambda _: (),
    )

    with pytest.raises(ValueError, match=f"{name} does not serve a TriggerExclusiveGoal"):
        registry.register(receiver)

    assert registry.named(name, signal, "TriggerShowGoal") is None


@pytest.mark.parametrize(
    "name",
    [
        "trigger_exclusive_on_close_notification",
        "trigger_show_escrow_refund",
        "handle_trigger_private_goal_escrow",
    ],
)
async def test_the_platform_registers_its_own_receivers_through_the_same_door(name: str) -> None:
    heard: list[str] = []

    async def handler(about: Occurrence) -> None:
        heard.append(about.event_id)

    registry = standard_receivers()
    registry.register(
        Receiver(
            name,
            Signal.GOAL_ENDED,
            Phase.DELIVER,
            frozenset({"TriggerShowGoal"}),
            lambda _: (Invoke(handler),),
        )
    )
    about = occurrence(goal_type="TriggerShowGoal")

    [effect] = effects_of(name, about, registry)
    assert isinstance(effect, Invoke)
    await effect.handler(about)

    assert heard == [about.event_id]
    [runs] = registry.of(Signal.GOAL_ENDED, "TriggerShowGoal", Phase.DELIVER)
    assert runs.name == name


def test_the_platforms_receivers_run_behind_those_already_there() -> None:
    registry = standard_receivers()
    registry.register(
        Receiver(
            "bill",
            Signal.GOAL_ENDED,
            Phase.DELIVER,
            frozenset({TRIGGER_EXCLUSIVE_GOAL}),
            lambda _: (),
        )
    )

    runs = registry.of(Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL, Phase.DELIVER)

    assert runs[-1].name == "bill"
    assert len(runs) == 6


def test_a_name_can_be_registered_once_for_a_signal_and_a_goal_type() -> None:
    registry = standard_receivers()
    [taken] = registry.of(Signal.GOAL_ADDED, TRIGGER_EXCLUSIVE_GOAL, Phase.DELIVER)

    with pytest.raises(ValueError, match=r"notify_goal_added of goal\.added is registered already"):
        registry.register(taken)

    registry.register(replace(taken, serves=frozenset({"TriggerShowGoal"})))
    assert registry.named("notify_goal_added", Signal.GOAL_ADDED, "TriggerShowGoal") is not None


def test_a_receiver_that_no_code_serves_is_found_by_nobody() -> None:
    registry = standard_receivers()

    assert registry.named("notify_goal_added", Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL) is None
    assert registry.named("notify_goal_added", Signal.GOAL_ADDED, EXCLUSIVE_GOAL) is None
    assert registry.named("nobody", Signal.GOAL_ADDED, TRIGGER_EXCLUSIVE_GOAL) is None


# Commit phase


def test_set_embedded_goal_ended_after_an_agreement() -> None:
    assert effects_of("set_embedded_goal_ended", AGREED) == (
        SetOnSession(
            "b" * 24,
            "ben",
            "a" * 24,
            {
                "exclusive_goal_pairs.ben.trigger_exclusive_goal_ended": True,
                "exclusive_goal_pairs.ben.trigger_exclusive_goal_agreed": NOW,
                "status.exclusive_to": ["ben"],
            },
        ),
    )


def test_set_embedded_goal_ended_after_a_disagreement_takes_the_stream_for_nobody() -> None:
    assert effects_of("set_embedded_goal_ended", DISAGREED) == (
        SetOnSession(
            "b" * 24,
            "ben",
            "a" * 24,
            {"exclusive_goal_pairs.ben.trigger_exclusive_goal_ended": True},
        ),
    )


def test_cleanup_expired_exclusive_goal_pairs_unsets_the_others_once_one_is_agreed() -> None:
    assert effects_of("cleanup_expired_exclusive_goal_pairs", AGREED) == (
        UnsetOtherPairs("b" * 24),
    )


def test_sync_trigger_goal_session_viewer_gives_everyone_in_breakdown_a_pass() -> None:
    about = occurrence(breakdown=("ben", "cleo"), prepaid_duration_s=30, show_grace_s=60.0)

    assert effects_of("sync_trigger_goal_session_viewer", about) == (
        SyncViewers("b" * 24, ("ben", "cleo"), nbf=NOW, duration_s=90.0),
    )


def test_trigger_exclusive_goal_escrow_refund_is_due_65_s_after_exp() -> None:
    about = occurrence(exp=NOW - timedelta(seconds=3))

    assert effects_of("trigger_exclusive_goal_escrow_refund", about) == (
        MakeDue(Due(CommandName.REFUND, NOW + timedelta(seconds=62))),
    )


@pytest.mark.parametrize(
    "name",
    [
        "cleanup_expired_exclusive_goal_pairs",
        "sync_trigger_goal_session_viewer",
        "trigger_exclusive_goal_escrow_refund",
        "notify_stream_authorized_for_agreed_trigger_goal",
    ],
)
def test_without_an_agreement_nothing_comes_of_it(name: str) -> None:
    assert effects_of(name, DISAGREED) == ()


def test_snapshot_rtc_sources_keeps_the_shows_sources() -> None:
    assert effects_of("snapshot_rtc_sources", SHOW_ENDED) == (KeepSources("b" * 24),)


# Deliver phase


@pytest.mark.parametrize("about", [AGREED, DISAGREED, SHOW_ENDED])
def test_notify_goal_ended_tells_the_streamers_three_channels(about: Occurrence) -> None:
    assert effects_of("notify_goal_ended", about) == (
        Push(
            "goal.ended",
            ("private-stream@anna", "presence-stream@anna", "private-user@anna"),
            {"goal_id": "a" * 24, "active": False, "event_id": about.event_id},
        ),
    )


def test_notify_stream_authorized_tells_each_payer_on_his_own_preview_channel() -> None:
    about = occurrence(breakdown=("ben", "cleo"))

    def push(viewer_id: str) -> Push:
        return Push(
            "stream.authorized",
            (f"presence-stream-viewer@anna.preview.{viewer_id}",),
            {
                "session_id": "b" * 24,
                "streamer_id": "anna",
                "viewer_id": viewer_id,
                "nbf": "2026-11-22T17:25:00.123Z",
                "duration": 90,
                "exp": "2026-11-22T17:26:30.123Z",
                "event_id": f"{'a' * 24}:2:stream.authorized",
            },
        )

    found = effects_of("notify_stream_authorized_for_agreed_trigger_goal", about)

    assert found == (push("ben"), push("cleo"))


@pytest.mark.parametrize("about", [AGREED, DISAGREED, SHOW_ENDED])
def test_invalidate_get_session_token_view_cache_drops_the_sessions_view(
    about: Occurrence,
) -> None:
    assert effects_of("invalidate_get_session_token_view_cache", about) == (
        DropSessionToken("b" * 24),
    )


@pytest.mark.parametrize("about", [AGREED, DISAGREED, SHOW_ENDED])
def test_invalidate_cached_pusher_channel_data_drops_the_streamers_channels(
    about: Occurrence,
) -> None:
    assert effects_of("invalidate_cached_pusher_channel_data", about) == (DropChannelData("anna"),)


@pytest.mark.parametrize(
    ("about", "agreed"), [(AGREED, True), (DISAGREED, False), (SHOW_ENDED, True)]
)
def test_track_goals_writes_one_record_for_each_event(about: Occurrence, agreed: bool) -> None:
    assert effects_of("track_goals", about) == (
        Track(
            about.event_id,
            {
                "goal_type": about.goal_type,
                "goal_id": "a" * 24,
                "session_id": "b" * 24,
                "streamer_id": "anna",
                "viewer_id": "ben",
                "agreed": agreed,
                "at": NOW,
            },
        ),
    )


def test_notify_stream_authorized_for_ended_exclusive_goal_authorizes_the_room_again() -> None:
    assert effects_of("notify_stream_authorized_for_ended_exclusive_goal", SHOW_ENDED) == (
        AuthorizeRoom("b" * 24, "anna", f"{'a' * 24}:2:stream.authorized", NOW),
    )


def test_notify_goal_added_tells_the_streamer_and_not_the_room() -> None:
    about = occurrence(Signal.GOAL_ADDED)

    assert effects_of("notify_goal_added", about) == (
        Push(
            "goal.added",
            ("private-stream@anna", "private-user@anna"),
            {**about.args, "event_id": about.event_id},
        ),
    )


@pytest.mark.parametrize("signal", [Signal.EXCLUSIVE_STARTED, Signal.EXCLUSIVE_ENDED])
def test_notify_exclusive_tells_the_stream_and_the_room(signal: Signal) -> None:
    about = occurrence(signal, goal_type=EXCLUSIVE_GOAL)

    assert effects_of("notify_exclusive", about) == (
        Push(
            signal.value,
            ("private-stream@anna", "presence-stream@anna"),
            {**about.args, "event_id": about.event_id},
        ),
    )


@pytest.mark.parametrize(
    "signal", [Signal.ESCROW_HELD, Signal.ESCROW_CAPTURED, Signal.ESCROW_RELEASED]
)
def test_notify_escrow_tells_only_the_viewer_whose_money_it_is(signal: Signal) -> None:
    about = occurrence(signal)

    assert effects_of("notify_escrow", about) == (
        Push(signal.value, ("private-user@ben",), {**about.args, "event_id": about.event_id}),
    )


def test_no_signal_that_changes_a_pass_is_pushed_before_the_cached_pass_is_dropped() -> None:
    """Whoever has seen an event reads nothing stale, also when another process delivers it."""
    registry = standard_receivers()

    for signal, goal_type in (
        (Signal.GOAL_ENDED, TRIGGER_EXCLUSIVE_GOAL),
        (Signal.GOAL_ENDED, EXCLUSIVE_GOAL),
        (Signal.EXCLUSIVE_STARTED, EXCLUSIVE_GOAL),
        (Signal.EXCLUSIVE_ENDED, EXCLUSIVE_GOAL),
        (Signal.ESCROW_RELEASED, TRIGGER_EXCLUSIVE_GOAL),
    ):
        first = registry.of(signal, goal_type, Phase.DELIVER)[0]
        assert first.name == "invalidate_get_session_token_view_cache", signal


def test_settle_escrow_settles_the_goal() -> None:
    assert effects_of("settle_escrow", occurrence(Signal.ESCROW_RELEASED)) == (Settle("a" * 24),)


def test_receivers_leave_the_signals_arguments_alone() -> None:
    about = occurrence()
    before = dict(about.args)

    for names in RUNS.values():
        for name in names:
            receiver = standard_receivers().named(name, about.signal, about.goal_type)
            if receiver is not None:
                assert receiver.react(about) == receiver.react(about)

    assert about.args == before


def test_an_authorization_of_whole_seconds_says_so_without_a_point() -> None:
    def duration(seconds: float) -> object:
        return authorization(
            session_id="s", streamer_id="anna", viewer_id="ben", nbf=NOW, duration_s=seconds
        )["duration"]

    assert repr(duration(90.0)) == "90"
    assert repr(duration(61.5)) == "61.5"
