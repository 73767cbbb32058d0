"""What agents and people do in a hardened container: git, npm, login shells, a project's own tool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipeline.engines.container import STATE, Container, running
from pipeline.stack import trust
from tests.conftest import PODMAN, Built

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

        assert shell(container, "pip --version").endswith("(python 3.11)")
        assert shell(container, "python3 -m pip --version; command -v pip").endswith(
            "/opt/venv/bin/pip"
        )
        shell(container, "/usr/bin/python3 -m venv /tmp/venv && /tmp/venv/bin/pip --version")


def tool_of_the_project(container: Container) -> None:
    """Write a tool into /workspace/.opencode, and let the server read the directory again."""
    folder = "/workspace/.opencode/tool"
    shell(container, f"mkdir -p {folder} && cat >{folder}/hello.ts <<'END'\n{TOOL}\nEND")
    shell(container, "curl -fsS -X POST http://localhost:4096/instance/dispose >/dev/null")


@pytest.mark.usefixtures("unmoved")
def test_a_tool_of_the_project_loads_and_a_wrong_configuration_is_named(built: Built) -> None:
    with running(built.engine, built.inspect()["Id"]) as container:
        container.wait_ready(60)
        tool_of_the_project(container)
        answer = container.server.get("/experimental/tool/ids", timeout=120)
        assert answer.status_code == 200, answer.text
        assert "hello" in answer.json()

        # A wrong opencode.json: the server is alive, and the health check names the file.
        shell(container, "echo '{\"model\": 7}' >/workspace/opencode.json")
        shell(container, "curl -fsS -X POST http://localhost:4096/instance/dispose >/dev/null")
        url = "http://localhost:4096/global/health"
        assert container.exec("/app/scripts/health", url, timeout=60).ok
        checked = container.exec("/app/scripts/health", timeout=60)
        assert not checked.ok
        assert "/workspace/opencode.json" in checked.output


@pytest.mark.parametrize("built", ["podman"], indirect=True)  # the server is the same in both
@pytest.mark.usefixtures("unmoved")
def test_a_tool_of_the_project_loads_without_a_network(built: Built) -> None:
    with running(built.engine, built.inspect()["Id"], network="none") as container:
        container.wait_ready_inside(60)
        tool_of_the_project(container)
        curl = ("curl", "-fsS", "http://localhost:4096/experimental/tool/ids")
        listed = container.exec(*curl, timeout=120)
        assert listed.ok, listed.output
        assert "hello" in json.loads(listed.stdout)
        # npm's own retries take 80 s.
        seconds = float(shell(container, f"curl -so /dev/null -w '%{{time_total}}' {curl[2]}"))
        assert seconds < 20, seconds

        # The next start finds the plugin package in the project.
        built.engine.must("stop", container.name)
        built.engine.must("start", container.name)
        container.wait_ready_inside(60)
        package = "/workspace/.opencode/node_modules/@opencode-ai/plugin/package.json"
        assert "@opencode-ai/plugin" in shell(container, f"cat {package}")


@pytest.mark.parametrize("built", ["podman"], indirect=True)
@pytest.mark.usefixtures("unmoved")
def test_a_state_of_another_user_is_an_error_with_the_command_that_helps(
    built: Built, tmp_path: Path
) -> None:
    image = built.inspect()["Id"]
    # A directory of root's, whatever the umask.
    tmp_path.chmod(0o755)
    argv = built.engine.run(image, rm=True, user="4321:4321", volume=f"{tmp_path}:{STATE}")
    done = built.engine.ask(argv, timeout=60)
    assert done.code == 1
    assert "Permission denied for UID 4321" in done.output
    assert "chown" in done.output


@PODMAN
@pytest.mark.usefixtures("unmoved")
def test_a_proxy_never_gets_what_goes_to_loopback(built: Built) -> None:
    nowhere = "http://127.0.0.1:9"
    names = ("http_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
    env = [*(f"{name}={nowhere}" for name in names), "no_proxy=git.example"]
    image = built.inspect()
    with running(built.engine, image["Id"], env=env) as container:
        container.wait_ready(60)
        command = (image["Config"].get("Healthcheck") or image["Healthcheck"])["Test"][-1]
        assert built.engine.ask(built.engine.healthcheck(container.name, command)).ok
        assert container.exec("/app/scripts/status").ok
        assert container.server
        session = container.server.send("POST", "/session", {}, timeout=60).json()["id"]
        body = {"agent": "build", "command": "echo $no_proxy; curl -fsS localhost:4096/config"}
        answer = container.server.send("POST", f"/session/{session}/shell", body, timeout=60).text
        assert "git.example,localhost" in answer
        assert "permission" in answer, answer


HTTPS = """
import http.server, ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/keys/server.pem", "/keys/key.pem")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8443), http.server.SimpleHTTPRequestHandler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
FETCH = "fetch('https://localhost:8443/').then(answer => process.exit(answer.ok ? 0 : 1))"
CLIENTS = {
    "curl": "curl -fsS https://localhost:8443/",
    "git": "git ls-remote https://localhost:8443/repository/.git",
    "node": f'node -e "{FETCH}"',
    "OpenCode": f'cd /tmp && BUN_BE_BUN=1 opencode -e "{FETCH}"',
    "Python": "python3 -c \"import httpx; httpx.get('https://localhost:8443/').raise_for_status()\"",
}
"""A request by each kind of program, of which each has its own list of CAs."""


@PODMAN
@pytest.mark.usefixtures("unmoved")
def test_every_program_trusts_the_networks_ca(
    built: Built, office_ca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    _certificate(office_ca, tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(office_ca))
    bundle = tmp_path / "bundle.crt"
    trust.write(bundle, trust.bundle(""))
    name = f"oc-trust-{built.engine.name}"
    argv = built.engine.run(
        built.inspect()["Id"],
        "-c",
        HTTPS,
        entrypoint="/usr/bin/python3",
        name=name,
        detach=True,
        workdir="/tmp",
        volume=[f"{tmp_path}:/keys:ro", f"{bundle}:{trust.MOUNTED}:ro", STATE],
    )
    container = Container(built.engine, name, 0)
    try:
        done = built.engine.ask(argv)
        assert done.ok, done.output
        make = "git init -q /tmp/repository && cd /tmp/repository && git update-server-info"
        shell(
            container, f"{make} && curl -sk --retry 20 --retry-connrefused https://localhost:8443/"
        )
        variables = " ".join(f"{variable}={trust.MOUNTED}" for variable in trust.VARIABLES)
        for client, command in CLIENTS.items():
            trusting = container.exec("sh", "-c", f"export {variables}; {command}", timeout=60)
            assert trusting.ok, (client, trusting.output)
            assert not container.exec("sh", "-c", command, timeout=60).ok, client
    finally:
        built.engine.ask(built.engine.remove_container(name))


def _certificate(office_ca: Path, home: Path) -> None:
    """Have the CA sign a certificate for localhost: ``home``/server.pem and key.pem."""
    words = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost"]
    paths = ["-keyout", str(home / "key.pem"), "-out", str(home / "request.pem")]
    subprocess.run(["openssl", *words, *paths], check=True, capture_output=True)
    words = ["x509", "-req", "-in", str(home / "request.pem"), "-copy_extensions", "copy"]
    words += ["-CA", str(office_ca), "-CAkey", str(office_ca.with_name("key.pem"))]
    words += ["-CAcreateserial", "-out", str(home / "server.pem"), "-days", "2"]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    (home / "key.pem").chmod(0o644)
