"""Report late and failing backups: to people, by the exit code, and to Datadog."""

import time
from typing import Any

from lib.backup import manifest, work
from lib.backup.console import age, log, size
from lib.backup.errors import Failure, LastRunFailed, Late
from lib.backup.manifest import Backup
from lib.backup.remote import Remote
from lib.backup.retention import newest_of_each_part
from lib.backup.settings import Settings


def status(settings: Settings, *, quiet: bool = False) -> dict[str, Any]:
    """Print the newest backup of each part, and send metrics to Datadog.

    Raises Late when one is older than BACKUP_MAX_AGE_HOURS or missing, LastRunFailed when only
    the last run failed.
    """
    last = work.last(settings.work)
    try:
        newest = newest_of_each_part(manifest.catalog(Remote(settings)))
    except Failure:
        send(settings, success=0)
        raise
    found = {part: newest[part] for part in settings.parts if part in newest}
    late = []
    for part in settings.parts:
        backup = found.get(part)
        too_old = backup is None or backup.age_seconds > settings.max_age_hours * 3600
        if too_old:
            late.append(part)
        if not quiet:
            print(f"{part:9} {'late' if too_old else 'ok':5} {describe(backup, part)}")
    failed = last.get("ok") is False
    metrics: dict[str, float] = {"success": 0 if late or failed else 1}
    if len(found) == len(settings.parts):
        metrics["age_seconds"] = max(backup.age_seconds for backup in found.values())
    send(settings, **metrics)
    reason = f"{last['error']}: {last.get('output', '')}" if failed else ""
    if late:
        limit = f"older than {settings.max_age_hours:g} h, or not there: {', '.join(late)}"
        raise Late(limit, reason or "Check the log of the backup container.")
    if failed:
        when = age(time.time() - last["began"])
        raise LastRunFailed(f"{when} ago: {reason}", "Run: backup run")
    parts = {
        part: {"id": backup.id, "age_seconds": round(backup.age_seconds)}
        for part, backup in found.items()
    }
    return {"parts": parts}


def describe(backup: Backup | None, part: str) -> str:
    """Return ID, age and size of the copy of a part."""
    if backup is None:
        return "no backup"
    stored = size(backup.parts[part].stored[0])
    return f"{backup.id}  {age(backup.age_seconds)} old, {stored}"


def send_run(settings: Settings, made: Backup | None) -> None:
    """Send how a run ended to Datadog."""
    metrics: dict[str, float] = {"success": 0}
    if made:
        seconds = work.last(settings.work).get("seconds", 0)
        metrics = {
            "success": 1,
            "age_seconds": made.age_seconds,
            "bytes": made.size,
            "seconds": seconds,
        }
    send(settings, **metrics)


def send(settings: Settings, **metrics: float) -> None:
    """Send gauges ``opencode.backup.NAME``. A failure is only logged."""
    tags: list[str] = []
    gauges = [(f"opencode.backup.{name}", value, tags) for name, value in metrics.items()]
    if error := settings.datadog.send(gauges):
        log(f"datadog: the metrics were not taken ({error})")
