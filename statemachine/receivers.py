"""What a signal causes: the named receivers, the goal types they serve, their phase, their effects.

A receiver is pure: it is given the `Occurrence` of a signal and returns effects, which the shell
performs: those of the commit phase inside the transaction that changes the goal, those of the
deliver phase after it, from the goal's outbox, until each has succeeded.

Source: requirements (`goal.ended` and its receivers), docs/receivers.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from statemachine.goal import CommandName, Due
from statemachine.instants import rfc3339

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

TRIGGER_EXCLUSIVE_GOAL: Final = "TriggerExclusiveGoal"
EXCLUSIVE_GOAL: Final = "ExclusiveGoal"

# The receivers that the requirements mark "returned": they belong to other goal types.
RETURNED_FOR_TRIGGER_EXCLUSIVE: Final = frozenset(
    {
        "trigger_exclusive_on_close_notification",
        "notify_stream_authorized_for_ended_exclusive_goal",
        "trigger_show_escrow_refund",
        "handle_trigger_private_goal_escrow",
        "snapshot_rtc_sources",
    }
)


class Signal(StrEnum):
    """What has happened; the events that sockets receive carry the same names."""

    GOAL_ADDED = "goal.added"
    GOAL_ENDED = "goal.ended"
    EXCLUSIVE_STARTED = "exclusive.started"
    EXCLUSIVE_ENDED = "exclusive.ended"
    ESCROW_HELD = "escrow.held"
    ESCROW_CAPTURED = "escrow.captured"
    ESCROW_RELEASED = "escrow.released"


class Phase(StrEnum):
    """When a receiver runs: inside the transaction, or after it."""

    COMMIT = "commit"
    DELIVER = "deliver"


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One signal that was sent, with all that its receivers need.

    Attributes:
        event_id: the same however often the occurrence is delivered.
        goal_type: `_cls` of the goal that the signal is about.
        goal_id: the invitation's id, 24 hex digits, also when the signal is about its show.
        breakdown: the viewers who paid.
        agreed_at: the task's `metadata.agreed`; none when the streamer did not agree.
        args: the signal's arguments, ready to be written as JSON.
    """

    signal: Signal
    event_id: str
    goal_type: str
    goal_id: str
    session_id: str
    streamer_id: str
    viewer_id: str
    breakdown: tuple[str, ...]
    prepaid_duration_s: int
    show_grace_s: float
    refund_delay_s: float
    at: datetime
    exp: datetime
    agreed_at: datetime | None
    args: Mapping[str, object]


# Effects of the commit phase


@dataclass(frozen=True, slots=True)
class SetOnSession:
    """Sets fields of the Session whose pair of `viewer_id` still names `goal_id`."""

    session_id: str
    viewer_id: str
    goal_id: str
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class UnsetOtherPairs:
    """Unsets the pairs that the requirements' aggregation finds; their goals are superseded."""

    session_id: str


@dataclass(frozen=True, slots=True)
class SyncViewers:
    """Puts viewers into `session.viewers`: `nbf` kept if there, `exp = nbf + duration`."""

    session_id: str
    viewer_ids: tuple[str, ...]
    nbf: datetime
    duration_s: float


@dataclass(frozen=True, slots=True)
class MakeDue:
    """Sets the goal's next deadline in the same write as its state."""

    due: Due


@dataclass(frozen=True, slots=True)
class KeepSources:
    """Copies the Session's media sources to the ExclusiveGoal that has ended."""

    session_id: str


# Effects of the deliver phase


@dataclass(frozen=True, slots=True)
class Push:
    """Publishes one event, with the same data, on each channel."""

    event: str
    channels: tuple[str, ...]
    data: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AuthorizeRoom:
    """Tells the viewers present in the stream that they may watch it again."""

    session_id: str
    streamer_id: str
    event_id: str
    nbf: datetime


@dataclass(frozen=True, slots=True)
class DropSessionToken:
    """Drops the cached session-token view."""

    session_id: str


@dataclass(frozen=True, slots=True)
class DropChannelData:
    """Drops what every node has cached about a streamer's channels."""

    streamer_id: str


