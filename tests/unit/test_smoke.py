"""The smoke test from end to end against a made-up OpenCode, its reports, and which tags move."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from invoke.context import Context

import tasks
from pipeline.core import process
from pipeline.core.errors import EngineBroken, NoSuchImage, ServerDied, ServerSilent, SmokeFailed
from pipeline.core.settings import ROOT, Settings
from pipeline.engines import detect
from pipeline.engines.container import SECRET
from pipeline.engines.engine import Engine
from pipeline.release import history, promote
from pipeline.smoke import image_probes, run, server_probes
from pipeline.smoke.probe import Probe, ProbeFailed, ProbeLate
from pipeline.smoke.run import Result, smoke_url
from pipeline.smoke.server_probes import pinned_version
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
    for module in (run, promote):
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
    assert names == ["ready", "config", "health", "tools", "agents", "commands", "skills"]
    out = capsys.readouterr().out
    assert "smoke: 7 of 7 probes passed" in out
    assert out.count("ok    ") == 7
    assert sorted(path.name for path in build.iterdir()) == ["smoke.json"]


def test_a_failed_probe_is_in_every_report_and_hides_no_other(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opencode(skill=[], agent={"not": "a list"}) as url, pytest.raises(SmokeFailed) as caught:
        smoke_url(Settings(), url)
    assert caught.value.what == "2 of 7 probes failed: agents, skills"
    report = json.loads((build / "smoke.json").read_text())
    failed = {probe["name"]: probe["detail"] for probe in report["probes"] if not probe["passed"]}
    assert report["passed"] is False
    # The answer of the wrong shape trips the probe itself, and that is its answer.
    assert failed.keys() == {"agents", "skills"}
    assert failed["agents"].startswith("AttributeError: ")
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


@pytest.mark.parametrize(
    ("trouble", "detail"),
    [
        (ProbeFailed("not that"), "not that"),
        (KeyError("name"), "KeyError: 'name'"),
        (ServerDied("it ended", "See.", "its log"), "its log\nServerDied: it ended\n  -> See."),
    ],
)
def test_whatever_a_probe_trips_over_is_its_answer(trouble: Exception, detail: str) -> None:
    def trip(_: object) -> str:
        raise trouble

    answer = run.run_probe(Probe("p", trip), None)
    assert (answer.passed, answer.detail, answer.name) == (False, detail, "p")


LATE = [
    subprocess.TimeoutExpired("podman", 30),
    requests.ReadTimeout("no answer in 5 s"),
    ServerSilent("it did not answer", "See."),
    ProbeLate("the check took 8 s"),
]


@pytest.mark.parametrize("error", LATE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("failures", [1, 2])
def test_a_late_probe_is_run_once_more(error: Exception, failures: int) -> None:
    calls: list[object] = []

    def late(subject: object) -> str:
        calls.append(subject)
        if len(calls) <= failures:
            raise error
        return "answers"

    result = run.run_probe(Probe("p", late), "subject")
    assert calls == ["subject"] * 2
    assert result.passed is (failures == 1)
    assert result.detail.startswith("answers") is (failures == 1)
    assert "second attempt; the first was late: " in result.detail


def test_independent_probes_run_together() -> None:
    together = threading.Barrier(3, timeout=10)

    def meet(_: object) -> str:
        together.wait()
        return "met"

    with run._background(ENGINE) as start:
        calls = [start(run.run_probe, Probe(str(n), meet), None) for n in range(3)]
        answers = [call.result() for call in calls]
    assert [(answer.name, answer.passed) for answer in answers] == [
        ("0", True),
        ("1", True),
        ("2", True),
    ]


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
                    (
                        value
                        for value in (*self.tags.values(), *OTHERS)
                        if f"sha256:{value[0]}" == source
                    ),
                    None,
                )
                assert moved, source
                self.tags[name.removeprefix("opencode-server:")] = moved
                self.moves += 1
        return process.Completed(tuple(argv), code, out, "", 0.0)


def inspection(identity: str, kind: str) -> dict[str, Any]:
    labels = {"opencode-server.openagents.kind": kind} if kind else None
    return {"Id": f"sha256:{identity}", "Size": 1, "Config": {"Labels": labels}}


REAL = "openagents"
OTHERS = [("new", REAL)]
ENGINE = Engine("docker", "/d", "20.10")


@pytest.fixture
def candidate(monkeypatch: pytest.MonkeyPatch) -> Tags:
    tags = Tags(candidate=("new", REAL), latest=("old", REAL), other=("other", REAL))
    monkeypatch.setattr(process, "run", tags)
    monkeypatch.setattr(run, "remove_leftovers", lambda _: 0)
    monkeypatch.setattr(detect, "of", lambda _: ENGINE)
    return tags


Asked = Callable[[str], None]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Let the image answer one probe well, or not."""

    def answer(word: str) -> None:
        passed = word == "passes"
        monkeypatch.setattr(
            run,
            "probe_image",
            lambda *_, **__: [Result("a", passed=passed, seconds=0, detail="")],
        )

    return answer


