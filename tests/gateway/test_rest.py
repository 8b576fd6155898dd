from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from gateway.errors import ErrorCode
from persistence.errors import StoreDamaged, StoreUnavailable
from statemachine.goal import RejectionCode

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from gateway.errors import Code
    from gateway.server import RunningGateway
    from gateway.settings import Settings
    from persistence.documents import Goal
    from persistence.errors import StoreError
    from persistence.intents import Answer, Intent

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNKNOWN = "0123456789abcdef01234567"


class Stage:
    """A streamer who is live, and a viewer, calling over HTTP."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        bearer: Callable[..., dict[str, str]],
        user: Callable[[str], str],
    ) -> None:
        self.http = http
        self.ada = bearer(user("ada"), "streamer", client_id="studio")
        self.bob = bearer(user("bob"), "viewer", client_id="ios")
        self.eve = bearer(user("eve"), "viewer")
        self.streamer_id, self.viewer_id = user("ada"), user("bob")

    async def session(self) -> str:
        answer = await self.http.post("/sessions", json={}, headers=self.ada)
        assert answer.status_code in {200, 201}, answer.text
        return answer.json()["id"]

    async def invitation(self, **changes: Any) -> dict[str, Any]:
        answer = await self.invite(await self.session(), **changes)
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def invite(self, session_id: str, /, **changes: Any) -> httpx.Response:
        terms = {"session_id": session_id, "prepaid_duration": 60, "amount": 500} | changes
        return await self.http.post("/goals", json=terms, headers=self.bob)

    async def answer(self, goal_id: str, agree: object, **headers: str) -> httpx.Response:
        return await self.http.request(
            "DELETE", f"/goals/{goal_id}", json={"agree": agree}, headers=self.ada | headers
        )


@pytest.fixture
def stage(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]], user: Callable[[str], str]
) -> Stage:
    return Stage(http, bearer, user)


def fail_commands(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, fault: StoreError
) -> None:
    """Every command fails from here on."""

    async def fail(_intent: Intent) -> Answer:
        raise fault

    monkeypatch.setattr(gateway.parts.commands._goals, "execute", fail)


def assert_problem(answer: httpx.Response, code: Code, status: int) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert (problem["code"], problem["status"], answer.status_code) == (code, status, status)
    assert problem["type"] == "about:blank"
    assert problem["title"]
    assert problem["detail"]
    assert isinstance(problem["retryable"], bool)
    return problem


class TestGoals:
    async def test_a_viewer_invites_and_reads_the_goal_under_the_requirements_names(
        self, stage: Stage
    ) -> None:
        goal = await stage.invitation()

        read = await stage.http.get(f"/goals/{goal['id']}", headers=stage.bob)

        assert read.json() == goal
        assert goal["_cls"] == "TriggerExclusiveGoal"
        assert goal["metadata"]["user_id"] == stage.streamer_id
        assert goal["conditions"]["exclusive_to"] == stage.viewer_id
        assert goal["breakdown"] == {stage.viewer_id: 500}
        assert goal["active"] is True

    async def test_the_streamer_agrees_with_delete_as_in_the_requirements(
        self, stage: Stage
    ) -> None:
        goal = await stage.invitation()

        agreed = await stage.answer(goal["id"], agree=True)

        assert agreed.status_code == 200
        assert agreed.json()["state"] == "agreed"
        assert agreed.json()["active"] is False
        assert agreed.json()["triggerer"] == "studio"
        assert agreed.json()["metadata"]["agreed"]

    async def test_a_token_without_client_id_acts_through_the_invitations_app(
        self, stage: Stage, bearer: Callable[..., dict[str, str]]
    ) -> None:
        goal = await stage.invitation()
        nameless = bearer(stage.streamer_id, "streamer")

        agreed = await stage.answer(goal["id"], agree=True, **nameless)

        assert agreed.json()["triggerer"] == "app-key"

    async def test_the_streamer_disagrees(self, stage: Stage) -> None:
        goal = await stage.invitation()

        declined = await stage.answer(goal["id"], agree=False)

        assert declined.json()["reason"] == "disagreed"
        assert "agreed" not in declined.json()["metadata"]

    async def test_who_loses_is_told_the_state_that_he_lost_to(self, stage: Stage) -> None:
        goal = await stage.invitation()
        await stage.answer(goal["id"], agree=True)

        late = await stage.answer(goal["id"], agree=False)

        problem = assert_problem(late, RejectionCode.GOAL_ALREADY_AGREED, 409)
        assert problem["goal"]["state"] == "agreed"

    async def test_the_same_idempotency_key_gives_the_same_answer_and_no_second_effect(
        self, stage: Stage
    ) -> None:
        goal = await stage.invitation()
        key = {"Idempotency-Key": "r-1"}

        first = await stage.answer(goal["id"], agree=True, **key)
        second = await stage.answer(goal["id"], agree=True, **key)

        assert first.status_code == second.status_code == 200
        assert first.json() == second.json()

    async def test_an_idempotency_key_is_not_used_for_another_command(self, stage: Stage) -> None:
        goal = await stage.invitation()
        key = {"Idempotency-Key": "r-1"}
        await stage.answer(goal["id"], agree=True, **key)

        other = await stage.answer(goal["id"], agree=False, **key)

        assert_problem(other, ErrorCode.REQUEST_ID_REUSED, 409)

    @pytest.mark.parametrize("key", ["", "x" * 65])
    async def test_an_idempotency_key_has_1_to_64_characters(self, stage: Stage, key: str) -> None:
        answer = await stage.answer(UNKNOWN, agree=True, **{"Idempotency-Key": key})

        assert_problem(answer, ErrorCode.BAD_REQUEST_ID, 400)

    @pytest.mark.parametrize("request_id", ["", "x" * 65])
    async def test_a_request_id_in_the_body_has_1_to_64_characters_too(
        self, stage: Stage, request_id: str
    ) -> None:
        wanted = {"session_id": UNKNOWN, "prepaid_duration": 60, "amount": 100}

        answer = await stage.http.post(
            "/goals", json=wanted | {"request_id": request_id}, headers=stage.bob
        )

        assert_problem(answer, ErrorCode.BAD_REQUEST_ID, 400)

    async def test_the_viewer_withdraws(self, stage: Stage) -> None:
        goal = await stage.invitation()

        answer = await stage.http.post(f"/goals/{goal['id']}/withdraw", headers=stage.bob)

        assert answer.status_code == 200
        assert answer.json()["reason"] == "withdrawn"

    async def test_with_a_viewers_token_a_streamer_neither_answers_nor_ends(
        self, stage: Stage, bearer: Callable[..., dict[str, str]]
    ) -> None:
        goal = await stage.invitation()
        viewing = bearer(stage.streamer_id, "viewer")

        agreed = await stage.answer(goal["id"], agree=True, **viewing)
        path = f"/sessions/{goal['conditions']['session_id']}"
        ended = await stage.http.delete(path, headers=viewing)

        assert_problem(agreed, RejectionCode.WRONG_ROLE, 403)
        assert_problem(ended, ErrorCode.FORBIDDEN, 403)

    async def test_a_viewer_can_not_agree(self, stage: Stage) -> None:
        goal = await stage.invitation()

        answer = await stage.http.request(
            "DELETE", f"/goals/{goal['id']}", json={"agree": True}, headers=stage.bob
        )

        assert_problem(answer, RejectionCode.WRONG_ROLE, 403)

    async def test_another_streamer_can_not_agree(
        self, stage: Stage, bearer: Callable[..., dict[str, str]], user: Callable[[str], str]
    ) -> None:
        goal = await stage.invitation()

        answer = await stage.http.request(
            "DELETE",
            f"/goals/{goal['id']}",
            json={"agree": True},
            headers=bearer(user("mallory"), "streamer"),
        )

        assert_problem(answer, RejectionCode.NOT_YOUR_GOAL, 403)

    async def test_a_stranger_can_not_read_a_goal(self, stage: Stage) -> None:
        goal = await stage.invitation()

        answer = await stage.http.get(f"/goals/{goal['id']}", headers=stage.eve)

        assert_problem(answer, RejectionCode.NOT_YOUR_GOAL, 403)

    @pytest.mark.parametrize(
        "goal_id", [UNKNOWN, "5", "x" * 24, "a.b", "$where", "%00", UNKNOWN + "0"]
    )
    async def test_an_id_that_is_no_goals_is_unknown(self, stage: Stage, goal_id: str) -> None:
        answers = [
            await stage.http.get(f"/goals/{goal_id}", headers=stage.bob),
            await stage.http.post(f"/goals/{goal_id}/withdraw", headers=stage.bob),
            await stage.answer(goal_id, agree=True),
        ]

        for answer in answers:
            assert_problem(answer, ErrorCode.UNKNOWN_GOAL, 404)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b"[]",
            b"null",
            b'{"agree": "true"}',
            b'{"agree": 1}',
            b'{"agree": null}',
            b'{"agree"',
            b"\xff",
            b'{"agree": "\xff"}',
        ],
    )
    async def test_agree_must_be_true_or_false(self, stage: Stage, body: bytes) -> None:
        headers = stage.ada | {"Content-Type": "application/json"}

        answer = await stage.http.request(
            "DELETE", f"/goals/{UNKNOWN}", content=body, headers=headers
        )

        assert_problem(answer, ErrorCode.MALFORMED, 400)

    @pytest.mark.parametrize(
        "changes",
        [
            {"amount": "500"},
            {"amount": 5.5},
            {"amount": None},
            {"prepaid_duration": "60"},
            {"session_id": 5},
        ],
    )
    async def test_an_invitation_of_the_wrong_types_is_malformed(
        self, stage: Stage, changes: dict[str, Any]
    ) -> None:
        answer = await stage.invite(await stage.session(), **changes)

        assert_problem(answer, ErrorCode.MALFORMED, 400)

    @pytest.mark.parametrize("amount", [0, -1, 10**12])
    async def test_an_absurd_amount_is_refused(self, stage: Stage, amount: int) -> None:
        answer = await stage.invite(await stage.session(), amount=amount)

        assert_problem(answer, RejectionCode.AMOUNT_OUT_OF_RANGE, 422)

    async def test_an_invitation_to_no_session_is_refused(self, stage: Stage) -> None:
        for session_id in (UNKNOWN, "a.b", "$x"):
            answer = await stage.invite(session_id)

            assert_problem(answer, ErrorCode.UNKNOWN_SESSION, 404)

    @pytest.mark.parametrize(
        ("fault", "code", "status"),
        [
            (StoreDamaged("the ledger has it already"), ErrorCode.INTERNAL, 500),
            (StoreUnavailable("no answer"), ErrorCode.UNAVAILABLE, 503),
        ],
    )
    async def test_damaged_books_are_told_from_a_database_that_does_not_answer(
        self,
        stage: Stage,
        gateway: RunningGateway,
        monkeypatch: pytest.MonkeyPatch,
        fault: StoreError,
        code: ErrorCode,
        status: int,
    ) -> None:
        goal = await stage.invitation()
        fail_commands(gateway, monkeypatch, fault)

        answer = await stage.answer(goal["id"], agree=True)

        assert_problem(answer, code, status)

    async def test_a_snapshot_says_that_it_is_as_of_before_it_was_read(
        self, stage: Stage, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It once was as of an instant by which it knew of less than had been committed."""
        clock, goals = gateway.parts.clock, gateway.parts.commands._goals
        read, read_at = goals.open_goals, clock.now()

        async def and_a_second_later(user_id: str) -> list[Goal]:
            found = await read(user_id)
            clock.shift(1)
            return found

        monkeypatch.setattr(goals, "open_goals", and_a_second_later)
        try:
            snapshot = json.loads(await gateway.parts.commands.snapshot(stage.viewer_id))
        finally:
            clock.shift(-1)

        as_of = datetime.fromisoformat(snapshot["as_of"])
        assert read_at <= as_of < read_at + timedelta(seconds=1)


