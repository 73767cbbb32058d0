"""For tests that need an engine: podman and docker with images of their own, and a checkout to run
``inv`` in.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from pipeline.core import process
from pipeline.core.settings import ROOT
from pipeline.engines import detect
from pipeline.engines.engine import Engine

IMAGE = "opencode-server-test"
PODMAN = pytest.mark.parametrize("built", ["podman"], indirect=True)
DOCKER = pytest.mark.parametrize("built", ["docker"], indirect=True)
"""For tests of what does not depend on the engine: one of them, in turn, so that neither is left out."""

BRIDGE, SUBNET = f"oc-test{os.getpid()}", f"172.31.{os.getpid() % 250}.1/24"
"""Of this run alone: another may go on beside it. A name holds 15 characters."""


class ByEngine(LoadScopeScheduling):  # type: ignore[misc]  # has no annotations
    """The tests with an engine's image are one process's, which builds it; all others, file by file, whose turn it is.

    xdist's own groups do nothing with pytest 9.2, which has no Node._nodeid that they could change.
    """

    def _split_scope(self, nodeid: str) -> str:
        if "tests/unit/" in nodeid:
            return nodeid.partition("::")[0]
        if "[docker" in nodeid:
            return "docker"
        return (
            "podman"
            if "[podman" in nodeid or "tests/image/" in nodeid
            else nodeid.partition("::")[0]
        )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine:
    """Have the tests' processes take what ``ByEngine`` gives them."""
    return ByEngine(config, log)


