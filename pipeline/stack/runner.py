"""How an engine runs the stack: podman plays the pods of ``deploy/kubernetes``, docker has ``deploy/compose.yaml``."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import process
from pipeline.container import TAKEN
from pipeline.engine import Engine
from pipeline.errors import EngineBroken, PartDown, PortTaken
from pipeline.settings import ROOT
from pipeline.stack.manifests import PARTS, Manifests, Pod, Stack, claim, pod
from pipeline.stack.secrets import BEGINNINGS, SERVER, check_passwords

COMPOSE = ROOT / "deploy" / "compose.yaml"
CONFIGURATIONS = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
START_SECONDS, END_SECONDS = 120, 120
BACKUP = "/app/scripts/backup"
PASSWORDS = BEGINNINGS[SERVER][1]
JOB_USER = "1000:1000"
"""Who the parts run as; what the backup does by hand must be done as it too, so that the server can read the result."""


@dataclass(frozen=True)
class State:
    """What the engine says of a part's container."""

    there: bool = False
    running: bool = False
    code: int = 0
    restarts: int = 0
    oom: bool = False
    image: str = ""
    since: str = ""


@dataclass(frozen=True)
class Runner:
    """The stack on one engine; what differs between the two is in the classes below."""

    engine: Engine
    manifests: Manifests
    stack: Stack
    home: Path

    @property
    def note(self) -> Path:
        """Where an upgrade writes down what would undo it, for as long as it is under way."""
        return self.home / "upgrade.json"

    def container(self, part: str) -> str:
        """Return the engine's name of a part's container."""
        raise NotImplementedError

    def start(self, part: str) -> None:
        """Start a part anew in place of what is there; volumes stay.

        Raises SecretsRefused, PortTaken, PartDown, EngineBroken.
        """
        check_passwords(self.stack.secrets)
        self._start(part)

    def _start(self, part: str) -> None:
        raise NotImplementedError

    def end(self, part: str) -> None:
        """End a part and remove its container; volumes stay."""
        raise NotImplementedError

    def end_all(self) -> None:
        """End every part, the first last, and what they share."""
        raise NotImplementedError

    def volumes(self) -> list[str]:
        """Return the names of the volumes that are there."""
        raise NotImplementedError

    def remove_volumes(self) -> None:
        """Remove them, and all that is in them. Raises EngineBroken."""
        for name in self.volumes():
            self.do(self.engine.argv("volume", "rm", name), f"remove the volume {name}")

    def state(self, part: str) -> State:
        """Ask the engine how a part is."""
        done = self.engine.ask(self.engine.argv("inspect", "--type", "container", self.container(part)), timeout=30)
        if not done.ok:
            return State()
        said = json.loads(done.stdout)[0]
        labels = said["Config"].get("Labels") or {}
        if not self.engine.podman and labels.get("com.docker.compose.project") != self.stack.name:
            return State()  # somebody else's, of the same name
        now = said["State"]
        restarts, oom = int(said.get("RestartCount") or 0), bool(now.get("OOMKilled"))
        return State(
            there=True, running=now["Running"], code=now["ExitCode"], restarts=restarts, oom=oom, image=said["Image"],
            since=now["StartedAt"],
        )  # fmt: skip

    def exec(self, part: str, *command: str, timeout: float = 30, user: str = "") -> process.Completed:
        """Run a command in a part. Raises subprocess.TimeoutExpired."""
        return self.engine.ask(self.engine.exec(self.container(part), *command, user=user), timeout=timeout)

    def backup(
        self, *words: str, timeout: float | None = 30, detach: bool = False, shown: bool = False
    ) -> process.Completed:
        """Run the backup's command line in its part; ``shown`` prints what it says instead of returning it.

        Whatever ends this early ends it too, cleanly, and waits for that. Raises subprocess.TimeoutExpired.
        """
        note = f"/tmp/by-hand-{secrets.token_hex(4)}"  # noqa: S108 -- in the container
        noted = ["sh", "-c", f'echo $$ > {note}; exec "$@"', "-", BACKUP, *words]
        argv = self.engine.exec(self.container("backup"), *noted, detach=detach, user=JOB_USER)
        try:
            return process.run(argv, timeout=timeout, env=self.engine.env, terminal=shown)
        except BaseException:
            # Neither engine hands a signal on to what it executes (podman issue 19486, moby issue 9098).
            begun = f"n=0; until [ -s {note} ] || [ $n = 20 ]; do sleep 0.1; n=$((n + 1)); done"
            ended = f"{begun}; p=$(cat {note}) && kill -INT $p && while [ -d /proc/$p ]; do sleep 0.1; done"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.exec("backup", "sh", "-c", ended, user=JOB_USER, timeout=END_SECONDS)
            raise

    def logs(self, part: str, lines: int = 15) -> str:
        """Return the last lines that a part wrote."""
        argv = self.engine.argv("logs", "--tail", str(lines), self.container(part))
        done = self.engine.ask(argv, timeout=30)
        return (done.stdout + done.stderr).strip()

    def do(self, argv: Sequence[str], what: str, **more: Any) -> process.Completed:
        """Run a command that has to succeed. Raises EngineBroken."""
        done = self.engine.ask(argv, timeout=more.pop("timeout", END_SECONDS), **more)
        if not done.ok:
            raise EngineBroken(f"{self.engine.name} cannot {what}", "inv doctor says more.", done.said)
        return done

    def failed_to_start(self, part: str, done: process.Completed) -> Exception:
        """Return what it means that the engine could not start a part."""
        if TAKEN.search(done.said):
            where = f"{self.stack.address}:{self.stack.port}"
            return PortTaken(f"{where} is taken", "Free it, or set stack.port to another.", done.said)
        if "no space left" in done.said.lower():
            return PartDown(
                f"{part} cannot be started: the disk is full", "Make room; inv doctor says where.", done.said
            )
        if "already in use" in done.said:
            remedy = f"Rename or remove the container {self.stack.name}, which is not the stack's, or set stack.name."
            return EngineBroken(f"{self.engine.name} cannot start {part}: its name is taken", remedy, done.said)
        return EngineBroken(f"{self.engine.name} cannot start {part}", "inv doctor says more.", done.said)