@dataclass(frozen=True, slots=True)
class Track:
    """Writes one analytics record, once for each `event_id`, and counts it."""

    event_id: str
    record: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Settle:
    """Ends a declined goal, now that its release is acknowledged."""

    goal_id: str


@dataclass(frozen=True, slots=True)
class Invoke:
    """Awaits the platform's own code; it can run twice and must have one effect."""

    handler: Callable[[Occurrence], Awaitable[None]]


CommitEffect = SetOnSession | UnsetOtherPairs | SyncViewers | MakeDue | KeepSources
DeliverEffect = Push | AuthorizeRoom | DropSessionToken | DropChannelData | Track | Settle | Invoke
Effect = CommitEffect | DeliverEffect


@dataclass(frozen=True, slots=True)
class Receiver:
    """One named thing that a signal causes, for the goal types that it serves."""

    name: str
    signal: Signal
    phase: Phase
    serves: frozenset[str]
    react: Callable[[Occurrence], Sequence[Effect]]


@dataclass(slots=True)
class Registry:
    """The receivers of a process, in the order in which they run."""

    _receivers: list[Receiver] = field(default_factory=list)

    def register(self, receiver: Receiver) -> None:
        """Adds a receiver behind those already there: the door for the platform's own code.

        Raises:
            ValueError: the name is taken for this signal and a goal type that it serves, or it
                is one that the requirements keep away from a TriggerExclusiveGoal.
        """
        for other in self._receivers:
            same = other.name == receiver.name and other.signal is receiver.signal
            if same and other.serves & receiver.serves:
                message = f"receiver {receiver.name} of {receiver.signal} is registered already"
                raise ValueError(message)
        if (
            receiver.name in RETURNED_FOR_TRIGGER_EXCLUSIVE
            and TRIGGER_EXCLUSIVE_GOAL in receiver.serves
        ):
            message = f"receiver {receiver.name} does not serve a {TRIGGER_EXCLUSIVE_GOAL}"
            raise ValueError(message)
        self._receivers.append(receiver)

    def of(self, signal: Signal, goal_type: str, phase: Phase) -> tuple[Receiver, ...]:
        """The receivers that run for a signal about a goal of this type, in order."""
        return tuple(
            receiver
            for receiver in self._receivers
            if receiver.signal is signal
            and receiver.phase is phase
            and goal_type in receiver.serves
        )

    def named(self, name: str, signal: Signal, goal_type: str) -> Receiver | None:
        """The receiver that an outbox entry names; none if no code serves it any more."""
        for receiver in self._receivers:
            if receiver.name == name and receiver.signal is signal and goal_type in receiver.serves:
                return receiver
        return None


def streamer_channels(streamer_id: str) -> tuple[str, str, str]:
    """The three targets of `goal.ended`."""
    return (
        f"private-stream@{streamer_id}",
        f"presence-stream@{streamer_id}",
        f"private-user@{streamer_id}",
    )


def preview_channel(streamer_id: str, viewer_id: str) -> str:
    """The channel on which one viewer hears that he may watch."""
    return f"presence-stream-viewer@{streamer_id}.preview.{viewer_id}"


def authorization(
    *, session_id: str, streamer_id: str, viewer_id: str, nbf: datetime, duration_s: float
) -> dict[str, object]:
    """The data of `stream.authorized` without its event id."""
    whole = int(duration_s) if float(duration_s).is_integer() else duration_s
    return {
        "session_id": session_id,
        "streamer_id": streamer_id,
        "viewer_id": viewer_id,
        "nbf": rfc3339(nbf),
        "duration": whole,
        "exp": rfc3339(nbf + timedelta(seconds=duration_s)),
    }


# Commit phase of goal.ended


def set_embedded_goal_ended(occurrence: Occurrence) -> Sequence[Effect]:
    """Marks the pair as ended and, when agreed, as agreed, and takes the stream for the viewer."""
    pair = f"exclusive_goal_pairs.{occurrence.viewer_id}"
    fields: dict[str, object] = {f"{pair}.trigger_exclusive_goal_ended": True}
    if occurrence.agreed_at is not None:
        fields[f"{pair}.trigger_exclusive_goal_agreed"] = occurrence.agreed_at
        fields["status.exclusive_to"] = [occurrence.viewer_id]
    return (SetOnSession(occurrence.session_id, occurrence.viewer_id, occurrence.goal_id, fields),)


