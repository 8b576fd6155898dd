"""Goals and Sessions over HTTP: the same commands as on the socket, by the same path.

Every call carries a bearer JWT. An `Idempotency-Key` header (1-64 characters) is the command's
`request_id`: sent again, it gives the same answer and no second effect.

Source: docs/protocol.md; requirements (`DELETE /goals/{goal_id}`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from gateway.bearer import JSON_TYPE, RefusedError, decode, json_body, owned
from gateway.commands import (
    REQUEST_ID_MAX,
    Agree,
    Disagree,
    Finish,
    Invite,
    Start,
    Withdraw,
)
from gateway.errors import CommandError, ErrorCode
from gateway.parts import parts_of
from gateway.problem import header, problem
from statemachine.goal import RejectionCode

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.auth import Identity
    from gateway.commands import GoalCommand

_ID: Final = re.compile(r"[0-9a-f]{24}", re.ASCII)


class Decision(msgspec.Struct, frozen=True):
    """The body of `DELETE /goals/{id}`: the requirements' `agree`."""

    agree: bool


class Show(msgspec.Struct, frozen=True):
    """The body of `POST` and `DELETE /sessions/{id}/exclusive`."""

    goal_id: str | None = None


class _Pair(msgspec.Struct, frozen=True):
    """What is read here of one of a Session's `exclusive_goal_pairs`."""

    trigger_exclusive_goal: str
    trigger_exclusive_goal_agreed: str | None = None
    exclusive_goal_ended: Any = None


class _Session(msgspec.Struct, frozen=True):
    exclusive_goal_pairs: dict[str, _Pair]


def routes(prefix: str) -> list[Route]:
    """The addresses of goals and Sessions."""
    goal, session = f"{prefix}/goals/{{goal_id}}", f"{prefix}/sessions/{{session_id}}"
    return [
        Route(f"{prefix}/goals", invite, methods=["POST"]),
        Route(goal, read_goal, methods=["GET"]),
        Route(goal, answer_goal, methods=["DELETE"]),
        Route(f"{goal}/withdraw", withdraw, methods=["POST"]),
        Route(f"{prefix}/sessions", create_session, methods=["POST"]),
        Route(session, read_session, methods=["GET"]),
        Route(session, end_session, methods=["DELETE"]),
        Route(f"{session}/token", session_token, methods=["GET"]),
        Route(f"{session}/exclusive", start_show, methods=["POST"]),
        Route(f"{session}/exclusive", finish_show, methods=["DELETE"]),
    ]


@owned
async def invite(request: Request, identity: Identity) -> Response:
    """A viewer invites: 201 with the goal."""
    wanted = decode(await json_body(request), Invite)
    request_id = _request_id(request) or _checked(wanted.request_id, "A request_id")
    command = msgspec.structs.replace(wanted, request_id=request_id)
    return await _execute(request, identity, command, 201)


@owned
async def read_goal(request: Request, identity: Identity) -> Response:
    """The goal, for its two parties."""
    goals = parts_of(request.scope).commands
    return _answer(await goals.goal_json(_goal_id(request), identity))


@owned
async def answer_goal(request: Request, identity: Identity) -> Response:
    """The streamer agrees or disagrees: 200 with the goal."""
    kind = Agree if decode(await json_body(request), Decision).agree else Disagree
    command = kind(request_id=_request_id(request), goal_id=_goal_id(request))
    return await _execute(request, identity, command)


@owned
async def withdraw(request: Request, identity: Identity) -> Response:
    """The viewer takes the invitation back: 200 with the goal."""
    command = Withdraw(request_id=_request_id(request), goal_id=_goal_id(request))
    return await _execute(request, identity, command)


@owned
async def create_session(request: Request, identity: Identity) -> Response:
    """A streamer goes live: 201 with the Session, 200 when it is live already."""
    body = await json_body(request)
    created = await parts_of(request.scope).commands.create_session(identity, body)
    if isinstance(created, CommandError):
        return problem(created)
    status, session = created
    return _json(session, status)


