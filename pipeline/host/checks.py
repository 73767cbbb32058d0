"""``inv lint`` and ``inv test``."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core import process
from pipeline.core.console import fail, log, ok
from pipeline.core.dev_tools import ensure_dev_tools
from pipeline.core.errors import ChecksFailed
from pipeline.core.settings import ROOT
from pipeline.host import setup


def shell_scripts() -> list[str]:
    """Return the paths of the shell scripts in this repository.

    A script is recognized by its first line, since most have no suffix.
    """
    paths = [ROOT / "inv"]
    for folder in (".ci", "build_scripts", "deploy/egress", "deploy/gateway", "scripts"):
        paths += sorted((ROOT / folder).iterdir())
    shebang = re.compile(rb"#!.*\b(ba|da)?sh\b")
    scripts = [path for path in paths if path.is_file() and shebang.match(path.read_bytes())]
    return [str(path.relative_to(ROOT)) for path in scripts]


def lint_argvs(bin_directory: Path) -> dict[str, list[str]]:
    """Return the command of each linter; PyPI packages install hadolint and shellcheck too.

    ``bin_directory`` is the one of the running Python.
    """
    python = str(bin_directory / "python")
    hadolint = [str(bin_directory / "hadolint"), "--no-color"]
    return {
        "ruff check": [python, "-m", "ruff", "check", "--quiet", "."],
        "ruff format": [python, "-m", "ruff", "format", "--quiet", "--diff", "."],
        "mypy --strict": [python, "-m", "mypy"],
        "hadolint": [*hadolint, "Containerfile", "deploy/databases/Containerfile"],
        "shellcheck": [str(bin_directory / "shellcheck"), *shell_scripts()],
    }


def lint() -> None:
    """Run the linters in parallel. Raises ChecksFailed, which names those that failed."""
    ensure_dev_tools()
    argvs = lint_argvs(Path(sys.executable).parent)
    failed = []
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda argv: process.run(argv, cwd=ROOT), argvs.values())
        for name, done in zip(argvs, results, strict=True):
            line = f"{name:14} {done.seconds:5.1f} s"
            if done.ok:
                ok(line)
            else:
                log(done.stdout + done.stderr)
                fail(line)
                failed.append(name)
    if failed:
        raise ChecksFailed(f"{', '.join(failed)} failed", "Correct what is printed above.")


def test(*, unit: bool = False, keyword: str = "") -> None:
    """Run the linters, then pytest. Raises ChecksFailed.

    All tests together need podman and docker, which are installed if they are missing.
    """
    lint()
    argv = [sys.executable, "-m", "pytest"]
    if unit:
        argv.append("tests/unit")
    else:
        setup.setup("auto", tests=True)
    if keyword:
        argv += ["-k", keyword]
    if not unit and not keyword:
        # tests/conftest.py says which tests run in the same process.
        argv += ["--numprocesses", "3", "--dist", "loadscope"]
    done = process.run(argv, cwd=ROOT, terminal=True)
    if not done.ok:
        raise ChecksFailed(
            f"pytest exited with {done.code}", "Run a failed test again: inv test -k NAME"
        )