def cleanup_expired_exclusive_goal_pairs(occurrence: Occurrence) -> Sequence[Effect]:
    """Unsets the other invitations of the Session, once one is agreed."""
    if occurrence.agreed_at is None:
        return ()
    return (UnsetOtherPairs(occurrence.session_id),)


def sync_trigger_goal_session_viewer(occurrence: Occurrence) -> Sequence[Effect]:
    """Gives everyone in `breakdown` a pass that begins when the streamer agreed."""
    if occurrence.agreed_at is None:
        return ()
    return (
        SyncViewers(
            occurrence.session_id,
            occurrence.breakdown,
            occurrence.agreed_at,
            occurrence.show_grace_s + occurrence.prepaid_duration_s,
        ),
    )


def trigger_exclusive_goal_escrow_refund(occurrence: Occurrence) -> Sequence[Effect]:
    """Makes the goal due for `check_trigger_exclusive_goal_refundable`, 65 s after its `exp`.

    Without an agreement the escrow was released with the goal, and nothing is left to check.
    """
    if occurrence.agreed_at is None:
        return ()
    at = occurrence.exp + timedelta(seconds=occurrence.refund_delay_s)
    return (MakeDue(Due(CommandName.REFUND, at)),)


def snapshot_rtc_sources(occurrence: Occurrence) -> Sequence[Effect]:
    """Keeps the show's media sources on its goal."""
    return (KeepSources(occurrence.session_id),)


# Deliver phase


def invalidate_get_session_token_view_cache(occurrence: Occurrence) -> Sequence[Effect]:
    """Drops the cached session-token view of the Session."""
    return (DropSessionToken(occurrence.session_id),)


def invalidate_cached_pusher_channel_data(occurrence: Occurrence) -> Sequence[Effect]:
    """Drops what the nodes have cached about the streamer's channels."""
    return (DropChannelData(occurrence.streamer_id),)


def _with_event_id(occurrence: Occurrence) -> dict[str, object]:
    return {**occurrence.args, "event_id": occurrence.event_id}


def notify_goal_ended(occurrence: Occurrence) -> Sequence[Effect]:
    """Pushes `goal.ended` with the signal's arguments to the streamer's three channels."""
    return (
        Push(
            Signal.GOAL_ENDED,
            streamer_channels(occurrence.streamer_id),
            _with_event_id(occurrence),
        ),
    )


def notify_stream_authorized_for_agreed_trigger_goal(
    occurrence: Occurrence,
) -> Sequence[Effect]:
    """Pushes `stream.authorized` to each viewer in `breakdown`, on his own preview channel."""
    if occurrence.agreed_at is None:
        return ()
    duration_s = occurrence.show_grace_s + occurrence.prepaid_duration_s
    return tuple(
        Push(
            "stream.authorized",
            (preview_channel(occurrence.streamer_id, viewer_id),),
            {
                **authorization(
                    session_id=occurrence.session_id,
                    streamer_id=occurrence.streamer_id,
                    viewer_id=viewer_id,
                    nbf=occurrence.agreed_at,
                    duration_s=duration_s,
                ),
                "event_id": occurrence.event_id.replace(
                    Signal.GOAL_ENDED.value, "stream.authorized"
                ),
            },
        )
        for viewer_id in occurrence.breakdown
    )


def notify_stream_authorized_for_ended_exclusive_goal(
    occurrence: Occurrence,
) -> Sequence[Effect]:
    """Authorizes the room's viewers again when a private show is over."""
    return (
        AuthorizeRoom(
            occurrence.session_id,
            occurrence.streamer_id,
            occurrence.event_id.replace(Signal.GOAL_ENDED.value, "stream.authorized"),
            occurrence.at,
        ),
    )


def track_goals(occurrence: Occurrence) -> Sequence[Effect]:
    """Writes the analytics record of an ended goal."""
    return (
        Track(
            occurrence.event_id,
            {
                "goal_type": occurrence.goal_type,
                "goal_id": occurrence.goal_id,
                "session_id": occurrence.session_id,
                "streamer_id": occurrence.streamer_id,
                "viewer_id": occurrence.viewer_id,
                "agreed": occurrence.agreed_at is not None,
                "at": occurrence.at,
            },
        ),
    )


