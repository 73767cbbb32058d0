"""deploy/compose.yaml as its first lines say: three files beside it, one command; docker-compose and podman-compose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine import Engine
from pipeline.settings import ROOT, Settings
from pipeline.stack import databases
from pipeline.stack.manifests import Manifests
from tests.servers import until
from tests.stack_up import Up

pytestmark = pytest.mark.engine


def program(engine: Engine) -> str:
    """Return the Compose of an engine: PyPI's podman-compose, whatever docker has."""
    if engine.podman:
        return str(Path(sys.executable).parent / "podman-compose")
    found = shutil.which("docker-compose")
    assert found, "docker-compose is not installed; inv setup --tests installs it"
    return found


def test_compose_starts_it_with_the_documented_command(stack: Up, tmp_path: Path) -> None:
    engine, deploy = stack.built.engine, tmp_path / "deploy"
    shutil.copytree(ROOT / "deploy", deploy)
    for name in ("server", "backup", "datadog"):
        text = (deploy / f"kubernetes/team/{name}.env.example").read_text()
        lines = [line for line in text.splitlines() if not line.startswith(("BACKUP_REMOTE", "RCLONE_"))]
        filled = [f"{line}of-a-test" if line.endswith("_PASSWORD=") else line for line in lines]
        (deploy / f"{name}.env").write_text("\n".join([*filled, ""]))
    made = databases.ensure(Settings(), engine, Manifests.read(), "falkordb", stack.built.reference)
    env = {**os.environ, **engine.env, "OPENCODE_STACK": stack.name, "OPENCODE_PORT": str(stack.port)}
    env |= {"FALKORDB_IMAGE": made, "VALKEY_IMAGE": made, "OPENCODE_IMAGE": stack.built.reference,
            "OPENCODE_BACKUP_IMAGE": stack.built.reference}  # fmt: skip
    if engine.podman:
        text, variable = engine.containers_conf({})
        (tmp_path / "containers.conf").write_text(text)
        env[variable] = str(tmp_path / "containers.conf")

    def compose(*words: str) -> None:
        argv = [program(engine), "--project-name", stack.name, "--env-file", "deploy/server.env"]
        argv += ["--file", "deploy/compose.yaml", *words]
        subprocess.run(argv, check=True, cwd=tmp_path, env=env, capture_output=True)

    def status(name: str) -> str:
        done = engine.ask(engine.argv("exec", name, "/app/scripts/status"))
        return done.stdout if done.ok else ""

    try:
        compose("up", "--detach")
        said = until(lambda: status(stack.name), "all parts answer")
        for words in ("server    ok", "password asked for", "falkordb  ok", "valkey    ok"):
            assert words in said
        assert engine.ask(engine.exec(f"{stack.name}-backup", "/app/scripts/backup", "run", "--create")).ok
    finally:
        compose("down", "--volumes")
