"""pusher-js as browsers run it: the web build and the worker build, by every transport."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from persistence.embedded_process import free_port
from tests.conftest import require
from tests.e2e.books import Books
from tests.e2e.browser import Browser, chromium_path
from tests.e2e.browser_app import BrowserApp, page_server
from tests.e2e.node_process import CLIENTS_INSTALLED
from tests.e2e.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.e2e.gateway_process import Gateway

# One Chromium for all tests of this file, so one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

# Together more than one stream carries.
PARTS = 40
PART_BYTES = 9_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    require(chromium_path(), "there is no Chromium on PATH")
    require(CLIENTS_INSTALLED, "the clients from npm are not installed (make npm)")
    async with Browser.launch(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with page_server() as address:
        yield address


@pytest_asyncio.fixture(loop_scope="module")
async def stage(shared_gateway: Gateway) -> AsyncIterator[Stage]:
    async with Books(shared_gateway.stores) as books, Stage(shared_gateway, books) as stage:
        yield stage


@asynccontextmanager
async def viewer_app(browser: Browser, stage: Stage) -> AsyncIterator[BrowserApp]:
    """A viewer's app, not yet connected; whatever it does, the page complains of nothing."""
    async with browser.page() as page:
        yield BrowserApp(page, stage.gateway, stage.user("viewer"), "viewer")
        assert page.complaints == []


@pytest.mark.pusher("clients", "pusher-js in a browser: web and worker build, every transport")
@pytest.mark.parametrize(
    ("worker", "transport"),
    [
        (False, "ws"),
        (False, "xhr_streaming"),
        (False, "xhr_polling"),
        (True, "ws"),
        (True, "xhr_streaming"),
    ],
    ids=["ws", "xhr_streaming", "xhr_polling", "worker-ws", "worker-xhr_streaming"],
)
async def test_an_app_subscribes_hears_and_commands(
    browser: Browser, address: str, stage: Stage, worker: bool, transport: str
) -> None:
    await stage.open_session(stage.user("streamer"))
    async with viewer_app(browser, stage) as app:
        connected = await app.connect(address, transports=[transport], worker=worker)
        assert connected["transport"] == transport
        await app.subscribe(app.own_channel)
        await app.expect(kind="event", event="goal.snapshot")
        other = await stage.socket("viewer", "viewer")

        data = {"text": "Grüße 🎭"}
        await stage.gateway.publish([app.own_channel], "headline", data)
        await app.order("trigger", channel=app.own_channel, event="client-of-app", data={"n": 2})
        invitation = {"request_id": "r-1", **stage.terms()}
        await app.order(
            "trigger", channel=app.own_channel, event="client-goal.invite", data=invitation
        )

        assert (await app.expect(kind="event", event="headline"))["data"] == data
        assert (await other.expect("client-of-app")).data == {"n": 2}
        reply = await app.expect(kind="event", event="goal.reply")
        assert reply["data"]["ok"] is True
        await other.send("client-to-app", {"n": 1}, app.own_channel)
        assert (await app.expect(kind="event", event="client-to-app"))["data"] == {"n": 1}


@pytest.mark.pusher("1.10", "a stream is opened anew after 256 KiB and nothing is lost")
async def test_pusher_js_loses_nothing_when_it_opens_its_next_stream(
    browser: Browser, address: str, stage: Stage
) -> None:
    async with viewer_app(browser, stage) as app:
        await app.connect(address, transports=["xhr_streaming"])
        channel = stage.user("news")
        await app.subscribe(channel)

        for number in range(PARTS):
            data = {"number": number, "text": "x" * PART_BYTES}
            answer = await stage.gateway.publish([channel], "part", data)
            assert answer.status_code == 200

        numbers: list[Any] = []
        for _ in range(PARTS):
            part = await app.expect(kind="event", event="part")
            numbers.append(part["data"]["number"])
        assert numbers == list(range(PARTS))
        opened = [url for url in app.page.requested if "/xhr_streaming?" in url]
        assert len(opened) >= 2


@pytest.mark.pusher("1.10", "a client whose WebSockets are killed falls back by itself")
async def test_an_app_without_websockets_gets_through_all_the_same(
    browser: Browser, address: str, stage: Stage
) -> None:
    async with browser.page() as page:
        app = BrowserApp(page, stage.gateway, stage.user("viewer"), "viewer")

        connected = await app.connect(
            address, transports=["ws", "xhr_streaming", "xhr_polling"], ws_port=free_port()
        )

        assert connected["transport"] == "xhr_streaming"
        await app.subscribe(app.own_channel)
        assert all("WebSocket connection" in complaint for complaint in page.complaints)


@pytest.mark.pusher("1.10", "a refused session is told the close code of a socket")
@pytest.mark.parametrize("transport", ["ws", "xhr_streaming", "xhr_polling"])
async def test_an_app_with_a_wrong_key_is_told_and_stops(
    browser: Browser, address: str, stage: Stage, transport: str
) -> None:
    async with viewer_app(browser, stage) as app:
        await app.begin(address, transports=[transport], key="no-such-key")

        assert (await app.expect(kind="error"))["code"] == 4001
        await app.expect(kind="state", state="disconnected")
