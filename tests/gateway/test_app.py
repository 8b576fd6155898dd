from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gateway.app import GatewayApp, origins_pattern
from gateway.apps import App, Apps
from gateway.settings import Settings
from gateway.wiring import StartError


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["example.com"], "https://example.com", True),
        (["example.com"], "http://example.com:8080", True),
        (["example.com"], "https://example.com.evil.org", False),
        (["example.com"], "https://notexample.com", False),
        (["example.com"], "https://sub.example.com", False),
        (["example.com"], "https://exampleXcom", False),
        (["example.com:443"], "https://example.com:8443", False),
        (["localhost:3000"], "http://localhost:3000", True),
        (["*.example.com"], "https://a.b.example.com", True),
        (["*.example.com"], "https://example.com", False),
        (["*.example.com"], "https://evil.org/.example.com", False),
        (["a.com", "b.com"], "https://b.com", True),
        (["a.com"], "null", False),
        (["a.com"], "ftp://a.com", False),
    ],
)
def test_an_apps_origins_are_hosts(origins: list[str], origin: str, allowed: bool) -> None:
    assert (re.fullmatch(origins_pattern(origins), origin) is not None) is allowed


def app_for(**changes: Any) -> GatewayApp:
    return GatewayApp(Settings(), Apps([App(id="1", key="k", secret="s", **changes)]))


async def call(
    app: GatewayApp, sent: list[dict[str, Any]] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """The ASGI messages that answer one call, without a server."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/healthz",
        "query_string": b"",
        "headers": [],
        "state": {},
    } | changes
    messages = [] if sent is None else sent

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    await app(scope, receive, send)
    return messages


def headers_of(messages: list[dict[str, Any]]) -> dict[bytes, bytes]:
    return dict(messages[0]["headers"])


async def test_a_page_of_an_origin_that_the_app_does_not_allow_is_not_let_in() -> None:
    app = app_for(origins=("shop.example",))

    ours = await call(app, headers=[(b"origin", b"https://shop.example")])
    theirs = await call(app, headers=[(b"origin", b"https://evil.example")])

    assert headers_of(ours)[b"access-control-allow-origin"] == b"https://shop.example"
    assert b"access-control-allow-origin" not in headers_of(theirs)


async def test_a_fault_of_ours_is_a_problem_document_without_its_cause() -> None:
    sent: list[dict[str, Any]] = []

    # Without the parts that `/readyz` asks, nothing can be answered.
    with pytest.raises(KeyError):
        await call(app_for(), sent, path="/readyz")

    document = json.loads(sent[1]["body"])
    assert (sent[0]["status"], document["code"]) == (500, "internal")
    assert "parts" not in document["detail"]


async def test_before_it_runs_it_has_no_parts() -> None:
    with pytest.raises(StartError, match="not running"):
        _ = app_for().parts


async def test_with_a_prefix_every_path_begins_with_it() -> None:
    app = GatewayApp(Settings(path_prefix="/duet"), Apps([App(id="1", key="k", secret="s")]))

    inside = await call(app, path="/duet/healthz")
    outside = await call(app, path="/healthz")

    assert inside[0]["status"] == 200
    assert outside[0]["status"] == 404
    assert json.loads(outside[1]["body"])["code"] == "not_found"
