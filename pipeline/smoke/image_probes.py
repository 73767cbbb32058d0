"""Probes of an image and of the container that was started from it."""

from __future__ import annotations

import json
import os
import re
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from urllib.parse import urlsplit

from pipeline.core.settings import Settings
from pipeline.engines.container import SECRET, Container, Server
from pipeline.image import secret_scan, tags
from pipeline.image.tags import Inspection
from pipeline.inputs import ca
from pipeline.smoke.probe import (
    SECONDS,
    ProbeFailed,
    ProbeLate,
    probes,
    request,
    run_inside,
)

PACKAGES = (
    "graphiti_core",
    "falkordb",
    "redis",
    "ddtrace",
    "datadog_api_client",
    "b2sdk.v2",
)

DEFAULTS = {
    "FALKORDB_HOST": "localhost",
    "FALKORDB_PORT": "6379",
    "VALKEY_HOST": "localhost",
    "VALKEY_PORT": "6380",
}
"""Environment variables that the image sets."""

COMMAND = [
    "ddtrace-run",
    "opencode",
    "serve",
    "--hostname",
    "0.0.0.0",  # noqa: S104 -- in the container
    "--port",
    "4096",
]
"""The end of ENTRYPOINT."""

HEALTHCHECK = {
    "Interval": 30_000_000_000,
    "Timeout": 10_000_000_000,
    "StartPeriod": 40_000_000_000,
}
"""Nanoseconds, as both engines report them."""

HEALTH_COMMAND = "curl -f http://localhost:4096/config || exit 1"

LABELS = (
    "org.opencontainers.image.title",
    "org.opencontainers.image.created",
    "org.opencontainers.image.revision",
    "org.opencontainers.image.source",
    "org.opencontainers.image.base.name",
    "org.opencontainers.image.base.digest",
    tags.KIND,
    tags.COMMIT,
    "opencode-server.openagents.source",
)

STOP_SECONDS = 8.0
"""How long the container may take to end; a busy machine needs more than the usual 0.3 s."""

PROGRAMS = """
set -e  # a missing program must fail the script, also before a pipe
first() { output="$("$@")"; echo "$output" | head -n 1; }
first rclone version
redis-cli --version
git --version
/opt/venv/bin/python -c 'from importlib.metadata import version; print("b2sdk", version("b2sdk"))'
test -x /usr/sbin/cron
dpkg-query --show --showformat='${Package} ${Version}\\n' cron
first rg --version
node --version
npm --version
/opt/venv/bin/ddtrace-run --version
"""

HARDENING = """
import json, re
status = open("/proc/1/status").read()
mounts = open("/proc/mounts").read()
print(json.dumps({
    **dict(re.findall(r"^(CapEff|CapBnd|NoNewPrivs|Uid):\\s*(\\w+)", status, re.M)),
    "Root": re.search(r"^\\S+ / \\S+ (rw|ro)", mounts, re.M)[1],
}))
"""
"""A program that prints what limits the process 1 of a container."""

IMPORTS = """
import importlib, importlib.metadata, sys
for name in sys.argv[1:]: importlib.import_module(name)
print(sys.prefix, len(list(importlib.metadata.distributions())))
"""


@dataclass(frozen=True)
class ImageSubject:
    """The inspected image that probes check, and a running container of it."""

    settings: Settings
    image: Inspection
    container: Container


def settings(subject: ImageSubject) -> str:
    """Entrypoint, port and environment are those of the contract.

    The image does not contain a password.
    """
    config = subject.image["Config"]
    env = dict(variable.split("=", 1) for variable in config.get("Env") or [])
    wrong = sorted(name for name, _ in DEFAULTS.items() - env.items())
    entrypoint = config.get("Entrypoint") or []
    if entrypoint[-len(COMMAND) :] != COMMAND or config.get("Cmd"):
        wrong.append(f"ENTRYPOINT {entrypoint} CMD {config.get('Cmd')}")
    if "4096/tcp" not in (config.get("ExposedPorts") or {}):
        wrong.append("EXPOSE")
    if SECRET in env:
        wrong.append(f"{SECRET} is set in the image")
    if wrong:
        raise ProbeFailed(f"differs from the contract: {'; '.join(wrong)}")
    return "entrypoint, port and environment are correct"


def labels(subject: ImageSubject) -> str:
    """The image has its OCI labels and those that say where OpenAgents came from."""
    found = subject.image["Config"].get("Labels") or {}
    missing = [name for name in LABELS if not found.get(name)]
    if missing:
        raise ProbeFailed(f"missing labels: {', '.join(missing)}; build with: inv build")
    return f"{found[tags.KIND]} {found[tags.COMMIT][:12]}"


def secrets(subject: ImageSubject) -> str:
    """No layer, and not the history, contains a secret or a CA of this network."""
    authorities = ca.extra(subject.settings.ca) | ca.staged()
    found, count = secret_scan.check(subject.container.engine, subject.image, authorities)
    if found:
        raise ProbeFailed("; ".join(found[:5]))
    return f"none in {count} layers and the history"


def packages(subject: ImageSubject) -> str:
    """Every Python package of the contract can be imported from /opt/venv."""
    # nice: the server starts meanwhile, and the test waits for that.
    quiet = ("nice", "-n5", "env", "DD_TRACE_ENABLED=false", "PYTHONDONTWRITEBYTECODE=1")
    python = (
        *quiet,
        "/opt/venv/bin/python",
        "-c",
        IMPORTS,
    )
    prefix, count = run_inside(subject.container, *python, *PACKAGES).split()
    if prefix != "/opt/venv":
        raise ProbeFailed(f"the packages are those of {prefix}")
    return f"{len(PACKAGES)} can be imported, of {count} in /opt/venv"


