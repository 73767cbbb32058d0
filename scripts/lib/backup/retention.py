"""Verify backups, choose which to keep, and remove the others."""

from collections.abc import Iterable

from lib.backup import manifest
from lib.backup.console import log, size
from lib.backup.errors import BackupDamaged, Failure
from lib.backup.manifest import INCOMPLETE, Backup, time_of
from lib.backup.remote import Remote
from lib.backup.settings import Keep, Settings

GRACE_SECONDS = 24 * 3600
"""For this long, an incomplete backup may still be uploading from another host."""

PERIODS = {"daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m"}


def verify(settings: Settings, wanted: str, *, everything: bool = False) -> list[Backup]:
    """Read a backup, or all complete ones, and compare each object with the manifest.

    Raises NoSuchBackup, and BackupDamaged when all have been read.
    """
    remote = Remote(settings)
    backups = manifest.catalog(remote)
    chosen = [backup for backup in backups if not backup.fault]
    if not everything:
        chosen = [manifest.choose(backups, wanted)]
    faults = []
    for backup in chosen:
        fault = damage(remote, backup)
        if fault:
            faults.append(f"{backup.id}: {fault}")
        log(f"{backup.id}: {fault or f'verified, {size(backup.size)}'}")
    if faults:
        remedy = "Restore an older backup, and check who can write to the remote."
        raise BackupDamaged("; ".join(faults), remedy)
    return chosen


def damage(remote: Remote, backup: Backup) -> str:
    """Return which objects differ from the manifest; an empty string when none does."""
    stored = remote.digests(backup.id)
    wrong = []
    for part in backup.parts.values():
        if stored.get(part.object) != part.stored[1]:
            wrong.append(part.object)
    return f"{', '.join(wrong)}: not what was uploaded" if wrong else ""


def prune(settings: Settings, *, dry_run: bool = False, verified: str = "") -> list[Backup]:
    """Remove the backups that retention does not keep, and return them.

    ``verified`` is the ID of a backup that was just read back. Raises BackupDamaged, and removes
    nothing, when the newest copy of a part is not what its manifest says. Raises the last Failure
    when some cannot be removed, after the others.
    """
    remote = Remote(settings)
    backups = manifest.catalog(remote)
    unwanted = to_remove(backups, settings.keep)
    for backup in unwanted:
        verb = "would remove" if dry_run else "removing"
        log(f"{verb} {backup.id}: {backup.fault or 'not kept'}")
    if dry_run or not unwanted:
        return unwanted
    for backup in newest_of_each_part(backups).values():
        if backup.id != verified and (fault := damage(remote, backup)):
            remedy = "Nothing was removed. Run backup run, or restore an older backup."
            raise BackupDamaged(f"{backup.id}: {fault}", remedy)
    failure = None
    for backup in unwanted:
        try:
            remote.remove(backup.id)
        except Failure as error:
            log(f"{backup.id} stays: {error}")
            failure = error
    if failure:
        raise failure
    return unwanted


def newest_of_each_part(backups: Iterable[Backup]) -> dict[str, Backup]:
    """Return the newest complete backup of each part; ``backups`` are newest first."""
    newest: dict[str, Backup] = {}
    for backup in backups:
        if backup.counts:
            for part in backup.parts:
                newest.setdefault(part, backup)
    return newest


def to_remove(backups: Iterable[Backup], keep: Keep) -> list[Backup]:
    """Return the backups to remove, oldest first.

    The newest complete copy of each part is always kept. An incomplete backup is removed after a
    day. One that was damaged later may hold a part that is whole: it is kept. So are those of other
    stacks.
    """
    newest = sorted(backups, key=lambda backup: backup.id, reverse=True)
    complete = [backup for backup in newest if not backup.fault and not backup.note]
    good = [backup for backup in complete if backup.counts]
    safety = [backup for backup in complete if backup.kind == "safety"]
    kept = {backup.id for backup in good[: keep.last] + safety[: keep.safety]}
    for period, form in PERIODS.items():
        first: dict[str, str] = {}
        for backup in good:
            first.setdefault(format(time_of(backup.id), form), backup.id)
        kept.update(list(first.values())[: getattr(keep, period)])
    kept.update(backup.id for backup in newest_of_each_part(good).values())
    for backup in newest:
        recent = backup.age_seconds < GRACE_SECONDS
        if backup.note or (backup.fault and (backup.fault != INCOMPLETE or recent)):
            kept.add(backup.id)
    return [backup for backup in reversed(newest) if backup.id not in kept]
