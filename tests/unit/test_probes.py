"""Each probe is seen to pass with a good answer and to fail with a bad one."""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import ca, layers, probes, process
from pipeline.container import Container, Server
from pipeline.engine import Engine
from pipeline.probes import IMAGE_PROBES, OFFLINE_PROBES, PROBES, Subject, Wrong, pinned_version
from pipeline.settings import ROOT, Settings
from tests.servers import Reply, free_port, http_server

ENGINE = Engine("podman", "/p", "4.3.1")
ALL = {probe.name: probe for probe in (*PROBES, *IMAGE_PROBES, *OFFLINE_PROBES)}

GOOD: dict[str, Any] = {
    "/config": {**json.loads((ROOT / "config.json").read_text()), "username": "root", "agent": {}},
    "/global/health": {"healthy": True, "version": pinned_version()},
    "/agent": [{"name": "build", "native": True}, {"name": "openagent"}, {"name": "Coder"}],
    "/experimental/tool/ids": ["bash", "env", "gemini_edit", "gemini_generate", "task_list_all"],
    "/command": [{"name": "init"}, {"name": "context/load"}],
    "/skill": [{"name": "task-management"}],
    "/doc": {"paths": {"/config": {"get": {}, "patch": {}}, "/session/{sessionID}": {"post": {}}}},
}
SIGNED_IN = "Basic " + base64.b64encode(b"opencode:pw").decode()
PACKAGE = {
    "agent/core/openagent.md": "---\nname: openagent\ndescription: x\n---\nText\n",
    "agents/coder.md": '---\ndescription: x\nname: "Coder"\n---\n',
    "agent/README.md": "No agent: it has no front matter.\n",
    "command/context/load.md": "Load it.\n",
    "skill/tasks/SKILL.md": "---\nname: task-management\n---\n",
    "tool/env.ts": "export default tool({})",
    "tool/gemini.ts": "export const edit = 1",
    "tool/task_list.ts": "export const all = 1",
    "tool/env/helper.ts": "",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for path, text in PACKAGE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.fixture
def answers() -> dict[str, Any]:
    """What the made-up OpenCode answers: path to JSON, or to a whole reply."""
    return deepcopy(GOOD)


@pytest.fixture
def server(answers: dict[str, Any]) -> Iterator[Server]:
    def respond(path: str, headers: Mapping[str, str]) -> Reply:
        if headers.get("Authorization") != SIGNED_IN and path not in answers.get("open", []):
            return 401, b""
        answer = answers.get(path, (404, b"{}"))
        return answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())

    with http_server(respond) as port:
        yield Server(f"http://127.0.0.1:{port}", "pw", 2)


class Inside(Container):
    """A container in which every command is answered by ``react``: its words to a code and what it prints."""

    react: Callable[[tuple[str, ...]], tuple[int, str]]

    def exec(self, *command: str, timeout: float = 30) -> process.Completed:
        del timeout
        code, said = self.react(command)
        return process.Completed(command, code, said, "", 0.0)


def inside(react: Callable[[tuple[str, ...]], tuple[int, str]]) -> Inside:
    made = Inside(ENGINE, "n", time.monotonic())
    made.react = react
    return made


