"""``status``: how the stack is, part by part, and in so many words what is wrong with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.engine import Engine
from pipeline.errors import NoStack, StackUnwell
from pipeline.report import fail, ok, say, table
from pipeline.settings import Settings
from pipeline.stack import life, upgrade
from pipeline.stack.runner import Runner, State

FULL_PERCENT = 90
ANSWER_SECONDS = 20
PLACES = {
    "falkordb": ("/var/lib/opencode",), "valkey": ("/var/lib/opencode",), "backup": ("/backups",),
    "opencode": ("/root/.local/share/opencode", "/workspace"),
}  # fmt: skip
"""Where each part's volumes are mounted."""

RECENT = timedelta(hours=1)
"""How long a restart is something wrong: after that the part has been well for so long."""

HARMLESS = ("absent",)
"""What ``/app/scripts/status`` says of what nobody has set up."""


@dataclass(frozen=True)
class Volume:
    """A volume as its part sees it: bytes that are used in it, and how full what it lies on is, in percent."""

    part: str
    path: str
    used: int
    full: int


@dataclass
class Health:
    """What is known of the stack: ``wrong`` is a sentence for each thing that is not as it should be."""

    states: dict[str, State] = field(default_factory=dict)
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)
    volumes: list[Volume] = field(default_factory=list)
    backup: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def look(run: Runner) -> Health:
    """Ask the engine and the parts, side by side. A part that does not answer costs ANSWER_SECONDS."""
    health = Health()
    with ThreadPoolExecutor() as pool:
        health.states = dict(zip(run.stack.parts, pool.map(run.state, run.stack.parts), strict=True))
        running = [part for part, state in health.states.items() if state.running]
        answers = pool.submit(_answers, run) if "opencode" in running else None
        backup = pool.submit(_backup, run) if "backup" in running else None
        memory = pool.submit(_memory, run, running)
        for volumes in pool.map(lambda part: _volumes(run, part), running):
            health.volumes += volumes
        health.answers = answers.result() if answers else {}
        health.backup = backup.result() if backup else {}
        health.memory = memory.result()
    health.wrong = list(faults(health))
    return health


def _answers(run: Runner) -> dict[str, dict[str, str]]:
    try:
        done = run.exec("opencode", "/app/scripts/status", "--json", timeout=ANSWER_SECONDS)
        return dict(json.loads(done.stdout)["parts"])
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return {"server": {"state": "failing", "detail": "its own status does not answer"}}


def _backup(run: Runner) -> dict[str, Any]:
    try:
        done = run.backup("status", "--json", timeout=ANSWER_SECONDS)
        return {"code": done.code, "said": (done.stderr.strip() or done.stdout.strip()), **_json(done.stdout)}
    except subprocess.TimeoutExpired:
        return {"code": -1, "said": "backup status does not answer"}


def _memory(run: Runner, running: list[str]) -> dict[str, str]:
    """Return the memory that each running part uses, in the engine's words, by container."""
    if not running:
        return {}
    names = map(run.container, running)
    argv = run.engine.argv("stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}", *names)
    done = run.engine.ask(argv, timeout=60)
    return dict(line.split("\t") for line in done.stdout.splitlines() if "\t" in line)


def _json(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _volumes(run: Runner, part: str) -> list[Volume]:
    found = []
    for path in PLACES.get(part, ()):
        script = f"df -Pk {path} | tail -1; du -sk {path} 2>/dev/null"
        try:
            lines = run.exec(part, "sh", "-c", script, timeout=ANSWER_SECONDS).stdout.splitlines()
            disk, used = lines[0].split(), lines[-1].split()
            found.append(Volume(part, path, int(used[0]) * 1024, int(disk[4].rstrip("%"))))
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            continue
    return found


def faults(health: Health) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong."""
    for part, state in health.states.items():
        if not state.there:
            yield f"{part} is not up: inv up starts it"
        elif not state.running:
            why = "it was out of memory" if state.oom else f"it ended with exit code {state.code}"
            yield f"{part} is down, {why}: inv logs --part {part}, inv up"
        elif state.restarts and datetime.now(UTC) - datetime.fromisoformat(state.since) < RECENT:
            when = state.since[:16].replace("T", " ")
            yield f"{part} has ended {state.restarts} times, and is up again since {when}: inv logs --part {part}"
    for part, said in health.answers.items():
        if said["state"] not in ("ok", *HARMLESS) and part != "backup":
            yield f"{part} is {said['state']}: {said['detail']}"
    for volume in health.volumes:
        if volume.full >= FULL_PERCENT:
            yield f"{volume.part}'s {volume.path} lies on a disk that is {volume.full} % full: make room"
    if health.backup.get("code"):
        words = str(health.backup["said"]).splitlines() or [f"its status ended with {health.backup['code']}"]
        yield f"backup: {words[0]}"


def status(settings: Settings, engine: Engine, *, as_json: bool = False) -> None:
    """Print how the stack is. Raises NoStack when none of it is there, StackUnwell when something is wrong."""
    run = life.of(settings, engine)
    health = look(run)
    if not any(state.there for state in health.states.values()):
        raise NoStack(f"the stack {settings.stack.name} is not up", "inv up starts it.")
    if pending := upgrade.pending(run):
        health.wrong.append(
            f"an upgrade from {pending['from'][:12]} was interrupted: inv upgrade finishes or undoes it"
        )
    if as_json:
        print(json.dumps(asdict(health)))
    else:
        _print(run, settings, health)
    if health.wrong:
        raise StackUnwell("; ".join(health.wrong), "Each says what to do; docs/operations.md says more.")


def _age(backup: dict[str, Any]) -> str:
    ages = [part["age_seconds"] for part in (backup.get("parts") or {}).values()]
    if ages:
        return f"the oldest newest copy of a part is {max(ages) / 3600:.1f} hours old"
    return str(backup.get("said", "is not up")).partition("\n")[0]


def _print(run: Runner, settings: Settings, health: Health) -> None:
    rows = []
    for part, state in health.states.items():
        how = "up" if state.running else f"ended with {state.code}" if state.there else "not there"
        sizes = [f"{volume.used / 1e6:,.1f} MB" for volume in health.volumes if volume.part == part]
        image = state.image.removeprefix("sha256:")[:12]
        since = state.since.split(".")[0].replace("T", " ")
        rows.append([part, how, since, health.memory.get(run.container(part), ""), " + ".join(sizes), image])
    table(f"{settings.stack.name} on {life.server(run, settings).url}",
          ["part", "is", "since", "memory", "volumes", "image"], rows)  # fmt: skip
    for part, said in health.answers.items():
        if part != "backup":
            say(f"{part:9} {said['state']:8} {said['detail']}")
    say(f"backup    {_age(health.backup)}")
    for sentence in health.wrong:
        fail(sentence)
    if not health.wrong:
        ok("all is well")