@dataclass(frozen=True)
class Pods(Runner):
    """podman: a pod for each part, in a network in which they find each other by name, as in a cluster."""

    def container(self, part: str) -> str:
        """Return the pod's name with the container's, as podman makes it."""
        return self._pod(part).container

    def _pod(self, part: str) -> Pod:
        return pod(self.manifests, self.stack, part)

    @cached_property
    def _env(self) -> dict[str, str]:
        named = os.environ.get("CONTAINERS_CONF")
        own = Path("~/.config/containers/containers.conf").expanduser()
        others: dict[str, Any] = {}
        for path in [Path(named)] if named else [*map(Path, CONFIGURATIONS), own]:
            if path.exists():
                for table, values in tomllib.loads(path.read_text()).items():
                    others.setdefault(table, {}).update(values)
        text, variable = self.engine.containers_conf(others)
        path = self.home / "containers.conf"
        path.write_text(text)
        return {variable: str(path)}

    def _start(self, part: str) -> None:
        """Play its pod, and the claims of the volumes that are not there."""
        played, network = self._pod(part), self.stack.name
        self.end(part)
        if not self.engine.ask(self.engine.argv("network", "inspect", network), timeout=30).ok:
            self.do(self.engine.argv("network", "create", network), "make a network")
        there = self.volumes()
        # One that is there already is refused by podman 4.3.
        claims = [claim(volume) for volume in played.volumes if volume not in there]
        text = "\n---\n".join([*claims, played.text()])
        done = process.run(
            self.engine.play(network), stdin=text.encode(), timeout=START_SECONDS, env={**self.engine.env, **self._env}
        )
        if not done.ok:
            self.end(part)
            raise self.failed_to_start(part, done)

    def end(self, part: str) -> None:
        """End its pod, and remove what does not last."""
        played = self._pod(part)
        if self.engine.ask(self.engine.argv("pod", "inspect", played.name), timeout=30).ok:
            for argv in self.engine.remove_pod(played.name):
                self.engine.ask(argv, timeout=END_SECONDS)
        for volume in played.scratch:
            self.engine.ask(self.engine.argv("volume", "rm", volume), timeout=30)

    def end_all(self) -> None:
        """End the pods, the first last, and remove their network."""
        for part in reversed(PARTS):  # the Agent too, whose key or image may be gone by now
            self.end(part)
        self.engine.ask(self.engine.argv("network", "rm", self.stack.name), timeout=30)

    def volumes(self) -> list[str]:
        """Return the volumes of the pods' claims."""
        done = self.do(self.engine.argv("volume", "ls", "--format", "{{.Name}}"), "list its volumes")
        ours = {volume for part in self.stack.parts for volume in self._pod(part).volumes}
        return sorted(ours & set(done.stdout.split()))


