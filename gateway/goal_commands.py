"""The one path of a goal command, from a socket or over HTTP, to its reply.

Decide and commit is `persistence.goals`; here an identity becomes an actor, an answer a reply, and
what the commit left to do is handed to the deliverer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from gateway.auth import USER_ID_PATTERN
from gateway.broker import BrokerUnavailable
from gateway.commands import Agree, Disagree, Finish, Invite, Reply, Start, Withdraw
from gateway.errors import ERRORS, CommandError, ErrorCode, code_of
from gateway.passes import has_time_left, pass_of, signed
from gateway.storable import why_not_storable
from persistence.errors import StoreDamaged, StoreOverloaded, StoreUnavailable
from persistence.faults import Step, reached
from persistence.intents import Done, Intent, Refused, Terms
from persistence.repeated import Repeated
from persistence.views import goal_view, session_view
from statemachine.goal import CommandName, RejectionCode, Role
from statemachine.instants import rfc3339

if TYPE_CHECKING:
    from gateway.auth import Identity
    from gateway.commands import GoalCommand
    from gateway.deliver import Deliverer
    from gateway.redis_passes import PassCache
    from gateway.telemetry import Telemetry
    from persistence.clock import Clock
    from persistence.documents import Goal, Session
    from persistence.goals import Goals
    from persistence.sessions import Sessions

_log = structlog.get_logger(__name__)

_NAME_OF: Final[dict[type[Any], CommandName]] = {
    Invite: CommandName.INVITE,
    Agree: CommandName.AGREE,
    Disagree: CommandName.DISAGREE,
    Withdraw: CommandName.WITHDRAW,
    Start: CommandName.START,
    Finish: CommandName.FINISH,
}


class _NewSession(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /sessions`; the media sources are the platform's own."""

    rtc_sources: list[Any] = []