class TestSessions:
    async def test_a_streamer_goes_live_once(self, stage: Stage) -> None:
        first = await stage.http.post("/sessions", json={}, headers=stage.ada)
        again = await stage.http.post("/sessions", headers=stage.ada)

        assert first.status_code == 201
        assert again.status_code == 200
        assert first.json()["id"] == again.json()["id"]
        assert first.json()["user"] == {"id": stage.streamer_id}

    async def test_a_session_of_no_json_is_malformed(self, stage: Stage) -> None:
        for body in (b"[]", b'{"rtc_sources": "\xff"}', b'{"rtc_sources": ' + b"[" * 5_000):
            answer = await stage.http.post("/sessions", content=body, headers=stage.ada)

            assert_problem(answer, ErrorCode.MALFORMED, 400)

    @pytest.mark.parametrize(
        "sources", ["[18446744073709551616]", '[{"a\\u0000": 1}]', "[" * 34 + "]" * 34]
    )
    async def test_sources_that_mongodb_could_not_keep_are_malformed(
        self, stage: Stage, sources: str
    ) -> None:
        body = f'{{"rtc_sources": {sources}}}'
        answer = await stage.http.post("/sessions", content=body, headers=stage.ada)

        problem = assert_problem(answer, ErrorCode.MALFORMED, 400)
        assert "rtc_sources" in problem["detail"]

    async def test_sources_are_kept_as_they_came(self, stage: Stage) -> None:
        sources = [{"$set": {"a.b": [None, 2**63 - 1, -(2**63), 1.5, "é"]}}]
        nested: list[Any] = []
        for _ in range(30):
            nested = [nested]

        created = await stage.http.post(
            "/sessions", json={"rtc_sources": [*sources, nested]}, headers=stage.ada
        )

        assert created.status_code == 201
        read = await stage.http.get(f"/sessions/{created.json()['id']}", headers=stage.ada)
        assert read.json()["rtc_sources"] == [*sources, nested]

    async def test_a_viewer_can_not_go_live(self, stage: Stage) -> None:
        answer = await stage.http.post("/sessions", json={}, headers=stage.bob)

        assert_problem(answer, RejectionCode.WRONG_ROLE, 403)

    async def test_the_streamer_ends_the_session(self, stage: Stage) -> None:
        session_id = await stage.session()

        ended = await stage.http.delete(f"/sessions/{session_id}", headers=stage.ada)
        invited = await stage.invite(session_id)

        assert ended.status_code == 200
        assert ended.json()["active"] is False
        assert_problem(invited, RejectionCode.SESSION_ENDED, 409)

    async def test_nobody_else_ends_it(self, stage: Stage) -> None:
        session_id = await stage.session()

        answer = await stage.http.delete(f"/sessions/{session_id}", headers=stage.bob)

        assert_problem(answer, ErrorCode.FORBIDDEN, 403)

    async def test_a_viewer_gets_a_signed_pass_that_nobody_caches(self, stage: Stage) -> None:
        session_id = await stage.session()

        answer = await stage.http.get(f"/sessions/{session_id}/token", headers=stage.bob)

        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert {"token", "nbf", "duration", "exp"} <= answer.json().keys()

    async def test_a_cached_pass_is_made_anew_when_half_of_its_time_is_over(
        self,
        stage: Stage,
        gateway: RunningGateway,
        settings: Settings,
        bearer: Callable[..., dict[str, str]],
    ) -> None:
        path = f"/sessions/{await stage.session()}/token"
        half_s = settings.room_pass_s / 2
        first = (await stage.http.get(path, headers=stage.bob)).json()

        gateway.parts.clock.shift(half_s)
        try:
            later = bearer(stage.viewer_id, "viewer")
            second = (await stage.http.get(path, headers=later)).json()
        finally:
            gateway.parts.clock.shift(-half_s)

        assert second["nbf"] >= first["nbf"] + half_s

    @pytest.mark.parametrize("session_id", [UNKNOWN, "5", "a.b", "$where"])
    async def test_an_id_that_is_no_sessions_is_unknown(
        self, stage: Stage, session_id: str
    ) -> None:
        path = f"/sessions/{session_id}"
        answers = [
            await stage.http.get(path, headers=stage.ada),
            await stage.http.delete(path, headers=stage.ada),
            await stage.http.get(f"{path}/token", headers=stage.ada),
            await stage.http.post(f"{path}/exclusive", headers=stage.ada),
        ]

        for answer in answers:
            assert_problem(answer, ErrorCode.UNKNOWN_SESSION, 404)


