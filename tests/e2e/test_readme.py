"""The README's snippet works as it stands against a running gateway."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require
from tests.e2e.node_process import CLIENTS_INSTALLED, HERE

if TYPE_CHECKING:
    from tests.e2e.stage import StageBuilder

README = Path(__file__).parents[2] / "README.md"

# What the reader fills in: his token, the stream's session, where the gateway is.
_TAIL = """
me.bind("goal.reply", (reply) => {
  process.stdout.write(`\\n${JSON.stringify(reply)}\\n`, () => process.exit(0));
});
"""


async def test_the_snippet_of_the_readme_invites(stage_with: StageBuilder, tmp_path: Path) -> None:
    node = shutil.which("node")
    require(node, "there is no node on PATH")
    require(CLIENTS_INSTALLED, "the clients from npm are not installed (make npm)")
    assert node is not None
    stage = await stage_with()
    streamer = await stage.socket("streamer", "streamer")
    session_id = await stage.open_session(streamer.user_id)
    [snippet] = re.findall(r"```js\n(.*?)```", README.read_text(), flags=re.DOTALL)
    for placeholder, value in {
        '"…"': json.dumps(stage.gateway.token(stage.user("ana"), "viewer")),
        "the streamer's session id": session_id,
        "private-user@ana": f"private-user@{stage.user('ana')}",
        "app-key": stage.gateway.app_key,
        "6001": str(stage.gateway.port),
        '"pusher-js"': json.dumps(str(HERE / "node_modules/pusher-js/dist/node/pusher.js")),
    }.items():
        assert placeholder in snippet
        snippet = snippet.replace(placeholder, value)
    script = tmp_path / "snippet.mjs"
    script.write_text(snippet + _TAIL)

    process = await asyncio.create_subprocess_exec(
        node, str(script), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate()

    # What the snippet itself prints may come after the reply.
    [answer] = [line for line in output.decode().splitlines() if line.startswith("{")]
    reply = json.loads(answer)
    assert reply["ok"], reply
    assert reply["goal"]["state"] == "invited"
    assert "my open invitations" in output.decode()