class GoalCommands:
    """Goal commands, Sessions and passes, as sockets and HTTP ask for them."""

    def __init__(
        self,
        *,
        goals: Goals,
        sessions: Sessions,
        deliverer: Deliverer,
        passes: PassCache,
        clock: Clock,
        telemetry: Telemetry,
        pass_secret: str,
        room_pass_s: float,
    ) -> None:
        self._goals = goals
        self._sessions = sessions
        self._deliverer = deliverer
        self._passes = passes
        self._clock = clock
        self._telemetry = telemetry
        self._pass_secret = pass_secret
        self._room_pass_s = room_pass_s
        self._unavailable = Repeated(_log, "command_unavailable")

    async def execute(self, command: GoalCommand, identity: Identity) -> Reply:
        """Carries out a command and replies; never raises for what a caller can cause."""
        name = _NAME_OF[type(command)]
        started_s = self._clock.monotonic_s()
        intent = _intent(name, command, identity)
        reply = await self._reply(intent)
        outcome = reply.error.code.value if reply.error else "ok"
        self._telemetry.command_done(name, outcome, self._clock.monotonic_s() - started_s)
        reached(Step.BEFORE_REPLY, name)
        return reply

    async def _reply(self, intent: Intent) -> Reply:
        try:
            answer = await self._goals.execute(intent)
        except StoreOverloaded:
            return Reply(intent.request_id, None, CommandError.of(ErrorCode.OVERLOADED))
        except StoreDamaged as error:
            _log.error("books_damaged", command=intent.command, goal=intent.goal_id, why=str(error))
            return Reply(intent.request_id, None, CommandError.of(ErrorCode.INTERNAL))
        except StoreUnavailable as error:
            self._unavailable.met(intent.command, command=intent.command, why=str(error))
            return Reply(intent.request_id, None, CommandError.of(ErrorCode.UNAVAILABLE))
        goal_json = msgspec.json.encode(answer.goal) if answer.goal is not None else None
        if isinstance(answer, Refused):
            return Reply(intent.request_id, goal_json, _error(answer))
        await self._deliverer.after_commit(answer)
        return Reply(intent.request_id, goal_json)

    async def snapshot(self, user_id: str) -> bytes:
        """The data of `goal.snapshot`: every goal of the user that has not ended.

        Raises:
            StoreUnavailable: MongoDB did not answer in time.
        """
        # Before the read: what is committed while it is under way may be missing.
        as_of = self._clock.now()
        goals = await self._goals.open_goals(user_id)
        return msgspec.json.encode(
            {"goals": [goal_view(goal) for goal in goals], "as_of": rfc3339(as_of)}
        )

    async def goal_json(self, goal_id: str, identity: Identity) -> bytes | CommandError:
        """One goal, for its two parties."""
        try:
            goal = await self._goals.goal(goal_id)
        except (StoreOverloaded, StoreUnavailable) as error:
            return _not_now(error)
        if goal is None:
            return CommandError.of(ErrorCode.UNKNOWN_GOAL)
        if identity.user_id not in _parties(goal):
            return CommandError.of(RejectionCode.NOT_YOUR_GOAL)
        return msgspec.json.encode(goal_view(goal))

    async def create_session(
        self, identity: Identity, body: bytes
    ) -> tuple[int, bytes] | CommandError:
        """Starts the caller's Session: 201; or finds the one that is live: 200."""
        if identity.role is Role.VIEWER:
            return CommandError.of(RejectionCode.WRONG_ROLE, "Only a streamer can go live.")
        if not USER_ID_PATTERN.fullmatch(identity.user_id):
            return CommandError.of(ErrorCode.BAD_USER_ID)
        try:
            wanted = msgspec.json.decode(body or b"{}", type=_NewSession)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return CommandError.of(ErrorCode.MALFORMED, f"The body is malformed: {error}.")
        fault = why_not_storable(wanted.rtc_sources)
        if fault is not None:
            return CommandError.of(ErrorCode.MALFORMED, f"rtc_sources can't be kept: {fault}.")
        try:
            session, created = await self._sessions.create(identity.user_id, wanted.rtc_sources)
        except (StoreOverloaded, StoreUnavailable) as error:
            return _not_now(error)
        if created:
            await self._deliverer.stream_changed(identity.user_id)
        return (201 if created else 200), msgspec.json.encode(session_view(session))

    async def session_json(self, session_id: str, identity: Identity) -> bytes | CommandError:
        """A Session: all of it for its streamer, for others without the other viewers."""
        session = await self._session(session_id)
        if isinstance(session, CommandError):
            return session
        return msgspec.json.encode(_seen_by(session, identity.user_id))

    async def end_session(self, session_id: str, identity: Identity) -> bytes | CommandError:
        """Ends the caller's Session: a live show is finished, invitations are declined."""
        session = await self._session(session_id)
        if isinstance(session, CommandError):
            return session
        if session.user.id != identity.user_id or identity.role is Role.VIEWER:
            return CommandError.of(ErrorCode.FORBIDDEN, "This session is another streamer's.")
        try:
            show_id = await self._goals.show_goal_id(session_id)
            if show_id is not None:
                finish = Finish(goal_id=show_id)
                reply = await self.execute(finish, identity)
                if reply.error is not None and reply.error.retryable:
                    return reply.error
            ended, deliveries = await self._sessions.end(session)
        except (StoreOverloaded, StoreUnavailable) as error:
            return _not_now(error)
        await self._deliverer.after_commit(Done({}, session_id, deliveries))
        await self._deliverer.stream_changed(identity.user_id)
        reached(Step.BEFORE_REPLY, CommandName.CLOSE)
        return msgspec.json.encode(session_view(ended))

    async def session_token(self, session_id: str, identity: Identity) -> bytes | CommandError:
        """The cached session-token view: the caller's pass for the media server.

        Without Redis every view is made anew: slower, never stale.
        """
        generation: str | None = None
        try:
            view, generation = await self._passes.read(session_id, identity.user_id)
            if view is not None and has_time_left(view, self._clock.now()):
                return view
        except BrokerUnavailable as error:
            _log.warning("pass_cache_unavailable", why=str(error))
        session = await self._session(session_id)
        if isinstance(session, CommandError):
            return session
        claims = pass_of(session, identity.user_id, self._clock.now(), self._room_pass_s)
        if isinstance(claims, CommandError):
            return claims
        view = msgspec.json.encode(signed(claims, self._pass_secret))
        if generation is not None:
            try:
                await self._passes.store(session_id, identity.user_id, view, generation)
            except BrokerUnavailable as error:
                _log.warning("pass_cache_unavailable", why=str(error))
        return view

    async def stream_is_live(self, streamer_id: str) -> bool:
        """Whether a streamer has a live Session.

        Raises:
            StoreUnavailable: MongoDB did not answer in time.
        """
        return await self._sessions.live_session_of(streamer_id) is not None

    async def _session(self, session_id: str) -> Session | CommandError:
        try:
            session = await self._sessions.session(session_id)
        except (StoreOverloaded, StoreUnavailable) as error:
            return _not_now(error)
        return session or CommandError.of(ErrorCode.UNKNOWN_SESSION)


def _intent(name: CommandName, command: GoalCommand, identity: Identity) -> Intent:
    terms = None
    goal_id = None
    if isinstance(command, Invite):
        terms = Terms(command.session_id, command.prepaid_duration, command.amount)
    else:
        goal_id = command.goal_id
    return Intent(
        command=name,
        role=identity.role,
        user_id=identity.user_id,
        goal_id=goal_id,
        terms=terms,
        client_id=identity.client_id,
        request_id=command.request_id,
    )


def _error(refused: Refused) -> CommandError:
    code = code_of(refused.code)
    return CommandError(code, refused.message, ERRORS[code].retryable)


def _not_now(error: StoreOverloaded | StoreUnavailable) -> CommandError:
    overloaded = isinstance(error, StoreOverloaded)
    return CommandError.of(ErrorCode.OVERLOADED if overloaded else ErrorCode.UNAVAILABLE)


def _parties(goal: Goal) -> tuple[str, str]:
    return goal.metadata.user_id, goal.conditions.exclusive_to


def _seen_by(session: Session, user_id: str) -> dict[str, Any]:
    view = session_view(session)
    if user_id != session.user.id:
        for name in ("exclusive_goal_pairs", "viewers"):
            view[name] = {key: value for key, value in view[name].items() if key == user_id}
    return view
