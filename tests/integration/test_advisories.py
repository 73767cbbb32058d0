"""Known vulnerabilities, asked of a server that speaks as OSV does and checks what it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.core.errors import NotReleased
from pipeline.core.settings import Advisories, Settings
from pipeline.image import advisories, contents
from pipeline.release import history, promote
from tests.nights import NEW, World
from tests.servers import free_port
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.server

INSIDE = {
    "debian": "12",
    "packages": {
        "debian": {
            "libcurl4": ["7.88.1-10+deb12u1", 1, "curl", "7.88.1-10+deb12u1"],
            "curl": ["7.88.1-10+deb12u1", 1, "curl", "7.88.1-10+deb12u1"],
        },
        "npm": {"ansi-regex": ["5.0.0, 6.0.1", 1], "zod": ["4.1.8", 1]},
        "python": {"Typing_Extensions": ["4.1", 1], "urllib3": ["1.26.4", 1]},
    },
}
ASKED = [
    ("Debian:12", "curl", "7.88.1-10+deb12u1"),
    ("PyPI", "Typing_Extensions", "4.1"),
    ("PyPI", "urllib3", "1.26.4"),
    ("npm", "ansi-regex", "5.0.0"),
    ("npm", "ansi-regex", "6.0.1"),
    ("npm", "zod", "4.1.8"),
]


def told(name: str, ecosystem: str, package: str, *fixes: str, **more: Any) -> dict[str, Any]:
    events = [event for fix in fixes for event in ({"introduced": "0"}, {"fixed": fix})] or [
        {"introduced": "0"}
    ]
    affected = {
        "package": {"ecosystem": ecosystem, "name": package},
        "ranges": [{"type": "ECOSYSTEM", "events": events}],
    }
    git = {
        "package": {"ecosystem": ecosystem, "name": package},
        "ranges": [{"type": "GIT", "events": [{"fixed": "9"}]}],
    }
    other = {
        "package": {"ecosystem": "Debian:13", "name": package},
        "ranges": [{"type": "ECOSYSTEM", "events": [{"fixed": "99"}]}],
    }
    return {
        "id": name,
        "summary": f"{package} is wrong",
        "affected": [git, other, affected],
        **more,
    }


KNOWN = {
    "DEBIAN-1": told("DEBIAN-1", "Debian:12", "curl", "7.88.1-10+deb12u12"),
    "DEBIAN-2": told("DEBIAN-2", "Debian:12", "curl", summary="", details="nothing yet\nmore"),
    "GHSA-1": told(
        "GHSA-1", "PyPI", "urllib3", "2.0.7", "1.26.18", database_specific={"severity": "MODERATE"}
    ),
    "GHSA-2": told("GHSA-2", "PyPI", "urllib3", "1.26.5", database_specific={"severity": "HIGH"}),
    "GHSA-3": told("GHSA-3", "npm", "ansi-regex", "5.0.1", "4.1.1"),
    "GHSA-4": told("GHSA-4", "npm", "zod", "5", withdrawn="2026-01-01T00:00:00Z"),
    "PYSEC-5": told("PYSEC-5", "PyPI", "typing-extensions", "4.2"),
}
HITS = {"curl": ["DEBIAN-1", "DEBIAN-2"], "zod": ["GHSA-4"], "Typing_Extensions": ["PYSEC-5"]}


class Osv(ThreadingHTTPServer):
    """It tells of urllib3's advisories on two pages, and forgets those in ``lost``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.batches: list[list[dict[str, Any]]] = []
        self.lost: set[str] = set()
        self.reply = b""

    @property
    def settings(self) -> Settings:
        return Settings(
            advisories=Advisories(url=f"http://127.0.0.1:{self.server_port}/", seconds=30)
        )


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        osv = cast("Osv", self.server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, self.headers["Content-Type"]) == ("/v1/querybatch", "application/json")
        osv.batches.append(body["queries"])
        self.answer({"results": [hits(**query) for query in body["queries"]]})

    def do_GET(self) -> None:
        name = self.path.removeprefix("/v1/vulns/")
        self.answer(KNOWN[name], 404 if name in cast("Osv", self.server).lost else 200)

    def answer(self, said: object, status: int = 200) -> None:
        body = cast("Osv", self.server).reply or json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def hits(package: dict[str, str], version: str, page_token: str = "") -> dict[str, Any]:
    name = package["name"]
    if name == "urllib3":
        return (
            {"vulns": [{"id": "GHSA-2"}]}
            if page_token
            else {"vulns": [{"id": "GHSA-1"}], "next_page_token": "p2"}
        )
    found = ["GHSA-3"] if (name, version) == ("ansi-regex", "5.0.0") else HITS.get(name, [])
    return (
        {"vulns": [{"id": each, "modified": "2026-01-01T00:00:00Z"} for each in found]}
        if found
        else {}
    )


