"""The demo page in a real Chromium, against a real gateway."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import pytest_asyncio

from gateway.apps import DEMO_APP, Apps
from gateway.broker import Publication
from gateway.demo_page import page_routes
from gateway.frames import push_body
from gateway.server import running_gateway
from gateway.settings import DEMO_JWT_SECRET, Settings
from tests.conftest import require
from tests.e2e.browser import Browser, chromium_path
from tests.e2e.demo_stage import PEOPLE, STREAMER, DemoPage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from gateway.server import RunningGateway

# One Chromium for all tests of this file, so one event loop; each test has its own gateway and tab.
pytestmark = pytest.mark.asyncio(loop_scope="module")

PRIVATE_STREAM = "private-stream@nova"
PRESENCE_STREAM = "presence-stream@nova"


def private_user(user: str) -> str:
    return f"private-user@{user}"


def preview(viewer: str) -> str:
    return f"presence-stream-viewer@nova.preview.{viewer}"


class GatewayBuilder(Protocol):
    def __call__(self, **settings: Any) -> AbstractAsyncContextManager[RunningGateway]: ...


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    require(chromium_path(), "there is no Chromium on PATH")
    async with Browser.launch(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def gateway_with(
    mongodb_url: str, mongodb_database_name: str, redis_url: str, redis_prefix: str
) -> GatewayBuilder:
    """Runs gateways as `duet demo` does, on stores of this test alone."""

    @asynccontextmanager
    async def build(**overrides: Any) -> AsyncIterator[RunningGateway]:
        settings = Settings(
            **{
                "port": 0,
                "mongodb_url": mongodb_url,
                "mongodb_database": mongodb_database_name,
                "redis_url": redis_url,
                "redis_prefix": redis_prefix,
                "jwt_secret": DEMO_JWT_SECRET,
                "drain_s": 0,
                **overrides,
            }
        )
        routes = page_routes(settings)
        async with running_gateway(settings, Apps([DEMO_APP]), routes=routes) as gateway:
            yield gateway

    return build


@asynccontextmanager
async def opened(browser: Browser, gateway: RunningGateway) -> AsyncIterator[DemoPage]:
    """The page in a tab of its own; whatever a test does, it complains of nothing."""
    async with browser.page() as page:
        demo = DemoPage(page)
        await page.resize(1440, 1000)
        await page.open(f"{gateway.url}/")
        await demo.ready()
        yield demo
        assert page.complaints == []


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(gateway_with: GatewayBuilder) -> AsyncIterator[RunningGateway]:
    async with gateway_with() as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def demo(browser: Browser, gateway: RunningGateway) -> AsyncIterator[DemoPage]:
    async with opened(browser, gateway) as demo:
        yield demo


async def heard_by_all(demo: DemoPage, gateway: RunningGateway) -> None:
    """Waits until everything published so far has reached every panel."""
    channels = {user: private_user(user) for user in PEOPLE}
    await gateway.parts.node.publish(
        [
            Publication(DEMO_APP.id, channel, push_body("test.marker", channel, {}))
            for channel in channels.values()
        ]
    )
    for user, channel in channels.items():
        await demo.waits_for(user, Counter({("test.marker", channel): 1}))


async def test_each_panel_shows_exactly_the_events_of_its_socket(
    demo: DemoPage, gateway: RunningGateway
) -> None:
    await demo.go_live()
    await demo.invite("alice")
    await demo.act(STREAMER, "agree")
    await demo.sees("alice", ".goal[data-state=agreed]")
    await demo.act(STREAMER, "start")
    await demo.sees("alice", ".goal[data-state=live]")
    await demo.act("alice", "finish")

    of_all = Counter(
        {
            ("goal.ended", PRESENCE_STREAM): 2,  # the invitation's, and the show's
            ("exclusive.started", PRESENCE_STREAM): 1,
            ("exclusive.ended", PRESENCE_STREAM): 1,
        }
    )
    expected = {
        "nova": of_all
        + Counter(
            {
                ("goal.snapshot", private_user("nova")): 1,
                ("goal.reply", private_user("nova")): 2,
                ("goal.added", private_user("nova")): 1,
                ("goal.added", PRIVATE_STREAM): 1,
                ("goal.ended", private_user("nova")): 2,
                ("goal.ended", PRIVATE_STREAM): 2,
                ("exclusive.started", PRIVATE_STREAM): 1,
                ("exclusive.ended", PRIVATE_STREAM): 1,
            }
        ),
        "alice": of_all
        + Counter(
            {
                ("goal.snapshot", private_user("alice")): 1,
                ("goal.reply", private_user("alice")): 2,
                ("escrow.held", private_user("alice")): 1,
                ("escrow.captured", private_user("alice")): 1,
                # Authorized by the agreement, and again with the room when the show is over.
                ("stream.authorized", preview("alice")): 2,
            }
        ),
        "bruno": of_all
        + Counter(
            {
                ("goal.snapshot", private_user("bruno")): 1,
                ("stream.authorized", preview("bruno")): 1,
            }
        ),
    }
    for user, seen in expected.items():
        await demo.waits_for(user, seen)
    await heard_by_all(demo, gateway)
    for user, seen in expected.items():
        marker = Counter({("test.marker", private_user(user)): 1})
        assert await demo.seen_by(user) == seen + marker, user


async def test_a_finished_show_is_paid_and_everyone_reads_so(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.reads("alice", "Nova is live")
    await demo.invite("alice", "25.00")
    await demo.figure("alice", "open", "25.00")
    await demo.reads("alice", "Waiting for Nova")
    await demo.reads("nova", "Alice invites you for 25.00")
    await demo.act(STREAMER, "agree")
    await demo.reads("alice", "Nova agreed")
    await demo.sees("alice", ".clock")
    await demo.act(STREAMER, "start")
    await demo.reads("alice", "is live")
    await demo.reads("bruno", "private show with another viewer")
    await demo.figure("alice", "captured", "25.00")
    await demo.act(STREAMER, "finish")

    await demo.reads("nova", "You earned 25.00")
    await demo.reads("alice", "25.00 went to Nova")
    await demo.reads("bruno", "Nova is live")
    await demo.sees("alice", ".invite")
    await demo.figure("alice", "open", "0.00")
    await demo.figure("", "captured", "25.00")
    await demo.balanced()


async def test_a_declined_invitation_gives_the_money_back(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.invite("bruno", "12.34")
    await demo.act(STREAMER, "disagree")

    await demo.reads("bruno", "declined. 12.34 came back to you")
    await demo.reads("nova", "Bruno: declined")
    await demo.figure("bruno", "released", "12.34")
    await demo.figure("bruno", "open", "0.00")
    await demo.balanced()


async def test_a_viewer_takes_an_invitation_back(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.invite("alice", "1000.5")
    await demo.act("alice", "withdraw")

    await demo.reads("alice", "withdrawn. 1,000.50 came back to you")
    await demo.reads("nova", "Alice: withdrawn")
    await demo.sees_no(STREAMER, "[data-action=agree]")
    await demo.figure("alice", "released", "1,000.50")
    await demo.balanced()


async def test_of_two_invitations_one_is_agreed_and_the_other_superseded(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.invite("alice", "25.00")
    await demo.invite("bruno", "40.00")
    await demo.reads("nova", "2 invitations wait")
    await demo.act(STREAMER, "agree", viewer="bruno")

    await demo.reads("bruno", "Nova agreed")
    await demo.reads("alice", "superseded. 25.00 came back to you")
    await demo.figure("alice", "released", "25.00")
    await demo.figure("bruno", "open", "40.00")
    await demo.figure("", "held", "65.00")
    await demo.balanced()
    authorized = await demo.seen_by("bruno")
    assert authorized["stream.authorized", preview("bruno")] == 1
    assert not [event for event, _ in await demo.seen_by("alice") if event == "stream.authorized"]


async def test_ending_the_stream_declines_what_was_not_answered(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.invite("alice")
    await demo.click(STREAMER, "[data-part=endStream]")

    await demo.reads("nova", "You are off air")
    await demo.reads("alice", "Nova is off air")
    await demo.sees("alice", ".goal[data-state=ended]")
    await demo.sees_no("alice", ".invite")
    await demo.figure("alice", "released", "25.00")
    await demo.balanced()


async def test_an_invitation_runs_out_by_the_gateways_clock(
    browser: Browser, gateway_with: GatewayBuilder
) -> None:
    """Though the page's estimate of that clock is seconds late, as after a snapshot that was."""
    late = "import('/clock.js').then((clock) => clock.setGatewayClock(Date.now() - 3000))"
    async with gateway_with(invitation_ttl_s=1.0) as gateway, opened(browser, gateway) as demo:
        await demo.go_live()
        await demo.page.evaluate(late)
        await demo.invite("alice")

        await demo.reads("alice", "expired. 25.00 came back to you")
        await demo.reads("nova", "Alice: expired")
        since = await demo.page.evaluate(
            "document.querySelector('#panel-alice [data-event=\"goal.ended\"] .since').textContent"
        )
        assert since == "after the deadline"


