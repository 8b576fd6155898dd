"""`duet escrow` and `duet migrate` as a person reads them, on a real MongoDB."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId
from typer.testing import CliRunner

from gateway import cli_migrate
from gateway.cli import app, main
from gateway.preflight import check_settings
from gateway.settings import Settings
from persistence.migrations import Migration, Migrator

if TYPE_CHECKING:
    from pymongo import MongoClient
    from pymongo.database import Database

    from gateway.preflight import Finding
    from persistence.store import Store

SECRET = "a-secret-that-is-longer-than-32-bytes"
NOTHING = "nothing to migrate: no document is older than version 1\n"
ALL_INDEXES = [
    "goals.open_goals_of_streamer",
    "goals.open_goals_of_viewer",
    "goals.open_goals_of_session",
    "goals.one_show_per_session",
    "goals.due_at_1",
    "goals.outbox_due_at_1",
    "sessions.one_live_session_per_streamer",
    "escrow.goal_id_1",
    "escrow.viewer_id_1_at_1",
    "escrow_calls.due_at_1",
    "escrow_calls.status_1_since_1",
    "escrow_calls.one_hold_per_request",
    "requests.at_1",
    "goal_records.streamer_id_1_at_1",
    "goal_records.at_1",
]


@pytest.fixture
def database(
    mongodb_url: str,
    mongodb_client: MongoClient[dict[str, Any]],
    mongodb_database_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Database[dict[str, Any]]:
    """The database that the command is told of."""
    monkeypatch.setenv("DUET_MONGODB_URL", mongodb_url)
    monkeypatch.setenv("DUET_MONGODB_DATABASE", mongodb_database_name)
    # A database of its own has its indexes made first.
    monkeypatch.setenv("DUET_COMMAND_TIMEOUT_S", "10")
    monkeypatch.setenv("COLUMNS", "800")
    return mongodb_client[mongodb_database_name]


def call(number: int, status: str, **more: Any) -> dict[str, Any]:
    goal_id = ObjectId(f"{number:024x}")
    now = datetime.now(UTC)
    return {
        "_id": f"{goal_id}:close",
        "call": "release",
        "goal_id": goal_id,
        "session_id": ObjectId(),
        "viewer_id": f"viewer{number}",
        "streamer_id": "anna",
        "amount": 1000 + number,
        "reason": "withdrawn",
        "at": now,
        "status": status,
        "since": now - timedelta(hours=3),
        "attempts": 7,
        **more,
    }


def duet(*arguments: str) -> tuple[int, str]:
    """Exit code and all output."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def line_with(word: str, output: str) -> str:
    (line,) = [line for line in output.splitlines() if word in line]
    return line


def test_what_waits_and_what_is_dead_is_listed_and_nothing_else(
    database: Database[dict[str, Any]],
) -> None:
    database["escrow_calls"].insert_many(
        [
            call(1, "pending", due_at=datetime.now(UTC)),
            call(2, "dead", answer="422: [bold]no such customer"),
            call(3, "acknowledged"),
            call(4, "abandoned"),
        ]
    )

    code, everything = duet("escrow", "list")
    _, dead = duet("escrow", "list", "--dead")

    assert code == 0
    line = line_with("viewer2", everything)
    for word in ("release", "1002", "anna", "dead", "7", "3 h", "422: [bold]no such customer"):
        assert word in line
    assert "pending" in line_with("viewer1", everything)
    assert "viewer3" not in everything
    assert "viewer4" not in everything
    assert "viewer1" not in dead
    assert "viewer2" in dead