class TestShows:
    async def test_a_stream_whose_show_can_not_be_finished_now_goes_on(
        self, stage: Stage, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        goal = await stage.invitation()
        path = f"/sessions/{goal['conditions']['session_id']}"
        await stage.answer(goal["id"], agree=True)
        started = await stage.http.post(
            f"{path}/exclusive", json={"goal_id": goal["id"]}, headers=stage.ada
        )
        assert started.status_code == 200, started.text
        with monkeypatch.context() as unavailable:
            fail_commands(gateway, unavailable, StoreUnavailable("no answer"))

            refused = await stage.http.delete(path, headers=stage.ada)

        assert_problem(refused, ErrorCode.UNAVAILABLE, 503)
        assert (await stage.http.get(path, headers=stage.ada)).json()["active"] is True
        ended = await stage.http.delete(path, headers=stage.ada)
        assert (ended.status_code, ended.json()["active"]) == (200, False)

    async def test_the_agreed_show_starts_and_finishes_without_naming_the_goal(
        self, stage: Stage
    ) -> None:
        goal = await stage.invitation()
        await stage.answer(goal["id"], agree=True)
        path = f"/sessions/{goal['conditions']['session_id']}/exclusive"

        started = await stage.http.post(path, headers=stage.ada)
        finished = await stage.http.delete(path, headers=stage.bob)

        assert (started.status_code, started.json()["state"]) == (200, "live")
        assert started.json()["id"] == finished.json()["id"] == goal["id"]
        assert (finished.json()["state"], finished.json()["outcome"]) == ("ended", "captured")

    async def test_a_shows_sources_are_kept_on_its_goal_as_they_came(self, stage: Stage) -> None:
        # A media server's SSRC has 32 bits, which MongoDB keeps as an integer of 64.
        sources = [{"ssrc": 4_000_000_000}]
        await stage.http.post("/sessions", json={"rtc_sources": sources}, headers=stage.ada)
        goal = await stage.invitation()
        await stage.answer(goal["id"], agree=True)
        path = f"/sessions/{goal['conditions']['session_id']}/exclusive"
        started = await stage.http.post(path, headers=stage.ada)

        finished = await stage.http.delete(path, headers=stage.bob)

        assert finished.status_code == 200
        show = await stage.http.get(f"/goals/{started.json()['exclusive_goal']}", headers=stage.bob)
        assert show.json()["rtc_sources"] == sources

    async def test_the_goal_can_be_named(self, stage: Stage) -> None:
        goal = await stage.invitation()
        await stage.answer(goal["id"], agree=True)
        path = f"/sessions/{goal['conditions']['session_id']}/exclusive"

        started = await stage.http.post(path, json={"goal_id": goal["id"]}, headers=stage.ada)

        assert started.json()["state"] == "live"

    async def test_nothing_agreed_nothing_to_start(self, stage: Stage) -> None:
        goal = await stage.invitation()
        path = f"/sessions/{goal['conditions']['session_id']}/exclusive"

        unnamed = await stage.http.post(path, headers=stage.ada)
        named = await stage.http.post(path, json={"goal_id": goal["id"]}, headers=stage.ada)
        unknown = await stage.http.post(path, json={"goal_id": "x"}, headers=stage.ada)

        assert_problem(unnamed, RejectionCode.GOAL_NOT_AGREED, 409)
        assert_problem(named, RejectionCode.GOAL_NOT_AGREED, 409)
        assert_problem(unknown, ErrorCode.UNKNOWN_GOAL, 404)


class TestTheEdge:
    async def test_no_address_is_a_problem_document(self, stage: Stage) -> None:
        assert_problem(await stage.http.get("/nothing"), ErrorCode.NOT_FOUND, 404)

    async def test_another_method_is_told_which_are_allowed(self, stage: Stage) -> None:
        answer = await stage.http.put("/goals", headers=stage.bob)

        assert_problem(answer, ErrorCode.METHOD_NOT_ALLOWED, 405)
        assert answer.headers["allow"] == "POST"

    async def test_a_body_over_the_limit_is_not_read_on(self, stage: Stage) -> None:
        async def endless() -> Any:
            for _ in range(10_000):
                yield b" " * 65_536

        announced = await stage.http.post("/goals", content=b" " * 300_000, headers=stage.bob)
        chunked = await stage.http.post("/goals", content=endless(), headers=stage.bob)

        assert_problem(announced, ErrorCode.BODY_TOO_LARGE, 413)
        assert_problem(chunked, ErrorCode.BODY_TOO_LARGE, 413)

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
    )
    async def test_a_body_that_says_it_is_no_json_is_refused(self, stage: Stage, kind: str) -> None:
        answer = await stage.http.post(
            "/goals", content=b"{}", headers=stage.bob | {"Content-Type": kind}
        )

        assert_problem(answer, ErrorCode.UNSUPPORTED_MEDIA_TYPE, 415)

    async def test_a_page_of_another_origin_may_call_with_a_token(self, stage: Stage) -> None:
        asked = await stage.http.options(
            f"/goals/{UNKNOWN}",
            headers={
                "Origin": "https://shop.example",
                "Access-Control-Request-Method": "DELETE",
                "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
            },
        )
        called = await stage.http.get(
            f"/goals/{UNKNOWN}", headers=stage.bob | {"Origin": "https://shop.example"}
        )

        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "*"
        assert "idempotency-key" in asked.headers["access-control-allow-headers"].lower()
        assert called.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in called.headers

    async def test_without_a_server_name_or_a_framework_in_the_headers(self, stage: Stage) -> None:
        assert "server" not in (await stage.http.get("/healthz")).headers