@pytest.fixture
def osv() -> Iterator[Osv]:
    with Osv() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(advisories, "BUILD", tmp_path)
    return tmp_path


def test_what_is_known_and_what_a_bump_would_fix(
    osv: Osv, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = advisories.report(osv.settings, INSIDE)
    assert rows
    assert json.loads((build / "advisories.json").read_text()) == rows
    first, second = osv.batches
    asked = [
        (each["package"]["ecosystem"], each["package"]["name"], each["version"]) for each in first
    ]
    assert asked == ASKED
    assert second == [
        {
            "package": {"ecosystem": "PyPI", "name": "urllib3"},
            "version": "1.26.4",
            "page_token": "p2",
        }
    ]
    assert {(row["id"], row["version"]): row["fixed"] for row in rows} == {
        ("DEBIAN-1", "7.88.1-10+deb12u1"): "7.88.1-10+deb12u12",
        ("DEBIAN-2", "7.88.1-10+deb12u1"): "",
        ("GHSA-1", "1.26.4"): "1.26.18",
        ("GHSA-2", "1.26.4"): "1.26.5",
        ("GHSA-3", "5.0.0"): "5.0.1",
        ("PYSEC-5", "4.1"): "4.2",
    }
    assert [row["summary"] for row in rows if row["id"] == "DEBIAN-2"] == ["nothing yet"]
    out = capsys.readouterr().out
    assert "6 advisories on 6 packages; newer versions fix 5" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "PyPI urllib3 1.26.4 1.26.18 GHSA-1 moderate" in lines
    assert "PyPI urllib3 1.26.4 1.26.5 GHSA-2 high" in lines


def test_more_packages_than_one_request_takes(osv: Osv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisories, "BATCH", 4)
    url = osv.settings.advisories.url.rstrip("/")
    found = advisories.find(url, advisories.packages_of(INSIDE), 30)
    assert [len(batch) for batch in osv.batches] == [4, 3]
    assert len(found) == 6


@pytest.mark.parametrize("fault", ["nobody", "404", "no JSON", "other JSON"])
def test_where_nobody_answers_that_is_said_and_nothing_fails(
    osv: Osv, build: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    settings = osv.settings
    if fault == "nobody":
        settings = Settings(advisories=Advisories(url=f"http://127.0.0.1:{free_port()}"))
    osv.lost = {"GHSA-1"} if fault == "404" else set()
    osv.reply = {"no JSON": b"<html>", "other JSON": b"[1]"}.get(fault, b"")
    (build / "advisories.json").write_text("[]")
    assert advisories.report(settings, INSIDE) is None
    assert f"no answer from {settings.advisories.url}" in capsys.readouterr().out
    assert not (build / "advisories.json").exists()


def test_nobody_is_asked_where_the_setting_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert advisories.report(Settings(advisories=Advisories(url="")), INSIDE) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("1.9", "1.10"),
        ("1.26.18", "2.0"),
        ("1.0~rc1", "1.0.1"),
        ("9", "1:0.1"),
        ("2.36-9+deb12u9", "2.36-9+deb12u10"),
    ],
)
def test_versions_are_ordered(lower: str, higher: str) -> None:
    assert advisories.order(lower) < advisories.order(higher)


def blocked_at(osv: Osv, severity: str) -> Settings:
    return Settings(advisories={**osv.settings.advisories.model_dump(), "block": severity})


def test_a_release_with_a_vulnerability_is_refused_at_the_severity_that_blocks(
    osv: Osv, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "read", lambda *_: INSIDE)
    monkeypatch.setattr(promote, "BUILD", build)
    monkeypatch.setattr(history, "FILE", build / "history.jsonl")
    engine = StubEngine("docker", "/d", "20.10", str(build / "engine.json"))
    engine.add("opencode-server:latest", "old")
    report = {"image": engine.add("", "new")["Id"], "ready_seconds": 1, "probes": []}
    for severity, refused in (("low", "2"), ("moderate", "2"), ("high", "1"), ("critical", "")):
        if refused:
            with pytest.raises(NotReleased, match=f"{refused} known .*GHSA-2 .urllib3"):
                promote.promote(blocked_at(osv, severity), engine, report)
            assert engine.tags()["latest"] == "old"
        else:
            promote.promote(blocked_at(osv, severity), engine, report)
            assert engine.tags()["latest"] == "new"
    osv.lost.add("GHSA-1")
    with pytest.raises(NotReleased, match="no service lists"):
        promote.check_advisories(blocked_at(osv, "critical"), engine, report)


def test_a_night_is_refused_too(osv: Osv, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "read", lambda *_: INSIDE)
    world = World(build)
    world.make()
    assert world.night() == "released"
    before = world.state()
    world.upstream, world.settings = NEW, blocked_at(osv, "high")
    assert world.night().startswith("NightFailed: release: 1 known vulnerabilities, high or worse")
    assert world.state() == before
    world.settings = blocked_at(osv, "critical")
    assert world.night() == "released"
