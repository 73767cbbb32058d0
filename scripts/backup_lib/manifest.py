"""A manifest says what a backup consists of. It is written last: without it there is no backup."""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from backup_lib.errors import BackupDamaged, NoSuchBackup, WrongPassword
from backup_lib.remote import Remote

FORMAT = 1
BLOCK = 1 << 16
INCOMPLETE = "incomplete: it has no manifest"
MANIFEST = "manifest.json"
ID = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{6}")
_TIME = "%Y%m%dT%H%M%SZ"


def new_id() -> str:
    """Return an ID: the time, and what tells two hosts apart."""
    return f"{datetime.now(UTC):{_TIME}}-{secrets.token_hex(3)}"


def time_of(backup: str) -> datetime:
    """Return when a backup of this ID was begun."""
    return datetime.strptime(backup[:16], _TIME).replace(tzinfo=UTC)


@dataclass(frozen=True)
class Part:
    """One object: ``stored`` and ``raw`` are its (bytes, SHA-256) compressed and not; ``facts`` what was in it."""

    object: str
    stored: tuple[int, str]
    raw: tuple[int, str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Backup:
    """What is at the remote under one ID; ``fault`` says why it does not count, and is empty when it does."""

    id: str
    kind: str = ""
    host: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    size: int = 0
    fault: str = ""

    @property
    def age_seconds(self) -> float:
        """Return how long ago it was begun."""
        return (datetime.now(UTC) - time_of(self.id)).total_seconds()


def write(backup: Backup) -> bytes:
    """Return a manifest: one line of JSON, with the SHA-256 of itself, and long enough to test a password.

    Of an encrypted object shorter than one of crypt's blocks (64 KiB) rclone says "unexpected EOF" when the password is
    wrong, as it does when the connection is cut.
    """
    parts = {
        name: {"object": part.object, "stored": list(part.stored), "raw": list(part.raw), "facts": part.facts}
        for name, part in backup.parts.items()
    }
    body = {"format": FORMAT, "id": backup.id, "kind": backup.kind, "host": backup.host, "parts": parts}
    return (json.dumps(body | {"sha256": _sum(body)}).ljust(BLOCK) + "\n").encode()


def _sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse(manifest: Mapping[str, Any]) -> Backup:
    """Return the backup that a manifest describes; with a fault when the manifest was changed."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    name = str(body.get("id"))
    if manifest.get("sha256") != _sum(body):
        return Backup(name, fault="its manifest was changed")
    if body["format"] != FORMAT:
        return Backup(name, fault=f"its format {body['format']} is of another version of this program")
    parts = {
        part: Part(said["object"], tuple(said["stored"]), tuple(said["raw"]), said["facts"])
        for part, said in body["parts"].items()
    }
    return Backup(name, body["kind"], body["host"], parts, sum(part.stored[0] for part in parts.values()))


def catalog(remote: Remote, *, create: bool = False) -> list[Backup]:
    """Return every backup at the remote, newest first, those that do not count among them."""
    sizes = remote.sizes(create=create)
    if any(path.endswith(f"/{MANIFEST}.bin") for path in sizes):
        raise WrongPassword(
            f"{remote.name} holds encrypted backups", "Set BACKUP_PASSWORD; without one, use a path of its own."
        )
    names = sorted({path.split("/")[0] for path in sizes if ID.fullmatch(path.split("/")[0])}, reverse=True)
    told = {backup.id: backup for backup in map(parse, remote.manifests())} if names else {}
    return [_judge(name, told.get(name), sizes) for name in names]


def _judge(name: str, told: Backup | None, sizes: Mapping[str, int]) -> Backup:
    if f"{name}/{MANIFEST}" not in sizes:
        return Backup(name, fault=INCOMPLETE)
    if told is None:
        return Backup(name, fault="its manifest cannot be read")
    if told.fault:
        return told
    for part in told.parts.values():
        size = sizes.get(f"{name}/{part.object}")
        if size != part.stored[0]:
            fault = f"{part.object} is missing" if size is None else f"{part.object} has not the size it had"
            return Backup(name, told.kind, told.host, told.parts, told.size, fault)
    return told


def choose(backups: Iterable[Backup], wanted: str, parts: Iterable[str] = ()) -> Backup:
    """Return a backup by its ID or the beginning of it, or the newest one that counts and has these parts.

    Raises NoSuchBackup, and BackupDamaged when the one that was asked for does not count.
    """
    backups, parts = list(backups), set(parts)
    remedy = "backup list says which there are."
    if wanted in ("", "latest"):
        good = [each for each in backups if not each.fault and each.kind == "backup" and parts <= set(each.parts)]
        if not good:
            raise NoSuchBackup(f"there is no complete backup of {', '.join(sorted(parts)) or 'anything'}", remedy)
        return good[0]
    found = [each for each in backups if each.id.startswith(wanted)]
    if len(found) != 1:
        raise NoSuchBackup(f"{len(found)} backups are called {wanted}", remedy)
    if found[0].fault:
        raise BackupDamaged(f"{found[0].id}: {found[0].fault}", "Take another one: backup list.")
    if missing := parts - set(found[0].parts):
        raise NoSuchBackup(f"{found[0].id} holds no {', '.join(sorted(missing))}", remedy)
    return found[0]
