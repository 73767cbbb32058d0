"""The questions a smoke test asks, as data: a name, what it needs, and how its answer is got."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPConnection
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from pipeline import ca, layers
from pipeline.base import architecture
from pipeline.container import SECRET, Container, Server
from pipeline.engine import Engine
from pipeline.settings import ROOT, Settings

PACKAGES = ("graphiti_core", "falkordb", "redis", "ddtrace", "datadog_api_client", "b2sdk.v2")

DEFAULTS = {"FALKORDB_HOST": "localhost", "FALKORDB_PORT": "6379", "VALKEY_HOST": "localhost", "VALKEY_PORT": "6380"}

COMMAND = ["ddtrace-run", "opencode", "serve", "--hostname", "0.0.0.0", "--port", "4096"]  # noqa: S104 -- the contract

HEALTHCHECK = {
    "Interval": 30_000_000_000,
    "Timeout": 10_000_000_000,
    "StartPeriod": 40_000_000_000,
}
"""Nanoseconds, as both engines give them."""

HEALTH_COMMAND = "curl -f http://localhost:4096/config || exit 1"

LABELS = ("title", "created", "revision", "source", "base.name", "base.digest")

OPENAGENTS = "/opt/openagents/.opencode"


INVENTORY = """
import json, pathlib, re, sys
root = pathlib.Path(sys.argv[1])
patterns = {"agent": "**/*.md", "command": "**/*.md", "skill": "**/SKILL.md", "tool": "*.ts"}
found = {kind: [] for kind in patterns}
for kind, pattern in patterns.items():
    for folder in (root / kind, root / (kind + "s")):
        for path in sorted(folder.glob(pattern)):
            front = re.match(r"---\\n(.*?)\\n---", path.read_text(), re.S)
            named = re.search(r"^name: *(.*?) *$", front[1], re.M) if front else None
            if kind in ("agent", "skill") and named:
                found[kind].append(named[1].strip(chr(34) + chr(39)))
            elif front or kind in ("tool", "command"):
                found[kind].append(path.relative_to(folder).with_suffix("").as_posix())
print(json.dumps({kind: sorted(set(names)) for kind, names in found.items()}))
"""
"""Run inside: the package's names. Agents and skills have theirs in the front matter, others in their path."""


class Wrong(Exception):
    """An answer that is not the one a good server or image gives."""


@dataclass
class Subject:
    """What is asked: a server, and, when the image is ours to start, the image and its two containers."""

    settings: Settings
    server: Server
    engine: Engine | None = None
    image: dict[str, Any] | None = None
    container: Container | None = None
    offline: Container | None = None
    _inventory: dict[str, list[str]] = field(default_factory=dict)
    _reading: Lock = field(default_factory=Lock)

    def json(self, path: str) -> Any:
        """GET ``path`` and return its JSON. Raises Wrong."""
        import requests

        try:
            # It is ready by now, so patience costs nothing; a busy machine needs it.
            answer = self.server.get(path, timeout=4 * self.server.timeout)
        except requests.RequestException as error:
            raise Wrong(f"{path}: {type(error).__name__}") from error
        if answer.status_code != requests.codes.ok:
            raise Wrong(f"{path} answered {answer.status_code}: {answer.text[:200]}")
        try:
            return answer.json()
        except ValueError as error:
            raise Wrong(f"{path} answered with something that is not JSON: {answer.text[:80]!r}") from error

    def inside(self, *command: str) -> str:
        """Run a command in the container and return what it printed. Raises Wrong when it fails."""
        assert self.container is not None  # noqa: S101 -- only probes that need a container call this
        done = self.container.exec(*command)
        if not done.ok:
            raise Wrong(f"{command[0]} ended with {done.code}: {done.said[-300:]}")
        return done.stdout.strip()

    def inventory(self, kind: str) -> list[str]:
        """Return the names under which the package's agents, tools, commands or skills should be listed.

        They are read inside, once for all kinds; of a server that is not ours nothing is known.
        """
        if self.container is None:
            return []
        with self._reading:
            if not self._inventory:
                said = self.inside("/usr/bin/python3", "-S", "-c", INVENTORY, OPENAGENTS)
                self._inventory.update(json.loads(said))
        return self._inventory[kind]


@dataclass(frozen=True)
class Probe:
    """A question, asked of a Subject; of one that is a Talk where it ``needs`` a "deep" smoke.

    Others need a "server" (any that runs), an "image" (one of ours, started) or "offline" (its own).
    """

    name: str
    needs: str
    ask: Callable[[Any], str]