def programs(subject: ImageSubject) -> str:
    """Every program of the contract runs."""
    versions = run_inside(subject.container, "nice", "-n5", "sh", "-c", PROGRAMS)
    return ", ".join(versions.splitlines()[:5])


def authentication(subject: ImageSubject) -> str:
    """Every route returns 401 without credentials, with a wrong password, and with a wrong user."""
    server = subject.container.server
    paths = request(server, "/doc")["paths"]
    routes = [(method, path) for path in paths for method in paths[path]]
    routes += [("get", "/"), ("get", "/doc"), ("get", "/no-such-page")]
    user = os.environ.get("OPENCODE_SERVER_USERNAME", "opencode")
    wrong = ("", f"{user}:wrong", f"nobody:{server.password}")
    with ThreadPoolExecutor() as pool:
        for admitted in pool.map(partial(_first_admitted, server, routes), wrong):
            if admitted:
                raise ProbeFailed(admitted)
    return f"401 on each of {len(routes)} routes"


def _first_admitted(
    server: Server,
    routes: list[tuple[str, str]],
    credentials: str,
) -> str:
    """Request routes with USER:PASSWORD until one does not return 401; return which, if any."""
    headers = {}
    if credentials:
        headers["Authorization"] = f"Basic {b64encode(credentials.encode()).decode()}"
    # 600 requests: with requests, which takes four times as long, they would dominate the test.
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=SECONDS)
    with closing(connection):
        for method, path in routes:
            connection.request(method.upper(), re.sub("{.*?}", "x", path), headers=headers)
            response = connection.getresponse()
            response.read()
            if response.status != HTTPStatus.UNAUTHORIZED:
                user = credentials.partition(":")[0] or "no user"
                return f"{method.upper()} {path} returned {response.status} to {user}"
    return ""


def hardening(subject: ImageSubject) -> str:
    """The container cannot write to its root, gain privileges, or exceed its limits.

    The root filesystem is read-only, there are no capabilities, the user is not root, and memory
    and processes are limited.
    """
    container = subject.container
    engine = container.engine
    found = json.loads(run_inside(container, "/usr/bin/python3", "-S", "-c", HARDENING))
    expected = {
        "Root": "ro",
        "CapEff": "0000000000000000",
        "CapBnd": "0000000000000000",
        "NoNewPrivs": "1",
    }
    wrong = [f"{name} {found[name]}" for name, _ in expected.items() - found.items()]
    # A rootless engine maps root in the container to the user who runs the engine.
    if found["Uid"] == "0" and not engine.rootless:
        wrong.append("runs as root")
    inspected = engine.ask(engine.inspect(container.name, "{{json .HostConfig}}"), timeout=30)
    limits = json.loads(inspected.stdout)
    if engine.bounded and not (limits["Memory"] and limits["PidsLimit"]):
        wrong.append("no limits")
    if wrong:
        raise ProbeFailed(f"not hardened: {', '.join(sorted(wrong))}")
    return "read-only root, no capabilities"


def health_check(subject: ImageSubject) -> str:
    """The image has the contract's health check, and it passes."""
    # podman reports it outside Config.
    check = subject.image["Config"].get("Healthcheck") or subject.image.get("Healthcheck")
    if not check:
        raise ProbeFailed("no health check; the OCI format drops it, build with --format docker")
    command = check["Test"][-1]
    if HEALTH_COMMAND not in command or not HEALTHCHECK.items() <= check.items():
        raise ProbeFailed(f"differs from the contract: {check}")
    engine = subject.container.engine
    for _ in range(3):  # As the engines do before they report a container as unhealthy.
        done = engine.ask(engine.healthcheck(subject.container.name, command), timeout=SECONDS)
        if done.ok:
            break
    else:
        # The server answers by now: the check's own limit of 8 s has passed on a busy machine.
        raise ProbeLate(f"the health check failed: {done.output[-200:]}")
    return "passes"


def status(subject: ImageSubject) -> str:
    """/app/scripts/status reports the server as healthy from inside the container."""
    run_inside(
        subject.container,
        "/app/scripts/status",
        "--json",
        "--timeout",
        f"{SECONDS / 2:g}",
        "server",
    )
    return "the server is healthy"


def offline(subject: ImageSubject) -> str:
    """The server becomes ready without a network, with OpenAgents' agents."""
    container = subject.container
    container.wait_ready_inside(subject.settings.smoke.ready_seconds)
    url = "http://localhost:4096/agent"
    agents = json.loads(run_inside(container, "curl", "-fsS", "-m", f"{SECONDS / 2:g}", url))
    if all(agent.get("native") for agent in agents):
        raise ProbeFailed("no agents of OpenAgents without a network")
    return f"ready in {container.ready_seconds:.1f} s with --network none"


def shutdown(subject: ImageSubject) -> str:
    """SIGTERM ends the container, before an engine would kill it (10 s)."""
    container = subject.container
    killed = container.engine.ask(container.engine.kill(container.name), timeout=30)
    if not killed.ok:
        raise ProbeFailed("the container had ended before SIGTERM")
    began = time.monotonic()
    while container.state()["Running"]:
        if time.monotonic() > began + STOP_SECONDS:
            raise ProbeFailed(f"running {STOP_SECONDS:g} s after SIGTERM: PID 1 ignores signals")
        time.sleep(0.02)
    return f"ended {time.monotonic() - began:.1f} s after SIGTERM"


STARTING = probes(settings, labels, secrets, packages, programs)
"""Run while the server starts."""

READY = probes(authentication, hardening, health_check, status)
"""Run when the server is ready."""

OFFLINE = probes(offline, shutdown)
"""Run one after the other with a second container, which has no network."""
