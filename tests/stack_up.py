"""A stack of a test's own, as ``inv up`` starts it: its name, its port, its secrets, and what is in
its parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from pipeline.core.settings import ROOT
from tests.conftest import Built, Checkout, Done, Running, build_once
from tests.servers import free_port

PASSWORDS = (
    "OPENCODE_SERVER_PASSWORD",
    "FALKORDB_PASSWORD",
    "VALKEY_PASSWORD",
    "BACKUP_PASSWORD",
    "GATEWAY_PASSWORD",
    "FALKORDB_ADMIN_PASSWORD",
    "VALKEY_ADMIN_PASSWORD",
)


BIN = Path(sys.executable).parent


def team(tmp_path: Path, *components: str) -> list[dict[str, Any]]:
    """Render a team's overlay, and have each document of it checked against the schema of
    Kubernetes.
    """
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    overlay = tmp_path / "deploy/kubernetes/team"
    for name in ("server.env", "backup.env", "datadog.env"):
        shutil.copy(overlay / f"{name}.example", overlay / name)
    (overlay.parent / "ca/ca.crt").write_text("a bundle\n")
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write(f"components: {json.dumps([f'../{name}' for name in components])}\n")
    rendered = subprocess.run(
        [BIN / "kubectl", "kustomize", overlay], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "all.yaml").write_text(rendered)
    argv = [str(BIN / "kubernetes-validate"), "--strict", str(tmp_path / "all.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(yaml.safe_load_all(rendered))


def named(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(
        each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )


def pod_of(documents: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Return the pod specification of a part."""
    kind = {"backup": "CronJob", "datadog": "Deployment"}.get(part, "StatefulSet")
    name = "opencode" if part == "opencode" else f"opencode-{part}"
    spec = named(documents, kind, name)["spec"]
    if part == "backup":
        spec = spec["jobTemplate"]["spec"]
    return dict(spec["template"]["spec"])


def named_prefix(documents: list[dict[str, Any]], kind: str, prefix: str) -> dict[str, Any]:
    """Return the document whose generated name begins with ``prefix``."""
    return next(
        each
        for each in documents
        if each["kind"] == kind and each["metadata"]["name"].startswith(prefix)
    )


@dataclass
class Up:
    """What a test does with it; ``home`` is where its secrets are."""

    built: Built
    name: str
    port: int
    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """What tells ``inv`` which stack is meant."""
        place = {"NAME": self.name, "PORT": str(self.port), "HOME": str(self.home)}
        place |= self.settings
        return {f"INVOKE_STACK_{name}": value for name, value in place.items()}

    def inv(self, *words: str) -> Done:
        return self.built.inv(*words, env=self.env)

    def start(self, *words: str) -> Running:
        return self.built.start(*words, env=self.env)

    def ok(self, *words: str) -> str:
        done = self.inv(*words)
        assert done.code == 0, done.stdout[-3000:] + done.stderr
        return done.stdout

    def engine(self, *words: str) -> str:
        """Run a command of the engine's own."""
        done = self.built.engine.ask(self.built.engine.argv(*words))
        assert done.ok, done.output
        return done.stdout

    def container(self, part: str) -> str:
        """Return a part's container."""
        return self.name if part == "opencode" else f"{self.name}-{part}"

    def volume(self, part: str) -> str:
        """Return the volume of a database."""
        return f"{self.name}_{part}"

    def inspect(self, part: str) -> dict[str, Any]:
        return dict(
            json.loads(self.engine("inspect", "--type", "container", self.container(part)))[0]
        )

    def crash(self, part: str) -> None:
        """Kill a part's first process as the kernel would, behind the engine's back."""
        os.kill(self.inspect(part)["State"]["Pid"], signal.SIGKILL)

    def restarted(self, part: str, times: int = 1) -> bool:
        """Whether the engine has started a part again."""
        seen = self.inspect(part)
        return seen["State"]["Running"] and int(seen["RestartCount"]) >= times

    def inside(self, part: str, *command: str) -> str:
        return self.engine("exec", self.container(part), *command)

    def valkey(self, *words: str) -> str:
        """Ask Valkey something; the password is what its own environment says."""
        client = 'REDISCLI_AUTH=$VALKEY_PASSWORD valkey-cli -p 6380 "$@"'
        return self.inside("valkey", "sh", "-c", client, "-", *words).strip()

    def secrets(self, name: str = "server.env") -> dict[str, str]:
        lines = (self.home / name).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    def ask(self, path: str, method: str = "GET", body: object = None, timeout: float = 60) -> Any:
        """Ask the server as its user does. Raises what requests raises."""
        auth = ("opencode", self.secrets("gateway.env")["GATEWAY_PASSWORD"])
        url = f"http://127.0.0.1:{self.port}{path}"
        answer = requests.request(method, url, auth=auth, json=body, timeout=timeout)
        if not answer.ok:
            raise requests.HTTPError(answer.text)
        return answer.json()


@contextlib.contextmanager
def a_stack(checkout: Checkout, engine: str, home: Path) -> Iterator[Up]:
    """Yield a stack that is not up yet; remove it with all it has."""
    made = Up(build_once(checkout, engine), f"t{os.getpid()}{engine[0]}", free_port(), home)
    try:
        yield made
    finally:
        done = made.inv("down", "--volumes", "--yes")
        assert done.code == 0, done.stderr
    assert made.name not in made.engine("ps", "--all", "--format", "{{.Names}}")
    assert made.name not in made.engine("volume", "ls", "--format", "{{.Name}}")