@pytest.mark.parametrize("columns", ["240", "80"])
def test_the_services_words_are_shown_as_they_are(
    database: Database[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = r"400: no match for ^\[/]+$ in C:\[red] :x:"
    database["escrow_calls"].insert_one(call(1, "dead", answer=words))

    code, output = duet("escrow", "list")

    assert code == 0
    assert words in output


def test_on_a_narrow_terminal_each_key_can_be_copied_and_each_word_read(
    database: Database[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [call(number, "dead", answer="402: no such customer") for number in range(2)]
    database["escrow_calls"].insert_many(rows)

    _, output = duet("escrow", "list")

    lines = [line.strip() for line in output.splitlines()]
    assert [line for line in lines if line.endswith(":close")] == [row["_id"] for row in rows]
    assert "release of 1001, viewer1 to anna, dead, 7 in vain, for 3 h" in " ".join(lines)
    assert lines.count("402: no such customer") == 2


def test_a_long_list_is_cut_and_says_so(database: Database[dict[str, Any]]) -> None:
    database["escrow_calls"].insert_many([call(number, "dead") for number in range(5)])

    _, output = duet("escrow", "list", "--dead", "--limit", "2")

    assert "… and 3 more" in output


def test_a_call_that_is_not_dead_is_not_taken_up_again(
    database: Database[dict[str, Any]],
) -> None:
    waiting = call(1, "acknowledged")
    database["escrow_calls"].insert_one(waiting)

    code, output = duet("escrow", "retry", waiting["_id"])

    assert code == 1
    assert output == f"duet: {waiting['_id']}: it is acknowledged, not dead\n"


def test_all_dead_letters_fall_due_at_once(database: Database[dict[str, Any]]) -> None:
    database["escrow_calls"].insert_many([call(1, "dead"), call(2, "dead"), call(3, "refused")])

    code, output = duet("escrow", "retry", "--all")

    assert (code, output) == (0, "2 calls will be said again\n")
    rows = list(database["escrow_calls"].find({"status": "pending"}))
    assert [row["attempts"] for row in rows] == [0, 0]
    assert all(row["due_at"] <= row["since"] for row in rows)


@pytest.mark.parametrize("arguments", [("retry",), ("retry", "a:close", "--all")])
def test_either_a_key_or_all_is_wanted(arguments: tuple[str, ...]) -> None:
    code, output = duet("escrow", *arguments)

    assert code == 2
    assert "either a KEY or --all" in output


def test_without_a_database_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["duet", "escrow", "list"])
    monkeypatch.delenv("DUET_MONGODB_URL", raising=False)

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("duet: DUET_MONGODB_URL: must be the address")


def test_a_database_of_this_schema_needs_no_migration(database: Database[dict[str, Any]]) -> None:
    making = duet("migrate")
    code, output = duet("migrate")

    assert (code, output) == (0, NOTHING)
    assert making == (0, f"making indexes: {', '.join(ALL_INDEXES)}\n{NOTHING}")


def test_an_index_that_is_missing_is_made_before_any_gateway_has_to(
    database: Database[dict[str, Any]],
) -> None:
    duet("migrate")
    database["goals"].drop_index("due_at_1")

    told = duet("migrate", "--dry-run")
    there = "due_at_1" in database["goals"].index_information()
    made = duet("migrate")

    assert told == (0, f"indexes to be made: goals.due_at_1\n{NOTHING}")
    assert not there
    assert made == (0, f"making indexes: goals.due_at_1\n{NOTHING}")
    assert "due_at_1" in database["goals"].index_information()


def test_an_index_that_another_took_the_place_of_is_dropped(
    database: Database[dict[str, Any]],
) -> None:
    duet("migrate")
    old = "metadata.user_id_1_state_1"
    database["goals"].create_index({"metadata.user_id": 1, "state": 1})

    told = duet("migrate", "--dry-run")
    making = duet("migrate", "--indexes")
    there = old in database["goals"].index_information()
    dropped = duet("migrate")

    assert told == (0, f"indexes to be dropped: goals.{old}\n{NOTHING}")
    assert making == (0, "")
    assert there
    assert dropped == (0, f"dropping indexes: goals.{old}\n{NOTHING}")
    assert old not in database["goals"].index_information()
    assert duet("migrate") == (0, NOTHING)


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch, database: Database[dict[str, Any]]) -> None:
    """Seven documents that a migration of a version to come would change."""
    migration = Migration(
        "0001_goals_are_better", "goals", 2, ({"$set": {"better": {"$literal": True}}},)
    )

    def with_it(store: Store, batch_size: int) -> Migrator:
        return Migrator(store, (migration,), batch_size=batch_size)

    monkeypatch.setattr(cli_migrate, "Migrator", with_it)
    duet("migrate")
    database["goals"].insert_many({"schema_version": 1, "number": number} for number in range(7))


@pytest.mark.usefixtures("older")
def test_a_dry_run_tells_and_changes_nothing(database: Database[dict[str, Any]]) -> None:
    code, output = duet("migrate", "--dry-run")

    assert (code, output) == (0, "0001_goals_are_better: 7 documents of goals\n")
    assert database["goals"].count_documents({"better": True}) == 0


@pytest.mark.usefixtures("older")
def test_indexes_can_be_made_while_older_gateways_need_the_documents_as_they_are(
    database: Database[dict[str, Any]],
) -> None:
    database["goals"].drop_index("due_at_1")

    made = duet("migrate", "--indexes")

    assert made == (0, "making indexes: goals.due_at_1\n")
    assert database["goals"].count_documents({"schema_version": 1}) == 7


@pytest.mark.usefixtures("older")
def test_migrating_shows_how_far_it_is_and_is_over_the_second_time(
    database: Database[dict[str, Any]],
) -> None:
    code, output = duet("migrate", "--batch-size", "2")
    again = duet("migrate")

    assert code == 0
    assert "0001_goals_are_better" in output
    assert "7/7" in output
    assert again == (0, NOTHING)
    assert database["goals"].count_documents({"better": True, "schema_version": 2}) == 7


@pytest.mark.usefixtures("older")
def test_who_migrates_is_told_what_was_left_as_it_is(
    database: Database[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = Migration("0002", "goals", 2, ({"$set": {"n": {"$abs": "$number"}}},))
    monkeypatch.setattr(cli_migrate, "Migrator", lambda store, **_: Migrator(store, (migration,)))
    database["goals"].update_one({"number": 3}, {"$set": {"number": "[bold]", "_cls": "x"}})
    row = database["goals"].find_one({"number": "[bold]"})
    assert row is not None

    code, output = duet("migrate")

    assert code == 1
    assert f"goals {row['_id']} is left as it is: $abs only supports numeric types" in output
    assert "1 of the documents could not be migrated" in output
    assert database["goals"].count_documents({"schema_version": 2}) == 6


@pytest.mark.usefixtures("older")
def test_a_second_runner_is_told_who_migrates(
    database: Database[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    database["migrations"].insert_one(
        {
            "_id": "lease",
            "owner": "other:6001/1",
            "lease_until": datetime.now(UTC) + timedelta(minutes=1),
        }
    )
    monkeypatch.setattr("sys.argv", ["duet", "migrate"])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "duet: other:6001/1 migrates this database; after a crash wait 30 s\n"
    )


def escrow_findings(url: str | None, secret: str | None) -> list[Finding]:
    settings = Settings(escrow_url=url, escrow_secret=secret)
    return [each for each in check_settings(settings) if each.what.startswith("DUET_ESCROW")]


@pytest.mark.parametrize(
    "url", ["https://pay.example/duet", "http://127.0.0.1:9000", "http://localhost/x"]
)
def test_a_payment_service_over_tls_or_on_this_machine_is_good(url: str) -> None:
    (finding,) = escrow_findings(url, SECRET)

    assert finding.good


@pytest.mark.parametrize(
    ("url", "secret", "what"),
    [
        ("http://pay.example", SECRET, "DUET_ESCROW_URL"),
        ("http://localhost.example", SECRET, "DUET_ESCROW_URL"),
        ("http://localhost:9000@pay.example", SECRET, "DUET_ESCROW_URL"),
        ("https://:9000", SECRET, "DUET_ESCROW_URL"),
        ("https://pay.example:90000", SECRET, "DUET_ESCROW_URL"),
        ("https://[::1", SECRET, "DUET_ESCROW_URL"),
        ("https://pay.example/duet?tenant=1", SECRET, "DUET_ESCROW_URL"),
        ("https://pay.example/duet#tenant", SECRET, "DUET_ESCROW_URL"),
        ("pay.example", SECRET, "DUET_ESCROW_URL"),
        ("https://pay.example", None, "DUET_ESCROW_SECRET"),
        ("https://pay.example", "short", "DUET_ESCROW_SECRET"),
        ("https://pay.example", "duet-development-secret-not-for-production", "DUET_ESCROW_SECRET"),
        (None, SECRET, "DUET_ESCROW_URL"),
    ],
)
def test_a_payment_service_that_is_half_set_or_open_to_others_is_refused(
    url: str | None, secret: str | None, what: str
) -> None:
    (finding,) = escrow_findings(url, secret)

    assert finding.fatal
    assert finding.what == what


def test_a_password_in_the_services_address_is_not_shown() -> None:
    (finding,) = escrow_findings("https://duet:hidden@pay.example/v1", SECRET)

    assert finding.good
    assert finding.text == "https://pay.example/v1"


def test_without_a_payment_service_there_is_nothing_to_say() -> None:
    assert escrow_findings(None, None) == []