def config(subject: Subject) -> str:
    """/config is JSON and carries config.json."""
    served = subject.json("/config")
    wanted = json.loads((ROOT / "config.json").read_text())
    lost = [key for key, value in wanted.items() if key not in served or not _carries(served[key], value)]
    if lost:
        raise Wrong(f"/config does not carry {', '.join(lost)} of config.json")
    return f"carries {len(wanted)} keys of config.json"


def health(subject: Subject) -> str:
    """/global/health says healthy, and the version that locks/ pins."""
    said = subject.json("/global/health")
    pinned = pinned_version(subject.image["Architecture"] if subject.image else "")
    if said.get("healthy") is not True or said.get("version") != pinned:
        raise Wrong(f"/global/health says {said}, and locks/npm pins {pinned}")
    return f"healthy, opencode {pinned}"


def agents(subject: Subject) -> str:
    """The agents of OpenAgents are listed."""
    names = [agent["name"] for agent in subject.json("/agent") if not agent.get("native")]
    return _listed(names, subject.inventory("agent"), "agents")


def tools(subject: Subject) -> str:
    """The tools of OpenAgents are listed: a file's default export by the file's name, others by name_export."""
    ids = subject.json("/experimental/tool/ids")
    files = subject.inventory("tool")
    if not ids:
        raise Wrong("no tools are listed")
    if missing := [name for name in files if not any(f"{tool}_".startswith(f"{name}_") for tool in ids)]:
        raise Wrong(f"no tool of {', '.join(missing)} is listed")
    return f"{len(ids)} tools" + (", OpenAgents' among them" if files else "")


def commands(subject: Subject) -> str:
    """The commands of OpenAgents are listed."""
    names = [command["name"] for command in subject.json("/command")]
    return _listed(names, subject.inventory("command"), "commands")


def skills(subject: Subject) -> str:
    """The skills of OpenAgents are listed."""
    names = [skill["name"] for skill in subject.json("/skill")]
    return _listed(names, subject.inventory("skill"), "skills")


def closed(subject: Subject) -> str:
    """With a password set, nobody gets in without it, or with another, by any route that the server documents."""
    routes = [(method, path) for path, methods in subject.json("/doc")["paths"].items() for method in methods]
    routes += [("get", path) for path in ("/", "/doc", "/no-such-page")]
    user = os.environ.get("OPENCODE_SERVER_USERNAME", "opencode")
    everybody = ("", f"{user}:wrong", f"nobody:{subject.server.password}")
    with ThreadPoolExecutor() as pool:
        let_in = [
            each for some in pool.map(lambda who: _let_in(subject.server, routes, who), everybody) for each in some
        ]
    if let_in:
        raise Wrong(f"{len(let_in)} routes: {'; '.join(let_in[:3])}")
    return f"401 on each of {len(routes)} routes"


def _let_in(server: Server, routes: list[tuple[str, str]], credentials: str) -> list[str]:
    """Return which of ``routes`` answer anything but 401 to these ``credentials``, as USER:PASSWORD or nothing."""
    signed = {"Authorization": f"Basic {b64encode(credentials.encode()).decode()}"} if credentials else {}
    let_in = []
    # Six hundred requests: with requests, which takes four times as long for one, they would be most of a smoke.
    with contextlib.closing(HTTPConnection(urlsplit(server.url).netloc, timeout=4 * server.timeout)) as connection:
        for method, path in routes:
            connection.request(method.upper(), re.sub("{.*?}", "x", path), headers=signed)
            answer = connection.getresponse()
            answer.read()
            if answer.status != HTTPStatus.UNAUTHORIZED:
                who = credentials.partition(":")[0] or "nobody"
                let_in.append(f"{method.upper()} {path} answered {answer.status} to {who}")
    return let_in


