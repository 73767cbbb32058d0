"""The development tools of locks/dev.txt, installed into .venv when a task first needs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path

from pipeline.core import process
from pipeline.core.console import log
from pipeline.core.errors import SetupFailed, ToolMissing
from pipeline.core.pip import install_argv, tool_env
from pipeline.core.settings import ROOT


def missing_tools(project: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return the development tools in pyproject.toml that this interpreter lacks."""
    dependencies = tomllib.loads(project.read_text())["project"]["optional-dependencies"]["dev"]
    if sys.version_info >= (3, 14):
        dependencies = [each for each in dependencies if "python_version < '3.14'" not in each]
    installed = {normalized(each.name) for each in importlib.metadata.distributions()}
    names = [re.split(r"[^\w.-]", dependency)[0] for dependency in dependencies]
    return [name for name in names if normalized(name) not in installed]


def normalized(name: str) -> str:
    """Return the name of a distribution as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ensure_dev_tools(venv: Path = ROOT / ".venv") -> None:
    """Install locks/dev.txt into our own .venv if a tool is missing.

    Raises ToolMissing when another environment runs this, SetupFailed when the installation fails.
    """
    missing = missing_tools()
    if not missing:
        return
    lock = ROOT / "locks" / "dev.txt"
    if Path(sys.prefix).resolve() != venv.resolve():
        raise ToolMissing(
            f"{', '.join(missing)} not in {sys.prefix}",
            "Use ./inv, or: pip install --require-hashes -r locks/dev.txt",
        )
    from filelock import FileLock

    log(f"installing the development tools of locks/dev.txt into {venv.name}")
    with FileLock(f"{venv}.lock"):  # the lock of ./inv
        argv = install_argv(lock, pip=importlib.util.find_spec("pip") is not None)
        done = process.run(argv, env=tool_env())
        if not done.ok:
            raise SetupFailed(
                f"{argv[0]} could not install locks/dev.txt",
                "Set PIP_INDEX_URL, PIP_CERT or a proxy if this network needs them.",
                done.output,
            )
        draft = venv / "made-from.part"
        shutil.copyfile(lock, draft)
        draft.replace(venv / "made-from.txt")
