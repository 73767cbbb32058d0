"""Make a backup: copy, check, compress, upload, read back, and only then write the manifest that makes it count."""

import gzip
import hashlib
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from backup_lib import manifest, opencode, work
from backup_lib.errors import BackupDamaged, Failure, UploadDamaged, full_disk, is_full
from backup_lib.manifest import MANIFEST, Backup, Part
from backup_lib.remote import Remote
from backup_lib.say import say, size
from backup_lib.settings import Settings

CHUNK = 1 << 20
PACKED = "packed"
OBJECTS = {"falkordb": "falkordb.rdb", "valkey": "valkey.rdb", "opencode": "opencode.db", "files": "files.tar"}


def backup(settings: Settings, parts: Iterable[str], *, create: bool = False, dry_run: bool = False) -> Backup | None:
    """Make a backup of these parts; return it, or None when it was a dry run. How it ended is remembered."""
    parts = list(parts)
    if dry_run:
        existing = manifest.catalog(Remote(settings), create=create)
        say(f"would copy {', '.join(parts)} to {settings.remote}, beside {len(existing)} backups")
        return None
    began = time.time()
    failed: BaseException | None = None
    made = None
    with work.working(settings.work) as scratch:
        try:
            made = make(settings, parts, scratch, create=create)
        except BaseException as error:
            failed = error
            raise
        finally:
            outcome = {
                "ok": failed is None,
                "began": began,
                "seconds": round(time.time() - began, 2),
                "error": type(failed).__name__ if failed else "",
                "said": str(failed) if isinstance(failed, Failure) else "",
                "id": made.id if made else "",
                "size": made.size if made else 0,
            }
            shutil.rmtree(scratch, ignore_errors=True)  # on a full disk it needs that room
            work.remember(settings.work, outcome)
    return made


def make(
    settings: Settings, parts: Iterable[str], scratch: Path, *, kind: str = "backup", create: bool = False
) -> Backup:
    """Copy the parts into ``scratch``, whose raw copies stay there, and upload them. Raises Failure; see errors."""
    remote = Remote(settings)
    manifest.catalog(remote, create=create)  # is it there, does it let us in, is the password that of the others?
    backup_id = manifest.new_id()
    say(f"{kind} {backup_id}: copying {', '.join(parts)}")
    (scratch / PACKED).mkdir()
    try:
        with ThreadPoolExecutor() as pool:  # a server waits five seconds before it begins; they may do so together
            facts = dict(zip(parts, pool.map(lambda part: copy(part, settings, scratch), parts), strict=True))
            packed = dict(zip(parts, pool.map(lambda part: pack(scratch / OBJECTS[part]), parts), strict=True))
        made = {part: Part(f"{OBJECTS[part]}.gz", stored, raw, facts[part]) for part, (stored, raw) in packed.items()}
    except OSError as error:
        if is_full(error):
            raise full_disk(str(settings.work)) from None
        raise
    try:
        told = ", ".join(f"{part.object} {size(part.stored[0])}" for part in made.values())
        say(f"{kind} {backup_id}: uploading {told}")
        remote.upload(scratch / PACKED, backup_id)
        shutil.rmtree(scratch / PACKED)
        _equal("an object", {part.object: part.stored[1] for part in made.values()}, remote.digests(backup_id))
        result = Backup(backup_id, kind, settings.host, made, sum(part.stored[0] for part in made.values()))
        written = manifest.write(result)
        remote.write(f"{backup_id}/{MANIFEST}", written)
        _equal(MANIFEST, written, remote.read(f"{backup_id}/{MANIFEST}"))
    except BaseException:
        say(f"{kind} {backup_id}: failed; what is there of it does not count, and is removed")
        with suppress(Failure):
            remote.remove(backup_id)
        raise
    say(f"{kind} {backup_id}: complete, {size(result.size)}, read back and equal")
    return result


def _equal(name: str, sent: object, read: object) -> None:
    if sent != read:
        raise UploadDamaged(f"{name} came back changed", "Try again; then look at the remote itself.")


def copy(part: str, settings: Settings, scratch: Path) -> dict[str, Any]:
    """Copy one part into ``scratch`` and check it; return the facts for the manifest."""
    target = scratch / OBJECTS[part]
    if part in settings.servers:
        from backup_lib import servers  # redis-py and NumPy take a third of a second to import

        return servers.copy(settings.servers[part], target, settings)
    if part == "opencode":
        return opencode.copy_database(settings.database, target)
    return opencode.copy_files(settings, target)


def pack(raw: Path) -> tuple[tuple[int, str], tuple[int, str]]:
    """Compress a file; return (bytes, SHA-256) of the result and of the file. Equal files pack equal."""
    packed = raw.parent / PACKED / f"{raw.name}.gz"
    with (
        raw.open("rb") as source,
        packed.open("wb") as target,
        # An RDB is compressed already: higher levels take longer and win nothing.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=target, mtime=0) as compressor,
    ):
        shutil.copyfileobj(source, compressor, CHUNK)
    return digest(packed), digest(raw)


def digest(path: Path) -> tuple[int, str]:
    """Return the bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def unpack(packed: Path, part: Part) -> Path:
    """Decompress a file beside itself and return it. Raises BackupDamaged when one is not what the manifest says."""
    remedy = "Nothing was changed. Take an older one: backup list."
    if not packed.exists() or digest(packed) != part.stored:
        raise BackupDamaged(f"{part.object} is not what was uploaded", remedy)
    raw = packed.with_suffix("")
    with gzip.open(packed) as source, raw.open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK)
    packed.unlink()
    if digest(raw) != part.raw:
        raise BackupDamaged(f"{part.object} does not hold what was copied", remedy)
    return raw