def notify_goal_added(occurrence: Occurrence) -> Sequence[Effect]:
    """Pushes `goal.added` to the streamer."""
    private_stream, _, private_user = streamer_channels(occurrence.streamer_id)
    return (Push(Signal.GOAL_ADDED, (private_stream, private_user), _with_event_id(occurrence)),)


def notify_exclusive(occurrence: Occurrence) -> Sequence[Effect]:
    """Pushes the start or the end of a show to the streamer's stream channels."""
    private_stream, presence_stream, _ = streamer_channels(occurrence.streamer_id)
    return (Push(occurrence.signal, (private_stream, presence_stream), _with_event_id(occurrence)),)


def notify_escrow(occurrence: Occurrence) -> Sequence[Effect]:
    """Pushes a movement of the ledger to the viewer whose money it is."""
    return (
        Push(
            occurrence.signal,
            (f"private-user@{occurrence.viewer_id}",),
            _with_event_id(occurrence),
        ),
    )


def settle_escrow(occurrence: Occurrence) -> Sequence[Effect]:
    """Ends a declined goal: in Duet's own ledger a release is acknowledged once written.

    A goal whose money a payment service holds as well waits for that one's acknowledgement; the
    shell, which knows who holds it, leaves it declined until then.
    """
    return (Settle(occurrence.goal_id),)


_INVITATION: Final = frozenset({TRIGGER_EXCLUSIVE_GOAL})
_SHOW: Final = frozenset({EXCLUSIVE_GOAL})
_BOTH: Final = _INVITATION | _SHOW


def standard_receivers() -> Registry:
    """The receivers of docs/receivers.md and those of the other signals.

    Within the deliver phase the caches go first: who has seen an event reads nothing stale.
    """
    commit, deliver, ended = Phase.COMMIT, Phase.DELIVER, Signal.GOAL_ENDED
    registry = Registry()
    for signal, phase, serves, react in (
        (ended, commit, _INVITATION, set_embedded_goal_ended),
        (ended, commit, _INVITATION, cleanup_expired_exclusive_goal_pairs),
        (ended, commit, _INVITATION, sync_trigger_goal_session_viewer),
        (ended, commit, _INVITATION, trigger_exclusive_goal_escrow_refund),
        (ended, commit, _SHOW, snapshot_rtc_sources),
        (ended, deliver, _BOTH, invalidate_get_session_token_view_cache),
        (ended, deliver, _BOTH, invalidate_cached_pusher_channel_data),
        (ended, deliver, _INVITATION, notify_stream_authorized_for_agreed_trigger_goal),
        (ended, deliver, _BOTH, notify_goal_ended),
        (ended, deliver, _SHOW, notify_stream_authorized_for_ended_exclusive_goal),
        (ended, deliver, _BOTH, track_goals),
        (Signal.GOAL_ADDED, deliver, _INVITATION, notify_goal_added),
        (Signal.EXCLUSIVE_STARTED, deliver, _SHOW, invalidate_get_session_token_view_cache),
        (Signal.EXCLUSIVE_STARTED, deliver, _SHOW, notify_exclusive),
        (Signal.EXCLUSIVE_ENDED, deliver, _SHOW, invalidate_get_session_token_view_cache),
        (Signal.EXCLUSIVE_ENDED, deliver, _SHOW, notify_exclusive),
        (Signal.ESCROW_HELD, deliver, _INVITATION, notify_escrow),
        (Signal.ESCROW_CAPTURED, deliver, _INVITATION, notify_escrow),
        (Signal.ESCROW_RELEASED, deliver, _INVITATION, invalidate_get_session_token_view_cache),
        (Signal.ESCROW_RELEASED, deliver, _INVITATION, notify_escrow),
        (Signal.ESCROW_RELEASED, deliver, _INVITATION, settle_escrow),
    ):
        registry.register(Receiver(react.__name__, signal, phase, serves, react))
    return registry