@dataclass(frozen=True)
class Compose(Runner):
    """docker: the services of ``deploy/compose.yaml``."""

    def container(self, part: str) -> str:
        """Return the name that the file gives it."""
        return self.stack.renamed(self._service(part))

    @cached_property
    def _program(self) -> list[str]:
        return self.engine.find_compose()

    def _service(self, part: str) -> str:
        return "opencode" if part == "opencode" else f"opencode-{part}"

    def _ask(self, *words: str) -> process.Completed:
        images = {"opencode": "OPENCODE", "backup": "OPENCODE_BACKUP", "falkordb": "FALKORDB", "valkey": "VALKEY",
                  "datadog": "DATADOG"}  # fmt: skip
        env = {f"{images[part]}_IMAGE": image for part, image in self.stack.images.items()}
        env |= {"OPENCODE_STACK": self.stack.name, "OPENCODE_HOME": str(self.home)}
        env |= {"OPENCODE_ADDRESS": self.stack.address, "OPENCODE_PORT": str(self.stack.port)}
        if self.stack.agent:
            env |= {"OPENCODE_AGENT_HOST": "opencode-datadog"}
        # The Agent's service is ended also where its key is gone by now, and started only when it is asked for.
        env |= {"COMPOSE_PROFILES": "datadog"}
        # Compose prefers what its own environment says of them to the file: of another server, perhaps.
        env |= {key: value for key, value in self.stack.secrets["opencode-server"].items() if key in PASSWORDS}
        argv = self.engine.compose(self._program, COMPOSE, self.stack.name, self.home / SERVER, *words)
        return self.engine.ask(argv, timeout=START_SECONDS + END_SECONDS, env=env)

    def _start(self, part: str) -> None:
        """Create its service anew."""
        done = self._ask("up", "--detach", "--no-deps", "--force-recreate", self._service(part))
        if not done.ok:
            raise self.failed_to_start(part, done)

    def end(self, part: str) -> None:
        """Stop its service and remove the container."""
        self._ask("rm", "--stop", "--force", self._service(part))

    def end_all(self) -> None:
        """Have Compose end all services and remove their network."""
        done = self._ask("down", "--timeout", "30")
        if not done.ok:
            raise EngineBroken("Compose cannot end the stack", "See what it said.", done.said)

    def volumes(self) -> list[str]:
        """Return the volumes that Compose has made for it."""
        words = ["volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={self.stack.name}"]
        return sorted(self.do(self.engine.argv(*words), "list its volumes").stdout.split())


def of(engine: Engine, manifests: Manifests, stack: Stack, home: Path) -> Runner:
    """Return what runs the stack on this engine."""
    return (Pods if engine.podman else Compose)(engine, manifests, stack, home)
