"""A working day in a hardened container: everything after the first prompt, on somebody's own repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engines.container import SECRET, STATE, WORK, Container, Server
from pipeline.smoke import conversation
from tests.conftest import Built
from tests.image.test_conversation import within
from tests.servers import free_port, until

pytestmark = pytest.mark.engine

OWNER = 4321
"""The owner of the project on the host: a user that the image does not know."""

TOOL = """
import { tool } from "@opencode-ai/plugin"
export default tool({ description: "greets", args: {}, async execute() { return "hello from the project" } })
"""
AGENT = "---\ndescription: an agent of the project\nmode: primary\n---\nYou fix this project.\n"
TEST = """
import unittest
import wheel_of_ours
from product import double
class Doubles(unittest.TestCase):
    def test(self): self.assertEqual(double(wheel_of_ours.TWENTY_ONE), 42)
"""
PROJECT = {
    ".gitignore": ".venv\nnode_modules\n__pycache__\n",
    ".opencode/tool/greet.ts": TOOL,
    ".opencode/agent/fixer.md": AGENT,
    "test_product.py": TEST,
    "product.py": "def double(number):\n    return number\n",
    "left/package.json": '{"name": "left", "version": "1.0.0", "main": "index.js"}',
    "left/index.js": "module.exports = 6\n",
}
FIXED = "def double(number):\n    return 2 * number\n"
PREPARE = (
    "npm install --silent --no-save ./left && node -e 'console.log(require(\"left\"))' && "
    "python3 -m venv .venv && .venv/bin/pip install --quiet --no-index ./wheel_of_ours-1.0-py3-none-any.whl && "
    ".venv/bin/python -m unittest -q 2>&1 | tail -n 1"
)
PUSH = "git add product.py && git commit --quiet --message 'Double it' && git push --quiet && git log --format=%an:%s -1"


def git(*words: str, home: Path) -> str:
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.com")
    argv = ["git", "-C", str(home), *identity, *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A bare repository with the project in it."""
    work, bare = tmp_path / "work", tmp_path / "upstream.git"
    for name, text in PROJECT.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    with zipfile.ZipFile(work / "wheel_of_ours-1.0-py3-none-any.whl", "w") as wheel:
        about = "wheel_of_ours-1.0.dist-info"
        wheel.writestr("wheel_of_ours.py", "TWENTY_ONE = 21\n")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: wheel-of-ours\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    git("init", "--quiet", "--initial-branch", "main", home=work)
    git("add", "--force", ".", home=work)
    git("commit", "--quiet", "--message", "the project", home=work)
    git("clone", "--quiet", "--bare", str(work), str(bare), home=tmp_path)
    return bare


@contextmanager
def ssh_server(container: Container, home: Path, port: int) -> Iterator[None]:
    """Run sshd of this machine in the network of a container; its key is ``home``/key."""
    program = shutil.which("sshd", path="/usr/sbin")
    assert program, "sshd is not installed; inv setup --tests installs it"
    for name in ("host", "key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(words, check=True)
    known = (home / "host.pub").read_text().split()[:2]
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(known)}\n")
    for name in ("key", "known_hosts"):
        os.chown(home / name, OWNER, OWNER)
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "HostKey": home / "host",
        "AuthorizedKeysFile": home / "key.pub",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    argv = [*within(container), program, "-D", "-e", "-f", "/dev/null", "-p", str(port), *options]
    with (home / "sshd.log").open("wb") as log, subprocess.Popen(argv, stderr=log) as server:
        try:
            until(lambda: b"listening" in (home / "sshd.log").read_bytes())
            yield
        finally:
            server.terminate()


