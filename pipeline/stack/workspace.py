"""The project that ``inv up`` mounts at /workspace, and as whom the server works in it."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.console import warn
from pipeline.core.errors import ProjectRefused
from pipeline.core.settings import Settings
from pipeline.core.state import read_json, write_json
from pipeline.engines.commands import USER
from pipeline.engines.engine import Engine

VOLUME = "volume"
"""The word that means the work volume instead of a directory."""


@dataclass(frozen=True)
class Workspace:
    """``directory`` is mounted at /workspace; None is the volume. ``user`` is UID:GID inside."""

    directory: Path | None = None
    user: str = USER


def choose(settings: Settings, home: Path, project: str) -> None:
    """Record the directory for this stack: ``project``, else the setting, else as recorded.

    Raises ProjectRefused.
    """
    chosen = project or settings.stack.project
    if chosen == VOLUME:
        forget(home)
    elif chosen:
        directory = check(Path(chosen).expanduser().resolve())
        owner = directory.stat()
        record = {"project": str(directory), "owner": f"{owner.st_uid}:{owner.st_gid}"}
        write_json(_record(home), record)


def recorded(engine: Engine, home: Path) -> Workspace:
    """Return what ``choose`` recorded; the directory may be gone."""
    record = read_json(_record(home))
    if not record:
        return Workspace()
    # Rootless: root in the container is the user here, who owns the directory.
    return Workspace(Path(record["project"]), "0:0" if engine.rootless else record["owner"])


def forget(home: Path) -> None:
    """Remove the record."""
    _record(home).unlink(missing_ok=True)


def _record(home: Path) -> Path:
    return home / "workspace.json"


def check(directory: Path) -> Path:
    """Return ``directory`` if the server can work in it. Raises ProjectRefused."""
    if not directory.is_dir():
        remedy = f"Create it, or use the volume: inv up --project {VOLUME}."
        raise ProjectRefused(f"the project {directory} is not a directory", remedy)
    if ":" in str(directory):
        raise ProjectRefused(f"{directory} has a colon, which no mount can have", "Rename it.")
    _check_owner(directory)
    _check_git(directory)
    return directory


def _check_owner(directory: Path) -> None:
    """Refuse what belongs to another user; root may serve anyone's. Raises ProjectRefused."""
    owner = directory.stat().st_uid
    if os.geteuid() in (0, owner):
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"UID {owner}"
    raise ProjectRefused(
        f"{directory} belongs to {name}, not to you",
        f"Run inv up as that user, or: sudo chown -R $(id -u):$(id -g) {directory}",
    )


def _check_git(directory: Path) -> None:
    """Refuse a linked work tree or submodule, whose repository is elsewhere; warn of a part.

    Raises ProjectRefused.
    """
    link = directory / ".git"
    if link.is_file():
        repository = (directory / link.read_text().partition(":")[2].strip()).resolve()
        if not repository.is_relative_to(directory):
            main = str(repository).partition("/.git/")[0]
            raise ProjectRefused(
                f"{directory} is a linked git work tree: its repository is {repository}, "
                "which the container does not see",
                f"Use the main work tree: inv up --project {main}. Or a clone: git clone "
                f"{directory} {directory}-clone, then inv up --project {directory}-clone",
            )
    elif not link.exists():
        for parent in directory.parents:
            if (parent / ".git").exists():
                warn(f"git does not work in it: the repository is {parent}")
                break
