"""Who is told of a night, and that nobody who is told can change it."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline import notify
from pipeline.settings import Settings
from tests.nights import NEW, World, failing
from tests.servers import silent_server

pytestmark = pytest.mark.server


@contextlib.contextmanager
def receiver(status: int = 200) -> Iterator[tuple[int, list[tuple[str, dict[str, str], Any]]]]:
    """Take POSTs; yield the port, and the path, headers and JSON of each."""
    got: list[tuple[str, dict[str, str], Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port, got
        finally:
            server.shutdown()
            thread.join()


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
    with receiver() as (port, got):
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
    assert [body["outcome"] for _, _, body in got] == ["failed", "released"]
    assert got[0][2]["text"] == "opencode-server: failed build: build: BuildFailed: no"
    assert got[1][2]["tag"] in got[1][2]["text"]


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
    with receiver(500) as (port, _):
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
