from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from gateway.bench import fanout
from gateway.bench.cli import app
from gateway.bench.errors import BenchError
from gateway.bench.http import HttpConnection
from gateway.bench.loop import run
from gateway.bench.options import Peer
from gateway.bench.peers import install
from gateway.bench.peers.dialects import DIALECTS
from gateway.bench.peers.server import PEERS, running_peers
from gateway.bench.show import progress_bar
from gateway.bench.stage import Plan, Stage
from gateway.bench.wire import FrameReader, upgrade_request
from gateway.frames import frame, published_body
from tests.conftest import require

if TYPE_CHECKING:
    from gateway.bench.results import Report
    from gateway.bench.target import Target

# Where a first run of this user installs the packages of npm.
INSTALLATION_S = 600
PATIENCE_S = 20

OPTIONS = fanout.FanoutOptions(sockets=20, bursts=(1, 4), event_bytes=300, processes=1, probe=True)


def need(peer: str) -> None:
    """Skips the test, or fails it on CI, when the peer can't be run here."""
    if peer == "c":
        require(sys.platform.startswith("linux") and shutil.which("cc"), "no Linux, or no cc")
        return
    require(shutil.which("npm") and shutil.which("node"), "there is no npm, or no node, on PATH")
    try:
        install.npm_packages()
    except BenchError as error:
        require(False, str(error))


def load(peer: str, redis_url: str) -> Report:
    plan = Plan(repeats=1, seconds=0.2, warmup_s=0)
    with progress_bar() as progress, running_peers([peer], redis_url) as (target,):
        return run(fanout.run(target, Stage(plan, progress), OPTIONS))


@pytest.mark.timeout(INSTALLATION_S)
@pytest.mark.parametrize("peer", list(PEERS))
def test_a_peer_delivers_every_event_of_every_burst_to_every_socket(
    peer: str, redis_url: str
) -> None:
    need(peer)

    report = load(peer, redis_url)

    assert report.delivery_ratio == 1.0
    for name in ("burst 1", "burst 4"):
        row = next(row for row in report.rows if row.name == name)
        cost = row.measure("server CPU µs/delivery")
        assert cost is not None
        assert cost.median > 0
        wait = row.measure("longest wait ms")
        assert wait is not None
        assert wait.median > 0


async def received(target: Target, expected: int) -> list[bytes]:
    """The payloads of so many events that one socket gets of a burst and a single publication."""
    manners = DIALECTS[target.dialect]
    steps = [(greeting.awaited, greeting.answer) for greeting in manners.greetings]
    steps.append((manners.welcome, target.subscribe_frame("room")))
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(upgrade_request(target.host, target.port, target.socket_path()))
    frames = FrameReader()
    events: list[bytes] = []
    is_subscribed = False
    while len(events) < expected:
        for payload in frames.feed(await reader.read(65_536)):
            if steps:
                awaited, answer = steps.pop(0)
                assert awaited in payload
                writer.write(answer)
            elif is_subscribed:
                events.append(payload)
            elif manners.confirmed in payload:
                is_subscribed = True
                await publish(target, target.burst_requests("room", "tick", "in a burst", 3))
                await publish(target, [target.publish_request("room", "tick", "alone")])
    writer.close()
    return events


async def publish(target: Target, requests: list[bytes]) -> None:
    for request in requests:
        connection = await HttpConnection.open(target.host, target.port)
        assert (await connection.send(request))[0] == 200
        connection.close()


@pytest.mark.timeout(INSTALLATION_S)
@pytest.mark.parametrize("peer", list(PEERS))
def test_what_a_peer_delivers_is_what_was_published(peer: str, redis_url: str) -> None:
    need(peer)
    texts = ["in a burst"] * 3 + ["alone"]

    with running_peers([peer], redis_url) as (target,):
        events = run(asyncio.wait_for(received(target, len(texts)), PATIENCE_S))
        lengths = [target.delivered_bytes("room", "tick", text) for text in texts]

    assert [len(frame(event)) for event in events] == lengths
    if peer == "socket.io":
        assert events == [b'42["tick","%s"]' % text.encode() for text in texts]
    else:
        assert events == [published_body("tick", "room", text) for text in texts]


