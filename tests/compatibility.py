"""The table of `docs/pusher-compatibility.md`, made from the marks of the tests.

`python -m tests.compatibility` writes it. A test with `@pytest.mark.pusher(section, behaviour)`
proves that behaviour; several may prove one. Sections are numbered as in the comments of the code.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pusher-compatibility.md"
BEGIN = "<!-- The rest is generated: python -m tests.compatibility -->\n"

SECTIONS = {
    "clients": "Unmodified clients",
    "1.1": "Connecting",
    "1.2": "How `data` is encoded",
    "1.3": "Events",
    "1.4": "Liveness",
    "1.5": "Signatures",
    "1.6": "Channels",
    "1.7": "Client events",
    "1.8": "Users, watchlists, authorized connections",
    "1.9": "Close codes",
    "1.10": "HTTP fallbacks",
    "2.1": "HTTP API: signatures",
    "2.2": "HTTP API: routes",
    "2.3": "Webhooks",
}


class Proof(NamedTuple):
    """A test and the behaviour that it proves."""

    section: str
    behaviour: str
    path: str
    test: str


class MarkError(Exception):
    """A mark that can't be put into the table."""


def proofs_in(source: str, path: str) -> Iterator[Proof]:
    """The marked tests of a file, in their order."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for decorator in node.decorator_list:
            if (
                isinstance(decorator, ast.Call)
                and ast.unparse(decorator.func) == "pytest.mark.pusher"
            ):
                words = [ast.literal_eval(argument) for argument in decorator.args]
                if len(words) != 2 or words[0] not in SECTIONS:
                    raise MarkError(f"{path}: {node.name}: not a section and a behaviour: {words}")
                yield Proof(words[0], words[1], path, node.name)


def proofs() -> Iterator[Proof]:
    """The marked tests of this repository."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "node_modules" not in path.parts:
            yield from proofs_in(path.read_text(), path.relative_to(ROOT).as_posix())


def tables(found: list[Proof]) -> str:
    """A table for each section: behaviour, and the tests that prove it."""
    by_section: dict[str, dict[str, list[Proof]]] = defaultdict(lambda: defaultdict(list))
    for proof in found:
        by_section[proof.section][proof.behaviour].append(proof)
    parts = []
    for number, title in SECTIONS.items():
        if number not in by_section:
            continue
        heading = title if number == "clients" else f"{number} {title}"
        rows = [
            f"| {_cell(behaviour)} | {'<br>'.join(map(_link, by_section[number][behaviour]))} |"
            for behaviour in sorted(by_section[number], key=str.casefold)
        ]
        parts.append("\n".join([f"## {heading}", "", "| behaviour | test |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _link(proof: Proof) -> str:
    sentence = proof.test.removeprefix("test_").replace("_", " ")
    return f"[{sentence}](../{proof.path})"


def page(introduction: str) -> str:
    """The whole page behind its introduction."""
    return f"{introduction}{BEGIN}\n{tables(list(proofs()))}"


def main() -> None:
    """Writes the page."""
    introduction, _, _ = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(page(introduction))


if __name__ == "__main__":
    main()
