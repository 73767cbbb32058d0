"""What agents and people do in a hardened container: git, npm, login shells, a project's own tool."""

from __future__ import annotations

import pytest

from pipeline.engines.container import Container, running
from tests.conftest import Built

pytestmark = pytest.mark.engine

TOOL = """
import { tool } from "@opencode-ai/plugin"
export default tool({ description: "greets", args: {}, async execute() { return "hello" } })
"""


def shell(container: Container, script: str) -> str:
    done = container.exec("sh", "-euc", script)
    assert done.ok, done.output
    return done.stdout.strip()


@pytest.mark.usefixtures("unmoved")
def test_a_hardened_container_is_a_place_to_work(built: Built) -> None:
    with running(built.engine, built.inspect()["Id"]) as container:
        # /workspace belongs to root, and the server does not run as root.
        shell(container, "cd /workspace && git init -q && git config --global user.name Ada")
        shell(container, "git config --global user.email ada@example.com")
        shell(container, "cd /workspace && echo 1 >a && git add a && git commit -qm one")
        assert shell(container, "cd /workspace && git log --format='%an %s'") == "Ada one"
        assert shell(container, "ls /root/.local/share/opencode/gitconfig")

        found = shell(container, "bash -lc 'command -v status python3; ssh -V' 2>&1").splitlines()
        assert found[:2] == ["/app/scripts/status", "/opt/venv/bin/python3"]
        assert found[2].startswith("OpenSSH_")
        encoding = shell(container, "/usr/bin/python3 -c 'import sys; print(sys.stdout.encoding)'")
        assert encoding == "utf-8"
        shell(container, "for p in file jq less make patch ps unzip; do command -v $p; done")

        package = '{"name": "left", "version": "1.0.0"}'
        shell(container, f"mkdir -p /tmp/left && echo '{package}' >/tmp/left/package.json")
        shell(container, "cd /tmp && npm pack --silent ./left && mkdir -p p && cd p && npm init -y")
        shell(
            container,
            "cd /tmp/p && npm install --offline ../left-1.0.0.tgz && ls node_modules/left",
        )


@pytest.mark.usefixtures("unmoved")
def test_a_tool_of_the_project_loads(built: Built) -> None:
    with running(built.engine, built.inspect()["Id"]) as container:
        container.wait_ready(60)
        assert container.server
        folder = "/workspace/.opencode/tool"
        shell(container, f"mkdir -p {folder} && cat >{folder}/hello.ts <<'END'\n{TOOL}\nEND")
        shell(container, "curl -fsS -X POST http://localhost:4096/instance/dispose >/dev/null")
        answer = container.server.get("/experimental/tool/ids", timeout=120)
        assert answer.status_code == 200, answer.text
        assert "hello" in answer.json()