class Dockerd:
    """A daemon of the tests' own, with its own images, socket and bridge: another one may run on
    this machine.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {"DOCKER_HOST": f"unix://{home}/docker.sock"}
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "dockerd is not installed; inv setup --tests installs it"
        self.home.mkdir(exist_ok=True)
        (self.home / "pid").unlink(missing_ok=True)  # what a killed one has left
        # Two that start in the same moment fail over each other's chains in iptables.
        with FileLock(Path(tempfile.gettempdir()) / "opencode-server-dockerd.lock"):
            self._start(program)

    def _start(self, program: str) -> None:
        words = [program, "--data-root", f"{self.home}/data", "--exec-root", f"{self.home}/exec"]
        words += [
            "--pidfile",
            f"{self.home}/pid",
            "--bridge",
            BRIDGE,
            "--host",
            self.env["DOCKER_HOST"],
        ]
        with (self.home / "log").open("ab") as log:
            self.child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        deadline = time.monotonic() + 60
        while not process.run(["docker", "info"], env=self.env).ok:
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "log").read_text()[-3000:])
            time.sleep(0.1)

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.child:
            self.child.send_signal(number)
            self.child.wait(60)
            self.child = None
        # A daemon that is killed leaves its containerd, which the next one would wait for as long
        # as it ends.
        pidfile = self.home / "exec/containerd/containerd.pid"
        if pidfile.exists():
            containerd, deadline = int(pidfile.read_text()), time.monotonic() + 20
            with contextlib.suppress(ProcessLookupError):
                os.kill(containerd, signal.SIGKILL)
                while time.monotonic() < deadline:
                    os.kill(containerd, 0)
                    time.sleep(0.05)
            pidfile.unlink()


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str

    def failed(self, name: str, code: int, *sentences: str) -> None:
        """Assert that it ended with this error, and that stderr says these things."""
        assert self.code == code, self.stdout[-3000:] + self.stderr
        assert f"\n{name}: " in f"\n{self.stderr}", self.stderr
        assert "\n  -> " in self.stderr
        assert "Traceback" not in self.stderr
        for sentence in sentences:
            assert sentence in self.stderr, self.stderr


@dataclass
class Running:
    """An ``inv`` that runs: ``until`` waits for something it prints, ``signal`` sends what Ctrl-C
    would.
    """

    child: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        for stream, kept in ((self.child.stdout, self.lines), (self.child.stderr, self.errors)):
            assert stream
            self.threads.append(threading.Thread(target=kept.extend, args=(stream,)))
            self.threads[-1].start()

    def until(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            assert self.child.poll() is None, "".join(self.lines[-30:] + self.errors)
            assert time.monotonic() < deadline, "".join(self.lines[-30:] + self.errors)
            time.sleep(0.01)

    def end(self, number: int = 0, seconds: float = 60) -> Done:
        if number:
            self.child.send_signal(number)
        self.child.wait(seconds)
        for thread in self.threads:
            thread.join()
        for stream in (self.child.stdout, self.child.stderr):
            assert stream
            stream.close()
        return Done(self.child.returncode, "".join(self.lines), "".join(self.errors))


@dataclass(frozen=True)
class Checkout:
    """A copy of this repository, in which ``inv`` builds an image of another name than the user's.

    ``env`` is added to the environment of each ``inv``; what is ``changed`` is kept in the directory ``aside``.
    ``built`` is what was built here, by engine: no global, since pytest's conftest and its importers' are two modules.
    """

    root: Path
    env: dict[str, str]
    aside: Path
    built: dict[str, Built] = field(default_factory=dict)

    def argv(self, *words: str) -> list[str]:
        """Return the command that is ``inv`` here."""
        return [sys.executable, "-P", "-m", "invoke", "--search-root", str(self.root), *words]

    def environ(self, env: dict[str, str] | None = None) -> dict[str, str]:
        """Return the environment of ``inv`` here."""
        # A terminal's reader sees each line as it is printed; so must a test that waits for one.
        return {**os.environ, **self.env, "PYTHONUNBUFFERED": "1", **(env or {})}

    def start(self, *words: str, env: dict[str, str] | None = None) -> Running:
        environ, argv, pipe = self.environ(env), self.argv(*words), subprocess.PIPE
        child = subprocess.Popen(
            argv,
            cwd=self.root,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
        )
        return Running(child)

    def inv(self, *words: str, env: dict[str, str] | None = None, seconds: float = 300) -> Done:
        running = self.start(*words, env=env)
        try:
            return running.end(seconds=seconds)
        finally:
            if running.child.poll() is None:
                running.child.kill()
                running.end()

    @contextlib.contextmanager
    def changed(self, name: str, content: str | None = None, *, append: str = "") -> Iterator[None]:
        """Have other content in a file, or none; put back what was there, with its times."""
        path = self.root / name
        kept = self.aside / name.replace("/", "-")
        path.rename(kept)
        try:
            if content is not None or append:
                path.write_text((kept.read_text() if content is None else content) + append)
                path.chmod(kept.stat().st_mode)
            yield
        finally:
            path.unlink(missing_ok=True)
            kept.rename(path)


@dataclass(frozen=True)
class Built:
    """The image that ``inv build`` made with one engine, which passed ``inv smoke``, and what they
    said.
    """

    checkout: Checkout
    engine: Engine
    reference: str
    said: str
    smoked: str

    def tags(self) -> dict[str, str]:
        """Return the ID that each tag of the image has: what a failure must not change."""
        done = self.engine.ask(
            self.engine.argv("images", "--no-trunc", "--format", "{{.Tag}} {{.ID}}", IMAGE)
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def containers(self) -> set[str]:
        """Return every container, buildah's own among them."""
        words = [
            "ps",
            "--all",
            "--no-trunc",
            "--format",
            "{{.ID}} {{.Names}}",
            *(["--external"] * self.engine.podman),
        ]
        return set(self.engine.ask(self.engine.argv(*words)).stdout.splitlines())

    def inv(self, *words: str, env: dict[str, str] | None = None, seconds: float = 300) -> Done:
        return self.checkout.inv(*words, "--engine", self.engine.name, env=env, seconds=seconds)

    def start(self, *words: str, env: dict[str, str] | None = None) -> Running:
        return self.checkout.start(*words, "--engine", self.engine.name, env=env)

    def inspect(self, reference: str = "") -> dict[str, Any]:
        image = self.engine.image(reference or self.reference)
        assert image
        return image


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory for images: gigabytes, so neither in pytest's, which is kept, nor in /tmp, which
    may be memory.
    """
    home = Path(tempfile.mkdtemp(prefix="opencode-server-test-", dir="/var/tmp"))
    yield home
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounted if mount.startswith(f"{home}/")]):
        subprocess.run(["umount", "--lazy", mount], check=True)
    shutil.rmtree(home)
    assert not home.exists()


@pytest.fixture(scope="session")
def users_store() -> str:
    """Where the user's podman keeps images."""
    done = process.run(["podman", "info", "--format", "{{.Store.GraphRoot}}"])
    assert done.ok, f"podman does not answer; inv setup installs it: {done.output}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def podman_store(scratch: Path, users_store: str) -> dict[str, str]:
    """podman with images and containers of its own; the user's images can be built on, and cannot
    be changed.
    """
    return storage(scratch / "podman", users_store)


