"""Read backups back and compare; remove those that are not kept."""

from backup_lib import keep, manifest
from backup_lib.errors import BackupDamaged
from backup_lib.manifest import Backup
from backup_lib.remote import Remote
from backup_lib.say import say, size
from backup_lib.settings import Settings


def verify(settings: Settings, wanted: str, *, everything: bool = False) -> list[Backup]:
    """Read a backup, or all that count, and compare each object with the manifest. Raises BackupDamaged at the end."""
    remote = Remote(settings)
    found = manifest.catalog(remote)
    chosen = [each for each in found if not each.fault] if everything else [manifest.choose(found, wanted)]
    faults = []
    for backup in chosen:
        if fault := damage(remote, backup):
            faults.append(f"{backup.id}: {fault}")
        say(f"{backup.id}: {fault or f'every object is what its manifest says, {size(backup.size)}'}")
    if faults:
        raise BackupDamaged("; ".join(faults), "Restore an older one, and look who can write to the remote.")
    return chosen


def damage(remote: Remote, backup: Backup) -> str:
    """Return what is wrong with a backup; nothing when each object is what the manifest says."""
    there = remote.digests(backup.id)
    wrong = [part.object for part in backup.parts.values() if there.get(part.object) != part.stored[1]]
    return f"{', '.join(wrong)}: not what was uploaded" if wrong else ""


def prune(settings: Settings, *, dry_run: bool = False, read_back: str = "") -> list[Backup]:
    """Remove what is not kept; return it. ``read_back`` is the ID of a backup that was compared just now.

    Raises BackupDamaged, and removes nothing, when the newest copy of a part is not what its manifest says.
    """
    remote = Remote(settings)
    found = manifest.catalog(remote)
    gone = keep.to_remove(found, settings.keep)
    for backup in gone:
        say(f"{'would remove' if dry_run else 'removing'} {backup.id}: {backup.fault or 'not kept'}")
    if dry_run or not gone:
        return gone
    good = [backup for backup in found if not backup.fault and backup.kind == "backup"]
    newest = {next(backup.id for backup in good if part in backup.parts) for one in good for part in one.parts}
    for backup in good:
        if backup.id in newest - {read_back} and (fault := damage(remote, backup)):
            remedy = "Nothing was removed. Make a backup, or restore an older one while it is there."
            raise BackupDamaged(f"{backup.id}: {fault}", remedy)
    for backup in gone:
        remote.remove(backup.id)
    return gone
