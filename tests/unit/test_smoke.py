"""The smoke test from end to end against a made-up OpenCode, its reports, and which tags move."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pipeline import history, probes, process, release, smoke
from pipeline.container import SECRET, Server
from pipeline.engine import Engine
from pipeline.errors import EngineBroken, NoSuchImage, ServerDied, ServerSilent, SmokeFailed
from pipeline.probes import Probe, Subject, Wrong, pinned_version
from pipeline.settings import ROOT, Settings
from pipeline.smoke import Answer, smoke_url
from tests.servers import free_port, http_server

OPENCODE: dict[str, Any] = {
    "/config": json.loads((ROOT / "config.json").read_text()),
    "/global/health": {"healthy": True, "version": pinned_version()},
    "/agent": [{"name": "openagent"}],
    "/experimental/tool/ids": ["env"],
    "/command": [{"name": "commit"}],
    "/skill": [{"name": "tasks"}],
}


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (smoke, release):
        monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(history, "FILE", tmp_path / "history.jsonl")
    monkeypatch.delenv(SECRET, raising=False)
    return tmp_path / "build"


@contextmanager
def opencode(**other: Any) -> Iterator[str]:
    replies = {path: json.dumps(answer).encode() for path, answer in OPENCODE.items()}
    replies |= {f"/{path}": json.dumps(answer).encode() for path, answer in other.items()}
    with http_server(lambda path, _: (200, replies[path])) as port:
        yield f"http://127.0.0.1:{port}"


def test_a_server_that_already_runs(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opencode() as url:
        report = smoke_url(Settings(), f"{url}/")
    assert report == json.loads((build / "smoke.json").read_text())
    assert (report["passed"], report["target"]) == (True, f"{url}/")
    names = [probe["name"] for probe in report["probes"]]
    assert names == ["config", "health", "agents", "tools", "commands", "skills"]
    suite = ET.parse(build / "smoke.xml").getroot()  # noqa: S314 -- ours
    assert (suite.get("tests"), suite.get("failures")) == ("6", "0")
    assert [case.get("name") for case in suite] == names
    out = capsys.readouterr().out
    assert "smoke: 6 of 6 probes passed" in out
    assert out.count("ok    ") == 6
    assert sorted(path.name for path in build.iterdir()) == ["smoke.json", "smoke.xml"]


def test_a_failed_probe_is_in_every_report_and_hides_no_other(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opencode(skill=[], agent={"not": "a list"}) as url, pytest.raises(SmokeFailed) as caught:
        smoke_url(Settings(), url)
    assert caught.value.what == "2 of 6 probes failed: agents, skills"
    report = json.loads((build / "smoke.json").read_text())
    failed = {probe["name"]: probe["detail"] for probe in report["probes"] if not probe["passed"]}
    assert report["passed"] is False
    # The answer of the wrong shape trips the probe itself, and that is its answer.
    assert failed.keys() == {"agents", "skills"}
    assert failed["agents"].startswith("AttributeError: ")
    suite = ET.parse(build / "smoke.xml").getroot()  # noqa: S314 -- ours
    assert suite.get("failures") == "2"
    failures = {case.get("name"): case.findtext("failure") for case in suite if case.find("failure") is not None}
    assert failures == failed
    assert "FAIL  skills" in capsys.readouterr().out


def test_a_password_in_the_url_is_in_no_report(build: Path) -> None:
    with opencode() as url:
        smoke_url(Settings(), url.replace("http://", "http://me:hidden@"))
    assert "hidden" not in (build / "smoke.json").read_text()


def test_nothing_is_asked_of_a_server_that_is_never_ready(build: Path) -> None:
    settings = Settings(smoke={"ready_seconds": 0.2})
    with pytest.raises(ServerSilent):
        smoke_url(settings, f"http://127.0.0.1:{free_port()}")
    assert not build.exists()


def test_junit_is_xml_whatever_a_probe_said(build: Path) -> None:
    said = '\x1b[31mred\x1b[0m & <tag> "quoted" \0 \ufffe ünï\n\tnext'
    build.mkdir()
    smoke._write_junit([Answer("a", passed=False, seconds=1.0, detail=said)], 1.5)
    suite = ET.parse(build / "smoke.xml").getroot()  # noqa: S314 -- ours
    text = suite.findtext("testcase/failure")
    assert text
    assert '& <tag> "quoted"' in text
    assert text.endswith("ünï\n\tnext")


@pytest.mark.parametrize(
    ("trouble", "detail"),
    [
        (Wrong("not that"), "not that"),
        (KeyError("name"), "KeyError: 'name'"),
        (subprocess.TimeoutExpired("podman", 30), "no answer within 30 s"),
        (ServerDied("it ended", "See.", "its log"), "it ended\nits log"),
    ],
)
def test_whatever_a_probe_trips_over_is_its_answer(trouble: Exception, detail: str) -> None:
    def trip(_: Subject) -> str:
        raise trouble

    answer = smoke._answer(Probe("p", "server", trip), Subject(Settings(), Server("")))
    assert (answer.passed, answer.detail, answer.name) == (False, detail, "p")


def test_independent_probes_run_together() -> None:
    together = threading.Barrier(3, timeout=10)

    def meet(_: Subject) -> str:
        together.wait()
        return "met"

    answers = smoke._ask([Probe(str(n), "server", meet) for n in range(3)], Subject(Settings(), Server("")))
    assert [(answer.name, answer.passed) for answer in answers] == [("0", True), ("1", True), ("2", True)]


class Tags:
    """Stands for process.run: an engine that only knows images by their tags; tag to (ID, kind)."""

    def __init__(self, **tags: tuple[str, str]) -> None:
        self.tags = dict(tags)
        self.moves = 0

    def __call__(self, argv: list[str], **_: Any) -> process.Completed:
        code, out = 0, ""
        match argv[1:]:
            case ["image", "inspect", name]:
                by_id = {f"sha256:{value[0]}": value for value in (*self.tags.values(), *OTHERS)}
                found = self.tags.get(name.removeprefix("opencode-server:")) or by_id.get(name)
                code, out = (0, json.dumps([inspection(*found)])) if found else (1, "")
            case ["tag", source, name]:
                moved = next(
                    (value for value in (*self.tags.values(), *OTHERS) if f"sha256:{value[0]}" == source), None
                )
                assert moved, source
                self.tags[name.removeprefix("opencode-server:")] = moved
                self.moves += 1
        return process.Completed(tuple(argv), code, out, "", 0.0)


def inspection(identity: str, kind: str) -> dict[str, Any]:
    labels = {"opencode-server.openagents.kind": kind} if kind else None
    return {"Id": f"sha256:{identity}", "Size": 1, "Config": {"Labels": labels}}


REAL, STARTER = "openagents", "starter"
OTHERS = [("new", REAL), ("new", STARTER)]
ENGINE = Engine("docker", "/d", "20.10")


@pytest.fixture
def candidate(monkeypatch: pytest.MonkeyPatch) -> Tags:
    tags = Tags(candidate=("new", REAL), latest=("old", REAL), other=("other", REAL))
    monkeypatch.setattr(process, "run", tags)
    monkeypatch.setattr(smoke, "remove_leftovers", lambda _: 0)
    return tags


Asked = Callable[[str], None]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Let the image answer one probe well, or not."""

    def answer(word: str) -> None:
        passed = word == "passes"
        monkeypatch.setattr(
            smoke, "ask_image", lambda *_, **__: ([Answer("a", passed=passed, seconds=0, detail="")], 1.0)
        )

    return answer


