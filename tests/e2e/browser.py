"""A real headless Chromium, driven over the Chrome DevTools Protocol: no library in between.

Only what the page's tests need: open a page, press keys, click, wait for something to become
true, take a picture, and know of every error the page reported.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from websockets.asyncio.client import ClientConnection, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 20.0
WAIT_TIMEOUT_S = 15.0

# Background networking off: a test machine's network may be closed, and the page must not need it.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)

KEYS = {
    "Tab": {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9},
    "Enter": {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Space": {"key": " ", "code": "Space", "windowsVirtualKeyCode": 32, "text": " "},
}
SHIFT = 8


def chromium_path() -> str | None:
    """The Chromium on PATH, if there is one."""
    return next((found for name in CHROMIUM_NAMES if (found := shutil.which(name))), None)


class PageError(AssertionError):
    """The page refused an expression, or what was waited for did not become true."""


class _Link:
    """One DevTools connection: commands with their answers, events to whoever listens."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listeners: list[Any] = []
        self._last_id = 0
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        await self._socket.close()
        await self._reader

    def listen(self, listener: Any) -> None:
        self._listeners.append(listener)

    def unlisten(self, listener: Any) -> None:
        self._listeners.remove(listener)

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[self._last_id] = answer
        await self._socket.send(json.dumps(message))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            reply = await answer
        if "error" in reply:
            raise PageError(f"{method}: {reply['error']['message']}")
        return reply.get("result", {})

    async def _read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                answer = self._answers.pop(message["id"])
                if not answer.done():
                    answer.set_result(message)
                continue
            for listener in [*self._listeners]:
                listener(message)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PageError("Chromium ended"))


