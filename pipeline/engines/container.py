"""A running container of the server, removed in any case, and the wait until it is ready."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.core import process
from pipeline.core.console import without_credentials
from pipeline.core.errors import EngineBroken, PipelineError, PortTaken, ServerDied, ServerSilent
from pipeline.engines.engine import Engine

if TYPE_CHECKING:
    import requests

PREFIX = "opencode-server-smoke"
PORT = 4096
STATE, WORK = "/root/.local/share/opencode", "/workspace"
"""The two volumes. Nothing else that a server writes is kept."""

TAKEN = re.compile(
    "address already in use|port is already allocated|proxy already running", re.IGNORECASE
)
"""How the engines report that a port is in use."""

SECRET = "OPENCODE_SERVER_PASSWORD"  # noqa: S105 -- the variable's name


@dataclass
class Server:
    """An OpenCode server: ``url`` without a trailing slash, and its password, if any.

    ``user`` is OPENCODE_SERVER_USERNAME by default. Every request raises requests.RequestException.
    """

    url: str
    password: str = ""
    timeout: float = 5.0
    user: str = ""

    def get(
        self,
        path: str,
        *,
        timeout: float | None = None,
    ) -> requests.Response:
        """GET ``path``.

        The default ``timeout`` is the server's.
        """
        return self.send("GET", path, timeout=timeout)

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        timeout: float | None = None,
    ) -> requests.Response:
        """Send a request with ``body`` as JSON.

        Each request has a session of its own, and thus a new connection.
        """
        with self.session() as session:
            url = f"{self.url}{path}"
            return session.request(method, url, json=body, timeout=timeout or self.timeout)

    def listen(
        self,
        path: str,
        *,
        timeout: float,
    ) -> requests.Response:
        """GET a stream of events; ``timeout`` is the longest pause in it.

        The caller closes the response.
        """
        return self.session().get(f"{self.url}{path}", stream=True, timeout=timeout)

    def session(self) -> requests.Session:
        """Return a session that sends the credentials."""
        import requests

        session = requests.Session()
        # No proxy for loopback; for other hosts the environment's proxy and CA bundle apply.
        session.trust_env = urlsplit(self.url).hostname not in {"127.0.0.1", "localhost", "::1"}
        if self.password:
            user = self.user or os.environ.get("OPENCODE_SERVER_USERNAME", "opencode")
            session.auth = (user, self.password)
        return session


@dataclass
class Container:
    """A container that was started; ``began`` is time.monotonic() just before."""

    engine: Engine
    name: str
    began: float
    server: Server = field(default_factory=lambda: Server(""))
    ready_seconds: float = 0.0

    def exec(
        self,
        *command: str,
        timeout: float = 30,
    ) -> process.Completed:
        """Run a command inside. Raises subprocess.TimeoutExpired.

        It runs as the container's user.
        """
        return self.engine.ask(self.engine.exec(self.name, *command), timeout=timeout)

    def logs(self) -> str:
        """Return the last lines of its log.

        stdout comes first, then stderr: the engines print them separately.
        """
        done = self.engine.ask(self.engine.logs(self.name, 40), timeout=30)
        return (done.stdout + done.stderr).strip()

    def state(self) -> dict[str, Any]:
        """Return the engine's State of it: Running, ExitCode and so on.

        A container that does not exist is not running and has no ExitCode.
        """
        done = self.engine.ask(self.engine.inspect(self.name, "{{json .State}}"), timeout=30)
        return json.loads(done.stdout) if done.ok else {"Running": False, "ExitCode": None}

    def wait_ready(self, seconds: float) -> None:
        """Wait until ``/config`` is 200 and JSON. Raises ServerDied, ServerSilent.

        ``ready_seconds`` is what it took since the start of the container.
        """
        wait_ready(self.server, time.monotonic() + seconds, alive=self.check_alive, log=self.logs)
        self.ready_seconds = time.monotonic() - self.began

    def wait_ready_inside(self, seconds: float) -> None:
        """Wait likewise with curl inside a container without network. Raises as ``wait_ready``.

        Such a container has no published port; starting curl takes 0.1 s, so ``ready_seconds`` is
        less exact.
        """
        deadline = time.monotonic() + seconds
        url = f"http://localhost:{PORT}/config"
        patience = 0.5
        while time.monotonic() < deadline:
            done = self.exec("curl", "-fsS", "-o", "/dev/null", "-m", f"{patience}", url)
            if done.ok:
                self.ready_seconds = time.monotonic() - self.began
                return
            if done.code == 28:  # noqa: PLR2004 -- curl's code for a timeout
                patience *= 2
            self.check_alive()
        what = f"the server did not answer within {seconds:g} s without a network"
        raise ServerSilent(what, "Raise smoke.ready_seconds if it is slow.", self.logs())

    def restart(self, seconds: float) -> Server:
        """Stop and start it: only its volumes are kept. Raises as ``wait_ready``, EngineBroken.

        The engine may publish it on another port afterwards, so the returned server is a new one.
        """
        self.engine.must("stop", self.name)
        self.engine.must("start", self.name)
        self.began = time.monotonic()
        self.server = replace(self.server, url=self.published())
        self.wait_ready(seconds)
        return self.server

    def published(self) -> str:
        """Return the URL on loopback that the engine published its port on. Raises ServerDied.

        The output of ``port`` is ADDRESS:PORT, one line for each address.
        """
        done = self.engine.ask(self.engine.argv("port", self.name, str(PORT)), timeout=30)
        match = re.match(r".*:(\d+)\s", done.stdout)
        if not match:
            self.check_alive()
            raise ServerDied("the container has no port", "Repeat the command.", done.output)
        return f"http://127.0.0.1:{match[1]}"

    def check_alive(self) -> None:
        """Raise ServerDied if the container has exited.

        Its log is quoted: an invalid config.json is reported there.
        """
        state = self.state()
        if not state["Running"]:
            raise ServerDied(
                f"the container exited with {state['ExitCode']} before the server answered",
                "Read its log above; an invalid config.json is a common cause.",
                self.logs(),
            )


def wait_ready(
    server: Server,
    deadline: float,
    *,
    alive: Callable[[], None] = lambda: None,
    log: Callable[[], str] = lambda: "",
) -> None:
    """Wait until ``/config`` is 200 and JSON, at most until ``deadline`` (time.monotonic()).

    A request that is made while OpenCode opens its socket hangs for ever, so the first timeout is
    short and each unanswered request doubles it. ``alive`` is called between requests and may
    raise; a failure quotes ``log()``. Raises ServerSilent.
    """
    import requests

    problem = "no request was sent"
    patience = 0.25
    checked = 0.0
    final = False
    while time.monotonic() < deadline and not final:
        try:
            answer = server.get("/config", timeout=patience)
            final = answer.status_code == requests.codes.unauthorized
            problem = f"/config answered {answer.status_code}: {answer.text[:200]}"
            if answer.status_code == requests.codes.ok:
                answer.json()
                return
        except requests.JSONDecodeError:
            problem = problem.replace("200: ", "200, but not JSON: ", 1)
        except requests.ReadTimeout:
            problem = "/config accepted a request and did not answer"
            patience *= 2
        except (requests.RequestException, ValueError) as error:
            # ValueError: the URL is invalid, in the words of requests or urllib3.
            final = isinstance(error, requests.exceptions.SSLError | ValueError)
            where = without_credentials(server.url)
            problem = f"no server answers at {where}: {type(error).__name__}"
        if time.monotonic() - checked > 0.5:  # noqa: PLR2004 -- an inspection takes 50 ms
            alive()
            checked = time.monotonic()
        time.sleep(0.02)
    raise ServerSilent(
        f"the server is not ready: {problem}",
        f"Set {SECRET} if it needs a password; raise smoke.ready_seconds if it is slow.",
        log(),
    )


@contextlib.contextmanager
def running(
    engine: Engine,
    image: str,
    *,
    port: int = 0,
    network: str = "",
    password: str = "",
    env: Sequence[str] = (),
    timeout: float = 5.0,
) -> Iterator[Container]:
    """Start a hardened container of ``image``; remove it and its volumes at the end in any case.

    It is published on 127.0.0.1 on ``port``, or on a free port with 0; with a ``network`` such as
    none it is not published. Raises PortTaken, ServerDied, EngineBroken.
    """
    name = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
    container = Container(engine, name, time.monotonic())
    argv = engine.run(
        image,
        detach=True,
        name=name,
        env=[*([SECRET] if password else []), *env],
        publish="" if network else f"127.0.0.1:{port or ''}:{PORT}",
        network=network,
        label=f"{PREFIX}={_here()}",
        volume=[STATE, WORK],
    )
    try:
        done = engine.ask(argv, timeout=120, env={SECRET: password} if password else None)
        if not done.ok:
            raise _start_failure(done.output, port, engine)
        if not network:
            container.server = Server(container.published(), password, timeout)
        yield container
    finally:
        _remove(engine, name)


def remove_leftovers(engine: Engine, whose: int = 0) -> int:
    """Remove the containers of process ``whose``, or of all that were killed; return the number."""
    label = f"label={PREFIX}={_here()}"
    argv = engine.argv("ps", all=True, filter=label, format="{{.Names}}")
    removed = 0
    for name in engine.ask(argv, timeout=60).stdout.split():
        owner = int(name.removeprefix(f"{PREFIX}-").partition("-")[0])
        if owner == whose or (not whose and not _alive(owner)):
            _remove(engine, name)
            removed += 1
    return removed


def _remove(engine: Engine, name: str) -> None:
    """Remove a container, again if a signal interrupts that: later signals are ignored.

    See ``process.interruptible``.
    """
    try:
        engine.ask(engine.remove_container(name), timeout=60)
    except BaseException:
        engine.ask(engine.remove_container(name), timeout=60)
        raise


def _here() -> str:
    """Return this host and PID namespace: an engine may serve several, each with its own PIDs."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}".strip()


def _alive(pid: int) -> bool:
    """Whether a process exists.

    Signal 0 checks for it without sending anything.
    """
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _start_failure(
    output: str,
    port: int,
    engine: Engine,
) -> PipelineError:
    """Return what the error output of ``run`` means.

    The engines report these conditions only as text, and differently.
    """
    if TAKEN.search(output):
        what = f"port {port} on 127.0.0.1 is already in use"
        return PortTaken(what, "Set smoke.port to a free port, or to 0 for any.", output)
    network = re.search("pasta|slirp4netns|netavark|aardvark", output)
    missing = re.search(
        "executable file .*not found|no such file or directory", output, re.IGNORECASE
    )
    if missing and not network:
        what = "the image's entrypoint cannot be started"
        return ServerDied(what, "Correct ENTRYPOINT in the Containerfile.", output)
    what = f"{engine.name} cannot start the image"
    return EngineBroken(what, "Check the engine: inv doctor.", output)
