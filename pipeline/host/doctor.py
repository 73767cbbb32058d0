"""``inv doctor``: a table of what works on this machine. Nothing is installed or started."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

from pipeline.core import process
from pipeline.core.console import table
from pipeline.core.errors import EngineBroken, NoEngine, PipelineError
from pipeline.core.pip import tool_env
from pipeline.core.settings import ROOT, Settings
from pipeline.engines import detect
from pipeline.engines.commands import Name
from pipeline.engines.engine import Engine
from pipeline.inputs import base, ca, openagents
from pipeline.inputs.rootfs import Lock

SECONDS = 4.5
"""The timeout of each network check; all of them run at the same time."""

ROOM = 6e9
"""The bytes that a first build needs for images, layers and downloads."""


class Row(NamedTuple):
    """One line of the table."""

    what: str
    state: Literal["ok", "warn", "FAIL"]
    detail: str
    remedy: str = ""


Check = Callable[[], Row]


def doctor(settings: Settings) -> None:
    """Print what works and how to repair the rest. Raises NoEngine when no engine works."""
    engines, rows = check_engines(settings)
    checks: list[Check] = [
        partial(space, engines),
        partial(program, "git", "Install git: inv setup"),
        partial(program, "mmdebstrap", "Install it if no registry answers: inv setup"),
        partial(authorities, settings, os.environ),
        partial(port, settings.stack.port),
        *(partial(registry, mirror, engines) for mirror in ("", *settings.base.mirrors)),
        partial(git_host, settings),
        npm,
        pypi,
        partial(debian, settings),
    ]
    with ThreadPoolExecutor(len(checks)) as pool:
        rows += pool.map(answer, checks)
    table("This machine", Row._fields, rows)
    if not engines:
        raise NoEngine(
            "no engine works on this machine",
            "Install podman: inv setup",
        )


def answer(check: Check) -> Row:
    """Return the row of a check; a failure of the check itself is a row too.

    For example a lock file that cannot be read.
    """
    try:
        return check()
    except PipelineError as error:
        return Row(
            type(error).__name__,
            "FAIL",
            error.what,
            error.remedy,
        )
    except OSError as error:
        return Row(
            type(error).__name__,
            "FAIL",
            str(error),
            "Correct it, then: inv doctor",
        )


def check_engines(settings: Settings) -> tuple[list[Engine], list[Row]]:
    """Return the engines that work and that the settings allow, and a row for each engine.

    Each is tried again, since a remembered engine may be broken by now.
    """
    working: list[Engine] = []
    rows = [Row("python", "ok", f"{platform.python_version()} in {sys.prefix}")]
    names: list[Name] = ["podman", "docker"]
    for name in names:
        try:
            engine = detect.prove(detect.answering(name))
        except NoEngine as error:
            remedy = f"Install {name} or start its daemon, if you want to use it."
            rows.append(Row(name, "warn", error.what, remedy))
        except EngineBroken as error:
            rows.append(Row(name, "FAIL", error.what, error.remedy))
        except subprocess.TimeoutExpired as error:
            detail = f"no answer within {error.timeout:.0f} s"
            rows.append(Row(name, "FAIL", detail, f"Restart {name}."))
        else:
            rows.append(Row(name, "ok", detect.describe(engine)))
            if engine.vfs:
                file = "~/.config" if engine.rootless else "/etc"
                remedy = f'Write [storage] driver = "overlay" to {file}/containers/storage.conf'
                detail = "vfs: a build takes three times as long and four times the space"
                rows.append(Row("storage", "warn", detail, f"{remedy}; podman system reset."))
            if settings.engine in {"auto", name}:
                working.append(engine)
    if not working:
        rows = [row._replace(state="FAIL") if row.state == "warn" else row for row in rows]
    return working, rows


def space(engines: Sequence[Engine]) -> Row:
    """Check the free space of the file systems that a build writes to.

    Those are the store of each engine, this repository and the temporary directory.
    """
    places = {"repository": str(ROOT), "temporary files": tempfile.gettempdir()}
    places |= {str(engine.name): engine.store for engine in engines if engine.store}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    detail = ", ".join(f"{size / 1e9:.1f} GB for {name}" for name, size in free.items())
    if min(free.values()) >= ROOM:
        return Row(
            "free space",
            "ok",
            detail,
        )
    remedy = f"A first build needs {ROOM / 1e9:.0f} GB: free up space, or run inv prune."
    return Row(
        "free space",
        "warn",
        detail,
        remedy,
    )


def program(name: str, remedy: str) -> Row:
    """Check whether a program is installed.

    A missing one is a warning: not every machine needs it.
    """
    path = shutil.which(name)
    return (
        Row(name, "ok", path)
        if path
        else Row(
            name,
            "warn",
            "not installed",
            remedy,
        )
    )


def authorities(settings: Settings, environ: Mapping[str, str]) -> Row:
    """Check the file of certificate authorities that a build uses.

    The public ones are in the base image; the others reach the downloads of a build only.
    """
    found = ca.source(settings.ca, environ)
    if not found:
        return Row(
            "CA",
            "ok",
            "public certificate authorities only",
        )
    name, path = found
    count = len(ca.certificates(path.read_text(errors="replace")))
    extra = len(ca.extra(settings.ca, environ))
    detail = f"{path} (from {name}): {count} certificates, {extra} of them not public"
    if count:
        return Row(
            "CA",
            "ok",
            detail,
        )
    return Row(
        "CA",
        "FAIL",
        detail,
        f"Set {name} to a file with PEM certificates.",
    )


def port(number: int) -> Row:
    """Check the port of the stack on loopback.

    SO_REUSEADDR as servers set it: a connection that was just closed does not count.
    """
    what = f"port {number}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            remedy = "Set stack.port to a free port, unless your stack is running."
            return Row(
                what,
                "warn",
                f"127.0.0.1:{number}: {error.strerror}",
                remedy,
            )
    return Row(
        what,
        "ok",
        f"free on 127.0.0.1:{number}",
    )


def registry(mirror: str, engines: Sequence[Engine]) -> Row:
    """Ask Docker Hub or a ``mirror`` for the manifest of the pinned base image.

    The engine asks, since it has its own mirrors, proxies and credentials.
    """
    name = mirror or "Docker Hub"
    if not engines:
        return Row(
            name,
            "warn",
            "not checked: no engine works",
            "Install podman: inv setup",
        )
    remedy = "Name a mirror in base.mirrors; without one the base is built here."
    return ask(
        name,
        base.ask_argv(engines[0], mirror),
        remedy,
        bad="warn",
    )


def git_host(settings: Settings) -> Row:
    """Ask the git host of OpenAgents with git, which has the user's proxies, CAs and keys.

    No git or ssh may ask for a password: this check runs beside others.
    """
    argv = [
        "git",
        "ls-remote",
        "--exit-code",
        "--",
        openagents.wanted(settings).url,
        "HEAD",
    ]
    remedy = "Name a clone in openagents.url; without one vendor/starter is used."
    env = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes"}
    return ask(
        "git host",
        argv,
        remedy,
        bad="warn",
        env=env,
    )


def npm() -> Row:
    """Ask npm's registry, if npm is installed."""
    remedy = "Set a registry: npm config set registry URL"
    return ask(
        "npm registry",
        ["npm", "ping", "--fetch-retries=0"],
        remedy,
    )