@owned
async def read_session(request: Request, identity: Identity) -> Response:
    """The Session."""
    commands = parts_of(request.scope).commands
    return _answer(await commands.session_json(_session_id(request), identity))


@owned
async def end_session(request: Request, identity: Identity) -> Response:
    """The streamer ends the stream; open invitations are declined."""
    commands = parts_of(request.scope).commands
    return _answer(await commands.end_session(_session_id(request), identity))


@owned
async def session_token(request: Request, identity: Identity) -> Response:
    """The caller's signed pass for the media server, from the cached view."""
    commands = parts_of(request.scope).commands
    return _answer(await commands.session_token(_session_id(request), identity))


@owned
async def start_show(request: Request, identity: Identity) -> Response:
    """The streamer starts the private show: 200 with the goal, whose escrow is captured."""
    goal_id = await _show_goal(request, identity)
    command = Start(request_id=_request_id(request), goal_id=goal_id)
    return await _execute(request, identity, command)


@owned
async def finish_show(request: Request, identity: Identity) -> Response:
    """Either party ends the private show: 200 with the goal."""
    goal_id = await _show_goal(request, identity)
    command = Finish(request_id=_request_id(request), goal_id=goal_id)
    return await _execute(request, identity, command)


async def _show_goal(request: Request, identity: Identity) -> str:
    """The goal that the body names, else the one that the Session's streamer agreed to last.

    Raises:
        RefusedError: There is no such Session, or nothing was agreed in it.
    """
    session_id = _session_id(request)
    named = decode(await json_body(request), Show).goal_id
    if named is not None:
        if not _ID.fullmatch(named):
            raise RefusedError(ErrorCode.UNKNOWN_GOAL)
        return named
    found = await parts_of(request.scope).commands.session_json(session_id, identity)
    if isinstance(found, CommandError):
        raise RefusedError(found.code, found.message)
    pairs = msgspec.json.decode(found, type=_Session).exclusive_goal_pairs.values()
    agreed = [
        (pair.trigger_exclusive_goal_agreed, pair.trigger_exclusive_goal)
        for pair in pairs
        if pair.trigger_exclusive_goal_agreed and not pair.exclusive_goal_ended
    ]
    if not agreed:
        raise RefusedError(
            RejectionCode.GOAL_NOT_AGREED, "Nothing has been agreed in this session."
        )
    return max(agreed)[1]


async def _execute(
    request: Request, identity: Identity, command: GoalCommand, status: int = 200
) -> Response:
    reply = await parts_of(request.scope).commands.execute(command, identity)
    if reply.error is not None:
        return problem(reply.error, reply.goal_json)
    return _json(reply.goal_json or b"null", status)


def _request_id(request: Request) -> str | None:
    return _checked(header(request.scope, b"idempotency-key"), "An Idempotency-Key")


def _checked(request_id: str | None, called: str) -> str | None:
    if request_id is not None and not 1 <= len(request_id) <= REQUEST_ID_MAX:
        message = f"{called} has 1 to {REQUEST_ID_MAX} characters."
        raise RefusedError(ErrorCode.BAD_REQUEST_ID, message)
    return request_id


def _goal_id(request: Request) -> str:
    return _id(request.path_params["goal_id"], ErrorCode.UNKNOWN_GOAL)


def _session_id(request: Request) -> str:
    return _id(request.path_params["session_id"], ErrorCode.UNKNOWN_SESSION)


def _id(text: str, otherwise: ErrorCode) -> str:
    """An id as MongoDB writes it; whatever is none can't be the id of anything."""
    if not _ID.fullmatch(text.lower()):
        raise RefusedError(otherwise)
    return text.lower()


def _answer(found: bytes | CommandError) -> Response:
    return problem(found) if isinstance(found, CommandError) else _json(found)


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, {"Cache-Control": "no-store"}, JSON_TYPE)
