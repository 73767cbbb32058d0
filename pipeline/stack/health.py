"""``status``: the state of each part, and one sentence for each problem."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.core.console import fail, log, megabytes, ok, table
from pipeline.core.errors import NoStack, StackUnwell
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.stack.compose import Project, State, project_of

FULL_PERCENT = 90
ANSWER_SECONDS = 20

MOUNTS = (
    ("falkordb", "/var/lib/opencode"),
    ("valkey", "/var/lib/opencode"),
    ("opencode", "/root/.local/share/opencode"),
    ("opencode", "/workspace"),
    ("backup", "/backups"),
)
"""Part and path of each volume."""

SILENT = {"server": {"state": "failing", "detail": "/app/scripts/status does not answer"}}

RECENT = timedelta(hours=1)
"""A restart longer ago than this is no problem any more."""


@dataclass(frozen=True)
class Volume:
    """A volume: bytes used in it, and the usage of its disk in percent."""

    part: str
    path: str
    used: int
    percent: int


@dataclass
class Health:
    """What ``status --json`` prints.

    ``answers`` are those of /app/scripts/status by part, ``memory`` is USED / LIMIT by container,
    ``backup`` what ``backup status`` reports, with its exit ``code`` and a ``message``.
    """

    states: dict[str, State]
    answers: dict[str, dict[str, str]]
    backup: dict[str, Any]
    volumes: list[Volume]
    memory: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check(project: Project) -> Health:
    """Ask the engine and the parts concurrently; each may take ANSWER_SECONDS."""
    parts = project.parts
    containers = [project.container(part) for part in parts]
    with ThreadPoolExecutor() as pool:
        states = pool.map(project.state, parts)
        answers = pool.submit(_ask, project, "opencode", "/app/scripts/status")
        front = pool.submit(project.gateway_problem)
        backup = pool.submit(_ask, project, "backup", "/app/scripts/backup", "status")
        memory = pool.submit(project.engine.ask, project.engine.memory(containers))
        volumes = pool.map(lambda mount: _volume(project, *mount), MOUNTS)
    lines = memory.result().stdout.splitlines()
    health = Health(
        states=dict(zip(parts, states, strict=True)),
        answers=answers.result().get("parts", SILENT) | {"gateway": _gateway(front.result())},
        backup=backup.result(),
        volumes=[volume for volume in volumes if volume],
        memory=dict(line.split("\t") for line in lines),
    )
    health.problems = list(problems(health))
    return health


def _gateway(problem: str) -> dict[str, str]:
    return {"state": "failing" if problem else "ok", "detail": problem}


def _ask(project: Project, part: str, *command: str) -> dict[str, Any]:
    """Return what a command with ``--json`` prints, with its exit ``code`` and a ``message``."""
    try:
        done = project.exec(part, *command, "--json", timeout=ANSWER_SECONDS)
        answer = dict(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, ValueError):
        return {"code": -1, "message": f"{command[0]} does not answer"}
    message = done.stderr.partition("\n")[0]
    return answer | {"code": done.code, "message": message}


def _volume(project: Project, part: str, path: str) -> Volume | None:
    """Measure a volume; None if the part does not run."""
    script = f"df -P {path} | awk 'END {{print $5 + 0}}'; du -sk {path}"
    try:
        output = project.exec(part, "sh", "-c", script, timeout=ANSWER_SECONDS).stdout
        percent, used, _ = output.split()
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return Volume(part, path, int(used) * 1024, int(percent))


def problems(health: Health) -> Iterator[str]:
    """Yield a sentence for each problem."""
    for part, state in health.states.items():
        if problem := _problem_of(state):
            yield f"{part} {problem}: inv logs --part {part}, inv up"
    for part, answer in health.answers.items():
        if answer["state"] not in {"ok", "absent"} and part != "backup":
            yield f"{part} is {answer['state']}: {answer['detail']}"
    for volume in health.volumes:
        if volume.percent >= FULL_PERCENT:
            place = f"{volume.part}'s {volume.path}"
            yield f"the disk of {place} is {volume.percent}% full: free up space"
    if health.backup["code"]:
        yield f"backup: {health.backup['message']}"


def _problem_of(state: State) -> str:
    """Return what is wrong with a container, or an empty string."""
    if not state.exists:
        return "is not running"
    if not state.running:
        return "ran out of memory" if state.oom else f"exited with code {state.code}"
    started = datetime.fromisoformat(state.since)
    if state.restarts and datetime.now(UTC) - started < RECENT:
        return f"has restarted {state.restarts} times"
    return ""


def status(settings: Settings, engine: Engine, *, as_json: bool = False) -> None:
    """Print the health of the stack. Raises NoStack if nothing runs, StackUnwell for problems."""
    project = project_of(settings, engine)
    health = check(project)
    if not any(state.exists for state in health.states.values()):
        raise NoStack(f"the stack {project.name} is not running", "Start it: inv up.")
    if project.note.exists():
        health.problems.append("an upgrade was interrupted: inv upgrade finishes or undoes it")
    if as_json:
        print(json.dumps(asdict(health)))
    else:
        _print(project, health)
    if health.problems:
        raise StackUnwell("; ".join(health.problems), "See docs/operations.md.")


def _print(project: Project, health: Health) -> None:
    rows = []
    for part, state in health.states.items():
        sizes = [megabytes(volume.used) for volume in health.volumes if volume.part == part]
        row = [
            part,
            "running" if state.running else "stopped",
            state.since[:19],
            health.memory.get(project.container(part), ""),
            " + ".join(sizes),
            state.image.removeprefix("sha256:")[:12],
        ]
        rows.append(row)
    columns = [
        "part",
        "state",
        "since",
        "memory",
        "volumes",
        "image",
    ]
    table(f"{project.name} on {project.address}", columns, rows)
    for part, answer in health.answers.items():
        log(f"{part:9} {answer['state']:8} {answer['detail']}")
    for part, backup in health.backup.get("parts", {}).items():
        log(f"backup of {part}: {backup['age_seconds'] / 3600:.1f} hours old")
    for problem in health.problems:
        fail(problem)
    if not health.problems:
        ok("the stack is healthy")