def pypi() -> Row:
    """Ask the package index for one small package, with pip or uv.

    pip is missing where uv created .venv.
    """
    argv = [
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-deps",
        "--no-cache",
        "-",
    ]
    if importlib.util.find_spec("pip"):
        argv = [
            sys.executable,
            "-m",
            "pip",
            "--retries",
            "0",
            "index",
            "versions",
            "invoke",
        ]
    remedy = "Set PIP_INDEX_URL to a mirror, or PIP_CERT to the CA of your proxy."
    return ask(
        "PyPI",
        argv,
        remedy,
        stdin=b"invoke",
        env=tool_env(),
    )


def debian(settings: Settings) -> Row:
    """Ask the Debian mirror of the settings, or the one of this machine's apt.

    mmdebstrap uses the same, where the base image is built here.
    """
    import requests

    remedy = "Name a mirror in base.debian_mirror."
    mirror = settings.base.debian_mirror
    if not mirror and shutil.which("apt-get"):
        argv = [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI)",
            "Origin: Debian",
        ]
        uris = process.run(argv).stdout.split()
        mirror = next((uri for uri in uris if "security" not in uri), "")
    if not mirror:
        return Row(
            "Debian",
            "warn",
            "not checked: apt has no Debian mirror",
            remedy,
        )
    url = f"{mirror.rstrip('/')}/dists/{Lock.read().debian}/InRelease"
    try:
        requests.head(url, timeout=SECONDS, allow_redirects=True).raise_for_status()
    except requests.RequestException as error:
        return Row(
            "Debian",
            "FAIL",
            f"{mirror}: {error}",
            remedy,
        )
    return Row(
        "Debian",
        "ok",
        f"{mirror} answers",
    )


def ask(
    what: str,
    argv: Sequence[str],
    remedy: str,
    *,
    bad: Literal["warn", "FAIL"] = "FAIL",
    **options: Any,
) -> Row:
    """Return whether a command succeeds within ``SECONDS``; options as of ``process.run``.

    ``bad`` is the state of a failure. A program that is not installed is only a warning.
    """
    try:
        done = process.run(argv, timeout=SECONDS, **options)
    except subprocess.TimeoutExpired:
        return Row(
            what,
            bad,
            f"no answer within {SECONDS} s",
            remedy,
        )
    except PipelineError as error:
        return Row(
            what,
            "warn",
            f"not checked: {error.what}",
            error.remedy,
        )
    if done.ok:
        return Row(
            what,
            "ok",
            f"answers ({done.seconds:.1f} s)",
        )
    return Row(
        what,
        bad,
        [f"exit code {done.code}", *done.output.splitlines()][-1],
        remedy,
    )
