"""The Compose project of one stack: the containers of deploy/compose.yaml on this machine."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core import process
from pipeline.core.errors import EngineBroken, PortTaken
from pipeline.core.settings import Settings
from pipeline.engines.container import STATE, TAKEN
from pipeline.engines.engine import Engine
from pipeline.stack import databases, gateway, overrides, trust, workspace
from pipeline.stack.databases import COMPOSE
from pipeline.stack.secrets import (
    AGENT,
    GATEWAY,
    SERVER,
    SERVER_PASSWORDS,
    check_passwords,
    home,
    read,
)
from pipeline.stack.workspace import Workspace

PODS = COMPOSE.with_name("compose.pods.yaml")
CLOSED = COMPOSE.with_name("compose.closed.yaml")
MODELS = COMPOSE.with_name("compose.models.yaml")
UNBOUNDED = COMPOSE.with_name("compose.unbounded.yaml")

PARTS = (
    "falkordb",
    "valkey",
    "egress",
    "opencode",
    "gateway",
    "backup",
    "datadog",
)
"""In the order in which ``up`` waits for them."""

VOLUMES = (
    "{}_state",
    "{}_work",
    "{}_falkordb",
    "{}_valkey",
    "{}_backups",
    "{}_copies",
    "{}_certificates",
)
"""The names that Compose gives the volumes of compose.yaml, with {} for the name of the stack."""

POD_VOLUMES = (
    "state-{}-0",
    "work-{}-0",
    "data-{}-falkordb-0",
    "data-{}-valkey-0",
    "{}-backups",
)
"""The names in compose.pods.yaml, with {} for the name of the stack."""

STOP_SECONDS = 60
"""How long a container may take after SIGTERM before it is killed."""

STATE_TEMPLATE = """{
    "project": "{{index .Config.Labels "com.docker.compose.project"}}",
    "running": {{.State.Running}},
    "code": {{.State.ExitCode}},
    "restarts": {{.RestartCount}},
    "oom": {{.State.OOMKilled}},
    "image": {{json .Image}},
    "settings": "{{index .Config.Labels "opencode-server.settings"}}",
    "since": {{json .State.StartedAt}}
}"""
"""A Go template for ``inspect`` that prints the fields of State as JSON."""


@dataclass(frozen=True)
class State:
    """A container as the engine reports it; ``since`` is when it started, RFC 3339.

    ``settings`` is the digest of what it was started with.
    """

    exists: bool = False
    running: bool = False
    code: int = 0
    restarts: int = 0
    oom: bool = False
    image: str = ""
    settings: str = ""
    since: str = ""


@dataclass(frozen=True)
class Project:
    """One stack: its engine, its secrets by file, its images by part.

    ``home`` is the directory of its secrets, lock and upgrade record.
    """

    engine: Engine
    settings: Settings
    home: Path
    secrets: Mapping[str, Mapping[str, str]] = field(repr=False)
    images: Mapping[str, str]
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def name(self) -> str:
        """The Compose project, and the name of the server's container."""
        return self.settings.stack.name

    @property
    def address(self) -> str:
        """ADDRESS:PORT of the gateway."""
        return f"{self.settings.stack.address}:{self.settings.stack.port}"

    @property
    def user(self) -> str:
        """The user name of clients."""
        return self.secrets[SERVER].get("OPENCODE_SERVER_USERNAME") or "opencode"

    @property
    def parts(self) -> list[str]:
        """The parts of this stack. The Agent is one if it has a key and an image."""
        return [part for part in PARTS if part in self.images]

    @property
    def note(self) -> Path:
        """The record of an upgrade in progress."""
        return self.home / "upgrade.json"

    def changed(self, part: str, state: State) -> bool:
        """Whether a part was started with other settings than it would be now."""
        return state.settings != self._digests().get(part, state.settings)

    def write_override(self) -> Path:
        """Write and return the file that adds this stack's settings to compose.yaml."""
        path = self.home / "compose.json"
        if file := trust.place(self.home, self._ca):
            trust.write(file, self._ca)
        overrides.write(path, self._added(), self._digests())
        return path

    @cached_property
    def _ca(self) -> str:
        return trust.bundle(self.settings.ca)

    def _added(self) -> dict[str, dict[str, Any]]:
        ca = trust.place(self.home, self._ca)
        added = overrides.services(self.workspace, ca, podman=self.engine.podman)
        return {part: service for part, service in added.items() if part in self.images}

    def _digests(self) -> dict[str, str]:
        return overrides.digests(self._added(), self.secrets, self.settings.stack)

    def container(self, part: str) -> str:
        """Return the container_name of a part in compose.yaml."""
        return self.name if part == "opencode" else f"{self.name}-{part}"

    def environment(self) -> dict[str, str]:
        """Return the variables that compose.yaml refers to."""
        env = {
            "OPENCODE_STACK": self.name,
            "OPENCODE_HOME": str(self.home),
            "OPENCODE_ADDRESS": self.settings.stack.address,
            "OPENCODE_PORT": str(self.settings.stack.port),
            "OPENCODE_AGENT_HOST": "opencode-datadog" if "datadog" in self.images else "",
            "GATEWAY_HOST": gateway.host(self.settings.stack),
            "GATEWAY_TLS": self.settings.stack.tls,
            "EGRESS_HOSTS": self.settings.stack.egress_hosts,
            "OPENCODE_SERVER_USERNAME": self.user,
            "OPENCODE_LOG_DRIVER": "k8s-file" if self.engine.podman else "json-file",
            "COMPOSE_PROFILES": "datadog",
        }
        for part, image in self.images.items():
            env[f"{part.upper()}_IMAGE"] = image
        # For these, Compose prefers its environment to --env-file, and the user's may have others.
        for name in SERVER_PASSWORDS:
            env[name] = self.secrets[SERVER][name]
        return env

    def start(self, *parts: str) -> None:
        """Create and start containers in place of those that exist; volumes stay.

        Raises SecretsRefused, ProjectRefused, ComposeMissing, PortTaken, EngineBroken.
        """
        check_passwords(self.secrets)
        if self.workspace.directory:
            workspace.check(self.workspace.directory)
        self.remove(*parts)
        words = []
        if self.volumes_of_pods():
            words += ["--file", str(PODS)]
        if not self.engine.bounded:
            words += ["--file", str(UNBOUNDED)]
        if self.settings.stack.egress != "open":
            words += ["--file", str(CLOSED)]
        if "egress" in self.images:
            words += ["--file", str(MODELS)]
        words += ["--file", str(self.write_override())]
        words += ["up", "--detach", "--no-deps"]
        words += ["opencode" if part == "opencode" else f"opencode-{part}" for part in parts]
        program = self.engine.find_compose()
        argv = self.engine.compose(program, COMPOSE, self.name, self.home / SERVER, *words)
        done = self.engine.ask(argv, env=self.environment())
        if done.ok:
            return
        self.remove(*parts)
        if TAKEN.search(done.output):
            remedy = "Free the port, or set stack.port to another."
            raise PortTaken(f"{self.address} is in use", remedy, done.output)
        remedy = "See the output above, and docs/operations.md for common causes."
        raise EngineBroken(f"cannot start {', '.join(parts)}", remedy, done.output)

    def remove(self, *parts: str) -> None:
        """Stop and remove containers; volumes stay. Raises EngineBroken."""
        names = [self.container(part) for part in parts if self.state(part).exists]
        if names:
            # A database writes its file after SIGTERM.
            self.engine.ask(self.engine.stop(names, STOP_SECONDS))
            self.engine.must("rm", "--force", "--volumes", *names)

    def state(self, part: str) -> State:
        """Ask the engine for the state of a part's container.

        A container of the same name that is not of this stack does not exist for it.
        """
        argv = self.engine.inspect(self.container(part), STATE_TEMPLATE)
        done = self.engine.ask(argv, timeout=30)
        if not done.ok:
            return State()
        values = json.loads(done.stdout)
        if values.pop("project") != self.name:
            return State()
        return State(exists=True, **values)

    def volumes(self) -> list[str]:
        """Return the names of the volumes that exist, also of those that the user created."""
        return sorted(self._existing(VOLUMES) | self.volumes_of_pods())

    def volumes_of_pods(self) -> set[str]:
        """Return the existing volumes of a stack that an earlier release started as pods."""
        return self._existing(POD_VOLUMES)

    def _existing(self, patterns: Sequence[str]) -> set[str]:
        existing = self.engine.ask(self.engine.list_volumes())
        names = {pattern.format(self.name) for pattern in patterns}
        return names & set(existing.stdout.split())

    def exec(self, part: str, *command: str, timeout: float = 30) -> process.Completed:
        """Run a command in a container. Raises subprocess.TimeoutExpired."""
        argv = self.engine.exec(self.container(part), *command)
        return self.engine.ask(argv, timeout=timeout)

    def chown(self) -> list[str]:
        """Return the command that gives the server's and the backup's volumes to their user."""
        paths = [STATE, "/backups", "/var/tmp"]  # noqa: S108 -- in the container
        return self.engine.run(
            self.images["opencode"],
            "-R",
            self.workspace.user,
            *paths,
            hardened=False,
            rm=True,
            user="0:0",
            entrypoint="chown",
            volumes_from=self.container("backup"),
        )

    def gateway_problem(self) -> str:
        """Return why clients do not reach the server through the gateway, or an empty string."""
        password = self.secrets[GATEWAY].get("GATEWAY_PASSWORD", "")
        return gateway.problem(self.settings.stack, self.user, password)

    def backup(
        self, *words: str, timeout: float | None = None, terminal: bool = False
    ) -> process.Completed:
        """Run /app/scripts/backup in its container; ``terminal`` prints its output.

        Raises subprocess.TimeoutExpired. Whatever interrupts this call ends the command too:
        engines forward no signal to it (podman issue 19486, moby issue 9098), so its process ID
        is recorded.
        """
        record = f"/tmp/by-hand-{secrets.token_hex(4)}"  # noqa: S108 -- in the container
        script = f'echo $$ > {record}; exec /app/scripts/backup "$@"'
        argv = self.engine.exec(self.container("backup"), "sh", "-c", script, "-", *words)
        try:
            return self.engine.ask(argv, timeout=timeout, terminal=terminal)
        except BaseException:
            wait = f"timeout 2 sh -c 'until [ -s {record} ]; do sleep 0.1; done'"
            end = f"p=$(cat {record}) && kill -INT $p && while [ -d /proc/$p ]; do sleep 0.1; done"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.exec("backup", "sh", "-c", f"{wait}; {end}", timeout=120)
            raise


def project_of(settings: Settings, engine: Engine) -> Project:
    """Return the stack with its local images. Raises SecretsRefused."""
    known = read(home(settings))
    ours = engine.local(image_tag(settings))
    images = {"opencode": ours, "backup": ours}
    for part in other_parts(settings, known):
        images[part] = databases.find(settings, engine, part)
    if not images.get("datadog"):
        images.pop("datadog", None)
    place = home(settings)
    return Project(engine, settings, place, known, images, workspace.recorded(engine, place))


def image_tag(settings: Settings) -> str:
    """Return the tag of the image that this stack runs. Only ``upgrade`` moves it."""
    return f"{settings.image}:stack-{settings.stack.name}"


def other_parts(settings: Settings, known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the parts that run other images than the server's; the Agent only with a key."""
    proxy = ["egress"] if settings.stack.egress == "models" else []
    agent = ["datadog"] if known[AGENT].get("DD_API_KEY") else []
    return ["falkordb", "valkey", *proxy, "gateway", *agent]
