"""Documents that somebody has changed by hand to nonsense: the others notice nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tests.faults.judged_stage import judged_stage

if TYPE_CHECKING:
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores

PAST = datetime.now(UTC) - timedelta(hours=1)
DAMAGE: list[dict[str, Any]] = [
    {"$set": {"due_at": PAST, "due_command": "explode"}},
    {"$set": {"due_at": PAST}, "$unset": {"due_command": ""}},
    {"$set": {"due_at": PAST, "state": "molten"}},
    {"$set": {"due_at": PAST}, "$unset": {"metadata": ""}},
    {"$set": {"outbox_due_at": PAST, "outbox": [{"event_id": "alone"}]}},
]


async def test_damaged_goals_stop_no_loop_and_are_told_in_log_and_metric(
    server_guard: ServerGuard, stores: Stores, apps_file: Path
) -> None:
    settings = {"DUET_POLL_INTERVAL_S": "0.05"}
    async with judged_stage(server_guard, stores, apps_file, settings) as stage:
        books, gateway = stage.books, stage.gateway
        goals = books.database["goals"]
        await stage.open_session(stage.user("damaged"))
        sound_rows = []
        for number, damage in enumerate(DAMAGE):
            guest = await stage.socket(f"guest{number}", "viewer")
            invited = await guest.command("client-goal.invite", **stage.terms())
            await books.until_delivered()
            sound_rows.append(await books.goal(invited["goal"]["id"]))
            await goals.update_one({"_id": sound_rows[-1]["_id"]}, damage)

        async def all_are_told() -> bool:
            log = gateway.log_text()
            return all(f'"id": "{row["_id"]}", "why": ' in log for row in sound_rows)

        await books.until("the log tells of each", all_are_told)
        metrics = (await gateway.call("GET", "/metrics")).text
        await stage.open_session(stage.user("streamer"))
        viewer = await stage.socket("viewer", "viewer")
        sound = (await viewer.command("client-goal.invite", **stage.terms()))["goal"]["id"]
        await books.move_deadline(sound, seconds=-3600)

        ended = await books.until_state(sound, "ended")
        assert (ended["reason"], ended["outcome"]) == ("expired", "refunded")
        await viewer.expect("escrow.released", viewer.own_channel)
        assert f"duet_damaged_documents {len(DAMAGE)}.0" in metrics
        assert '"loop_failed"' not in gateway.log_text()
        # What was mended takes part again, and in the verdict.
        for row in sound_rows:
            await goals.replace_one({"_id": row["_id"]}, row)
