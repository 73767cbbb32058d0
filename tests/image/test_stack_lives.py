"""The stack as podman plays it: real FalkorDB, a real Redis in Valkey's place, the server, and the backup's cron."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import Built, Checkout, Done, build_once
from tests.servers import free_port, until

PASSWORDS = ("OPENCODE_SERVER_PASSWORD", "FALKORDB_PASSWORD", "VALKEY_PASSWORD", "BACKUP_PASSWORD")


@dataclass
class Up:
    """A stack of a test's own: its name, port and secrets."""

    built: Built
    name: str
    port: int
    home: Path

    def inv(self, *words: str) -> Done:
        env = {"INVOKE_STACK_NAME": self.name, "INVOKE_STACK_PORT": str(self.port), "INVOKE_STACK_HOME": str(self.home)}
        return self.built.inv(*words, env=env)

    def ok(self, *words: str) -> str:
        done = self.inv(*words)
        assert done.code == 0, done.stdout[-3000:] + done.stderr
        return done.stdout

    def ask(self, path: str, method: str = "GET", body: object = None) -> Any:
        secrets = dict(line.split("=", 1) for line in (self.home / "server.env").read_text().splitlines()[1:])
        auth = ("opencode", secrets["OPENCODE_SERVER_PASSWORD"])
        answer = requests.request(method, f"http://127.0.0.1:{self.port}{path}", auth=auth, json=body, timeout=20)
        assert answer.ok, answer.text
        return answer.json()

    def podman(self, *words: str) -> str:
        done = self.built.engine.ask(self.built.engine.argv(*words))
        assert done.ok, done.said
        return done.stdout


@pytest.fixture
def stack(checkout: Checkout, engine_environment: None, tmp_path: Path) -> Iterator[Up]:  # noqa: ARG001
    made = Up(build_once(checkout, "podman"), f"t{os.getpid()}", free_port(), tmp_path / "home")
    try:
        yield made
    finally:
        done = made.inv("down", "--volumes", "--yes")
        assert done.code == 0, done.stderr


@pytest.mark.engine
def test_the_stack_lives_loses_nothing_and_goes_back_from_a_bad_upgrade(stack: Up, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", stack.port)):
        stack.inv("up").failed("PortTaken", 44, str(stack.port))
    assert "would start opencode" in stack.ok("up", "--dry-run")
    said = stack.ok("up")
    assert f"http://127.0.0.1:{stack.port}" in said
    assert "were up already" in stack.ok("up")
    assert requests.get(f"http://127.0.0.1:{stack.port}/config", timeout=20).status_code == 401
    session = stack.ask("/session", "POST", {"title": "kept"})["id"]

    for part in ("falkordb", "valkey", "opencode", "backup"):
        container = f"{_pod(stack, part)}-{part}"
        host = json.loads(stack.podman("inspect", "--type", "container", container))[0]["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["Memory"] > 0
        assert "no-new-privileges" in host["SecurityOpt"]
    ends = "ps -ef 2>/dev/null || cat /proc/[0-9]*/cmdline"
    seen = stack.podman("exec", f"{stack.name}-falkordb-falkordb", "sh", "-c", ends)
    values = [line.split("=", 1)[1] for name in ("server.env", "backup.env")
              for line in (stack.home / name).read_text().splitlines() if line.startswith(PASSWORDS)]  # fmt: skip
    assert len(values) == 4
    assert not any(value in seen for value in values)

    client = 'REDISCLI_AUTH=$VALKEY_PASSWORD valkey-cli -p 6380 "$@"'
    redis = ["exec", f"{stack.name}-valkey-valkey", "sh", "-c", client, "-"]
    assert stack.podman(*redis, "SET", "key", "value").strip() == "OK"
    stack.podman("kill", "--signal", "KILL", f"{stack.name}-valkey-valkey")
    done = stack.inv("up")  # whether or not the engine was faster
    assert done.code in {0, 73}, done.stderr
    until(lambda: stack.inv("up").code == 0)
    assert stack.podman(*redis, "GET", "key").strip() == "value"

    recipe = tmp_path / "Containerfile"
    recipe.write_text(f'FROM {stack.built.reference}\nENTRYPOINT ["false"]\n')
    limits = stack.built.engine.limits
    stack.podman("build", *limits, "--format", "docker", "--tag", "localhost/opencode-server-test:bad",
                 "--file", str(recipe), str(tmp_path))  # fmt: skip
    try:
        stack.inv("upgrade", "--to", "bad").failed("UpgradeRolledBack", 76, "did not come up")
    finally:
        stack.podman("rmi", "localhost/opencode-server-test:bad")
    assert stack.ask(f"/session/{session}")["title"] == "kept"

    stack.ok("down")
    stack.inv("status").failed("NoStack", 71, "inv up")
    stack.inv("down", "--volumes").failed("VolumesKept", 79, "--yes")
    stack.ok("up")
    assert stack.ask(f"/session/{session}")["title"] == "kept"
    assert stack.podman(*redis, "GET", "key").strip() == "value"


def _pod(stack: Up, part: str) -> str:
    return stack.name if part == "opencode" else f"{stack.name}-{part}"
