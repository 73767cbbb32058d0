"""The stack as podman and docker run it: real FalkorDB, a real Redis in Valkey's place, the server, and cron."""

from __future__ import annotations

import json
import signal
import socket
import subprocess

import pytest
import requests

from tests.image.conftest import derive
from tests.servers import until
from tests.stack_up import PASSWORDS, Up

pytestmark = pytest.mark.engine


def test_the_stack_lives_is_closed_and_loses_nothing(stack: Up) -> None:
    stack.inv("status").failed("NoStack", 71, "inv up")
    assert "nothing was up" in stack.ok("down")
    with socket.create_server(("127.0.0.1", stack.port)):
        stack.inv("up").failed("PortTaken", 44, str(stack.port))
    assert "would start opencode" in stack.ok("up", "--dry-run")
    said = stack.ok("up")
    assert f"http://127.0.0.1:{stack.port}" in said
    assert "were up already" in stack.ok("up")
    assert requests.get(f"http://127.0.0.1:{stack.port}/config", timeout=20).status_code == 401
    session = stack.ask("/session", "POST", {"title": "kept"})["id"]

    for part in ("falkordb", "valkey", "opencode", "backup"):
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
    values = [value for name in ("server.env", "backup.env") for key, value in stack.secrets(name).items()
              if key in PASSWORDS]  # fmt: skip
    assert len(values) == 4
    assert not any(value in seen_in_ps for value in values)

    until(lambda: json.loads(stack.inv("status", "--json").stdout)["backup"]["code"] == 0, "the first backup")
    assert "all is well" in stack.ok("status")
    said = stack.ok("logs")
    assert all(words in said for words in ("--- valkey", "Ready to accept connections", "server listening on"))
    following = stack.start("logs", "--part", "opencode", "--follow")
    following.until("server listening on")
    following.end(signal.SIGTERM)
    checkout = stack.built.checkout
    shell = subprocess.run(
        checkout.argv("shell", "--engine", stack.built.engine.name), input="id -u; pwd",
        env=checkout.environ(stack.env), cwd=checkout.root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shell.stdout.split() == ["1000", "/workspace"]

    assert stack.valkey("SET", "key", "value") == "OK"
    stack.engine("kill", "--signal", "KILL", stack.container("valkey"))
    until(lambda: stack.inv("up").code == 0, "up brings it back")  # docker takes a kill for somebody's will
    assert stack.valkey("GET", "key") == "value"

    as_the_role = ["exec", "--user", "1000:1000", stack.container("backup")]
    stack.engine(*as_the_role, "/app/scripts/backup", "run", "--create")
    assert stack.ask(f"/session/{session}", "DELETE") is True
    assert stack.valkey("SET", "key", "another") == "OK"
    assert "would stop the server" in stack.ok("restore", "--dry-run", "--replace")
    stack.inv("restore").failed("RestoreStopped", 80)
    assert stack.valkey("GET", "key") == "another"
    stack.ok("restore", "--replace")
    assert stack.ask(f"/session/{session}")["title"] == "kept"
    assert stack.valkey("GET", "key") == "value"

    stack.ok("down")
    stack.inv("status").failed("NoStack", 71, "inv up")
    stack.inv("down", "--volumes").failed("VolumesKept", 79, "--yes")
    stack.ok("up")
    assert stack.ask(f"/session/{session}")["title"] == "kept"
    assert stack.valkey("GET", "key") == "value"


def test_an_upgrade_moves_on_or_goes_back_with_image_and_data(stack: Up) -> None:
    def image() -> str:
        return str(stack.inspect("opencode")["Image"])

    stack.ok("up")
    session, before = stack.ask("/session", "POST", {"title": "kept"})["id"], image()
    assert "runs" in stack.ok("upgrade")
    derive(stack.built, "bad", 'ENTRYPOINT ["false"]')
    good = derive(stack.built, "good", "LABEL good=yes")
    engine = stack.built.engine
    engine.tag(engine.local("opencode-server-test-bad"), "opencode-server-test:bad")
    engine.tag(good, "opencode-server-test:good")
    try:
        stack.inv("upgrade", "--to", "bad").failed("UpgradeRolledBack", 76, "did not come up")
        assert (stack.ask(f"/session/{session}")["title"], image()) == ("kept", before)

        note = stack.home / "upgrade.json"
        killed = stack.start("upgrade", "--to", "good")
        until(lambda: note.exists() or killed.child.poll() is not None, "the upgrade has begun")
        killed.end(signal.SIGKILL)
        assert note.exists()
        stack.inv("status").failed("StackUnwell", 74, "was interrupted")
        said = stack.ok("upgrade", "--to", "good")
        assert "undoing it first" in said
        assert "upgraded from" in said
        assert not note.exists()
        assert image() != before
        assert stack.ask(f"/session/{session}")["title"] == "kept"
    finally:
        stack.ok("down")
        for name in (":bad", ":good", "-bad", "-good"):
            stack.engine("rmi", "--force", engine.local(f"opencode-server-test{name}"))
