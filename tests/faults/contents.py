"""What replies, snapshots and events say, held against the truth. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.evidence import Invitation, Run
    from tests.faults.history import Answered, Asked, Heard, Row

# What every push of a commit is called; each carries an id.
OF_COMMITS: Final = frozenset(
    {
        "goal.added",
        "goal.ended",
        "stream.authorized",
        "exclusive.started",
        "exclusive.ended",
        "escrow.held",
        "escrow.captured",
        "escrow.released",
    }
)
# To which version a command brings a goal, whoever gives it.
_BRINGS_TO: Final = {
    "invite": 1,
    "agree": 2,
    "disagree": 2,
    "withdraw": 2,
    "expire": 2,
    "start": 3,
    "refund": 3,
    "finish": 4,
}
_MOVEMENT: Final = {"escrow.held": "hold", "escrow.captured": "capture"}


def shown(run: Run, view: Row) -> Iterator[str]:
    """What is wrong with a goal as a reply or a snapshot shows it."""
    one = run.invitations.get(view["id"])
    if one is None:
        yield f"{view['id']} was shown, and there is no such goal"
        return
    version = view["version"]
    was = one.life[version - 1] if 1 <= version <= len(one.life) else None
    if was != (view["state"], view["reason"], view["outcome"]):
        yield f"{one.id} was shown as {view['state']} at version {version}, and was {was}"
    if not _says(view, _as_invited(one)):
        yield f"{one.id} was shown with other terms or parties than it has"


def answered(run: Run, asked: Asked, answer: Answered) -> Iterator[str]:
    """What is wrong with what an answer says."""
    if answer.goal is None:
        return
    yield from shown(run, answer.goal)
    if asked.goal_id is not None and answer.goal["id"] != asked.goal_id:
        yield f"{asked.command} of {asked.goal_id} was answered with {answer.goal['id']}"
    if not answer.ok:
        return
    if answer.goal["version"] != _BRINGS_TO.get(asked.command, answer.goal["version"]):
        yield f"{asked.command} of {answer.goal['id']} was answered with {answer.goal['state']}"
    if asked.amount is not None and answer.goal["amount"] != asked.amount:
        yield f"{asked.amount} was offered, and {answer.goal['amount']} acknowledged"


def told(run: Run, heard: Heard) -> Iterator[str]:
    """What is wrong with the data of an event."""
    if heard.event_id is None:
        if heard.event in OF_COMMITS:
            yield f"{heard.listener} got {heard.event} on {heard.channel} without an id"
        return
    goal_id, version, _ = heard.event_id.split(":", 2)
    one = run.invitations.get(goal_id)
    if one is not None and not _says(heard.data, _told_of(one, int(version), heard)):
        yield f"{heard.event_id} was told on {heard.channel} with data of its own: {heard.data}"


def _told_of(one: Invitation, version: int, heard: Heard) -> Row:
    """What an event must say; it may say more."""
    match heard.event:
        case "goal.added":
            return {"id": one.id, "version": 1, "state": "invited"} | _as_invited(one)
        case "goal.ended":
            of_show = version > 2
            show_id = one.row.get("exclusive_goal")
            return {
                "goal_id": str(show_id) if of_show else one.id,
                "_cls": "ExclusiveGoal" if of_show else "TriggerExclusiveGoal",
                "active": False,
                "conditions": {"session_id": one.session_id, "exclusive_to": one.viewer_id},
                "metadata": {"user_id": one.streamer_id, "agreed": _Given(one.agreed_at)},
            }
        case "stream.authorized":
            return {
                "session_id": one.session_id,
                "streamer_id": one.streamer_id,
                "viewer_id": heard.channel.rpartition(".preview.")[2],
            }
        case "exclusive.started" | "exclusive.ended":
            return {
                "session_id": one.session_id,
                "goal_id": one.id,
                "exclusive_to": one.viewer_id,
            }
        case event:
            reason = reason_of(one, _MOVEMENT.get(event, "release"))
            return {"goal_id": one.id, "amount": one.row["amount"], "reason": reason}


def reason_of(one: Invitation, movement: str) -> str | None:
    """Why the money of a goal moved."""
    return {"hold": "invited", "capture": "started"}.get(movement, one.reason)


def _as_invited(one: Invitation) -> Row:
    return {
        "amount": one.row["amount"],
        "breakdown": one.row["breakdown"],
        "conditions": {"session_id": one.session_id, "exclusive_to": one.viewer_id},
        "metadata": {"user_id": one.streamer_id},
    }


class _Given:
    """Equals anything that is there, or only none."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: object) -> None:
        self._is_given = value is not None

    def __eq__(self, other: object) -> bool:
        return (other is not None) == self._is_given


def _says(data: Any, wanted: Row) -> bool:
    return isinstance(data, dict) and all(
        _says(data.get(name), value) if isinstance(value, dict) else data.get(name) == value
        for name, value in wanted.items()
    )