def test_only_a_candidate_that_passed_becomes_latest(
    candidate: Tags, asked: Asked, build: Path
) -> None:
    asked("fails")
    with pytest.raises(SmokeFailed):
        tasks.smoke(Context())
    asked("passes")
    tasks.smoke(Context(), image="opencode-server:other")
    tasks.smoke(Context(), dry_run=True)
    assert run.smoke(Settings(), ENGINE)["image"] == "sha256:new"
    assert candidate.moves == 0
    tasks.smoke(Context())
    assert [candidate.tags[name][0] for name in ("candidate", "latest", "previous")] == [
        "new",
        "new",
        "old",
    ]
    assert json.loads((build / "smoke.json").read_text())["target"] == "opencode-server:candidate"


def test_an_image_that_is_not_here(candidate: Tags) -> None:
    del candidate.tags["candidate"]
    with pytest.raises(NoSuchImage, match="docker has no image opencode-server:candidate"):
        run.smoke(Settings(), ENGINE)


def test_the_image_is_asked_while_two_containers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, log = tmp_path / "podman", tmp_path / "log"
    for group in ("READY", "STARTING", "OFFLINE"):
        probe = Probe(group, lambda subject: subject.container.name)
        monkeypatch.setattr(image_probes, group, (probe,))
    monkeypatch.setattr(server_probes, "PROBES", ())
    image = inspection("1", REAL)
    with opencode() as url:
        program.write_text(
            f"#!/bin/sh\necho $* >> {log}\n[ $1 != port ] || echo 127.0.0.1:{url.rpartition(':')[2]}\n"
        )
        program.chmod(0o755)
        answers = run.probe_image(Settings(), Engine("podman", str(program), "4"), image)
    assert [answer.name for answer in answers] == [
        "ready",
        "STARTING",
        "READY",
        "OFFLINE",
    ]
    assert all(answer.passed for answer in answers)
    assert answers[0].seconds > 0
    published, _, alone = (answer.detail for answer in answers[1:])
    assert published != alone
    lines = log.read_text().splitlines()
    assert {line.split()[-1] for line in lines if line.startswith("rm ")} == {published, alone}
    (unpublished,) = (line for line in lines if "--network none" in line)
    assert f"--name {alone} " in unpublished
    assert "/config returns 200" in capsys.readouterr().out


def test_when_the_server_cannot_start_the_other_container_is_not_waited_for(tmp_path: Path) -> None:
    program, log = tmp_path / "podman", tmp_path / "log"
    # A command inside runs until its container is removed.
    program.write_text(f"""#!/bin/sh
echo "$*" >> {log}
case "$*" in
    *--publish*) echo refused >&2; exit 125 ;;
    ps*) sed -n 's/^run .*--name \\([^ ]*\\) .*/\\1/p' {log} ;;
    exec*) until grep -q "^rm .* $2$" {log}; do sleep 0.05; done; exit 1 ;;
esac
""")
    program.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(EngineBroken):
        run.probe_image(Settings(), Engine("podman", str(program), "4"), inspection("1", REAL))
    assert time.monotonic() - began < 20
    lines = log.read_text().splitlines()
    started = {line.partition("--name ")[2].split()[0] for line in lines if line.startswith("run ")}
    assert len(started) == 2
    assert {line.split()[-1] for line in lines if line.startswith("rm ")} == started