@contextmanager
def at_work(built: Built, project: Path, keys: Path, ssh: str) -> Iterator[Container]:
    """A hardened container of the image, as README's ``run`` has it, that works on ``project``."""
    engine = built.engine
    container = Container(engine, f"oc-day-{os.getpid()}-{engine.name}", time.monotonic())
    env = [*conversation.environment(), f"GIT_SSH_COMMAND={ssh}", SECRET]
    argv = engine.run(
        built.inspect()["Id"],
        detach=True,
        name=container.name,
        user=f"{OWNER}:{OWNER}",
        env=env,
        publish="127.0.0.1::4096",
        volume=[f"{project}:{WORK}", f"{keys}:/keys:ro", STATE],
    )
    try:
        done = engine.ask(argv, env={SECRET: "pw"})
        assert done.ok, done.output
        container.server = Server(container.published(), "pw", 60)
        container.wait_ready(120)
        yield container
    finally:
        engine.ask(engine.remove_container(container.name))


def bash(session: conversation.Session, command: str, **options: str) -> str:
    """Let the model run a command, and return its output."""
    session.prompt(("bash", {"command": command, "description": "works"}), **options)
    return session.outputs()["bash"].strip()


@pytest.mark.usefixtures("unmoved")
def test_a_working_day(built: Built, upstream: Path, tmp_path: Path) -> None:
    project, keys = tmp_path / "project", tmp_path / "keys"
    for folder in (project, keys):
        folder.mkdir()
        os.chown(folder, OWNER, OWNER)
    port = free_port()
    ssh = "ssh -i /keys/key -o IdentitiesOnly=yes -o UserKnownHostsFile=/keys/known_hosts"
    with at_work(built, project, keys, ssh) as container:
        conversation.start_upstreams(container)
        with ssh_server(container, keys, port):
            run = container.exec
            assert run("git", "config", "--global", "user.name", "Ada").ok
            assert run("git", "config", "--global", "user.email", "ada@example.com").ok
            cloned = run("git", "clone", "-q", f"ssh://root@127.0.0.1:{port}{upstream}", ".")
            assert cloned.ok, cloned.output
            assert container.server.send("POST", "/instance/dispose", timeout=60).ok

            session = conversation.Session(container)
            session.path = f"/session/{session.request('/session', {})['id']}"
            session.prompt(("greet", {}), agent="fixer")
            assert session.outputs()["greet"] == "hello from the project"
            assert bash(session, PREPARE).splitlines() == ["6", "FAILED (failures=1)"]

            before = session.prompt(("write", {"filePath": "notes.txt", "content": "a mistake"}))
            assert (project / "notes.txt").read_text() == "a mistake"
            asked = [m["info"]["id"] for m in session.messages() if m["info"]["role"] == "user"][-1]
            session.request(f"{session.path}/revert", {"messageID": asked})
            assert not (project / "notes.txt").exists(), before

            edit = {"filePath": f"{WORK}/product.py", "content": FIXED}
            session.prompt(("read", {"filePath": f"{WORK}/product.py"}), ("write", edit))
            assert bash(session, ".venv/bin/python -m unittest -q 2>&1 | tail -n 1") == "OK"
            assert bash(session, PUSH) == "Ada:Double it"
        assert git("log", "--format=%s", "-1", "main", home=upstream) == "Double it"

        # Killed while the model's tool runs: the session goes on after a start.
        prompt = threading.Thread(target=lost, args=(session,))
        prompt.start()
        until((project / "begun").exists)
        assert built.engine.ask(built.engine.argv("kill", container.name)).ok
        prompt.join()
        built.engine.must("start", container.name)
        container.server = replace(container.server, url=container.published())
        container.wait_ready(120)
        conversation.start_upstreams(container)
        conversation.received(container)
        session.prompt(("bash", {"command": "git status --short", "description": "looks"}))
        last = [part for part in session.messages()[-2]["parts"] if part["type"] == "tool"][-1]
        assert last["state"]["status"] == "completed"

    owners = {path.lstat().st_uid for path in project.rglob("*")}
    assert owners == {OWNER}


def lost(session: conversation.Session) -> None:
    """Send a prompt whose answer never comes."""
    with pytest.raises(Exception, match=r"(?i)connection|remote|aborted"):
        session.prompt(("bash", {"command": "touch begun; sleep 60", "description": "waits"}))