def hardened(subject: Subject) -> str:
    """It runs on a root that is read-only, without capabilities, new privileges or root, in bounds."""
    assert subject.container  # noqa: S101 -- needs image
    engine = subject.container.engine
    # In /proc/mounts the options are the fourth word, rw or ro the first of them.
    script = "sed -n 's/^[^ ]* \\/ [^ ]* \\(r[ow]\\).*/Root: \\1/p' /proc/mounts; cat /proc/1/status"
    lines = [line.split() for line in subject.inside("sh", "-c", script).splitlines()]
    said = {line[0]: line[1] for line in lines if len(line) > 1}
    wanted = {"Root:": "ro", "CapEff:": "0" * 16, "CapBnd:": "0" * 16, "NoNewPrivs:": "1"}
    wrong = [f"{name} {said.get(name)}" for name, value in wanted.items() if said.get(name) != value]
    if said.get("Uid:") == "0" and not engine.rootless:
        wrong.append("it is root")
    config = engine.ask(engine.argv("inspect", "--format", "{{json .HostConfig}}", subject.container.name), timeout=30)
    bounds = json.loads(config.stdout)
    if engine.bounded and not (bounds.get("Memory") and bounds.get("PidsLimit")):
        wrong.append("no bounds")
    if wrong:
        raise Wrong(f"not hardened: {', '.join(wrong)}")
    return (
        f"read-only, no capabilities{'' if engine.rootless else ', not root'}{', in bounds' if engine.bounded else ''}"
    )


def healthcheck(subject: Subject) -> str:
    """The image has the contract's health check, and it passes when run."""
    check = subject.image and (subject.image["Config"].get("Healthcheck") or subject.image.get("Healthcheck"))
    if not check:
        raise Wrong(
            "the image has no health check: it was built in the OCI format, which drops it; use --format docker"
        )
    said = check["Test"][-1]
    differing = [key for key, value in HEALTHCHECK.items() if check.get(key) != value]
    if HEALTH_COMMAND not in said or differing:
        raise Wrong(f"the health check is {said!r} with other {', '.join(differing) or 'command'} than the contract's")
    assert subject.container  # noqa: S101 -- needs image
    engine = subject.container.engine
    done = engine.ask(engine.healthcheck(subject.container.name, said), timeout=15)
    if not done.ok:
        raise Wrong(f"the health check failed: {done.said[-200:]}")
    return "passes"


def packages(subject: Subject) -> str:
    """Every Python package of the contract imports in /opt/venv."""
    program = (
        "import importlib, importlib.metadata, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sys.prefix, len(list(importlib.metadata.distributions())))"
    )
    quiet = ("env", "DD_TRACE_ENABLED=false", "PYTHONDONTWRITEBYTECODE=1")
    prefix, count = subject.inside(*quiet, "/opt/venv/bin/python", "-c", program, *PACKAGES).split()
    if prefix != "/opt/venv":
        raise Wrong(f"the packages are those of {prefix}")
    return f"{len(PACKAGES)} import, of {count} in /opt/venv"


def programs(subject: Subject) -> str:
    """The programs of the contract answer."""
    script = (
        # In a pipe, a program that is missing goes unnoticed.
        'set -e; first() { said="$("$@")"; echo "$said" | head -n 1; }; '
        "first rclone version; redis-cli --version; git --version; "
        '/opt/venv/bin/python -c \'from importlib.metadata import version; print("b2sdk", version("b2sdk"))\'; '
        "test -x /usr/sbin/cron; dpkg-query --show --showformat='${Package} ${Version}\\n' cron; "
        "first rg --version; node --version; npm --version; /opt/venv/bin/ddtrace-run --version"
    )
    said = subject.inside("sh", "-c", script).splitlines()
    return ", ".join(re.sub(r" version|-cli|ddtrace-run ", "", line) for line in said[:5])


def status(subject: Subject) -> str:
    """The status script answers from inside, and finds the server well."""
    assert subject.container  # noqa: S101 -- needs image
    done = subject.container.exec("/app/scripts/status", "--json", "--timeout", "20", "server")
    if not done.ok:
        raise Wrong(f"/app/scripts/status ended with {done.code}: {done.said[-300:]}")
    return "the server is well, from inside"


def settings(subject: Subject) -> str:
    """Entrypoint, port and defaults are the contract's."""
    assert subject.image  # noqa: S101 -- needs image
    said = subject.image["Config"]
    env = dict(variable.split("=", 1) for variable in said.get("Env") or [])
    wrong = [name for name, value in DEFAULTS.items() if env.get(name) != value]
    if (said.get("Entrypoint") or [])[-len(COMMAND) :] != COMMAND or said.get("Cmd"):
        wrong.append(f"ENTRYPOINT {said.get('Entrypoint')} {said.get('Cmd') or ''}")
    if "4096/tcp" not in (said.get("ExposedPorts") or {}):
        wrong.append("EXPOSE")
    if SECRET in env:
        wrong.append(f"{SECRET} is baked in")
    if wrong:
        raise Wrong(f"not the contract's: {'; '.join(wrong)}")
    return "entrypoint, port and defaults are the contract's"


