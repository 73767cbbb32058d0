"""``upgrade`` and ``restore``: what changes the stack's data.

An upgrade records in ``upgrade.json`` the image before it and the ID of its backup, before the
first change and until after the last. The next ``upgrade`` then undoes or finishes one that was
killed.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.core.console import log, ok, warn
from pipeline.core.errors import (
    NoStack,
    PipelineError,
    RestoreStopped,
    UpgradeRolledBack,
    UpgradeStopped,
    named,
)
from pipeline.core.settings import Settings
from pipeline.core.state import read_json, write_json
from pipeline.engines.engine import Engine
from pipeline.image.tags import find, same_id, short_id
from pipeline.stack.compose import Project, image_tag, project_of
from pipeline.stack.lifecycle import exclusive, wait, wait_server
from pipeline.stack.secrets import check_passwords

BACKUP_SECONDS = 4 * 3600

SERVER_PARTS = ("opencode", "files")
"""The parts of a backup that need the server stopped; databases are restored while they run."""


def pending(project: Project) -> dict[str, Any]:
    """Return the record of an upgrade that was interrupted, or an empty dict."""
    return read_json(project.note)


def upgrade(
    settings: Settings, engine: Engine, to: str = "latest", *, dry_run: bool = False
) -> None:
    """Move the stack to the image ``to``, after finishing or undoing an interrupted upgrade.

    Raises NoStack, NoSuchRelease, SecretsRefused, UpgradeRolledBack; UpgradeStopped if nothing
    was changed.
    """
    newer = find(settings, engine, to)
    project = project_of(settings, engine)
    if dry_run:
        log(f"upgrade: would back up, and move to {short_id(newer)}")
        return
    check_passwords(project.secrets)
    with exclusive(settings):
        if record := pending(project):
            warn(f"an upgrade to {record['to'][:12]} was interrupted")
            _settle(project, record)
        current = _current(project)
        running = project.state("opencode").image
        if newer["Id"] == current["Id"] and same_id(running, current["Id"]):
            ok(f"the stack already runs {short_id(current)}")
            return
        _move(project, current, newer)


def _current(project: Project) -> dict[str, Any]:
    """Return the image of the stack. Raises NoStack."""
    current = project.engine.image(project.images["opencode"])
    if current is None or not project.state("opencode").exists:
        raise NoStack("the stack is not running", "Start it: inv up.")
    return current


def _settle(project: Project, record: dict[str, Any]) -> None:
    """Finish an interrupted upgrade if the server answers, and keep its data; else undo it.

    Raises UpgradeStopped.
    """
    state = project.state("opencode")
    if state.running:
        try:
            wait_server(project, state.restarts)
        except PipelineError as error:
            warn(error.what)
        else:
            project.engine.tag(state.image, image_tag(project.settings))
            _start_backup(project, state.image)
            project.note.unlink(missing_ok=True)
            ok("the server answers: keeping its image and its data")
            return
    warn(f"undoing it: restoring the image before it and backup {record['backup']}")
    _undo(project, record)


def _start_backup(project: Project, image: str) -> None:
    """Have the backup run, with ``image``."""
    state = project.state("backup")
    if not state.running or not same_id(state.image, image):
        project.start("backup")
        wait(project, "backup")


def _move(project: Project, current: dict[str, Any], newer: dict[str, Any]) -> None:
    """Back up, then start the server and the backup from ``newer``, or undo that."""
    backup = _back_up(project)
    ok(f"backup {backup}")
    record = {"from": current["Id"], "to": newer["Id"], "backup": backup}
    write_json(project.note, record)
    try:
        with named():
            project.engine.tag(newer["Id"], image_tag(project.settings))
            # The server first: until it is healthy, the old backup can restore its data.
            project.start("opencode")
            wait_server(project)
            ok(f"opencode  runs {short_id(newer)}")
            project.start("backup")
            wait(project, "backup")
            ok(f"backup    runs {short_id(newer)}")
    except PipelineError as error:
        warn(f"{error.what}\nrolling back to {short_id(current)}")
        _undo(project, record)
        raise UpgradeRolledBack(
            f"{short_id(newer)} is not healthy: {error.what}",
            f"The stack runs {short_id(current)} with the data of backup {backup}.",
            error.details,
        ) from None
    project.note.unlink()
    ok(f"upgraded to {short_id(newer)}. To go back: inv upgrade --to {short_id(current)}")


def _back_up(project: Project) -> str:
    """Make a backup and return its ID. Raises UpgradeStopped."""
    done = project.backup("run", "--create", "--json", timeout=BACKUP_SECONDS)
    if not done.ok:
        raise UpgradeStopped(
            "the backup before the upgrade failed",
            "Nothing was changed. Fix the backup (docs/backup.md), then: inv upgrade.",
            done.output,
        )
    return str(json.loads(done.stdout)["id"])


def _undo(project: Project, record: dict[str, Any]) -> None:
    """Restore image and data. Raises UpgradeStopped and keeps the record for another try."""
    try:
        with named():
            project.engine.tag(record["from"], image_tag(project.settings))
            project.remove("opencode")
            _start_backup(project, record["from"])
            # A newer server may have migrated its own data; the databases are untouched.
            words = [
                "restore",
                record["backup"],
                "--only",
                ",".join(SERVER_PARTS),
                "--replace",
            ]
            done = project.backup(*words, timeout=BACKUP_SECONDS)
            if not done.ok:
                raise UpgradeStopped(f"cannot restore {record['backup']}", "", done.output)
            log(done.output)
            project.start("opencode")
            wait_server(project)
    except PipelineError as error:
        raise UpgradeStopped(
            f"cannot undo the upgrade: {error.what}",
            f"The data is in backup {record['backup']}. Fix the cause, then: inv upgrade.",
            error.details,
        ) from None
    project.note.unlink(missing_ok=True)


def restore(
    settings: Settings,
    engine: Engine,
    backup: str = "",
    *,
    only: str = "",
    replace: bool = False,
    dry_run: bool = False,
) -> None:
    """Restore a backup, by default the newest, or its parts ``only``; this stops the server.

    Raises NoStack, SecretsRefused, RestoreStopped, StackBusy, PartDown.
    """
    project = project_of(settings, engine)
    if not project.state("backup").running:
        raise NoStack("the backup is not running", "Start it: inv up.")
    words = [backup] if backup else []
    stops_server = not only or any(part in only for part in SERVER_PARTS)
    if dry_run:
        _run(project, "verify", *words)
        log("restore: would stop the server, restore this backup, and start the server")
        return
    if only:
        words += ["--only", only]
    if replace:
        words.append("--replace")
    check_passwords(project.secrets)
    with exclusive(settings):
        if stops_server:
            project.remove("opencode")
            ok("stopped the server")
        try:
            _run(project, "restore", *words)
        finally:
            if stops_server:
                project.start("opencode")
                wait_server(project)
                ok("started the server")
        # The user has chosen this data: there is no interrupted upgrade to undo any more.
        project.note.unlink(missing_ok=True)


def _run(project: Project, *words: str) -> None:
    """Run a command of the backup with its output on the terminal. Raises RestoreStopped."""
    done = project.backup(*words, timeout=None, terminal=True)
    if not done.ok:
        raise RestoreStopped(
            f"backup {words[0]} failed with exit code {done.code}",
            "See its output above, and docs/backup.md.",
        )
