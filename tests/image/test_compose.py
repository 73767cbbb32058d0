"""deploy/compose.yaml as its first lines say: three files beside it, one command; docker-compose
and podman-compose.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.core import process
from pipeline.core.settings import ROOT, Settings
from pipeline.engines.engine import Engine
from pipeline.stack import databases
from tests.servers import until
from tests.stack_up import PASSWORDS, Up, named_prefix, pod_of, team

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
        lines = [
            line for line in text.splitlines() if not line.startswith(("BACKUP_REMOTE", "RCLONE_"))
        ]
        filled = [f"{line}of-a-test" if line.endswith("_PASSWORD=") else line for line in lines]
        (deploy / f"{name}.env").write_text("\n".join([*filled, ""]))
    example = (deploy / "gateway/gateway.env.example").read_text().strip()
    (deploy / "gateway.env").write_text(f"{example}of-a-test\n")
    made = image_of(stack, "falkordb")
    env = {
        **os.environ,
        **engine.env,
        "OPENCODE_STACK": stack.name,
        "OPENCODE_PORT": str(stack.port),
    }
    env |= {
        "FALKORDB_IMAGE": made,
        "VALKEY_IMAGE": made,
        "GATEWAY_IMAGE": image_of(stack, "gateway"),
        "OPENCODE_IMAGE": stack.built.reference,
        "BACKUP_IMAGE": stack.built.reference,
    }
    options = []
    if engine.podman:
        options = ["--in-pod=false", f"--podman-args={shlex.join(engine.flags)}"]
        options.append(f"--podman-run-args={shlex.join(engine.limits)}")

    def compose(*words: str) -> None:
        argv = [program(engine), "--project-name", stack.name, "--env-file", "deploy/server.env"]
        argv += ["--file", "deploy/compose.yaml", *options, *words]
        subprocess.run(argv, check=True, cwd=tmp_path, env=env, capture_output=True)

    def status(name: str) -> str:
        done = engine.ask(engine.argv("exec", name, "/app/scripts/status"))
        return done.stdout if done.ok else ""

    try:
        compose("up", "--detach")
        said = until(lambda: status(stack.name), "all parts answer")
        for words in ("server    ok", "password required", "falkordb  ok", "valkey    ok"):
            assert words in said
        config = f"http://127.0.0.1:{stack.port}/config"
        assert requests.get(config, timeout=60).status_code == 401
        assert requests.get(config, auth=("opencode", "of-a-test"), timeout=60).ok
        assert engine.ask(
            engine.exec(f"{stack.name}-backup", "/app/scripts/backup", "run", "--create")
        ).ok
    finally:
        compose("down", "--volumes")


def image_of(stack: Up, part: str) -> str:
    """Return the image of a part, built for the stack, which removes its tag at the end."""
    settings = Settings.model_validate({"stack": {"name": stack.name}})
    databases.ensure(settings, stack.built.engine, part, stack.built.reference)
    return databases.find(settings, stack.built.engine, part)


def playable(part: str, documents: list[dict[str, Any]], image: str, prefix: str) -> dict[str, Any]:
    """Return a rendered pod as podman 4.3 can play it: without Secrets, claims and limits of CPUs."""
    spec = copy.deepcopy(pod_of(documents, part))
    (container,) = spec["containers"]
    variables = {name: f"{name.lower()}-of-a-test" for name in PASSWORDS[:3]}
    for database in ("FALKORDB", "VALKEY"):
        variables[f"{database}_USERNAME"] = "memory"
        variables[f"{database}_MEMORY_PASSWORD"] = variables[f"{database}_PASSWORD"]
    if part == "opencode":
        variables |= named_prefix(documents, "ConfigMap", "opencode-settings")["data"]
    container.pop("envFrom", None)
    container.pop("ports", None)
    container["resources"]["limits"].pop("cpu")
    container |= {"image": image, "imagePullPolicy": "Never"}
    container["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    spec["volumes"] = []
    for mount in container["volumeMounts"]:
        mount["name"] = f"{prefix}-{part}-{mount['name']}"
        spec["volumes"].append({"name": mount["name"], "emptyDir": {}})
    # podman makes the volumes root's; a cluster gives them to fsGroup.
    spec["securityContext"] = {"runAsUser": 1000 if part == "opencode" else 0}
    name = "opencode" if part == "opencode" else f"opencode-{part}"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


@pytest.mark.parametrize("stack", ["podman"], indirect=True)
def test_podman_plays_what_kustomize_renders_of_a_team(stack: Up, tmp_path: Path) -> None:
    engine, network = stack.built.engine, f"{stack.name}-kube"
    made = image_of(stack, "falkordb")
    images = {"falkordb": made, "valkey": made, "opencode": stack.built.reference}
    documents = team(tmp_path)
    # `kube play` has no flag for ulimits.
    limits = [limit for limit in engine.limits if limit != "--ulimit"]
    configuration = tmp_path / "containers.conf"
    configuration.write_text(f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n")
    env = {**engine.env, "CONTAINERS_CONF": str(configuration)}
    stack.engine("network", "create", network)
    try:
        for part, image in images.items():
            pod = json.dumps(playable(part, documents, image, stack.name)).encode()
            play = engine.argv("kube", "play", "--network", network, "-")
            done = process.run(play, stdin=pod, env=env)
            assert done.ok, done.output

        def status() -> str:
            done = engine.ask(engine.exec("opencode-opencode", "/app/scripts/status"))
            return done.stdout if done.ok else ""

        output = until(status, "all parts answer")
        for words in ("server    ok", "falkordb  ok", "valkey    ok"):
            assert words in output
        for part in images:
            container = "opencode-opencode" if part == "opencode" else f"opencode-{part}-{part}"
            described = pod_of(documents, part)["containers"][0]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                command = described[probe]["exec"]["command"]
                assert engine.ask(engine.exec(container, *command)).ok, (part, probe)
    finally:
        for name in ("opencode", "opencode-falkordb", "opencode-valkey"):
            engine.ask(engine.argv("pod", "rm", "--force", name))
        for volume in stack.engine("volume", "ls", "--quiet").split():
            if volume.startswith(f"{stack.name}-"):
                engine.ask(engine.argv("volume rm", volume))
        engine.ask(engine.remove_network(network))