def labelled(subject: Subject) -> str:
    """The OCI labels, and those that say where OpenAgents came from."""
    assert subject.image  # noqa: S101 -- needs image
    labels = subject.image["Config"].get("Labels") or {}
    wanted = [f"org.opencontainers.image.{name}" for name in LABELS]
    wanted += [f"opencode-server.openagents.{name}" for name in ("kind", "source", "commit")]
    if missing := [name for name in wanted if not labels.get(name)]:
        raise Wrong(f"no label {', '.join(missing)}; build it with inv build")
    return f"{labels['opencode-server.openagents.kind']} {labels['opencode-server.openagents.commit'][:12]}"


def secrets(subject: Subject) -> str:
    """No secret and no CA of this network in any layer or the history."""
    assert subject.engine  # noqa: S101 -- needs image
    assert subject.image  # noqa: S101 -- needs image
    faults, count = layers.check(subject.engine, subject.image, ca.extra(subject.settings.ca) | ca.staged())
    if faults:
        raise Wrong("; ".join(faults[:5]))
    return f"none in {count} layers and the history"


def offline(subject: Subject) -> str:
    """It is ready with its network cut off."""
    assert subject.offline  # noqa: S101 -- needs offline
    subject.offline.wait_ready_inside(subject.settings.smoke.ready_seconds)
    found = subject.offline.exec("curl", "-fsS", "-m", "10", "http://localhost:4096/agent")
    if not found.ok or not [agent for agent in json.loads(found.stdout) if not agent.get("native")]:
        raise Wrong(f"no agents of OpenAgents without a network: {found.said[-200:]}")
    return f"ready in {subject.offline.ready_seconds:.1f} s with --network none"


def stops(subject: Subject) -> str:
    """SIGTERM ends it within a second."""
    assert subject.offline  # noqa: S101 -- needs offline
    engine, name = subject.offline.engine, subject.offline.name
    running = subject.offline.state().get("Running")
    killed = engine.ask(engine.argv("kill", "--signal", "TERM", name), timeout=30)
    if not (running and killed.ok):
        raise Wrong("it had ended before it was told to")
    # What the engine's client takes, beside everything else that is asked, is not the server's.
    began = time.monotonic()
    at = datetime.now(UTC)
    while (state := subject.offline.state()).get("Running") and time.monotonic() - began < 5:  # noqa: PLR2004 -- to report
        time.sleep(0.02)
    took = time.monotonic() - began
    if not state.get("Running"):
        # The engine noted when: asking it took a part of what was measured here.
        took = min(took, max(0.0, (datetime.fromisoformat(state["FinishedAt"]) - at).total_seconds()))
    if took > 1:
        raise Wrong(f"still running {took:.1f} s after SIGTERM: something ignores signals as PID 1")
    return f"ended {took:.2f} s after SIGTERM"


PROBES = (
    Probe("config", "server", config),
    Probe("health", "server", health),
    Probe("agents", "server", agents),
    Probe("tools", "server", tools),
    Probe("commands", "server", commands),
    Probe("skills", "server", skills),
    Probe("closed", "image", closed),
    Probe("hardened", "image", hardened),
    Probe("health check", "image", healthcheck),
    Probe("status", "image", status),
)
"""Asked of a server that is ready."""

IMAGE_PROBES = (
    Probe("settings", "image", settings),
    Probe("labels", "image", labelled),
    Probe("secrets", "image", secrets),
    Probe("packages", "image", packages),
    Probe("programs", "image", programs),
)
"""Asked of the image and what is in it, while its server starts."""

OFFLINE_PROBES = (Probe("offline", "offline", offline), Probe("stops", "offline", stops))
"""Asked of a second container, one after the other."""


def pinned_version(machine: str = "") -> str:
    """Return the version of OpenCode that ``locks/npm`` pins for an architecture, or for this machine's."""
    lock = json.loads((ROOT / "locks" / "npm" / architecture(machine) / "package.json").read_text())
    return str(lock["dependencies"]["opencode-ai"])


def _carries(served: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(served, dict):
        return all(key in served and _carries(served[key], value) for key, value in wanted.items())
    return bool(served == wanted)


def _listed(names: list[str], wanted: list[str], what: str) -> str:
    if missing := [name for name in wanted if name not in names]:
        raise Wrong(f"{len(missing)} of {len(wanted)} {what} are not listed: {', '.join(missing[:5])}")
    if not names:
        raise Wrong(f"no {what} are listed")
    return f"{len(names)} {what}" + (f", with all {len(wanted)} of OpenAgents" if wanted else "")
