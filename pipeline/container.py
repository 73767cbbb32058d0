"""One running container: a name of its own, a loopback port, its log when something fails, and always removed."""

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

from pipeline import process
from pipeline.engine import Engine
from pipeline.errors import EngineBroken, PortTaken, ServerDied, ServerSilent
from pipeline.report import without_credentials

if TYPE_CHECKING:
    import requests

PREFIX = "opencode-server-smoke"
PORT = 4096
STATE, WORK = "/root/.local/share/opencode", "/workspace"
"""The two volumes; nothing else that a server writes outlives it."""

TAKEN = re.compile("address already in use|port is already allocated|proxy already running", re.IGNORECASE)
"""How the engines say that a port is in use."""

SECRET = "OPENCODE_SERVER_PASSWORD"  # noqa: S105 -- the variable's name


@dataclass
class Server:
    """A server to ask: ``url`` without a trailing slash, and the password it wants, if any, of which user.

    Where no user is named it is OPENCODE_SERVER_USERNAME, or OpenCode's own default.
    """

    url: str
    password: str = ""
    timeout: float = 5.0
    user: str = ""

    def get(self, path: str, *, timeout: float | None = None) -> requests.Response:
        """GET ``path``. Raises requests.RequestException."""
        return self.send("GET", path, timeout=timeout)

    def send(self, method: str, path: str, body: object = None, *, timeout: float | None = None) -> requests.Response:
        """Send a request with ``body`` as JSON. Raises requests.RequestException."""
        with self.session() as session:
            return session.request(method, f"{self.url}{path}", json=body, timeout=timeout or self.timeout)

    def listen(self, path: str, *, timeout: float) -> requests.Response:
        """GET a stream of events; ``timeout`` is how long it may be silent. Raises requests.RequestException."""
        return self.session().get(f"{self.url}{path}", stream=True, timeout=timeout)

    def session(self) -> requests.Session:
        """Return a session that signs in."""
        import requests

        session = requests.Session()
        # A proxy of the environment has no business on loopback; elsewhere it and the CA bundle count.
        session.trust_env = urlsplit(self.url).hostname not in {"127.0.0.1", "localhost", "::1"}
        user = self.user or os.environ.get("OPENCODE_SERVER_USERNAME", "opencode")
        session.auth = (user, self.password) if self.password else None
        return session


@dataclass
class Container:
    """A container that was started; ``began`` is time.monotonic() just before."""

    engine: Engine
    name: str
    began: float
    server: Server | None = None
    ready_seconds: float = field(default=0.0)

    def exec(self, *command: str, timeout: float = 30) -> process.Completed:
        """Run a command inside. Raises subprocess.TimeoutExpired."""
        return self.engine.ask(self.engine.exec(self.name, *command), timeout=timeout)

    def logs(self) -> str:
        """Return the last lines it wrote."""
        done = self.engine.ask(self.engine.argv("logs", "--tail", "40", self.name), timeout=30)
        return (done.stdout + done.stderr).strip()

    def state(self) -> dict[str, Any]:
        """Return the engine's State of it: Running, ExitCode and so on."""
        done = self.engine.ask(self.engine.argv("inspect", "--format", "{{json .State}}", self.name), timeout=30)
        return json.loads(done.stdout) if done.ok else {"Running": False, "ExitCode": None}

    def wait_ready(self, seconds: float) -> None:
        """Wait until ``/config`` is 200 and JSON. Raises ServerDied, ServerSilent."""
        assert self.server is not None  # noqa: S101 -- published containers have one
        wait_ready(self.server, self.began + seconds, alive=self._check_alive, log=self.logs)
        self.ready_seconds = time.monotonic() - self.began

    def wait_ready_inside(self, seconds: float) -> None:
        """Wait likewise, asking from inside: for a container without a network. Raises ServerDied, ServerSilent."""
        ask = (  # a request is given a quarter of a second, and twice as long each time it is not answered
            "m=250; until curl -fsS -o /dev/null -m $((m / 1000)).$((m % 1000)) "
            f"http://localhost:{PORT}/config 2>/dev/null; do [ $? != 28 ] || m=$((m * 2)); sleep 0.02; done; "
            "date +%s.%N"
        )
        left = max(0.1, self.began + seconds - time.monotonic())
        done = self.exec("timeout", f"{left:.1f}", "sh", "-c", ask, timeout=left + 10)
        if not done.ok:
            self._check_alive()
            raise ServerSilent(
                f"without a network the server did not answer within {seconds:g} s", "See its log above.", self.logs()
            )
        # The engine's client takes a tenth of a second to come back, which is not the server's.
        back = time.time() - float(done.stdout or time.time())
        self.ready_seconds = time.monotonic() - self.began - min(max(back, 0.0), 1.0)

    def restart(self, seconds: float) -> Server:
        """Stop it and start it again, and wait until it is ready: only its volumes last. Raises as ``wait_ready``."""
        assert self.server is not None  # noqa: S101 -- published containers have one
        for verb in ("stop", "start"):
            done = self.engine.ask(self.engine.argv(verb, self.name), timeout=60)
            if not done.ok:
                raise EngineBroken(f"{self.engine.name} cannot {verb} a container", "inv doctor says more.", done.said)
        self.began = time.monotonic()
        self.server = replace(self.server, url=f"http://127.0.0.1:{_published(self)}")
        self.wait_ready(seconds)
        return self.server

    def _check_alive(self) -> None:
        state = self.state()
        if not state["Running"]:
            raise ServerDied(
                f"the container ended with exit code {state['ExitCode']} before it answered",
                "Its log above says why; a config.json that OpenCode refuses is the usual reason.",
                self.logs(),
            )