@pytest.fixture
def subject(server: Server, package: Path) -> Subject:
    def react(command: tuple[str, ...]) -> tuple[int, str]:
        """Run the inventory for real, on the package of this test."""
        assert command[:3] == ("/usr/bin/python3", "-S", "-c")
        assert command[4] == "/opt/openagents/.opencode"
        argv = [sys.executable, "-S", "-c", command[3], str(package)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return Subject(Settings(), server, container=inside(react))


NATIVE = [{"name": "build", "native": True}]


@pytest.mark.parametrize(
    ("name", "good", "path", "bad", "words"),
    [
        ("config", "carries 4 keys", "/config", {"autoupdate": True}, r"does not carry \$schema, autoupdate, share"),
        ("config", "carries 4 keys", "/config", (500, b"boom"), "/config answered 500: boom"),
        ("config", "carries 4 keys", "/config", (200, b"<html>"), "not JSON: '<html>'"),
        ("health", f"opencode {pinned_version()}", "/global/health", {"healthy": False}, "says {'healthy': False}"),
        ("health", "healthy", "/global/health", {"healthy": True, "version": "0.0.1"}, "locks/npm pins"),
        ("agents", "2 agents, with all 2", "/agent", NATIVE, "2 of 2 agents are not listed: Coder, openagent"),
        ("agents", "2 agents", "/agent", [{"name": "Coder"}], "1 of 2 agents are not listed: openagent"),
        (
            "tools",
            "5 tools, OpenAgents' among them",
            "/experimental/tool/ids",
            ["bash", "env"],
            "of gemini, task_list is",
        ),
        (
            "tools",
            "5 tools",
            "/experimental/tool/ids",
            ["environment", "gemini", "task_list"],
            "no tool of env is listed",
        ),
        ("tools", "5 tools", "/experimental/tool/ids", ["env", "gemini_x", "task"], "no tool of task_list is listed"),
        ("commands", "with all 1", "/command", [{"name": "init"}], "commands are not listed: context/load"),
        ("skills", "1 skills", "/skill", [], "skills are not listed: task-management"),
        ("closed", "401 on each of 6 routes", "open", ["/session/x"], "3 routes: POST /session/.* answered 404"),
    ],
)
def test_a_question_to_the_server(
    subject: Subject, answers: dict[str, Any], name: str, good: str, path: str, bad: Any, words: str
) -> None:
    assert good in ALL[name].ask(subject)
    answers[path] = bad
    with pytest.raises(Wrong, match=words):
        ALL[name].ask(subject)


def test_every_question_to_a_server_has_a_bad_answer_above() -> None:
    mark = next(mark for mark in test_a_question_to_the_server.pytestmark if mark.name == "parametrize")
    assert {probe.name for probe in PROBES if probe.needs == "server"} <= {case[0] for case in mark.args[1]}


def test_of_a_server_that_is_not_ours_anything_listed_will_do(server: Server, answers: dict[str, Any]) -> None:
    subject = Subject(Settings(), server)
    assert ALL["agents"].ask(subject) == "2 agents"
    assert ALL["tools"].ask(subject) == "5 tools"
    answers["/agent"] = NATIVE
    with pytest.raises(Wrong, match="no agents are listed"):
        ALL["agents"].ask(subject)


def test_a_server_that_is_gone_is_a_wrong_answer() -> None:
    gone = Subject(Settings(), Server(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(Wrong, match="/config: ConnectionError"):
        ALL["config"].ask(gone)


IMAGE: dict[str, Any] = {
    "Id": "sha256:1",
    "Config": {
        "Env": ["PATH=/opt/venv/bin", *(f"{name}={value}" for name, value in probes.DEFAULTS.items())],
        "Entrypoint": ["tini", "--", *probes.COMMAND],
        "ExposedPorts": {"4096/tcp": {}},
        "Labels": {
            **{f"org.opencontainers.image.{name}": "x" for name in probes.LABELS},
            **dict.fromkeys((f"opencode-server.openagents.{name}" for name in ("kind", "source", "commit")), "x"),
        },
        "Healthcheck": {**probes.HEALTHCHECK, "Test": ["CMD-SHELL", f"[ -z x ] || y; {probes.HEALTH_COMMAND}"]},
    },
}


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("settings", "Env", ["FALKORDB_HOST=elsewhere"], "FALKORDB_HOST; FALKORDB_PORT; VALKEY_HOST"),
        ("settings", "Env", [*IMAGE["Config"]["Env"], "OPENCODE_SERVER_PASSWORD=x"], "PASSWORD is baked in"),
        ("settings", "Entrypoint", ["opencode"], "ENTRYPOINT"),
        ("settings", "Cmd", ["--port", "1"], "ENTRYPOINT"),
        ("settings", "ExposedPorts", None, "EXPOSE"),
        ("labels", "Labels", None, r"no label org\.opencontainers\.image\.title"),
        ("labels", "Labels", {**IMAGE["Config"]["Labels"], "opencode-server.openagents.commit": ""}, "commit; build"),
        ("health check", "Healthcheck", None, "the OCI format, which drops it"),
        ("health check", "Healthcheck", {**IMAGE["Config"]["Healthcheck"], "Interval": 1}, "with other Interval than"),
        ("health check", "Healthcheck", {**IMAGE["Config"]["Healthcheck"], "Test": ["true"]}, "with other command"),
    ],
)
def test_a_question_about_the_image(
    monkeypatch: pytest.MonkeyPatch, name: str, key: str, value: object, words: str
) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> process.Completed:
        asked.append(argv)
        return process.Completed(tuple(argv), len(asked) - 1, "", "unhealthy", 0.0)

    monkeypatch.setattr(process, "run", run)
    subject = Subject(Settings(), Server(""), ENGINE, deepcopy(IMAGE), inside(lambda _: (0, "")))
    assert ALL[name].ask(subject)
    if name == "health check":
        assert asked == [["/p", "healthcheck", "run", "n"]]
        with pytest.raises(Wrong, match="the health check failed: unhealthy"):
            ALL[name].ask(subject)
    assert subject.image
    subject.image["Config"][key] = value
    with pytest.raises(Wrong, match=words):
        ALL[name].ask(subject)


@pytest.mark.parametrize(
    ("name", "said", "answer", "bad"),
    [
        ("packages", "/opt/venv 43", "6 import, of 43 in /opt/venv", (0, "/usr 43")),
        ("packages", "/opt/venv 43", "6 import", (1, "No module named 'httpx'")),
        (
            "programs",
            "rclone v1\nredis-cli 7\ngit version 2\nb2sdk 2\ncron 3\nv20",
            "rclone v1, redis 7, git 2, b2sdk 2",
            (127, "x"),
        ),
        ("status", "{}", "well", (1, "server: down")),
    ],
)
def test_a_question_that_is_asked_inside(name: str, said: str, answer: str, bad: tuple[int, str]) -> None:
    assert answer in ALL[name].ask(Subject(Settings(), Server(""), ENGINE, IMAGE, inside(lambda _: (0, said))))
    with pytest.raises(Wrong):
        ALL[name].ask(Subject(Settings(), Server(""), ENGINE, IMAGE, inside(lambda _: bad)))


def test_secrets_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    looked_for: list[dict[str, str]] = []

    def check(_engine: Engine, _image: dict[str, Any], extra: dict[str, str]) -> tuple[list[str], int]:
        looked_for.append(extra)
        return found, 8

    monkeypatch.setattr(layers, "check", check)
    monkeypatch.setattr(ca, "extra", lambda _: {"a": "named now"})
    monkeypatch.setattr(ca, "staged", lambda: {"b": "named when it was built"})
    subject = Subject(Settings(), Server(""), ENGINE, IMAGE)
    assert ALL["secrets"].ask(subject) == "none in 8 layers and the history"
    found += ["/root/.npmrc", "/app/.env"]
    with pytest.raises(Wrong, match=r"^/root/\.npmrc; /app/\.env$"):
        ALL["secrets"].ask(subject)
    assert looked_for == [{"a": "named now", "b": "named when it was built"}] * 2


GOOD_STATUS = (
    "Root: ro\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\nUid:\t1000\t1000\t1000\t1000\n"
)


@pytest.mark.parametrize(
    ("status", "bounds", "words"),
    [
        (GOOD_STATUS, {"Memory": 1, "PidsLimit": 1}, ""),
        (GOOD_STATUS.replace("ro", "rw"), {"Memory": 1, "PidsLimit": 1}, "Root: rw"),
        (GOOD_STATUS.replace("CapEff:\t0", "CapEff:\t2"), {"Memory": 1, "PidsLimit": 1}, "CapEff: 2"),
        (GOOD_STATUS.replace("CapBnd:\t0", "CapBnd:\t2"), {"Memory": 1, "PidsLimit": 1}, "CapBnd: 2"),
        (GOOD_STATUS.replace("Privs:\t1", "Privs:\t0"), {"Memory": 1, "PidsLimit": 1}, "NoNewPrivs: 0"),
        (GOOD_STATUS.replace("1000", "0"), {"Memory": 1, "PidsLimit": 1}, "it is root"),
        (GOOD_STATUS, {"Memory": 0, "PidsLimit": 1}, "no bounds"),
        (GOOD_STATUS, {"Memory": 1, "PidsLimit": 0}, "no bounds"),
        ("", {"Memory": 1, "PidsLimit": 1}, "CapEff"),
    ],
)
def test_a_container_that_is_not_hardened(
    monkeypatch: pytest.MonkeyPatch, status: str, bounds: dict[str, int], words: str
) -> None:
    monkeypatch.setattr(
        process, "run", lambda argv, **_: process.Completed(tuple(argv), 0, json.dumps(bounds), "", 0.0)
    )
    subject = Subject(Settings(), Server(""), ENGINE, IMAGE, inside(lambda _: (0, status)))
    if not words:
        assert ALL["hardened"].ask(subject) == "read-only, no capabilities, not root, in bounds"
        return
    with pytest.raises(Wrong, match=f"not hardened: .*{words}"):
        ALL["hardened"].ask(subject)


@pytest.mark.parametrize("reply", [(0, json.dumps(NATIVE)), (22, "")])
def test_without_a_network_openagents_is_there_too(reply: tuple[int, str]) -> None:
    listed = [(0, json.dumps(GOOD["/agent"])), reply]
    alone = inside(lambda command: listed.pop(0) if command[0] == "curl" else (0, ""))
    subject = Subject(Settings(), Server(""), ENGINE, IMAGE, offline=alone)
    assert "with --network none" in ALL["offline"].ask(subject)
    with pytest.raises(Wrong, match="no agents of OpenAgents without a network"):
        ALL["offline"].ask(subject)


def test_sigterm_must_end_it_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> process.Completed:
        asked.append(argv)
        return process.Completed(tuple(argv), 0, "", "", 0.0)

    monkeypatch.setattr(process, "run", run)
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(probes, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    ended = {"Running": False, "FinishedAt": "2026-01-01T00:00:00.123456789Z"}
    late = {"Running": False, "FinishedAt": "2999-01-01T00:00:00.5+00:00"}
    up = {"Running": True}
    states = iter([up, ended, up, up, up, late, up, *[up] * 50])
    alone = inside(lambda _: (0, ""))
    monkeypatch.setattr(Inside, "state", lambda _: next(states))
    subject = Subject(Settings(), Server(""), ENGINE, IMAGE, offline=alone)
    assert ALL["stops"].ask(subject).startswith("ended")
    assert asked == [["/p", "kill", "--signal", "TERM", "n"]]
    for _ in ("ended after two seconds, by the engine's clock too", "never ends"):
        with pytest.raises(Wrong, match="after SIGTERM: something ignores signals as PID 1"):
            ALL["stops"].ask(subject)


@pytest.mark.parametrize(("states", "code"), [([False], 0), ([True, False], 1)])
def test_a_server_that_had_ended_by_itself_does_not_pass_for_one_that_stops(
    monkeypatch: pytest.MonkeyPatch, states: list[bool], code: int
) -> None:
    monkeypatch.setattr(process, "run", lambda argv, **_: process.Completed(tuple(argv), code, "", "", 0.0))
    ended = iter([*states, *[False] * 9])
    monkeypatch.setattr(Inside, "state", lambda _: {"Running": next(ended)})
    subject = Subject(Settings(), Server(""), ENGINE, IMAGE, offline=inside(lambda _: (0, "")))
    with pytest.raises(Wrong, match="it had ended before it was told to"):
        ALL["stops"].ask(subject)