@pytest.mark.timeout(INSTALLATION_S)
def test_duet_and_a_peer_are_measured_in_one_run_and_compared(
    tmp_path: Path, mongodb_url: str, redis_url: str
) -> None:
    need("c")
    file = tmp_path / "report.json"
    stores = ["--mongodb-url", mongodb_url, "--redis-url", redis_url]
    plan = ["--repeats", "2", "--seconds", "0.1", "--warmup", "0", "--burst", "4"]

    result = CliRunner().invoke(
        app,
        ["fanout", "--against", "c", "--sockets", "20", *plan, *stores, "--json", str(file)],
        catch_exceptions=False,
    )

    assert result.exit_code == 0, result.output
    assert "duet against c: fanout" in result.output
    report: dict[str, Any] = json.loads(file.read_bytes())
    (cost,) = [
        each
        for each in report["comparisons"]
        if each["row"] == "burst 4" and each["measure"] == "server CPU µs/delivery"
    ]
    assert cost["peer"] == "c"
    assert cost["ratios"] == [own / peer for peer, own in cost["pairs"]]
    assert len(cost["ratios"]) == 2
    assert min(cost["ratios"]) <= cost["median_ratio"] <= max(cost["ratios"])


def test_the_command_knows_every_peer() -> None:
    assert {peer.value for peer in Peer} == set(PEERS)


def test_the_c_loop_refuses_a_second_channel(redis_url: str) -> None:
    need("c")
    with running_peers(["c"], redis_url) as (target,):
        target.subscribe_frame("one")
        target.subscribe_frame("one")

        with pytest.raises(BenchError, match="c knows one channel only"):
            target.subscribe_frame("two")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "duet-bench"


@pytest.mark.parametrize(
    ("missing", "peer"), [("npm", "bun"), ("npm", "socket.io"), ("cc", "c"), ("npm", "ws")]
)
def test_a_missing_installer_is_named_in_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, missing: str, peer: str, redis_url: str
) -> None:
    if peer == "c" and not sys.platform.startswith("linux"):
        pytest.skip("the C loop is for Linux")
    monkeypatch.setenv("PATH", str(cache / "nothing"))

    with (
        pytest.raises(BenchError, match=f"^there is no {missing} on PATH: [^\n]+$"),
        running_peers([peer], redis_url),
    ):
        pytest.fail("it was started")


def test_what_the_installer_says_is_passed_on_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error the network is down' >&2\necho more >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    with pytest.raises(BenchError, match=r"^npm failed: npm error the network is down$"):
        install.npm_packages()
    assert [path.name for path in cache.iterdir()] == ["lock"]


def waits_or_has_ended(thread: threading.Thread) -> bool:
    if thread.ident is None:
        return False  # it has not begun
    frame = sys._current_frames().get(thread.ident)
    return frame is None or frame.f_code.co_name == "_locked"


def test_what_is_in_the_cache_is_made_once_however_many_ask(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("text")
    made: list[Path] = []

    def make(directory: Path) -> None:
        made.append(directory)
        while any(not waits_or_has_ended(thread) for thread in threads if thread is not me()):
            threading.Event().wait(0.001)
        (directory / "product").write_text(source.read_text())

    found: list[Path] = []
    me = threading.current_thread
    threads = [
        threading.Thread(target=lambda: found.append(install._made("x", [source], make)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert len(set(found)) == 1
    assert (found[0] / "product").read_text() == "text"


def test_another_lock_file_is_another_installation(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("text")
    first = install._made("x", [source], lambda _: None)

    source.write_text("other text")

    assert install._made("x", [source], lambda _: None) != first


def test_an_installation_that_failed_is_made_anew(cache: Path, tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise BenchError("interrupted")

    with pytest.raises(BenchError, match="interrupted"):
        install._made("x", [Path(__file__)], fail)

    made = install._made("x", [Path(__file__)], lambda _: None)

    assert list(made.iterdir()) == []


def test_the_lock_file_pins_every_package_and_names_no_address() -> None:
    packages = json.loads(install.source("package-lock.json").read_bytes())["packages"]
    wanted = json.loads(install.source("package.json").read_bytes())["dependencies"]

    assert packages[""]["dependencies"] == wanted
    for name, package in packages.items():
        assert "resolved" not in package
        if name:
            assert package["integrity"].startswith("sha512-")
    assert all(version[0].isdecimal() for version in wanted.values())


def test_the_sources_of_the_peers_are_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=root,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    peers = Path(fanout.__file__).parent / "peers"
    sources = [path.name for path in peers.iterdir() if path.suffix in {".js", ".c", ".json"}]
    assert {Path(name).suffix for name in sources} == {".js", ".c", ".json"}
    for name in sources:
        assert f"gateway/bench/peers/{name} " in listing
