from __future__ import annotations

import asyncio
import json
import os
import resource
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from gateway.bench.cli import app
from gateway.bench.errors import BenchError
from gateway.bench.results import Measure, Report, Row, percentile
from gateway.bench.show import plot_report
from gateway.bench.stage import Doubts
from gateway.bench.usage import allow_files, usage_of
from gateway.bench.wire import FrameReader, client_frame
from gateway.cli import app as duet
from gateway.frames import frame
from tests.gateway.bench.runs import medians, run

if TYPE_CHECKING:
    from pathlib import Path

    from websockets.extensions import Extension

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture
def stores(mongodb_url: str, redis_url: str) -> tuple[str, str]:
    return mongodb_url, redis_url


def test_fanout_counts_every_delivery_on_a_real_gateway(
    tmp_path: Path, stores: tuple[str, str]
) -> None:
    load = ["--sockets", "24", "--burst", "1", "--burst", "4", "--seconds", "0.1"]

    report = run("fanout", *load, "--processes", "2", report=tmp_path / "report", stores=stores)

    assert report["delivery_ratio"] == 1.0
    assert [row["name"] for row in report["rows"]] == ["connect", "burst 1", "burst 4"]
    for row_name in ("burst 1", "burst 4"):
        found = medians(report, row_name)
        assert found["deliveries/s"] > 0
        assert 0 < found["last socket p50 ms"] <= found["last socket p99 ms"]
        assert found["server MiB"] > 0


def test_agree_times_the_push_to_the_viewer_and_the_reply(
    tmp_path: Path, stores: tuple[str, str]
) -> None:
    load = ["--rate", "20", "--seconds", "0.2", "--pairs", "6", "--hot", "--callers", "4"]
    load += ["--listeners", "10", "--events", "50"]

    report = run("agree", *load, report=tmp_path / "report", stores=stores)

    assert report["delivery_ratio"] == 1.0
    assert [row["name"] for row in report["rows"]] == [
        "20 a second",
        "flat out",
        "hot, 4 callers",
    ]
    paced = medians(report, "20 a second")
    assert 0 < paced["authorized p50 ms"] <= paced["authorized p99 ms"]
    assert 0 < paced["reply p50 ms"] <= paced["reply p99 ms"]
    assert 0 < paced["event p50 ms"] <= paced["event p99 ms"]
    assert medians(report, "hot, 4 callers")["transactions/s"] > 0


def test_a_file_that_cannot_be_written_is_one_line_before_the_run() -> None:
    result = CliRunner().invoke(app, ["fanout", "--json", "/no/such/directory/report.json"])

    assert result.exit_code == 1
    assert result.stderr == "duet: /no/such/directory/report.json can't be written\n"


def test_a_plot_of_an_unknown_type_is_one_line_before_the_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    result = CliRunner().invoke(app, ["fanout", "--plot", str(tmp_path / "plot.docx")])

    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "its name must end in one of" in result.stderr


def test_the_duet_command_lists_the_shapes() -> None:
    listing = CliRunner().invoke(duet, ["bench", "--help"]).output

    assert "fanout" in listing
    assert "agree" in listing


@pytest.mark.parametrize("length", [0, 125, 126, 65_535, 65_536])
def test_client_frames_are_what_a_server_reads(length: int) -> None:
    payload = b"x" * length
    reader = StreamReader()
    reader.feed_data(client_frame(payload))
    extensions: list[Extension] = []

    parsing = Frame.parse(reader.read_exact, mask=True, max_size=None, extensions=extensions)
    with pytest.raises(StopIteration) as parsed:
        next(parsing)

    assert parsed.value.value == Frame(Opcode.TEXT, payload)


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1_000_000])
def test_frames_are_read_however_the_bytes_are_cut(cut: int) -> None:
    payloads = [b"", b"a" * 125, b"b" * 126, b"c" * 70_000]
    data = UPGRADED + b"".join(map(frame, payloads))
    reader = FrameReader()

    read = [
        payload
        for start in range(0, len(data), cut)
        for payload in reader.feed(data[start : start + cut])
    ]

    assert read == payloads


def test_a_refused_handshake_and_a_close_frame_name_the_server_s_reason() -> None:
    with pytest.raises(BenchError, match=r"refused a WebSocket: .* 404 Not Found"):
        FrameReader().feed(b"HTTP/1.1 404 Not Found\r\n\r\n")
    with pytest.raises(BenchError, match="closed a socket: 4001 unknown app"):
        FrameReader().feed(UPGRADED + b"\x88\x0d" + (4001).to_bytes(2) + b"unknown app")


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]

    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([7.0], 99) == 7
    assert percentile([], 50) == 0


def test_a_measure_shows_its_median_and_its_farthest_repeat() -> None:
    assert Measure("µs", (2.0, 1.0, 2.5), 1).text() == "2.0 ±50%"
    assert Measure("µs", (2000.0,)).text() == "2,000"


@pytest.fixture
def report() -> Report:
    rows = (
        Row("burst 1", (Measure("µs", (3.0, 1.0, 2.0)), Measure("events/s", (9.0, 9.0, 9.0)))),
        Row("burst 8", (Measure("µs", (0.5, 0.25, 0.5), 2),)),
    )
    return Report(
        shape="fanout",
        target="duet",
        started_at="2026-11-22T17:25:00+00:00",
        machine={},
        options={},
        rows=rows,
        delivery_ratio=1.0,
    )


def test_a_report_s_json_has_medians_beside_the_repeats(report: Report) -> None:
    measure = json.loads(report.json())["rows"][0]["measures"][0]

    assert measure == {"name": "µs", "values": [3.0, 1.0, 2.0], "digits": 0, "median": 2.0}


def test_a_plot_shows_what_several_rows_have(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"

    plot_report(report, file)

    drawn = file.read_text()
    assert "<!-- µs -->" in drawn
    assert "<!-- events/s -->" not in drawn


def test_a_busy_generator_and_a_busy_machine_are_doubted_once_a_row() -> None:
    doubts = Doubts()

    for share in (0.5, 0.95, 0.99):
        doubts.generator_share("burst 8", share)
    doubts.idle_share("burst 64", 0.5)
    doubts.idle_share("burst 64", 0.01)
    doubts.idle_share("burst 1", None)

    assert doubts.all() == (
        "burst 8: the generator was the limit, it had no more than a core to use",
        "burst 64: the machine was the limit, all its cores were busy",
    )


def test_the_usage_of_a_process_includes_its_children() -> None:
    async def parent_and_child() -> tuple[int, int]:
        child = await asyncio.create_subprocess_exec("sleep", "30")
        try:
            everything = usage_of(os.getpid()).resident_bytes
            return everything, usage_of(child.pid).resident_bytes
        finally:
            child.kill()
            await child.wait()

    everything, child_bytes = asyncio.run(parent_and_child())

    assert everything > child_bytes > 0


def test_the_usage_of_an_ended_process_is_a_plain_error() -> None:
    async def ended() -> int:
        process = await asyncio.create_subprocess_exec("true")
        await process.wait()
        return process.pid

    with pytest.raises(BenchError, match="has ended"):
        usage_of(asyncio.run(ended()))


def test_more_sockets_than_files_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1_000))

    with pytest.raises(BenchError, match=r"ulimit -Hn 10512"):
        allow_files(10_000)
