"""OpenCode's state: its database, which may be in use, and its files."""

import contextlib
import io
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lib.backup.errors import (
    CopyCorrupt,
    NothingToCopy,
    RestoreFailed,
    ServerUnreachable,
    TargetInUse,
)
from lib.backup.settings import Settings

DATABASE = "opencode.db"
SUFFIXES = (
    "",
    "-wal",
    "-shm",
    "-journal",
)
SECONDS = 30.0
SKIPPED = frozenset(
    {
        "bin",
        "cache",
        "log",
        "node_modules",
        "package.json",
        "package-lock.json",
        "snapshot",
        "tool-output",
    }
)
"""Entries of each directory that OpenCode creates again, or that are the image's own."""


def read_only(path: Path, *, immutable: bool = False) -> contextlib.closing[sqlite3.Connection]:
    """Open a database for reading; ``immutable`` for one that nobody else has open."""
    mode = "immutable=1" if immutable else "mode=ro"
    uri = f"file:{quote(str(path.absolute()))}?{mode}"
    return contextlib.closing(sqlite3.connect(uri, uri=True, timeout=SECONDS))


def copy_database(source: Path, target: Path) -> dict[str, Any]:
    """Copy a database as of one moment, check it, and return the facts for the manifest.

    Raises NothingToCopy, CopyCorrupt, and ServerUnreachable when it stays locked.
    """
    if not source.is_file():
        remedy = f"Mount the server's volume at {source.parent}, or set BACKUP_PARTS without it."
        raise NothingToCopy(f"{source} does not exist", remedy)
    try:
        with read_only(source) as live, contextlib.closing(sqlite3.connect(target)) as copied:
            live.backup(copied)  # in one step: a read lock, and in WAL mode writers go on
        return inspect_database(target)
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise OSError(28, "No space left on device") from None
        remedy = "Check which process has it locked, and run it again."
        raise ServerUnreachable(f"{source}: {error}", remedy) from None
    except sqlite3.DatabaseError as error:
        remedy = "The database is damaged. Run: backup restore --only opencode --replace"
        raise CopyCorrupt(f"{source}: {error}", remedy) from None


def inspect_database(path: Path) -> dict[str, Any]:
    """Return version and rows of a database that nobody else has open. Raises CopyCorrupt."""
    with read_only(path, immutable=True) as database:
        result = database.execute("PRAGMA integrity_check").fetchone()[0]
        if result != "ok":
            remedy = "Check the database that it was copied from."
            raise CopyCorrupt(f"{path.name} fails its integrity check: {result}", remedy)
        query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        rows = {}
        for (table,) in database.execute(query).fetchall():
            name = table.replace('"', '""')
            count = database.execute(f'SELECT count(*) FROM "{name}"').fetchone()  # noqa: S608
            rows[table] = int(count[0])
        version = database.execute("PRAGMA user_version").fetchone()[0]
        return {"sqlite": sqlite3.sqlite_version, "user_version": version, "rows": rows}


def is_damaged(path: Path) -> bool:
    """Return whether a file is not a database, or fails its integrity check."""
    try:
        with read_only(path) as database:
            return bool(database.execute("PRAGMA integrity_check").fetchone() != ("ok",))
    except sqlite3.DatabaseError:
        return True


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database that nobody else has open. Raises TargetInUse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        try:
            # In WAL mode, each process that has it open holds a shared lock that excludes this one.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("BEGIN EXCLUSIVE")
            database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            remedy = "Stop the server that uses it, and run it again."
            raise TargetInUse(f"{path} is in use ({error})", remedy) from None
        except sqlite3.DatabaseError:
            pass  # damaged: a restore replaces it
        yield database


def put_database(source: Path, target: Path) -> None:
    """Overwrite a database in one transaction. Raises TargetInUse, RestoreFailed."""
    try:
        with read_only(source, immutable=True) as copied, exclusive(target) as database:
            copied.backup(database)
    except sqlite3.DatabaseError as error:
        remedy = "Check its directory and disk, and run it again."
        raise RestoreFailed(f"{target}: {error}", remedy) from None


def roots(settings: Settings) -> dict[str, Path]:
    """Return OpenCode's directories by their name in the archive."""
    return {"data": settings.data, "config": settings.config, "state": settings.state}


def copy_files(settings: Settings, target: Path) -> dict[str, Any]:
    """Archive the regular files of OpenCode's directories, except the database and SKIPPED."""
    count = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for root, directory in roots(settings).items():
            # On a read-only root the configuration is the image's: the next image brings its own.
            if root == "config" and not os.access(directory, os.W_OK):
                continue
            for path in sorted(files_in(directory)):
                with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                    data = path.read_bytes()
                    status = path.stat()
                    entry = tarfile.TarInfo(f"{root}/{path.relative_to(directory)}")
                    entry.size = len(data)
                    entry.mode = status.st_mode & 0o777
                    entry.mtime = int(status.st_mtime)
                    archive.addfile(entry, io.BytesIO(data))
                    count += 1
    return {"files": count}


def files_in(directory: Path) -> Iterator[Path]:
    """Yield the files to back up."""
    for where, folders, names in os.walk(directory):
        top = Path(where) == directory
        if top:
            folders[:] = [name for name in folders if name not in SKIPPED]
        for name in names:
            path = Path(where, name)
            skipped = top and (name in SKIPPED or name.startswith(DATABASE))
            if path.is_file() and not path.is_symlink() and not skipped:
                yield path


def members(archive: Path, settings: Settings) -> Iterator[tuple[Path, int, bytes]]:
    """Yield the target path, mode and content of each file in an archive. Raises CopyCorrupt."""
    remedy = "Choose another backup: backup list"
    try:
        with tarfile.open(archive) as files:
            for entry in files:
                root, _, rest = entry.name.partition("/")
                directory = roots(settings).get(root)
                content = files.extractfile(entry) if entry.isfile() else None
                if not (directory and content and rest) or ".." in rest.split("/"):
                    what = f"{archive.name}: unexpected entry {entry.name}"
                    raise CopyCorrupt(what, remedy)
                yield directory / rest, entry.mode, content.read()
    except tarfile.TarError as error:
        raise CopyCorrupt(f"{archive.name}: {error}", remedy) from None


def put_file(path: Path, mode: int, content: bytes) -> None:
    """Write a file completely, or leave it as it is."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(prefix=".restore-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def move_aside(database: Path) -> Path:
    """Rename a damaged database and its companion files; return the new name."""
    aside = database.with_name(f"{database.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    rename(database, aside)
    return aside


def rename(database: Path, to: Path) -> None:
    """Rename a database and its companion files."""
    for suffix in SUFFIXES:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{database}{suffix}").replace(f"{to}{suffix}")


def remove(database: Path) -> None:
    """Remove a database and its companion files."""
    for suffix in SUFFIXES:
        Path(f"{database}{suffix}").unlink(missing_ok=True)
