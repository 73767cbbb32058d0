"""Make a backup: copy, check, compress, upload, read back, and write the manifest last."""

import gzip
import hashlib
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib.backup import manifest, opencode_source, work
from lib.backup.console import log, size
from lib.backup.errors import BackupDamaged, Failure, UploadDamaged, full_disk, is_full
from lib.backup.manifest import MANIFEST, Backup, Part
from lib.backup.remote import Remote
from lib.backup.settings import Settings

CHUNK = 1 << 20
PACKED = "packed"
OBJECTS = {
    "falkordb": "falkordb.rdb",
    "valkey": "valkey.rdb",
    "opencode": "opencode.db",
    "files": "files.tar",
}
"""The file name of each part's copy."""


def backup(
    settings: Settings, parts: Iterable[str], *, create: bool = False, dry_run: bool = False
) -> Backup | None:
    """Make a backup of the parts and record how it ended; return it, or None for a dry run."""
    parts = list(parts)
    if dry_run:
        existing = manifest.catalog(Remote(settings), create=create)
        log(f"would copy {', '.join(parts)} to {settings.remote}, beside {len(existing)} backups")
        return None
    began = time.time()
    made = None
    outcome: dict[str, Any] = {
        "ok": True,
        "began": began,
        "error": "",
        "output": "",
    }
    with work.working(settings.work) as scratch:
        try:
            made = make(settings, parts, scratch, create=create)
            outcome |= {"id": made.id, "size": made.size}
        except BaseException as error:
            output = str(error) if isinstance(error, Failure) else ""
            outcome |= {"ok": False, "error": type(error).__name__, "output": output}
            raise
        finally:
            outcome["seconds"] = round(time.time() - began, 2)
            shutil.rmtree(scratch, ignore_errors=True)  # makes room for the record on a full disk
            work.record(settings.work, outcome)
    return made


def make(
    settings: Settings,
    parts: Iterable[str],
    scratch: Path,
    *,
    kind: str = "backup",
    create: bool = False,
) -> Backup:
    """Copy the parts into ``scratch``, where the raw copies stay, and upload them.

    Raises the Failures of errors.py. An upload that fails is removed.
    """
    remote = Remote(settings)
    manifest.catalog(remote, create=create)  # fails early on a wrong remote, key or password
    backup_id = manifest.new_id()
    name = f"{kind} {backup_id}"
    log(f"{name}: copying {', '.join(parts)}")
    try:
        copies = copy_all(settings, parts, scratch)
    except OSError as error:
        if is_full(error):
            raise full_disk(str(settings.work)) from None
        raise
    total = sum(part.stored[0] for part in copies.values())
    result = Backup(backup_id, kind, settings.host, copies, total, stack=settings.stack)
    log(f"{name}: uploading {size(total)}")
    try:
        upload(remote, result, scratch)
    except BaseException:
        log(f"{name}: failed, removing what was uploaded")
        with suppress(Failure):
            remote.remove(backup_id)
        raise
    log(f"{name}: complete, {size(total)}, verified")
    return result


def copy_all(settings: Settings, parts: Iterable[str], scratch: Path) -> dict[str, Part]:
    """Copy and compress the parts, side by side: a server may wait seconds before it starts."""
    (scratch / PACKED).mkdir()

    def one(part: str) -> Part:
        raw = scratch / OBJECTS[part]
        facts = copy(part, settings, raw)
        packed = pack(raw)
        return Part(packed.name, digest(packed), digest(raw), facts)

    with ThreadPoolExecutor() as pool:
        return dict(zip(parts, pool.map(one, parts), strict=True))


def upload(remote: Remote, made: Backup, scratch: Path) -> None:
    """Upload a backup, read it back, and write its manifest. Raises UploadDamaged."""
    remote.upload(scratch / PACKED, made.id)
    shutil.rmtree(scratch / PACKED)
    sent = {part.object: part.stored[1] for part in made.parts.values()}
    written = manifest.write(made)
    path = f"{made.id}/{MANIFEST}"
    remedy = "Run it again. If it repeats, check the remote's storage."
    if remote.digests(made.id) != sent:
        raise UploadDamaged("an object differs from what was uploaded", remedy)
    remote.write(path, written)
    if remote.read(path) != written:
        raise UploadDamaged(f"{MANIFEST} differs from what was uploaded", remedy)


def copy(part: str, settings: Settings, target: Path) -> dict[str, Any]:
    """Copy one part to ``target`` and check it; return the facts for the manifest."""
    if part in settings.servers:
        from lib.backup import snapshot  # redis-py takes 0.2 s to import

        return snapshot.copy(settings.servers[part], target, settings)
    if part == "opencode":
        return opencode_source.copy_database(settings.database, target)
    return opencode_source.copy_files(settings, target)


def pack(raw: Path) -> Path:
    """Compress a file and return the result. Equal files give equal results."""
    packed = raw.parent / PACKED / f"{raw.name}.gz"
    with (
        raw.open("rb") as source,
        packed.open("wb") as target,
        # An RDB file is compressed already: higher levels take longer for nothing.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=target, mtime=0) as compressor,
    ):
        shutil.copyfileobj(source, compressor, CHUNK)
    return packed


def unpack(packed: Path, part: Part) -> Path:
    """Decompress a downloaded object and return the file. Raises BackupDamaged."""
    remedy = "Nothing was changed. Choose an older backup: backup list"
    if not packed.exists() or digest(packed) != part.stored:
        raise BackupDamaged(f"{part.object} is not what was uploaded", remedy)
    raw = packed.with_suffix("")
    with gzip.open(packed) as source, raw.open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK)
    packed.unlink()
    if digest(raw) != part.raw:
        raise BackupDamaged(f"{part.object} is not what was copied", remedy)
    return raw


def digest(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