def test_only_a_candidate_that_passed_becomes_latest(candidate: Tags, asked: Asked, build: Path) -> None:
    asked("fails")
    with pytest.raises(SmokeFailed):
        smoke.smoke(Settings(), ENGINE)
    assert candidate.moves == 0
    asked("passes")
    assert smoke.smoke(Settings(), ENGINE, "opencode-server:other")["passed"]
    assert smoke.smoke(Settings(), ENGINE, dry_run=True) == {}
    assert candidate.moves == 0
    smoke.smoke(Settings(), ENGINE)
    assert [candidate.tags[name][0] for name in ("candidate", "latest", "previous")] == ["new", "new", "old"]
    assert json.loads((build / "smoke.json").read_text())["target"] == "opencode-server:candidate"


def test_an_image_that_is_not_here(candidate: Tags) -> None:
    del candidate.tags["candidate"]
    with pytest.raises(NoSuchImage, match="docker has no image opencode-server:candidate"):
        smoke.smoke(Settings(), ENGINE)


def test_the_image_is_asked_while_two_containers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, log = tmp_path / "podman", tmp_path / "log"
    for group in ("PROBES", "IMAGE_PROBES", "OFFLINE_PROBES"):
        probe = Probe(group, "image", lambda subject: subject.container.name if subject.container else "none")
        monkeypatch.setattr(probes, group, (probe,))
    image = inspection("1", REAL)
    with opencode() as url:
        program.write_text(f"#!/bin/sh\necho $* >> {log}\n[ $1 != port ] || echo 127.0.0.1:{url.rpartition(':')[2]}\n")
        program.chmod(0o755)
        answers, ready = smoke.ask_image(Settings(), Engine("podman", str(program), "4"), image)
    assert [answer.name for answer in answers] == ["ready", "PROBES", "IMAGE_PROBES", "OFFLINE_PROBES"]
    assert all(answer.passed for answer in answers)
    assert ready > 0
    published, _, alone = (answer.detail for answer in answers[1:])
    assert published != alone
    lines = log.read_text().splitlines()
    assert {line.split()[-1] for line in lines if line.startswith("rm ")} == {published, alone}
    assert [line.split()[2] for line in lines if "--network none" in line] == [alone]
    assert "/config answers 200" in capsys.readouterr().out


def test_when_the_server_cannot_start_the_other_container_is_not_waited_for(tmp_path: Path) -> None:
    program, log = tmp_path / "podman", tmp_path / "log"
    # A command inside runs until its container is removed.
    program.write_text(f"""#!/bin/sh
echo "$*" >> {log}
case "$*" in
    *--publish*) echo refused >&2; exit 125 ;;
    ps*) sed -n 's/^run --name \\([^ ]*\\) .*/\\1/p' {log} ;;
    exec*) until grep -q "^rm .* $2$" {log}; do sleep 0.05; done; exit 1 ;;
esac
""")
    program.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(EngineBroken):
        smoke.ask_image(Settings(), Engine("podman", str(program), "4"), inspection("1", REAL))
    assert time.monotonic() - began < 20
    lines = log.read_text().splitlines()
    started = {line.split()[2] for line in lines if line.startswith("run ")}
    assert len(started) == 2
    assert {line.split()[-1] for line in lines if line.startswith("rm ")} == started
