"""Manifests: what a backup consists of. A backup without a manifest is incomplete."""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lib.backup.console import log
from lib.backup.errors import BackupDamaged, NoSuchBackup, WrongPassword
from lib.backup.remote import Remote

FORMAT = 1
BLOCK = 1 << 16
AHEAD_SECONDS = 3600
"""How far the clock of another host may be ahead."""

INCOMPLETE = "incomplete: it has no manifest"
MANIFEST = "manifest.json"
ID = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{6}")
TIME = "%Y%m%dT%H%M%SZ"


def new_id() -> str:
    """Return an ID: the time, and a random suffix for other hosts."""
    return f"{datetime.now(UTC):{TIME}}-{secrets.token_hex(3)}"


def time_of(backup_id: str) -> datetime:
    """Return when a backup began."""
    return datetime.strptime(backup_id[:16], TIME).replace(tzinfo=UTC)


@dataclass(frozen=True)
class Part:
    """One object: (bytes, SHA-256) as ``stored`` and ``raw``, and ``facts`` about the content."""

    object: str
    stored: tuple[int, str]
    raw: tuple[int, str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Backup:
    """A backup at the remote; ``fault`` says why it is not complete, and is empty if it is.

    ``kind`` is backup or safety, ``size`` the bytes of all objects. ``note`` says why a complete
    one is neither restored nor removed unless its ID is given.
    """

    id: str
    kind: str = ""
    host: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    size: int = 0
    fault: str = ""
    stack: str = ""
    note: str = ""

    @property
    def counts(self) -> bool:
        """Return whether it is complete, of this stack, and no safety backup."""
        return self.kind == "backup" and not self.fault and not self.note

    @property
    def age_seconds(self) -> float:
        """Return the seconds since it began."""
        return (datetime.now(UTC) - time_of(self.id)).total_seconds()


def write(backup: Backup) -> bytes:
    """Return the manifest: one line of JSON with its own SHA-256, padded to a block of crypt.

    With a wrong password, rclone reports "unexpected EOF" for an encrypted object that is shorter
    than 64 KiB, as it does for a cut connection.
    """
    body = {
        "format": FORMAT,
        "id": backup.id,
        "kind": backup.kind,
        "host": backup.host,
        "stack": backup.stack,
    }
    body["parts"] = {name: asdict(part) for name, part in backup.parts.items()}
    body = json.loads(json.dumps(body))
    return (json.dumps(body | {"sha256": checksum(body)}).ljust(BLOCK) + "\n").encode()


def checksum(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse(manifest: Mapping[str, Any]) -> Backup:
    """Return the backup that a manifest describes; with a fault if the manifest was changed."""
    body = dict(manifest)
    expected = body.pop("sha256", "")
    name = str(body.get("id"))
    if expected != checksum(body):
        return Backup(name, fault="its manifest was changed")
    if body["format"] != FORMAT:
        return Backup(name, fault=f"format {body['format']} is of another version of backup")
    parts = {}
    for part, entry in body["parts"].items():
        stored, raw = tuple(entry["stored"]), tuple(entry["raw"])
        parts[part] = Part(entry["object"], stored, raw, entry["facts"])
    size = sum(part.stored[0] for part in parts.values())
    # Until 2026-11, manifests named no stack.
    stack = body.get("stack", "")
    return Backup(name, body["kind"], body["host"], parts, size, stack=stack)


def catalog(remote: Remote, *, create: bool = False) -> list[Backup]:
    """Return every backup at the remote, newest first, also those with a fault."""
    sizes = remote.sizes(create=create)
    if any(path.endswith(f"/{MANIFEST}.bin") for path in sizes):
        remedy = "Set BACKUP_PASSWORD. For backups without one, use another path in BACKUP_REMOTE."
        raise WrongPassword(f"{remote.name} holds encrypted backups", remedy)
    names = {path.split("/")[0] for path in sizes}
    names = {name for name in names if ID.fullmatch(name)}
    parsed = {backup.id: backup for backup in map(parse, remote.manifests())} if names else {}
    found = [check(name, parsed.get(name), sizes) for name in sorted(names, reverse=True)]
    return [replace(backup, note=note(backup, remote.stack)) for backup in found]


def note(backup: Backup, stack: str) -> str:
    """Return why a backup does not count for ``stack``; an empty string if it does."""
    if not backup.fault and backup.age_seconds < -AHEAD_SECONDS:
        log(f"{backup.id} does not count: it is from the future; check the clock of {backup.host}")
        return "from the future"
    if backup.stack not in ("", stack):
        return f"of the stack {backup.stack}"
    return ""


def check(name: str, backup: Backup | None, sizes: Mapping[str, int]) -> Backup:
    """Return the backup ``name``, with a fault if its manifest or an object is missing or changed.

    ``sizes`` are the bytes of each object at the remote.
    """
    if f"{name}/{MANIFEST}" not in sizes:
        return Backup(name, fault=INCOMPLETE)
    if backup is None:
        return Backup(name, fault="its manifest cannot be read")
    if backup.fault:
        return backup
    for part in backup.parts.values():
        size = sizes.get(f"{name}/{part.object}")
        if size != part.stored[0]:
            problem = "is missing" if size is None else "has not the size it had"
            fault = f"{part.object} {problem}"
            return replace(backup, fault=fault)
    return backup


def choose(backups: Iterable[Backup], wanted: str, parts: Iterable[str] = ()) -> Backup:
    """Return the backup whose ID starts with ``wanted``, or the newest complete one with ``parts``.

    ``backups`` are newest first. Raises NoSuchBackup, and BackupDamaged for one with a fault.
    """
    needed = set(parts)
    remedy = "List the backups: backup list"
    if wanted in ("", "latest"):
        for backup in backups:
            if backup.counts and needed <= set(backup.parts):
                return backup
        what = ", ".join(sorted(needed)) or "anything"
        raise NoSuchBackup(f"there is no complete backup of {what}", remedy)
    found = [backup for backup in backups if backup.id.startswith(wanted)]
    if len(found) != 1:
        raise NoSuchBackup(f"{len(found)} backups match {wanted}", remedy)
    chosen = found[0]
    if chosen.fault:
        raise BackupDamaged(f"{chosen.id}: {chosen.fault}", "Choose another one: backup list")
    if missing := needed - set(chosen.parts):
        raise NoSuchBackup(f"{chosen.id} does not contain {', '.join(sorted(missing))}", remedy)
    return chosen
