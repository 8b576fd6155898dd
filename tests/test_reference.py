from __future__ import annotations

import re

import pytest

from gateway import channel_auth, probes, rest
from gateway.pusher_api import _ROUTES
from tests import reference

DOCS = reference.PAGE.parent
ROUTES = [*rest.routes(""), *channel_auth.routes(""), *probes.routes("")]


def test_the_page_is_what_the_code_says() -> None:
    assert reference.PAGE.read_text() == reference.page(), "run: python -m tests.reference"


@pytest.mark.parametrize("path", sorted({re.sub(r"{\w+}", "{id}", one.path) for one in ROUTES}))
def test_every_route_is_documented(path: str) -> None:
    text = (DOCS / "protocol.md").read_text()

    assert re.search(rf"[ `]{re.escape(path)}`", text)


@pytest.mark.parametrize("address", sorted(_ROUTES))
def test_every_route_of_the_pusher_api_is_documented(address: str) -> None:
    path = f"/apps/{{id}}/{address}"
    pattern = re.escape(path).replace(r"\*", r"{\w+}")

    assert re.search(rf" {pattern}[`?]", (DOCS / "backends.md").read_text())


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    pages = [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if not link.startswith("http")
    ]

    assert links
    assert [(page.name, to) for page, to in links if not (page.parent / to).exists()] == []
