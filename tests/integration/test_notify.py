"""Who is told of a night, and that nobody who is told can change it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from pipeline import notify
from pipeline.settings import Settings
from tests.nights import NEW, World, failing
from tests.servers import collector, silent_server

pytestmark = pytest.mark.server


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.make()
    assert made.night() == "released"
    return made


def test_a_command_and_a_webhook_hear_of_releases_and_failures_and_of_nothing_else(
    world: World, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    write = f"import sys; open({str(told)!r}, 'a').write(sys.stdin.read() + chr(10))"
    with collector() as (port, got):
        command = f'{sys.executable} -c "{write}"'
        world.settings = Settings(notify={"command": command, "webhook": f"http://127.0.0.1:{port}/hook"})
        assert world.night() == "unchanged"
        assert not told.exists()
        world.upstream = NEW
        world.broken["build"] = failing("BuildFailed: no")
        assert world.night().startswith("NightFailed")
        world.broken.clear()
        assert world.night() == "released"
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(line["outcome"], line.get("where")) for line in lines] == [("failed", "build"), ("released", None)]
    bodies = [json.loads(body) for _, _, body in got]
    assert [body["outcome"] for body in bodies] == ["failed", "released"]
    assert bodies[0]["text"] == "opencode-server: failed build: build: BuildFailed: no"
    assert bodies[1]["tag"] in bodies[1]["text"]


def test_who_fails_or_hangs_changes_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.upstream = NEW
    with silent_server() as port:
        url = f"http://127.0.0.1:{port}/s3cret"
        world.settings = Settings(notify={"command": "sleep 60", "webhook": url, "datadog": True, "seconds": 0.5})
        began = time.monotonic()
        assert world.night() == "released"
        assert time.monotonic() - began < 30
    out = capsys.readouterr().out
    assert out.count("!!    notify: ") == 3
    assert "s3cret" not in out
    assert "notify: command: TimeoutExpired" in out or "notify: command: no answer" in out
    for fault in ("/no/such/program", "false", "'unbalanced"):
        notify.tell(Settings(notify={"command": fault}), None, {"outcome": "failed"})
    with collector(other=500) as (port, _):
        notify.tell(Settings(notify={"webhook": f"http://127.0.0.1:{port}"}), None, {"outcome": "failed"})
    assert capsys.readouterr().out.count("!!    notify: ") == 4


def test_what_datadog_is_told() -> None:
    record = {
        "outcome": "released",
        "tag": "20270115-abcdef0",
        "moves": ["a 1 -> 2"],
        "seconds": 60.5,
        "size": 7,
        "ready_seconds": 2,
    }
    payload = notify.datadog_payload(record, "opencode-server")
    assert payload == {
        "title": "opencode-server: released 20270115-abcdef0",
        "text": "a 1 -> 2",
        "alert_type": "success",
        "tags": ["image:opencode-server", "outcome:released"],
        "metrics": {
            "opencode_server.nightly.seconds": 60.5,
            "opencode_server.nightly.ready_seconds": 2,
            "opencode_server.nightly.size": 7,
            "opencode_server.nightly.released": 1,
        },
    }
    assert notify.datadog_payload({"outcome": "failed"}, "x")["alert_type"] == "error"
