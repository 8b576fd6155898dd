"""Takes the README's picture of the running demo page: an agreed show that is live.

duet demo --port 6001 &
python -m tests.e2e.demo_picture http://127.0.0.1:6001/ docs/images/demo.png
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.e2e.browser import Browser
from tests.e2e.demo_stage import PEOPLE, STREAMER, DemoPage


async def take(url: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        async with Browser.launch(Path(profile)) as browser, browser.page() as page:
            demo = DemoPage(page)
            # Without motion nothing is caught half-way.
            await page.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
            await page.resize(1440, 1000)
            await page.open(url)
            await demo.ready()
            await demo.go_live()
            await demo.invite("alice", "25.00")
            await demo.invite("bruno", "40.00")
            await demo.act(STREAMER, "agree", viewer="alice")
            await demo.reads("bruno", "superseded")
            await demo.act(STREAMER, "start")
            for user in PEOPLE:
                await demo.sees(user, "[data-event='exclusive.started']")
            await demo.figure("alice", "captured", "25.00")
            await demo.sees(STREAMER, ".goal[data-state=ended]")
            await page.evaluate("scrollTo(0, 0)")
            await page.picture(target, full=True)
            await demo.act(STREAMER, "finish")
            await demo.click(STREAMER, "[data-part=endStream]")
            await demo.reads(STREAMER, "You are off air")


if __name__ == "__main__":
    asyncio.run(take(sys.argv[1], Path(sys.argv[2])))
