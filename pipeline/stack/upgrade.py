"""``upgrade``: to a newer image, with a backup before, and back to the image and the data that were there if need be.

What is on disk while it runs, ``upgrade.json``, is enough to undo it: the image before and the backup's ID. It is
written before the first change and removed after the last, so that the next finishes or undoes one that was killed.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.engine import Engine
from pipeline.errors import NoStack, PipelineError, UpgradeRolledBack, UpgradeStopped, named
from pipeline.history import same
from pipeline.records import read_json, write_json
from pipeline.release import find, short
from pipeline.report import ok, say, warn
from pipeline.settings import Settings
from pipeline.stack import life
from pipeline.stack.restore import SERVERS_OWN
from pipeline.stack.runner import Runner

BACKUP_SECONDS = 4 * 3600


def pending(run: Runner) -> dict[str, Any]:
    """Return what an upgrade that did not end has written down, or nothing."""
    return read_json(run.note)


def upgrade(settings: Settings, engine: Engine, to: str = "latest", *, dry_run: bool = False) -> None:
    """Move the stack to the image ``to``, after finishing or undoing an upgrade that was interrupted.

    Raises NoStack, NoSuchRelease, UpgradeStopped when nothing was changed, UpgradeRolledBack when all was put back.
    """
    newer = find(settings, engine, to)
    run = life.of(settings, engine)
    if dry_run:
        before = _before(run, settings, engine)
        first = "finish or undo the upgrade that was interrupted, " if pending(run) else ""
        say(f"upgrade: would {first}back up, and move from {short(before)} to {short(newer)}")
        return
    with life.alone(settings):
        if left := pending(run):
            warn(f"an upgrade from {left['from'][:12]} to {left['to'][:12]} was interrupted")
            _settle(run, settings, left)
        before = _before(run, settings, engine)
        if newer["Id"] == before["Id"] and same(run.state("opencode").image, before["Id"]):
            ok(f"the stack runs {short(before)} already")
            return
        _move(run, settings, before, newer)


def _before(run: Runner, settings: Settings, engine: Engine) -> dict[str, Any]:
    """Return the image that the stack has. Raises NoStack."""
    before = engine.image(engine.local(life.image_tag(settings)))
    if before is None or not run.state("opencode").there:
        raise NoStack("there is no stack to upgrade", "inv up starts one, from the newest released image.")
    return before


def _settle(run: Runner, settings: Settings, left: dict[str, Any]) -> None:
    """End an upgrade that was interrupted: a server that answers stays, with what it has written since then.

    Only one that does not is put back, with its data. Raises UpgradeStopped.
    """
    state = run.state("opencode")
    if state.running:
        try:
            life.wait(run, settings, "opencode", state.restarts)
        except PipelineError as error:
            warn(error.what)
        else:
            run.engine.tag(state.image, life.image_tag(settings))
            if not same(run.state("backup").image, state.image):
                run.start("backup")
                life.wait(run, settings, "backup")
            run.note.unlink(missing_ok=True)
            ok(f"the server runs {state.image.removeprefix('sha256:')[:12]} and answers; its data stays as it is")
            return
    warn(f"undoing it: the image before, and backup {left['backup']}")
    _undo(run, settings, left)


def _move(run: Runner, settings: Settings, before: dict[str, Any], newer: dict[str, Any]) -> None:
    saved = _back_up(run)
    ok(f"backup {saved}")
    note = {"from": before["Id"], "to": newer["Id"], "backup": saved}
    write_json(run.note, note)
    try:
        with named():
            run.engine.tag(newer["Id"], life.image_tag(settings))
            for part in ("opencode", "backup"):
                # The new server first; the old backup stays until it is well, since it can put the data back.
                run.start(part)
                life.wait(run, settings, part)
                ok(f"{part:9} runs {short(newer)}")
    except PipelineError as error:
        warn(f"{error.what}\ngoing back to {short(before)}")
        _undo(run, settings, note)
        raise UpgradeRolledBack(
            f"{short(newer)} did not come up: {error.what}",
            f"The stack runs {short(before)} with the data of backup {saved}. Its log is above.",
            error.details,
        ) from None
    run.note.unlink()
    ok(f"upgraded from {short(before)} to {short(newer)}; back: inv upgrade --to {short(before)}")


def _back_up(run: Runner) -> str:
    """Make a backup, and return its ID. Raises UpgradeStopped."""
    if not run.state("backup").running:
        raise UpgradeStopped("there is no backup role to make a backup", "inv up starts it; nothing was changed.")
    done = run.backup("run", "--create", "--json", timeout=BACKUP_SECONDS)
    if not done.ok:
        raise UpgradeStopped("the backup before it failed", "Nothing was changed; mend that first.", done.said)
    return str(json.loads(done.stdout)["id"])


def _undo(run: Runner, settings: Settings, note: dict[str, Any]) -> None:
    """Put image and data back. Raises UpgradeStopped, and leaves the note for another try."""
    try:
        with named():
            run.engine.tag(note["from"], life.image_tag(settings))
            run.end("opencode")
            role = run.state("backup")
            if not role.running or not same(role.image, note["from"]):
                run.start("backup")
                life.wait(run, settings, "backup")
            # What a newer server may have changed for good; the databases run on as they were.
            words = ("restore", note["backup"], "--only", ",".join(SERVERS_OWN), "--replace")
            done = run.backup(*words, timeout=BACKUP_SECONDS)
            if not done.ok:
                raise UpgradeStopped(f"backup {note['backup']} could not be restored", "", done.said)
            say(done.said)  # among it, where what it replaced was saved
            run.start("opencode")
            life.wait(run, settings, "opencode")
    except PipelineError as error:
        remedy = f"The data is in backup {note['backup']}: docs/operations.md. Then inv upgrade again."
        raise UpgradeStopped(f"going back failed: {error.what}", remedy, error.details) from None
    run.note.unlink(missing_ok=True)