def storage(home: Path, *reading: str) -> dict[str, str]:
    """Return the environment of a podman that stores in ``home``, and only reads from other stores."""
    home.mkdir(exist_ok=True)
    (home / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{home}/images"\nrunroot = "{home}/run"\n'
        f"[storage.options]\nadditionalimagestores = {json.dumps(reading)}\n"
    )
    return {"CONTAINERS_STORAGE_CONF": f"{home}/storage.conf"}


@pytest.fixture(scope="session")
def dockerd(scratch: Path) -> Iterator[Dockerd]:
    """A docker daemon; where there is none, the test fails."""
    for words in (
        ["link", "add", BRIDGE, "type", "bridge"],
        ["addr", "add", SUBNET, "dev", BRIDGE],
    ):
        subprocess.run(["ip", *words], check=True)
    daemon = Dockerd(scratch / "docker")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end()
        subprocess.run(["ip", "link", "delete", BRIDGE], check=True)


@pytest.fixture(scope="session")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, podman_store: dict[str, str], dockerd: Dockerd
) -> Checkout:
    """A checkout with OpenAgents fetched: the starter, committed to a git repository, is what
    stands in for it.
    """
    root, origin = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("origin")
    listed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name, follow_symlinks=False)
    shutil.copytree(ROOT / "vendor" / "starter", origin, dirs_exist_ok=True)
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "agents"]):
        subprocess.run([*git, *words], check=True)
    env = {**podman_store, **dockerd.env, "INVOKE_IMAGE": IMAGE}
    made = Checkout(root, env, tmp_path_factory.mktemp("aside"))
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    commit = head.stdout.strip()
    done = made.inv("fetch", "--url", str(origin), "--ref", commit, "--engine", "podman")
    assert done.code == 0, done.stdout + done.stderr
    assert (
        json.loads((root / "vendor/OpenAgents/.fetched.json").read_text())["kind"] == "openagents"
    )
    return made


@pytest.fixture
def engine_environment(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``Engine.ask`` runs in this process sees the same engines as ``inv`` in the checkout."""
    for name, value in checkout.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["podman", "docker"])
def built(request: pytest.FixtureRequest, checkout: Checkout, engine_environment: None) -> Built:  # noqa: ARG001
    """The image, built once with each engine."""
    return build_once(checkout, request.param)


def build_once(checkout: Checkout, name: str) -> Built:
    if name not in checkout.built:
        done = checkout.inv("build", "--engine", name, seconds=500)
        assert done.code == 0, done.stdout[-3000:] + done.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(detect, "BUILD", checkout.root / "build")
            engine = detect.find(name)
        smoked = checkout.inv("smoke", "--engine", name)
        assert smoked.code == 0, smoked.stdout + smoked.stderr
        made = Built(
            checkout, engine, engine.local(f"{IMAGE}:candidate"), done.stdout, smoked.stdout
        )
        checkout.built[name] = made
    return checkout.built[name]
