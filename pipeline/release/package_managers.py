"""npm and uv: find the newest versions of packages, and tell an outage from an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from pipeline.core import process
from pipeline.core.errors import BumpFailed, PipelineError, SourcesUnreachable
from pipeline.core.pip import install_argv, tool_env
from pipeline.core.settings import Settings
from pipeline.inputs import ca, rootfs

CALL_SECONDS = 300
"""Time limit for one call of npm or uv."""

COMPILE = (
    "pip compile --quiet --universal --python-version 3.11 --upgrade"
    " --generate-hashes --no-emit-index-url --no-header"
)

OUTAGE = re.compile(
    r"ENOTFOUND|ECONN|ETIMEDOUT|EAI_AGAIN|\bE5\d\d\b|\b50\d |network|Failed to fetch"
    r"|sending request|timed? out",
    re.IGNORECASE,
)
"""How npm and uv report that a registry does not answer, or answers with a 5xx status."""


def npm(settings: Settings, *words: str, cwd: Path | None = None) -> str:
    """Run npm and return its stdout.

    Raises SourcesUnreachable when the registry does not answer, BumpFailed for other errors.
    """
    env = {
        "NPM_CONFIG_FETCH_TIMEOUT": str(settings.network.stall_seconds * 1000),
        "NPM_CONFIG_FETCH_RETRIES": str(settings.network.attempts - 1),
    }
    bundle = ca.source(settings.ca)
    if bundle:
        env["NODE_EXTRA_CA_CERTS"] = str(bundle[1])
    argv = [*rootfs.npm(env), *words, "--loglevel=error"]
    result = _run(argv, env, cwd)
    # npm outdated exits with 1 if a package is outdated or, as here, not installed.
    if result.code > (words[0] == "outdated"):
        raise _failure(f"npm {words[0]} failed", result.output)
    return result.stdout


def newest_on_npm(settings: Settings, ranges: Mapping[str, str]) -> dict[str, str]:
    """Return the newest version of each package in its range, such as ^1.2.3, by one npm call.

    Raises as ``npm`` does.
    """
    project = {"name": "pins", "private": True, "dependencies": ranges}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "package.json").write_text(json.dumps(project))
        output = npm(settings, "outdated", "--json", cwd=directory)
    packages = json.loads(output or "{}")
    newest = {}
    for name, versions in ranges.items():
        version = packages.get(name, {}).get("wanted")
        if not version:
            raise _failure(f"npm reports no version of {name} {versions}", output)
        newest[name] = version
    return newest


def compile_lock(settings: Settings, locks: Path, source: str) -> str:
    """Resolve Python requirements to their newest versions and return the lock file's text.

    ``source`` is a requirements file, relative to the directory ``locks``, and options of uv.
    Raises SourcesUnreachable when the index does not answer, BumpFailed for other errors.
    """
    env = tool_env()
    env["UV_HTTP_TIMEOUT"] = str(settings.network.stall_seconds)
    with tempfile.NamedTemporaryFile() as file:
        argv = [uv(locks), *COMPILE.split(), "--output-file", file.name, *source.split()]
        result = _run(argv, env, locks)
        if not result.ok:
            raise _failure(f"uv cannot resolve locks/{source}", result.output)
        return Path(file.name).read_text()


def uv(locks: Path) -> str:
    """Return the path of uv: the one on PATH, else the locked one, installed into the cache.

    Raises SourcesUnreachable, BumpFailed.
    """
    installed = shutil.which("uv")
    if installed:
        return installed
    from filelock import FileLock

    lock = locks / "uv.txt"
    version = lock.read_text().split()[0]
    target = rootfs.cache_directory() / version
    with FileLock(f"{target}.lock"):  # several locks are compiled at once
        if not target.exists():
            draft = target.with_name(f"{version}.{os.getpid()}")
            python = sys.executable
            if not find_spec("pip"):
                # A .venv made by uv has no pip; the Python that it is based on has.
                python = getattr(sys, "_base_executable", python)
            argv = [python, *install_argv(lock, pip=True)[1:], "--target", str(draft)]
            result = _run(argv, tool_env())
            if not result.ok:
                raise _failure("pip cannot install uv", result.output)
            draft.replace(target)
    return str(target / "bin" / "uv")


def _run(argv: list[str], env: Mapping[str, str], cwd: Path | None = None) -> process.Completed:
    try:
        return process.run(
            argv,
            env=env,
            cwd=cwd,
            timeout=CALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        reason = f"{argv[0]} did not finish within {CALL_SECONDS} s"
        raise SourcesUnreachable(reason, "Try again later.") from error


def _failure(what: str, output: str) -> PipelineError:
    if OUTAGE.search(output):
        last_line = output.strip().splitlines()[-1]
        return SourcesUnreachable(f"{what}: {last_line[:300]}", "Try again later.")
    return BumpFailed(
        what,
        "No pin was changed. Correct the pin or its constraint.",
        output,
    )
