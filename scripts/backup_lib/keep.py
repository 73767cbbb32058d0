"""Which backups to keep: the last ones, and the newest of each day, week and month."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from backup_lib.manifest import INCOMPLETE, Backup, time_of

GRACE_SECONDS = 24 * 3600
"""An incomplete backup may be on its way up, from another host, for so long."""

PERIODS: Mapping[str, Callable[[datetime], str]] = {
    "DAILY": lambda when: f"{when:%Y-%m-%d}",
    "WEEKLY": lambda when: f"{when:%G-%V}",
    "MONTHLY": lambda when: f"{when:%Y-%m}",
}


def to_remove(backups: Iterable[Backup], keep: Mapping[str, int]) -> list[Backup]:
    """Return what is to be removed, oldest first. Of each part the newest copy that counts always stays."""
    newest = sorted(backups, key=lambda backup: backup.id, reverse=True)
    good = [backup for backup in newest if not backup.fault and backup.kind == "backup"]
    safety = [backup for backup in newest if not backup.fault and backup.kind == "safety"]
    kept = {backup.id for backup in good[: keep["LAST"]] + safety[: keep["SAFETY"]]}
    for period, name in PERIODS.items():
        first: dict[str, str] = {}
        for backup in good:
            first.setdefault(name(time_of(backup.id)), backup.id)
        kept |= set(list(first.values())[: keep[period]])
    for part in {part for backup in good for part in backup.parts}:
        kept.add(next(backup.id for backup in good if part in backup.parts))
    # What was begun and not finished goes after a day. What was damaged later may hold a part that is whole: it stays.
    kept |= {
        each.id for each in newest if each.fault and (each.fault != INCOMPLETE or each.age_seconds < GRACE_SECONDS)
    }
    return [backup for backup in reversed(newest) if backup.id not in kept]
