"""Who is told of a night, and that nobody who is told can change it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import NightFailed
from pipeline.core.settings import Settings
from pipeline.release import history, html_report, notify
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
        world.settings = Settings(
            notify={"command": command, "webhook": f"http://127.0.0.1:{port}/hook"}
        )
        assert world.night() == "unchanged"
        assert not told.exists()
        world.upstream = NEW
        world.broken["build"] = failing("BuildFailed: no")
        assert world.night().startswith("NightFailed")
        world.broken.clear()
        assert world.night() == "released"
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(line["outcome"], line.get("where")) for line in lines] == [
        ("failed", "build"),
        ("released", None),
    ]
    bodies = [json.loads(body) for _, _, body in got]
    assert [body["outcome"] for body in bodies] == ["failed", "released"]
    assert bodies[0]["text"] == "opencode-server: failed build: build: BuildFailed: no"
    assert bodies[1]["tag"] in bodies[1]["text"]


HOSTILE = "<!channel> </pre><script>x</script>\x1b[31m\x1b]0;t\x07\u202e\nok    released"
"""What a branch, a commit or a build may say."""


@pytest.mark.parametrize("task", ["bump", "build"])
def test_text_of_others_is_text_in_the_log_the_report_and_the_message(
    world: World, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    world.upstream = NEW
    world.broken[task] = NightFailed(HOSTILE, "Nothing.", HOSTILE)
    world.remarks = [HOSTILE]
    with collector() as (port, got):
        world.settings = Settings(notify={"webhook": f"http://127.0.0.1:{port}"})
        world.night(log_file=True)
        world.broken.clear()
        assert world.night(log_file=True) == "released"
    texts = [json.loads(body)["text"] for _, _, body in got]
    assert len(texts) == 2
    assert not [text for text in texts if "<" in text or len(text.splitlines()) > 1]
    (log, _) = sorted((world.root / "build/nights").glob("*.log"))
    with world.patched():
        page = html_report.page(*history.read())
        history.show()
        shown = capsys.readouterr().out
        history.show(lines=True)
        lines = capsys.readouterr().out
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    for text in (page, log.read_text(), shown, lines, *texts):
        assert "released" in text
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert not [line for line in shown.splitlines() if line.startswith("ok  ")]


def test_who_fails_or_hangs_changes_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.upstream = NEW
    with silent_server() as port:
        url = f"http://127.0.0.1:{port}/s3cret"
        world.settings = Settings(
            notify={"command": "sleep 60", "webhook": url, "datadog": True, "seconds": 0.5}
        )
        began = time.monotonic()
        assert world.night() == "released"
        assert time.monotonic() - began < 30
    out = capsys.readouterr().out
    assert out.count("!!    notify: ") == 3
    assert "s3cret" not in out
    assert "notify: command: TimeoutExpired" in out or "notify: command: no answer" in out
    for fault in ("/no/such/program", "false", "'unbalanced"):
        notify.send(Settings(notify={"command": fault}), {"outcome": "failed"})
    with collector(other=500) as (port, _):
        settings = Settings(notify={"webhook": f"http://127.0.0.1:{port}"})
        notify.send(settings, {"outcome": "failed"})
    assert capsys.readouterr().out.count("!!    notify: ") == 4


@pytest.mark.parametrize(
    ("record", "event", "gauges"),
    [
        (
            {
                "outcome": "released",
                "tag": "20270115-abcdef0",
                "moves": ["a 1 -> 2"],
                "seconds": 60.5,
                "size": 7,
                "ready_seconds": 2,
            },
            ("opencode-server: released 20270115-abcdef0", "a 1 -> 2", "success"),
            {"seconds": 60.5, "ready_seconds": 2, "size": 7, "released": 1},
        ),
        (
            {"outcome": "failed", "where": "build", "why": "no", "seconds": 3.5},
            ("opencode-server: failed build", "build: no", "error"),
            {"seconds": 3.5, "released": 0},
        ),
    ],
)
def test_datadog_gets_an_event_and_gauges(
    record: dict[str, Any],
    event: tuple[str, str, str],
    gauges: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DD_API_KEY", "k3y")
    with collector() as (port, got):
        monkeypatch.setenv("DD_URL", f"http://127.0.0.1:{port}")
        notify.send(Settings(notify={"datadog": True}), record)
    assert "ok    notify: datadog: sent" in capsys.readouterr().out
    assert [path for path, _, _ in got] == ["/api/v1/events", "/api/v2/series"]
    assert {headers["DD-API-KEY"] for _, headers, _ in got} == {"k3y"}
    posted, metrics = (json.loads(body) for _, _, body in got)
    tags = ["image:opencode-server", f"outcome:{record['outcome']}"]
    assert (posted["title"], posted["text"], posted["alert_type"]) == event
    assert posted["tags"] == tags
    series = metrics["series"]
    assert all((each["type"], each["tags"]) == (3, tags) for each in series)
    values = {each["metric"]: each["points"][0]["value"] for each in series}
    assert values == {f"opencode_server.nightly.{name}": gauges[name] for name in gauges}


def test_datadog_without_a_key_or_with_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DD_API_KEY", raising=False)
    settings = Settings(notify={"datadog": True})
    with collector(status=403) as (port, got):
        monkeypatch.setenv("DD_URL", f"http://127.0.0.1:{port}")
        notify.send(settings, {"outcome": "failed"})
        assert got == []
        monkeypatch.setenv("DD_API_KEY", "s3cret")
        notify.send(settings, {"outcome": "failed"})
    out = capsys.readouterr().out
    assert "!!    notify: datadog: KeyError: 'DD_API_KEY'" in out
    assert "!!    notify: datadog: ConnectionError: HTTP status 403" in out
    assert "s3cret" not in out