class Page:
    """One tab in a browser context of its own: its storage is shared with nobody.

    Attributes:
        complaints: Every uncaught exception, console error and failed request, as text.
        requested: Every address that the page asked for.
    """

    def __init__(self, link: _Link, session: str) -> None:
        self._link = link
        self._session = session
        self.complaints: list[str] = []
        self.requested: list[str] = []
        link.listen(self._heard)

    @classmethod
    async def create(cls, link: _Link, context: str) -> Self:
        target = await link.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await link.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        page = cls(link, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page._call(f"{domain}.enable")
        # Focus behaves as in the window in front, however many tabs there are.
        await page._call("Emulation.setFocusEmulationEnabled", enabled=True)
        return page

    async def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        await self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    async def prefer(self, **features: str) -> None:
        """Sets media features, e.g. `prefers_color_scheme="dark"`."""
        await self._call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
            ],
        )

    async def open(self, url: str) -> None:
        await self._load("Page.navigate", url=url)

    async def reload(self) -> None:
        await self._load("Page.reload")

    async def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a promise is awaited."""
        reply = await self._call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in reply:
            details = reply["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            raise PageError(f"{expression}\n{text}")
        return reply["result"].get("value")

    async def wait_for(self, condition: str, timeout_s: float = WAIT_TIMEOUT_S) -> Any:
        """Waits until an expression is truthy, looking whenever the document changes."""
        found = await self.evaluate(f"""
            new Promise((resolve) => {{
              const now = () => {{ try {{ return {condition}; }} catch {{ return null; }} }};
              const look = () => {{
                const value = now();
                if (!value) return;
                observer.disconnect();
                clearTimeout(timer);
                resolve({{ value: value instanceof Node ? true : value }});
              }};
              const observer = new MutationObserver(look);
              const timer = setTimeout(() => {{ observer.disconnect(); resolve(null); }},
                {timeout_s * 1000});
              observer.observe(document, {{
                subtree: true, childList: true, attributes: true, characterData: true,
              }});
              look();
            }})
        """)
        if found is None:
            raise PageError(f"not true within {timeout_s} s: {condition}")
        return found["value"]

    async def click(self, selector: str) -> None:
        """Clicks the middle of an element with the mouse, once it can be seen."""
        quoted = json.dumps(selector)
        await self.wait_for(f"document.querySelector({quoted})?.checkVisibility()")
        x, y = await self.evaluate(f"""(() => {{
            const element = document.querySelector({quoted});
            element.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            await self._call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def press(self, key: str, *, shift: bool = False) -> None:
        details = KEYS[key]
        modifiers = SHIFT if shift else 0
        await self._call(
            "Input.dispatchKeyEvent",
            type="keyDown" if "text" in details else "rawKeyDown",
            modifiers=modifiers,
            **details,
        )
        released = {name: value for name, value in details.items() if name != "text"}
        await self._call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **released)

    async def type_over(self, selector: str, text: str) -> None:
        """Replaces what is in a field, as a person who selects all of it and types."""
        await self.evaluate(
            f"(({{ select }} = {{}}) => {{ const field = document.querySelector("
            f"{json.dumps(selector)}); field.focus(); field.select(); }})()"
        )
        await self._call("Input.insertText", text=text)

    async def picture(self, path: Path, *, full: bool = False) -> None:
        """Writes a PNG of what is visible, or of the whole page."""
        shot = await self._call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))

    async def _load(self, method: str, **params: Any) -> None:
        loaded = asyncio.Event()

        def listener(message: dict[str, Any]) -> None:
            if (
                message.get("sessionId") == self._session
                and message["method"] == "Page.loadEventFired"
            ):
                loaded.set()

        self._link.listen(listener)
        try:
            await self._call(method, **params)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await loaded.wait()
        finally:
            self._link.unlisten(listener)

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._link.call(method, self._session, **params)

    def _heard(self, message: dict[str, Any]) -> None:
        if message.get("sessionId") != self._session:
            return
        params = message["params"]
        match message["method"]:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                text = details.get("exception", {}).get("description", details["text"])
                self.complaints.append(text)
            case "Runtime.consoleAPICalled" if params["type"] in {"error", "warning", "assert"}:
                values = [str(arg.get("value", arg.get("description"))) for arg in params["args"]]
                self.complaints.append(" ".join(values))
            case "Log.entryAdded" if params["entry"]["level"] in {"error", "warning"}:
                entry = params["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
            case "Network.webSocketCreated":
                self.requested.append(params["url"])


class Browser:
    """A Chromium process with a profile of its own."""

    def __init__(self, process: Process, link: _Link) -> None:
        self._process = process
        self._link = link

    @classmethod
    @asynccontextmanager
    async def launch(cls, profile: Path) -> AsyncIterator[Self]:
        """Starts Chromium; at the end it is gone, with all its tabs.

        Args:
            profile: An empty directory for what it writes.
        """
        executable = chromium_path()
        if executable is None:
            raise PageError("no Chromium on PATH")
        process = await create_subprocess_exec(
            executable,
            *FLAGS,
            f"--user-data-dir={profile}",
            "about:blank",
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                address = await _debugging_address(process)
            assert process.stderr is not None
            drain = asyncio.create_task(process.stderr.read())
            socket = await connect(address, max_size=None, compression=None)
            link = _Link(socket)
            try:
                yield cls(process, link)
            finally:
                await link.call("Browser.close")
                await link.close()
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await process.wait()
                await drain
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    @asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A new tab, closed after the block: an open one would go on reconnecting."""
        context = (await self._link.call("Target.createBrowserContext"))["browserContextId"]
        try:
            yield await Page.create(self._link, context)
        finally:
            await self._link.call("Target.disposeBrowserContext", browserContextId=context)


async def _debugging_address(process: Process) -> str:
    """Reads where Chromium listens, which it says on standard error."""
    assert process.stderr is not None
    async for line in process.stderr:
        _, found, address = line.decode(errors="replace").partition("DevTools listening on ")
        if found:
            return address.strip()
    raise PageError("Chromium ended before it listened")
