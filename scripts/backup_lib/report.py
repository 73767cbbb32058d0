"""Whether backups are late or failing: for people, for scripts by the exit code, for Datadog as metrics."""

import json
import time
import urllib.request
from typing import Any

from backup_lib import manifest, work
from backup_lib.errors import Failure, LastRunFailed, Late
from backup_lib.manifest import Backup
from backup_lib.remote import Remote
from backup_lib.say import age, say, size
from backup_lib.settings import Settings

SECONDS = 5


def newest(settings: Settings, found: list[Backup]) -> dict[str, Backup]:
    """Return the newest complete backup of each part that BACKUP_PARTS names and there is one of."""
    good = [backup for backup in found if not backup.fault and backup.kind == "backup"]
    first = {part: next((each for each in good if part in each.parts), None) for part in settings.parts}
    return {part: backup for part, backup in first.items() if backup}


def status(settings: Settings, *, quiet: bool = False) -> dict[str, Any]:
    """Say how old the newest backup of each part is, and how the last run here ended; send both to Datadog.

    Raises Late when one is older than BACKUP_MAX_AGE_HOURS or there is none, LastRunFailed when only that is wrong.
    """
    last = work.recall(settings.work)
    try:
        found = newest(settings, manifest.catalog(Remote(settings)))
    except Failure:
        metrics(settings, {"success": 0})
        raise
    ages = {part: backup.age_seconds for part, backup in found.items()}
    late = [part for part in settings.parts if ages.get(part, float("inf")) > settings.max_age_hours * 3600]
    if not quiet:
        for part in settings.parts:
            one = found.get(part)
            told = f"{one.id}  {age(one.age_seconds)} old, {size(one.parts[part].stored[0])}" if one else "no backup"
            print(f"{part:9} {'late' if part in late else 'ok':5} {told}")
    failed = last.get("ok") is False
    values: dict[str, float] = {"success": 0 if late or failed else 1}
    if len(ages) == len(settings.parts):
        values["age_seconds"] = max(ages.values())
    metrics(settings, values)
    if late:
        remedy = f"{last['error']}: {last['said']}" if failed else "Look at the log of the container that makes them."
        raise Late(f"older than {settings.max_age_hours:g} h, or not there: {', '.join(late)}", remedy)
    if failed:
        when = age(time.time() - last["began"])
        raise LastRunFailed(f"{when} ago: {last['error']}: {last['said']}", "backup run tries again.")
    return {"parts": {part: {"id": backup.id, "age_seconds": round(ages[part])} for part, backup in found.items()}}


def send(settings: Settings, made: Backup | None) -> None:
    """Tell Datadog how a run ended."""
    values: dict[str, float] = {"success": 1 if made else 0}
    if made:
        values |= {"age_seconds": made.age_seconds, "bytes": made.size}
        values["seconds"] = work.recall(settings.work).get("seconds", 0)
    metrics(settings, values)


def metrics(settings: Settings, values: dict[str, float]) -> None:
    """Send gauges named ``opencode.backup.*`` when there is a key; whatever goes wrong is told and is no failure.

    One request of a documented form: Datadog's client takes a second to import.
    """
    if not settings.datadog_key:
        return
    now = int(time.time())
    series = [
        {"metric": f"opencode.backup.{name}", "type": 3, "points": [{"timestamp": now, "value": value}],
         "resources": [{"type": "host", "name": settings.host}]}
        for name, value in values.items()
    ]  # fmt: skip
    headers = {"Content-Type": "application/json", "DD-API-KEY": settings.datadog_key}
    body = json.dumps({"series": series}).encode()
    request = urllib.request.Request(f"{settings.datadog_url}/api/v2/series", body, headers)  # noqa: S310 -- ours or set
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
            response.read()
    except (OSError, ValueError) as error:  # what it says could hold the key
        say(f"datadog: the metrics were not taken ({type(error).__name__})")
