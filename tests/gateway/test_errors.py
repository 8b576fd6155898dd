from __future__ import annotations

import http

import msgspec
import pytest

from gateway.errors import (
    DISCONNECTS,
    ERRORS,
    CloseCode,
    Code,
    CommandError,
    ErrorCode,
    Notice,
    code_of,
)
from statemachine.goal import RejectionCode


@pytest.mark.parametrize("code", list(RejectionCode))
def test_every_rejection_of_the_state_machine_is_in_the_table(code: RejectionCode) -> None:
    assert CommandError.of(code).code is code
    assert code_of(code.value) is code


def test_no_code_means_two_things() -> None:
    assert not {code.value for code in ErrorCode} & {code.value for code in RejectionCode}


@pytest.mark.parametrize("code", list(ERRORS))
def test_every_code_has_a_status_and_a_sentence(code: Code) -> None:
    spec = ERRORS[code]

    assert 400 <= http.HTTPStatus(spec.http_status) < 600
    assert spec.sentence.endswith(".")
    assert spec.sentence[0].isupper()


@pytest.mark.parametrize("code", list(ERRORS))
def test_only_what_may_change_by_itself_is_retryable(code: Code) -> None:
    spec = ERRORS[code]

    assert spec.retryable == (spec.http_status in {408, 429, 500, 503, 504})


def test_an_error_says_the_more_exact_sentence_when_there_is_one() -> None:
    general = CommandError.of(ErrorCode.UNKNOWN_GOAL)
    exact = CommandError.of(ErrorCode.UNKNOWN_GOAL, "No goal 5.")

    assert general.message == ERRORS[ErrorCode.UNKNOWN_GOAL].sentence
    assert exact.message == "No goal 5."
    assert exact.http_status == 404


def test_on_the_wire_an_error_is_code_message_and_retryable() -> None:
    error = CommandError.of(ErrorCode.UNAVAILABLE, "Later.")

    assert msgspec.json.decode(msgspec.json.encode(error)) == {
        "code": "unavailable",
        "message": "Later.",
        "retryable": True,
    }


@pytest.mark.parametrize("code", list(CloseCode))
def test_every_close_code_has_a_reason_that_fits_a_close_frame(code: CloseCode) -> None:
    disconnect = DISCONNECTS[code]

    assert disconnect.code == code
    assert 0 < len(disconnect.reason.encode()) <= 123


def test_no_close_code_is_one_at_which_pusher_js_would_stop_for_a_notice() -> None:
    assert not {int(code) for code in CloseCode} & {int(notice) for notice in Notice}