def wait_ready(
    server: Server, deadline: float, *, alive: Callable[[], None] | None = None, log: Callable[[], str] | None = None
) -> None:
    """Wait until ``/config`` is 200 and JSON, at most until ``deadline`` (time.monotonic()).

    The first requests are short, since one made in the moment the socket opens hangs for ever; each that is not
    answered lets the next wait twice as long. ``alive`` is asked between requests
    and may raise, ``log`` is what a failure quotes. Raises ServerSilent.
    """
    import requests

    last, looked, patience = "no request was answered", 0.0, 0.25
    while time.monotonic() < deadline:
        try:
            answer = server.get("/config", timeout=min(server.timeout, patience))
            if answer.status_code == requests.codes.ok:
                answer.json()
                return
            last = f"/config answered {answer.status_code}: {answer.text[:200]}"
            if answer.status_code == requests.codes.unauthorized:
                break
        except requests.JSONDecodeError:
            last = f"/config answered 200, but not with JSON: {answer.text[:200]}"
        except requests.ReadTimeout:
            last = "/config took a request and did not answer it"
            patience *= 2
        except requests.RequestException as error:
            last = f"nothing answers at {without_credentials(server.url)}: {type(error).__name__}"
            if isinstance(error, (requests.exceptions.SSLError, ValueError)):  # requests' word for an impossible URL
                break
        except ValueError as error:  # urllib's, for one with a bracket too few
            last = str(error)
            break
        if alive and time.monotonic() - looked > 0.5:  # noqa: PLR2004 -- inspecting costs 50 ms of engine time
            alive()
            looked = time.monotonic()
        time.sleep(0.02)
    raise ServerSilent(
        f"the server was not ready in time; {last}",
        f"If it needs a password, set {SECRET}; if it is only slow, raise smoke.ready_seconds.",
        log() if log else "",
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
    """Start ``image``, hardened; yield the container; remove it and its volumes whatever happens.

    It is published on 127.0.0.1 only, on ``port`` or one that the engine chooses; not at all with a ``network`` of its
    own choice. Raises PortTaken, ServerDied, EngineBroken.
    """
    container = Container(engine, f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}", time.monotonic())
    argv = engine.run(
        image,
        name=container.name,
        env=[*([SECRET] if password else []), *env],
        publish="" if network else f"127.0.0.1:{port or ''}:{PORT}",
        network=network,
        labels={PREFIX: _here()},
        volumes=[STATE, WORK],
    )
    try:
        done = engine.ask(argv, timeout=120, env={SECRET: password} if password else None)
        if not done.ok:
            raise _start_failure(done, port, engine)
        if not network:
            container.server = Server(f"http://127.0.0.1:{_published(container)}", password, timeout)
        yield container
    finally:
        _remove(engine, container.name)


def remove_leftovers(engine: Engine, whose: int = 0) -> int:
    """Remove the containers of the process ``whose``, or of every smoke test that was killed; return how many."""
    ours = f"label={PREFIX}={_here()}"
    done = engine.ask(engine.argv("ps", "--all", "--filter", ours, "--format", "{{.Names}}"), timeout=60)
    owners = {name: int(name.split("-")[3]) for name in done.stdout.split() if name.startswith(PREFIX)}
    names = [name for name, owner in owners.items() if (owner == whose if whose else not _alive(owner))]
    for name in names:
        _remove(engine, name)
    return len(names)


def _remove(engine: Engine, name: str) -> None:
    """Remove a container; once more when a signal has cut that short, since from then on signals are ignored."""
    try:
        engine.ask(engine.remove_container(name), timeout=60)
    except BaseException:
        engine.ask(engine.remove_container(name), timeout=60)
        raise


def _here() -> str:
    """Return where a process ID means a process of ours: an engine may serve several hosts, and their containers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}".strip()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _published(container: Container) -> int:
    done = container.engine.ask(container.engine.argv("port", container.name, str(PORT)), timeout=30)
    match = re.search(r":(\d+)\s*$", done.stdout.strip().splitlines()[0]) if done.ok and done.stdout.strip() else None
    if not match:
        state = container.state()
        raise ServerDied(
            f"the container ended with exit code {state['ExitCode']} as it started", "Its log is above.",
            container.logs() or done.said,
        )  # fmt: skip
    return int(match[1])


def _start_failure(done: process.Completed, port: int, engine: Engine) -> Exception:
    said = done.said.lower()
    if TAKEN.search(said):
        return PortTaken(
            f"port {port} on 127.0.0.1 is taken", "Free it, or set smoke.port to another, or to 0 for any.", done.said
        )
    network = re.search(r"pasta|slirp4netns|netavark|aardvark", said)
    if re.search(r"executable file .*not found|no such file or directory", said) and not network:
        return ServerDied(
            "the image's entrypoint cannot be started", "Look at ENTRYPOINT in the Containerfile.", done.said
        )
    return EngineBroken(f"{engine.name} cannot start the image", "inv doctor says more.", done.said)
