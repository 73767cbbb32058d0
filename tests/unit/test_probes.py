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
import requests

from pipeline.core import process
from pipeline.core.settings import ROOT, Settings
from pipeline.engines.container import Container, Server
from pipeline.engines.engine import Engine
from pipeline.image import secret_scan
from pipeline.inputs import ca
from pipeline.smoke import image_probes
from pipeline.smoke.image_probes import OFFLINE, READY, STARTING, ImageSubject
from pipeline.smoke.probe import ProbeFailed
from pipeline.smoke.server_probes import PROBES, ServerSubject, pinned_version, read_inventory
from tests.servers import Reply, free_port, http_server

ENGINE = Engine("podman", "/p", "4.3.1")
ALL = {probe.name: probe for probe in (*PROBES, *STARTING, *READY, *OFFLINE)}

GOOD: dict[str, Any] = {
    "/config": {
        **json.loads((ROOT / "config.json").read_text()),
        "username": "root",
        "agent": {},
    },
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
        credentials = headers.get("Authorization", "")
        user = base64.b64decode(credentials.removeprefix("Basic ")).decode().partition(":")[0]
        if credentials != SIGNED_IN and answers.get("open", {}).get(path) != user:
            return 401, b""
        answer = answers.get(path, (404, b"{}"))
        return answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())

    with http_server(respond) as port:
        yield Server(f"http://127.0.0.1:{port}", "pw", 2)


