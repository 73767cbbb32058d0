"""Lint and tests, run by the tools that everyone runs them with."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import host, process
from pipeline.errors import ChecksFailed
from pipeline.report import fail, ok, say
from pipeline.settings import ROOT

SCRIPTS = ("inv", "scripts/backup-cron", "scripts/health", ".ci/run")


def lint_argvs(bin_directory: Path) -> dict[str, list[str]]:
    """Return each linter's call. hadolint and shellcheck are binaries that PyPI packages put beside python."""
    python = str(bin_directory / "python")
    return {
        "ruff check": [python, "-m", "ruff", "check", "--quiet", "."],
        "ruff format": [python, "-m", "ruff", "format", "--quiet", "--diff", "."],
        "mypy --strict": [python, "-m", "mypy"],
        "hadolint": [str(bin_directory / "hadolint"), "--no-color", "Containerfile", "deploy/databases/Containerfile"],
        "shellcheck": [str(bin_directory / "shellcheck"), *SCRIPTS],
    }


def lint() -> None:
    """Run every linter, side by side. Raises ChecksFailed, naming those that found something."""
    host.ensure_dev_tools()
    argvs = lint_argvs(Path(sys.executable).parent)
    with ThreadPoolExecutor() as pool:
        results = dict(zip(argvs, pool.map(lambda argv: process.run(argv, cwd=ROOT), argvs.values()), strict=True))
    for name, done in results.items():
        if done.ok:
            ok(f"{name:14} {done.seconds:5.1f} s")
        else:
            say(done.stdout + done.stderr)
            fail(f"{name:14} {done.seconds:5.1f} s")
    if failed := [name for name, done in results.items() if not done.ok]:
        raise ChecksFailed(f"{', '.join(failed)} found something", "It is printed above.")


def test(*, unit: bool = False, keyword: str = "") -> None:
    """Lint, then run pytest; all of it needs podman and docker, and installs what is missing. Raises ChecksFailed."""
    lint()
    if not unit:
        host.setup("auto", tests=True)
    argv = [sys.executable, "-m", "pytest"]
    if unit or keyword:
        argv += [*(["tests/unit"] if unit else []), *(["-k", keyword] if keyword else [])]
    else:
        argv += ["--numprocesses", "3", "--dist", "loadscope"]  # tests/conftest.py says what goes together
    done = process.run(argv, cwd=ROOT, terminal=True)
    if not done.ok:
        raise ChecksFailed(f"pytest ended with {done.code}", "Its report is above; inv test -k NAME runs one again.")
