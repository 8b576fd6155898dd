"""The demo page in a tab: what a person does on it, and what it shows them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.e2e.browser import Page

STREAMER = "nova"
VIEWERS = ("alice", "bruno")
PEOPLE = (STREAMER, *VIEWERS)

Seen = Counter[tuple[str, str]]

# Every entry of a panel's timeline as [event, channel, times], protocol frames aside.
_SEEN = """
[...document.querySelectorAll(`#panel-${user} .entry[data-protocol="false"]`)].flatMap((entry) =>
  [...entry.querySelectorAll("[data-channel]")].map((item) => {
    return [entry.dataset.event, item.dataset.channel, Number(item.dataset.times ?? 1)];
  }))
"""


@dataclass(frozen=True, slots=True)
class DemoPage:
    """The page, in the words of those who use it."""

    page: Page

    async def ready(self) -> None:
        """Waits until all three are connected and know their open goals."""
        for user in PEOPLE:
            await self.sees(
                user, f"[data-event='goal.snapshot'] [data-channel='private-user@{user}']"
            )

    async def sees(self, user: str, selector: str) -> None:
        """Waits until a person's panel shows an element."""
        quoted = json.dumps(f"#panel-{user} {selector}")
        await self.page.wait_for(f"document.querySelector({quoted})?.checkVisibility()")

    async def sees_no(self, user: str, selector: str) -> None:
        """Waits until a person's panel shows no such element."""
        quoted = json.dumps(f"#panel-{user} {selector}")
        await self.page.wait_for(f"!document.querySelector({quoted})?.checkVisibility()")

    async def reads(self, user: str, text: str) -> None:
        """Waits until a panel says this where it says how things stand."""
        selector = json.dumps(f"#panel-{user} [data-part=status]")
        await self.page.wait_for(
            f"document.querySelector({selector})?.textContent.includes({json.dumps(text)})"
        )

    async def click(self, user: str, selector: str) -> None:
        await self.page.click(f"#panel-{user} {selector}")

    async def act(self, user: str, action: str, *, viewer: str | None = None) -> None:
        """Presses a button of a goal's card; `viewer` says whose when there are several."""
        card = "" if viewer is None else f".goal[aria-label^='{viewer.capitalize()}'] "
        await self.click(user, f"{card}[data-action={action}]")

    async def go_live(self) -> None:
        await self.click(STREAMER, "[data-part=goLive]")
        for user in PEOPLE:
            await self.sees_subscribed(user, f"presence-stream@{STREAMER}")

    async def sees_subscribed(self, user: str, channel: str) -> None:
        selector = f"#panel-{user} .channels [data-channel='{channel}'][data-state=subscribed]"
        await self.page.wait_for(f"document.querySelector({json.dumps(selector)})")

    async def invite(self, viewer: str, amount: str = "25.00") -> None:
        """Invites, and waits until the streamer's panel has the card."""
        await self.page.type_over(f"#panel-{viewer} [data-part=amount]", amount)
        await self.click(viewer, "[data-part=invite]")
        await self.sees(STREAMER, f".goal[data-state=invited][aria-label^='{viewer.capitalize()}']")
        await self.sees(viewer, ".goal[data-state=invited]")

    async def seen_by(self, user: str) -> Seen:
        """How often which event came to a panel's socket on which channel."""
        found = await self.page.evaluate(f"((user) => {_SEEN})({json.dumps(user)})")
        seen: Seen = Counter()
        for event, channel, times in found:
            seen[event, channel] += times
        return seen

    async def waits_for(self, user: str, wanted: Seen) -> None:
        """Waits until a panel has received at least all of this."""
        pairs = json.dumps([[event, channel, times] for (event, channel), times in wanted.items()])
        await self.page.wait_for(
            f"""((user) => {{
                const seen = {_SEEN};
                return {pairs}.every(([event, channel, times]) => times <= seen
                  .filter(([e, c]) => e === event && c === channel)
                  .reduce((sum, [, , n]) => sum + n, 0));
            }})({json.dumps(user)})"""
        )

    async def figure(self, viewer: str, name: str, amount: str) -> None:
        """Waits until the ledger below the panels says this; no viewer is the sum."""
        selector = json.dumps(f"#books tr[data-user='{viewer}'] [data-figure={name}]")
        await self.page.wait_for(f"document.querySelector({selector})?.textContent === '{amount}'")

    async def balanced(self) -> None:
        await self.page.wait_for(
            "document.getElementById('books-balance').textContent === 'Balanced'"
        )

    async def focused(self) -> dict[str, Any]:
        """What the keyboard is on."""
        found: dict[str, Any] = await self.page.evaluate("""(() => {
            const element = document.activeElement;
            const style = getComputedStyle(element);
            return {
              text: element.textContent.trim(),
              part: element.dataset.part ?? null,
              action: element.dataset.action ?? null,
              user: element.closest(".panel")?.dataset.user ?? null,
              goal: element.dataset.goal ?? null,
              ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
            };
        })()""")
        return found