class Inside(Container):
    """A container in which every command is answered by ``react``: its words to a code and what it
    prints.
    """

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
def subject(server: Server, package: Path) -> ServerSubject:
    def react(command: tuple[str, ...]) -> tuple[int, str]:
        """Run the inventory for real, on the package of this test."""
        assert command[:3] == ("/usr/bin/python3", "-S", "-c")
        assert command[4] == "/opt/openagents/.opencode"
        argv = [sys.executable, "-S", "-c", command[3], str(package)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return ServerSubject(server, lambda: read_inventory(inside(react)))


NATIVE = [{"name": "build", "native": True}]


@pytest.mark.parametrize(
    ("name", "good", "path", "bad", "words"),
    [
        (
            "config",
            "has all 6 settings",
            "/config",
            {"autoupdate": True},
            r"differs from config.json in \$schema, autoupdate, share, plugin, permission",
        ),
        ("config", "has all 6 settings", "/config", (500, b"boom"), "/config returned 500: boom"),
        (
            "health",
            f"OpenCode {pinned_version()}",
            "/global/health",
            {"healthy": False},
            "returned {'healthy': False}, expected",
        ),
        (
            "health",
            "healthy",
            "/global/health",
            {"healthy": True, "version": "0.0.1"},
            "returned .*0.0.1.*, expected",
        ),
        (
            "agents",
            "2 agents, including all 2 of OpenAgents",
            "/agent",
            NATIVE,
            "2 of 2 agents are not listed: Coder, openagent",
        ),
        (
            "agents",
            "2 agents",
            "/agent",
            [{"name": "Coder"}],
            "1 of 2 agents are not listed: openagent",
        ),
        (
            "tools",
            "5 tools, including all of OpenAgents",
            "/experimental/tool/ids",
            ["bash", "env"],
            "no tool is listed for gemini, task_list",
        ),
        (
            "tools",
            "5 tools",
            "/experimental/tool/ids",
            ["environment", "gemini", "task_list"],
            "no tool is listed for env",
        ),
        (
            "tools",
            "5 tools",
            "/experimental/tool/ids",
            ["env", "gemini_x", "task"],
            "no tool is listed for task_list",
        ),
        (
            "commands",
            "including all 1",
            "/command",
            [{"name": "init"}],
            "commands are not listed: context/load",
        ),
        ("skills", "1 skills", "/skill", [], "skills are not listed: task-management"),
    ],
)
def test_a_question_to_the_server(
    subject: ServerSubject,
    answers: dict[str, Any],
    name: str,
    good: str,
    path: str,
    bad: Any,
    words: str,
) -> None:
    assert good in ALL[name].check(subject)
    answers[path] = bad
    with pytest.raises(ProbeFailed, match=words):
        ALL[name].check(subject)


def test_every_question_to_a_server_has_a_bad_answer_above() -> None:
    mark = next(
        mark for mark in test_a_question_to_the_server.pytestmark if mark.name == "parametrize"
    )
    assert {probe.name for probe in PROBES} <= {case[0] for case in mark.args[1]}


@pytest.mark.parametrize("user", ["", "opencode", "nobody"])
def test_a_route_that_needs_no_password(server: Server, answers: dict[str, Any], user: str) -> None:
    container = inside(lambda _: (0, ""))
    container.server = server
    subject = ImageSubject(Settings(), IMAGE, container)
    assert ALL["authentication"].check(subject) == "401 on each of 6 routes"
    answers["open"] = {"/session/x": user}
    with pytest.raises(ProbeFailed, match=f"POST /session/.* returned 404 to {user or 'no user'}"):
        ALL["authentication"].check(subject)


def test_of_a_server_that_is_not_ours_anything_listed_will_do(
    server: Server, answers: dict[str, Any]
) -> None:
    subject = ServerSubject(server)
    assert ALL["agents"].check(subject) == "2 agents, including all 0 of OpenAgents"
    assert ALL["tools"].check(subject) == "5 tools, including all of OpenAgents"
    answers["/agent"] = NATIVE
    with pytest.raises(ProbeFailed, match="no agents are listed"):
        ALL["agents"].check(subject)


def test_a_server_that_is_gone_is_a_wrong_answer() -> None:
    gone = ServerSubject(Server(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(requests.ConnectionError):
        ALL["config"].check(gone)


IMAGE: dict[str, Any] = {
    "Id": "sha256:1",
    "Config": {
        "Env": [
            "PATH=/opt/venv/bin",
            *(f"{name}={value}" for name, value in image_probes.DEFAULTS.items()),
        ],
        "Entrypoint": ["tini", "--", *image_probes.COMMAND],
        "ExposedPorts": {"4096/tcp": {}},
        "Labels": {
            **dict.fromkeys(image_probes.LABELS, "x"),
        },
        "Healthcheck": {
            **image_probes.HEALTHCHECK,
            "Test": ["CMD-SHELL", f"[ -z x ] || y; {image_probes.HEALTH_COMMAND}"],
        },
    },
}


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        (
            "settings",
            "Env",
            ["FALKORDB_HOST=elsewhere"],
            "FALKORDB_HOST; FALKORDB_PORT; VALKEY_HOST",
        ),
        (
            "settings",
            "Env",
            [*IMAGE["Config"]["Env"], "OPENCODE_SERVER_PASSWORD=x"],
            "PASSWORD is set in the image",
        ),
        ("settings", "Entrypoint", ["opencode"], "ENTRYPOINT"),
        ("settings", "Cmd", ["--port", "1"], "ENTRYPOINT"),
        ("settings", "ExposedPorts", None, "EXPOSE"),
        ("labels", "Labels", None, r"missing labels: org\.opencontainers\.image\.title"),
        (
            "labels",
            "Labels",
            {**IMAGE["Config"]["Labels"], "opencode-server.openagents.commit": ""},
            "commit; build",
        ),
        ("health check", "Healthcheck", None, "the OCI format drops it"),
        (
            "health check",
            "Healthcheck",
            {**IMAGE["Config"]["Healthcheck"], "Interval": 1},
            "differs from the contract: .*'Interval': 1,",
        ),
        (
            "health check",
            "Healthcheck",
            {**IMAGE["Config"]["Healthcheck"], "Test": ["true"]},
            "differs from the contract: .*true",
        ),
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
    subject = ImageSubject(Settings(), deepcopy(IMAGE), inside(lambda _: (0, "")))
    assert ALL[name].check(subject)
    if name == "health check":
        assert asked == [["/p", "healthcheck", "run", "n"]]
        with pytest.raises(ProbeFailed, match="the health check failed: unhealthy"):
            ALL[name].check(subject)
    assert subject.image
    subject.image["Config"][key] = value
    with pytest.raises(ProbeFailed, match=words):
        ALL[name].check(subject)


@pytest.mark.parametrize(
    ("name", "said", "answer", "bad"),
    [
        ("packages", "/opt/venv 43", "6 can be imported, of 43 in /opt/venv", (0, "/usr 43")),
        ("packages", "/opt/venv 43", "6 can be imported", (1, "No module named 'httpx'")),
        (
            "programs",
            "rclone v1\nredis-cli 7\ngit version 2\nb2sdk 2\ncron 3\nv20",
            "rclone v1, redis-cli 7, git version 2, b2sdk 2",
            (127, "x"),
        ),
        ("status", "{}", "healthy", (1, "server: down")),
    ],
)
def test_a_question_that_is_asked_inside(
    name: str, said: str, answer: str, bad: tuple[int, str]
) -> None:
    assert answer in ALL[name].check(ImageSubject(Settings(), IMAGE, inside(lambda _: (0, said))))
    with pytest.raises(ProbeFailed):
        ALL[name].check(ImageSubject(Settings(), IMAGE, inside(lambda _: bad)))


def test_secrets_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    looked_for: list[dict[str, str]] = []

    def check(
        _engine: Engine, _image: dict[str, Any], extra: dict[str, str]
    ) -> tuple[list[str], int]:
        looked_for.append(extra)
        return found, 8

    monkeypatch.setattr(secret_scan, "check", check)
    monkeypatch.setattr(ca, "extra", lambda _: {"a": "named now"})
    monkeypatch.setattr(ca, "staged", lambda: {"b": "named when it was built"})
    subject = ImageSubject(Settings(), IMAGE, inside(lambda _: (0, "")))
    assert ALL["secrets"].check(subject) == "none in 8 layers and the history"
    found += ["/root/.npmrc", "/app/.env"]
    with pytest.raises(ProbeFailed, match=r"^/root/\.npmrc; /app/\.env$"):
        ALL["secrets"].check(subject)
    assert looked_for == [{"a": "named now", "b": "named when it was built"}] * 2


LIMITS = {"Memory": 1, "PidsLimit": 1}


@pytest.mark.parametrize(
    ("changed", "limits", "words"),
    [
        ({}, LIMITS, ""),
        ({"Root": "rw"}, LIMITS, "Root rw"),
        ({"CapEff": "2" + "0" * 15}, LIMITS, "CapEff 2"),
        ({"CapBnd": "2" + "0" * 15}, LIMITS, "CapBnd 2"),
        ({"NoNewPrivs": "0"}, LIMITS, "NoNewPrivs 0"),
        ({"Uid": "0"}, LIMITS, "runs as root"),
        ({}, {"Memory": 0, "PidsLimit": 1}, "no limits"),
        ({}, {"Memory": 1, "PidsLimit": 0}, "no limits"),
    ],
)
def test_a_container_that_is_not_hardened(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], limits: dict[str, int], words: str
) -> None:
    monkeypatch.setattr(
        process,
        "run",
        lambda argv, **_: process.Completed(tuple(argv), 0, json.dumps(limits), "", 0.0),
    )
    found = {
        "Root": "ro",
        "NoNewPrivs": "1",
        "Uid": "1000",
        **dict.fromkeys(("CapEff", "CapBnd"), "0" * 16),
    }
    container = inside(lambda _: (0, json.dumps(found | changed)))
    subject = ImageSubject(Settings(), IMAGE, container)
    if not words:
        assert ALL["hardening"].check(subject) == "read-only root, no capabilities"
        return
    with pytest.raises(ProbeFailed, match=f"not hardened: .*{words}"):
        ALL["hardening"].check(subject)


@pytest.mark.parametrize(
    ("reply", "words"),
    [((0, json.dumps(NATIVE)), "no agents of OpenAgents"), ((22, ""), "curl exited with code 22")],
)
def test_without_a_network_openagents_is_there_too(reply: tuple[int, str], words: str) -> None:
    listed = [(0, json.dumps(GOOD["/agent"])), reply]
    alone = inside(lambda command: listed.pop(0) if "agent" in command[-1] else (0, ""))
    subject = ImageSubject(Settings(), IMAGE, alone)
    assert "with --network none" in ALL["offline"].check(subject)
    with pytest.raises(ProbeFailed, match=words):
        ALL["offline"].check(subject)


def test_sigterm_must_end_it_within_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> process.Completed:
        asked.append(argv)
        return process.Completed(tuple(argv), 0, "", "", 0.0)

    monkeypatch.setattr(process, "run", run)
    clock = iter(float(second) for second in range(100))
    time_module = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None)
    monkeypatch.setattr(image_probes, "time", time_module)
    states = iter([True, False, *[True] * 50])
    monkeypatch.setattr(Inside, "state", lambda _: {"Running": next(states)})
    subject = ImageSubject(Settings(), IMAGE, inside(lambda _: (0, "")))
    assert ALL["shutdown"].check(subject) == "ended 2.0 s after SIGTERM"
    assert asked == [["/p", "kill", "--signal", "TERM", "n"]]
    with pytest.raises(ProbeFailed, match="after SIGTERM: PID 1 ignores signals"):
        ALL["shutdown"].check(subject)


def test_a_server_that_had_ended_by_itself_does_not_pass_for_one_that_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        process, "run", lambda argv, **_: process.Completed(tuple(argv), 1, "", "", 0.0)
    )
    monkeypatch.setattr(Inside, "state", lambda _: {"Running": False})
    subject = ImageSubject(Settings(), IMAGE, inside(lambda _: (0, "")))
    with pytest.raises(ProbeFailed, match="had ended before SIGTERM"):
        ALL["shutdown"].check(subject)


def test_the_program_for_hardening_reads_this_process() -> None:
    argv = [sys.executable, "-S", "-c", image_probes.HARDENING]
    found = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert found.keys() == {"Root", "CapEff", "CapBnd", "NoNewPrivs", "Uid"}
    assert found["Root"] in {"rw", "ro"}
    assert len(found["CapEff"]) == len(found["CapBnd"]) == 16