async def test_what_is_never_started_is_refunded_though_no_event_tells_the_streamer(
    browser: Browser, gateway_with: GatewayBuilder
) -> None:
    async with gateway_with(refund_delay_s=0.5) as gateway, opened(browser, gateway) as demo:
        await demo.go_live()
        await demo.invite("alice")
        await demo.act(STREAMER, "agree")

        await demo.reads("alice", "not started. 25.00 came back to you")
        await demo.reads("nova", "Alice: not started")
        await demo.balanced()


async def test_a_reload_restores_open_and_ended_goals(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.invite("bruno", "40.00")
    await demo.act(STREAMER, "disagree")
    await demo.figure("bruno", "released", "40.00")
    await demo.invite("alice", "25.00")
    await demo.act(STREAMER, "agree")
    await demo.sees("alice", ".goal[data-state=agreed]")

    await demo.page.reload()
    await demo.ready()

    await demo.sees("alice", ".goal[data-state=agreed] .clock")
    await demo.sees(STREAMER, "[data-action=start]")
    await demo.reads("bruno", "declined. 40.00 came back to you")
    await demo.figure("alice", "open", "25.00")
    await demo.figure("", "held", "65.00")
    await demo.balanced()
    await demo.act(STREAMER, "start")
    await demo.reads("alice", "Your private show with Nova is live")


async def test_a_second_tab_knows_the_open_goals_from_the_snapshot_alone(
    browser: Browser, gateway: RunningGateway, demo: DemoPage
) -> None:
    await demo.go_live()
    await demo.invite("alice")

    async with opened(browser, gateway) as second:
        await second.sees("alice", ".goal[data-state=invited]")
        await second.act(STREAMER, "agree")
        await demo.reads("alice", "Nova agreed")
        await demo.sees(STREAMER, "[data-action=start]")


async def test_who_was_away_learns_how_it_ended(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.invite("alice")
    await demo.click("alice", "[data-part=toggle]")
    await demo.sees("alice", "[data-part=connection][data-state=offline]")
    await demo.act(STREAMER, "disagree")
    await demo.reads("nova", "Alice: declined")
    await demo.reads("alice", "may be out of date")
    await demo.sees("alice", ".goal[data-state=invited]")
    await demo.act("alice", "withdraw")
    await demo.sees("alice", ".goal [data-part=goalError]")

    await demo.click("alice", "[data-part=toggle]")

    await demo.reads("alice", "declined. 25.00 came back to you")
    await demo.figure("alice", "released", "25.00")
    await demo.balanced()


async def test_the_page_comes_back_by_itself_when_the_gateway_does(
    browser: Browser, gateway_with: GatewayBuilder
) -> None:
    async with AsyncExitStack() as tab:
        async with gateway_with() as gateway:
            port = gateway.port
            demo = await tab.enter_async_context(opened(browser, gateway))
            await demo.go_live()
            await demo.invite("alice")
        await demo.sees("alice", "[data-part=connection]:not([data-state=connected])")

        async with gateway_with(port=port):
            for user in PEOPLE:
                await demo.sees(user, "[data-part=connection][data-state=connected]")
                await demo.waits_for(user, Counter({("goal.snapshot", private_user(user)): 2}))
            await demo.act(STREAMER, "agree")
            await demo.reads("alice", "Nova agreed")
            # The browser itself reports each attempt while nobody listened; all else is a fault.
            demo.page.complaints[:] = [
                text for text in demo.page.complaints if "ERR_CONNECTION_REFUSED" not in text
            ]
            await tab.aclose()


async def test_what_the_gateway_refuses_is_told_beside_the_form(demo: DemoPage) -> None:
    await demo.go_live()
    await demo.page.type_over("#panel-alice [data-part=amount]", "0")
    await demo.click("alice", "[data-part=invite]")

    await demo.sees("alice", "[data-part=inviteError]")
    await demo.waits_for("alice", Counter({("goal.reply", private_user("alice")): 1}))
    await demo.sees_no("bruno", "[data-part=inviteError]")
    await demo.page.type_over("#panel-alice [data-part=amount]", "many")
    await demo.click("alice", "[data-part=invite]")
    await demo.sees("alice", "[data-part=amount][aria-invalid=true]")
    assert (await demo.focused())["part"] == "amount"
    await demo.invite("alice", "25.00")
    await demo.sees_no("alice", "[data-part=inviteError]")


async def test_data_is_shown_as_text_and_never_as_markup(
    demo: DemoPage, gateway: RunningGateway
) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\">"
    channel = private_user("alice")

    await gateway.parts.node.publish(
        [Publication(DEMO_APP.id, channel, push_body(evil, channel, {"text": evil}))]
    )
    await demo.page.wait_for(
        "document.querySelector('#panel-alice .entry .name').textContent.includes('<img')"
    )

    found = await demo.page.evaluate("[document.images.length, document.title]")
    assert found == [0, "Duet demo"]


async def test_everything_can_be_done_from_the_keyboard(demo: DemoPage) -> None:
    async def tab_to(user: str, *, back: bool = False, **wanted: str) -> None:
        for _ in range(60):
            await demo.page.press("Tab", shift=back)
            focused = await demo.focused()
            if focused["user"] == user and wanted.items() <= focused.items():
                assert focused["ring"], f"no visible focus on {focused}"
                return
        raise AssertionError(f"the keyboard does not reach {wanted} of {user}")

    await tab_to("nova", part="goLive")
    await demo.page.press("Enter")
    await demo.sees("alice", ".invite")
    await tab_to("alice", part="amount")
    await tab_to("alice", part="invite")
    await demo.page.press("Enter")
    await demo.sees("alice", ".goal[data-state=invited]")
    await demo.page.wait_for("document.activeElement.matches('#panel-alice .goal')")
    await demo.sees(STREAMER, "[data-action=agree]")
    await tab_to("nova", back=True, action="agree")
    await demo.page.press("Space")
    # The pressed button is gone; its card has the focus, and the next one is one key away.
    await demo.page.wait_for("document.activeElement.matches('#panel-nova .goal')")
    await tab_to("nova", action="start")
    await demo.page.press("Enter")
    await demo.sees(STREAMER, "[data-action=finish]")
    await tab_to("nova", action="finish")
    await demo.page.press("Enter")
    await demo.reads("nova", "You earned 25.00")


async def test_the_page_asks_nobody_but_its_gateway(
    demo: DemoPage, gateway: RunningGateway
) -> None:
    await demo.go_live()
    await demo.invite("alice")

    ours = (gateway.url, gateway.ws_url)
    assert [address for address in demo.page.requested if not address.startswith(ours)] == []


async def populated(demo: DemoPage) -> None:
    """A page with one of each: cards, an error, an open event, open channels."""
    await demo.go_live()
    await demo.invite("alice", "25.00")
    await demo.invite("bruno", "40.00")
    await demo.act(STREAMER, "agree", viewer="alice")
    await demo.reads("bruno", "superseded")
    await demo.act(STREAMER, "start")
    await demo.sees("alice", ".goal[data-state=live]")
    await demo.page.type_over("#panel-bruno [data-part=amount]", "0")
    await demo.click("bruno", "[data-part=invite]")
    await demo.sees("bruno", "[data-part=inviteError]")
    await demo.page.evaluate(
        "document.querySelectorAll('.channels, .entry:first-child details')"
        ".forEach((details) => { details.open = true; })"
    )


async def test_nothing_sticks_out_sideways_at_any_width(demo: DemoPage) -> None:
    await populated(demo)

    found = {}
    for width in (320, 390, 700, 820, 1080, 1440):
        await demo.page.resize(width, 900, mobile=width < 700)
        found[width] = await demo.page.evaluate("""(() => {
            const width = document.documentElement.clientWidth;
            const out = [...document.querySelectorAll("body *")]
              .filter((element) => element.checkVisibility() && !element.closest("pre, .skip"))
              .filter((element) => element.getBoundingClientRect().right > width + 0.5)
              .map((element) => element.outerHTML.slice(0, 120));
            return [width, document.documentElement.scrollWidth, out];
        })()""")

    assert found == {width: [width, width, []] for width in found}


async def test_panels_are_stacked_on_a_phone_and_side_by_side_on_a_desktop(demo: DemoPage) -> None:
    boxes = """[...document.querySelectorAll(".panel")].map((panel) => {
        const { left, right, top, bottom } = panel.getBoundingClientRect();
        return [left, right, top, bottom];
    })"""

    await demo.page.resize(390, 844, mobile=True)
    phone = await demo.page.evaluate(boxes)
    await demo.page.resize(1440, 1000)
    desktop = await demo.page.evaluate(boxes)

    assert len(phone) == 3
    assert all(above[3] < below[2] for above, below in itertools.pairwise(phone))
    assert all(before[1] < after[0] for before, after in itertools.pairwise(desktop))
    assert len({top for _, _, top, _ in desktop}) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_has_the_contrast_of_wcag_aa(demo: DemoPage, scheme: str) -> None:
    # Without motion no colour is caught half-way.
    await demo.page.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    await populated(demo)

    measured = await demo.page.evaluate(_CONTRASTS)

    assert len(measured) > 80
    assert [found for found in measured if found["ratio"] < found["needs"]] == []


async def test_who_wants_less_motion_gets_none(demo: DemoPage) -> None:
    await populated(demo)
    moving = await demo.page.evaluate("document.getAnimations().length")

    await demo.page.prefer(prefers_reduced_motion="reduce")

    assert moving > 0
    await demo.page.wait_for("document.getAnimations().length === 0")


async def test_every_control_has_a_name_and_every_panel_tells_its_state_aloud(
    demo: DemoPage,
) -> None:
    await populated(demo)

    nameless = await demo.page.evaluate("""
        [...document.querySelectorAll("button, input, a, summary, [tabindex='0']")]
          .filter((element) => element.checkVisibility())
          .filter((element) => !(element.getAttribute("aria-label") || element.textContent.trim()
            || element.labels?.[0]?.textContent.trim() || element.getAttribute("aria-labelledby")))
          .map((element) => element.outerHTML)
    """)
    live = await demo.page.evaluate(
        "[...document.querySelectorAll('.panel [role=status][aria-live=polite]')].length"
    )

    assert nameless == []
    assert live == 3


# The contrast of every element that has text of its own, by WCAG 2's formula.
_CONTRASTS = """(() => {
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r, g, b].map((c, i) => c * a + [R, G, B][i] * (1 - a));
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => {
      const c = value / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll("body *")]
    .filter((element) => element.checkVisibility({ opacityProperty: true }))
    .filter((element) => element.matches("input") || [...element.childNodes].some(
      (node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim() !== ""))
    .map((element) => {
      const style = getComputedStyle(element);
      const below = ground(element);
      const text = luminance(over(parse(style.color), below));
      const [light, dark] = [text, luminance(below)].sort((a, b) => b - a);
      const large = parseFloat(style.fontSize) >= 24;
      return {
        text: (element.matches("input") ? element.value : element.textContent).trim().slice(0, 40),
        ratio: (light + 0.05) / (dark + 0.05),
        needs: large ? 3 : 4.5,
      };
    });
})()"""
