"""The stack as podman and docker run it: real FalkorDB, a real Redis in Valkey's place, the server,
and the backup.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from tests.conftest import SUBNET
from tests.gateway import Gateway, refuses_what_opencode_takes
from tests.image.conftest import derive
from tests.servers import until
from tests.stack_up import PASSWORDS, Up

pytestmark = pytest.mark.engine

HOST = SUBNET.partition("/")[0]
"""An address of this machine that containers reach: of the bridge that the tests' docker has."""


def test_the_stack_lives_is_closed_and_loses_nothing(stack: Up) -> None:
    stack.inv("status").failed("NoStack", 71, "inv up")
    assert "nothing is running" in stack.ok("down")
    with socket.create_server(("127.0.0.1", stack.port)):
        stack.inv("up").failed("PortTaken", 44, str(stack.port))
    assert "would start falkordb, valkey, opencode, gateway, backup" in stack.ok("up", "--dry-run")
    said = stack.ok("up")
    assert f"http://127.0.0.1:{stack.port}/L3dvcmtzcGFjZQ in a browser" in said
    assert "are already running" in stack.ok("up")
    assert requests.get(f"http://127.0.0.1:{stack.port}/config", timeout=20).status_code == 401
    session = stack.ask("/session", "POST", {"title": "kept"})["id"]

    # Where a model on this machine is.
    assert stack.inside("opencode", "getent", "hosts", "host.containers.internal")
    _is_closed(stack)
    front = Gateway(stack.port, password=stack.secrets("gateway.env")["GATEWAY_PASSWORD"])
    refuses_what_opencode_takes(front)
    _shells_get_no_secrets(stack, front)
    until(
        lambda: json.loads(stack.inv("status", "--json").stdout)["backup"]["code"] == 0,
        "the first backup",
    )
    assert "the stack is healthy" in stack.ok("status")
    said = stack.ok("logs")
    assert all(
        words in said
        for words in ("--- valkey", "Ready to accept connections", "server listening on")
    )
    following = stack.start("logs", "--part", "opencode", "--follow")
    following.until("server listening on")
    following.end(signal.SIGTERM)
    checkout = stack.built.checkout
    shell = subprocess.run(
        checkout.argv("shell", "--engine", stack.built.engine.name),
        input="id -u; pwd",
        env=checkout.environ(stack.env),
        cwd=checkout.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.split() == ["1000", "/workspace"]

    assert stack.valkey("SET", "key", "value") == "OK"
    stack.engine("kill", "--signal", "KILL", stack.container("valkey"))
    until(
        lambda: stack.inv("up").code == 0, "up brings it back"
    )  # docker takes a kill for somebody's will
    assert stack.valkey("GET", "key") == "value"

    _restores(stack, session)

    stack.ok("down")
    stack.inv("status").failed("NoStack", 71, "inv up")
    stack.inv("down", "--volumes").failed("VolumesKept", 79, "--yes")
    stack.ok("up")
    assert stack.ask(f"/session/{session}")["title"] == "kept"
    assert stack.valkey("GET", "key") == "value"


def _is_closed(stack: Up) -> None:
    for part in ("falkordb", "valkey", "opencode", "gateway", "backup"):
        seen = stack.inspect(part)
        assert seen["HostConfig"]["ReadonlyRootfs"]
        assert seen["HostConfig"]["Memory"] > 0
        assert "no-new-privileges" in str(seen["HostConfig"]["SecurityOpt"])
    ports = stack.engine("ps", "--format", "{{.Ports}}", "--filter", f"name={stack.name}").split()
    assert {each for each in ports if "->" in each} == {f"127.0.0.1:{stack.port}->4096/tcp"}
    seen_in_ps = (
        stack.inside("falkordb", "sh", "-c", "cat /proc/[0-9]*/cmdline")
        + subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout
    )
    values = [
        value
        for name in ("server.env", "gateway.env", "backup.env")
        for key, value in stack.secrets(name).items()
        if key in PASSWORDS
    ]
    assert len(values) == 7
    assert not any(value in seen_in_ps for value in values)


def _shells_get_no_secrets(stack: Up, front: Gateway) -> None:
    command = "env; status >/dev/null; cat /proc/self/environ"
    session = stack.ask("/session", "POST", {})["id"]
    body = {"agent": "build", "command": command}
    answer = json.dumps(stack.ask(f"/session/{session}/shell", "POST", body))
    shell = {"command": "sh", "args": ["-c", f"{command}; echo the end; read line"]}
    terminal = stack.ask("/pty", "POST", shell)["id"]
    status, peer = front.upgrade(f"/pty/{terminal}/connect", Authorization=front.basic)
    screen = b""
    with peer:
        assert status == 101
        while b"the end" not in screen:
            more = peer.recv(65536)
            assert more, screen
            screen += more
    for output in (answer, screen.decode(errors="replace")):
        assert "FALKORDB_HOST" in output
        for name in ("server.env", "gateway.env", "backup.env"):
            for secret in stack.secrets(name).values():
                assert secret not in output


def _restores(stack: Up, session: str) -> None:
    stack.inside("backup", "/app/scripts/backup", "run", "--create")
    assert stack.ask(f"/session/{session}", "DELETE") is True
    assert stack.valkey("SET", "key", "another") == "OK"
    assert "would stop the server" in stack.ok("restore", "--dry-run", "--replace")
    stack.inv("restore").failed("RestoreStopped", 80)
    assert stack.valkey("GET", "key") == "another"
    interrupted = stack.start("restore", "--replace")
    interrupted.until("stopped the server")
    until(
        lambda: "backup\0restore" in stack.inside("backup", "sh", "-c", "cat /proc/[0-9]*/cmdline"),
        "it restores",
    )
    interrupted.end(signal.SIGINT)
    assert "backup\0restore" not in stack.inside("backup", "sh", "-c", "cat /proc/[0-9]*/cmdline")
    assert stack.ask("/session", "POST", {"title": "up again"})["title"] == "up again"
    stack.ok("restore", "--replace")
    assert stack.ask(f"/session/{session}")["title"] == "kept"
    assert stack.valkey("GET", "key") == "value"


def _reaches_nothing_outside(stack: Up) -> None:
    """Assert that the server does not reach a cloud's metadata, and which parts have a way out."""
    script = "import socket; socket.create_connection(('169.254.169.254', 80), 5)"
    engine = stack.built.engine
    done = engine.ask(engine.exec(stack.container("opencode"), "python3", "-c", script))
    # Docker 20.10 drops the packets; podman and newer Docker set no route.
    assert "Network is unreachable" in done.output or "timed out" in done.output
    inside, outside = f"{stack.name}_default", f"{stack.name}_outside"
    internal = [
        stack.engine("network", "inspect", "--format", "{{.Internal}}", each).strip()
        for each in (inside, outside)
    ]
    assert internal == ["true", "false"]
    for part in ("falkordb", "valkey", "egress", "opencode", "gateway", "backup"):
        networks = set(stack.inspect(part)["NetworkSettings"]["Networks"])
        both = part in ("gateway", "backup", "egress")
        assert networks == ({inside, outside} if both else {inside})


def _reaches_what_is_listed(stack: Up) -> None:
    """Assert that a request leaves only by the proxy, and only for a host of the list."""
    listed = ThreadingHTTPServer((HOST, 0), SimpleHTTPRequestHandler)
    threading.Thread(target=listed.serve_forever, daemon=True).start()
    url = f"http://{HOST}:{listed.server_port}/"
    status = "curl -s -m 20 -o /dev/null -w %{http_code}"
    with listed:
        for command, answer in (
            (f"{status} {url}", "200"),
            (f"{status} http://169.254.169.254/latest/meta-data/", "403"),
            (f"{status} http://{HOST}.example/", "403"),
            (f"{status} --noproxy '*' -m 5 http://169.254.169.254/", "000"),
            ("curl -sS -m 20 https://169.254.169.254/ 2>&1", "CONNECT tunnel failed, response 403"),
        ):
            assert answer in stack.inside("opencode", "sh", "-c", f"{command} || true"), command
        listed.shutdown()
    assert "169.254.169.254" in stack.ok("logs", "--part", "egress")


def killed(stack: Up, to: str, before: str) -> None:
    """Kill an upgrade in the moment in which the server's container is there with the new image."""
    upgrade = stack.start("upgrade", "--to", to)
    until(
        lambda: _image(stack) not in ("", before) or upgrade.child.poll() is not None,
        "the new server is there",
    )
    upgrade.end(signal.SIGKILL)
    assert (stack.home / "upgrade.json").exists()


def _image(stack: Up) -> str:
    done = stack.built.engine.ask(
        stack.built.engine.argv("inspect", "--format", "{{.Image}}", stack.container("opencode"))
    )
    return done.stdout.strip() if done.ok else ""


def test_an_upgrade_moves_on_or_goes_back_with_image_and_data(stack: Up) -> None:
    def image() -> str:
        return str(stack.inspect("opencode")["Image"])

    stack.settings |= {"EGRESS": "models", "EGRESS_HOSTS": f"model.example {HOST}"}
    stack.ok("up")
    _reaches_nothing_outside(stack)
    _reaches_what_is_listed(stack)
    session, before = stack.ask("/session", "POST", {"title": "kept"})["id"], image()
    assert "already runs" in stack.ok("upgrade")
    ruin = "rm -f /root/.local/share/opencode/opencode.db*; sleep 2; exit 1"
    derive(stack.built, "bad", f'ENTRYPOINT ["sh", "-c", "{ruin}"]')
    good = derive(stack.built, "good", "LABEL good=yes")
    engine = stack.built.engine
    engine.tag(engine.local("opencode-server-test-bad"), "opencode-server-test:bad")
    engine.tag(good, "opencode-server-test:good")
    try:
        stack.inv("upgrade", "--to", "bad").failed("UpgradeRolledBack", 76, "is not healthy")
        assert (stack.ask(f"/session/{session}")["title"], image()) == ("kept", before)

        killed(stack, "bad", before)
        stack.inv("status").failed("StackUnwell", 74, "was interrupted")
        said = stack.ok("upgrade", "--to", "good")
        assert "undoing it" in said
        assert "upgraded to" in said
        assert stack.ask(f"/session/{session}")["title"] == "kept"

        after = image()
        killed(stack, before.removeprefix("sha256:"), after)
        stack.ok("up")
        later = stack.ask("/session", "POST", {"title": "later"})["id"]
        said = stack.ok("upgrade", "--to", before.removeprefix("sha256:"))
        assert "keeping its image and its data" in said
        assert (stack.ask(f"/session/{later}")["title"], image()) == ("later", before)
        assert "was interrupted" not in stack.ok("status")
    finally:
        stack.ok("down")
        for name in (":bad", ":good", "-bad", "-good"):
            stack.engine("rmi", "--force", engine.local(f"opencode-server-test{name}"))
