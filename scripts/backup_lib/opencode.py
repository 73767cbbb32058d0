"""OpenCode's state: its database, while it is being written to, and its files."""

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

from backup_lib.errors import CopyCorrupt, NothingToCopy, RestoreFailed, ServerUnreachable, TargetInUse
from backup_lib.settings import Settings

DATABASE = "opencode.db"
SECONDS = 30.0
SKIPPED = frozenset(
    {"bin", "cache", "log", "node_modules", "package.json", "package-lock.json", "snapshot", "tool-output"}
)
"""What OpenCode makes anew, and the image's own: at the top of each directory."""


def read_only(path: Path, *, immutable: bool = False) -> sqlite3.Connection:
    """Open a database that is to stay as it is; an ``immutable`` one is nobody else's, and gets no -wal beside it."""
    mode = "immutable=1" if immutable else "mode=ro"
    name = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{name}?{mode}", uri=True, timeout=SECONDS)


def copy_database(source: Path, target: Path) -> dict[str, Any]:
    """Copy a database that may be written to meanwhile, as of one moment; check it; return facts for the manifest.

    Raises NothingToCopy, CopyCorrupt, and ServerUnreachable when it stays locked.
    """
    if not source.is_file():
        remedy = "Mount the server's volume at ~/.local/share/opencode, or leave opencode out of BACKUP_PARTS."
        raise NothingToCopy(f"{source} is not there", remedy)
    try:
        with contextlib.closing(read_only(source)) as live, contextlib.closing(sqlite3.connect(target)) as copied:
            live.backup(copied)  # in one step: it holds a read lock, and in WAL mode writers go on
        return look_at_database(target)
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise OSError(28, "No space left on device") from None
        raise ServerUnreachable(f"{source}: {error}", "Look who has it locked, and try again.") from None
    except sqlite3.DatabaseError as error:
        raise CopyCorrupt(f"{source}: {error}", "The database itself is damaged: restore it.") from None


def look_at_database(path: Path) -> dict[str, Any]:
    """Return what is in a database that nobody else has open. Raises CopyCorrupt."""
    with contextlib.closing(read_only(path, immutable=True)) as database:
        said = [row[0] for row in database.execute("PRAGMA integrity_check")]
        if said != ["ok"]:
            raise CopyCorrupt(f"{path.name} fails its integrity check: {said[0]}", "Look at the database it is of.")
        return {"sqlite": sqlite3.sqlite_version, "user_version": _one(database, "PRAGMA user_version"),
                "rows": rows(database)}  # fmt: skip


def is_damaged(path: Path) -> bool:
    """Say whether a database fails its integrity check, or is none."""
    try:
        with contextlib.closing(read_only(path)) as database:
            return bool(database.execute("PRAGMA integrity_check").fetchone() != ("ok",))
    except sqlite3.DatabaseError:
        return True


def rows(database: sqlite3.Connection) -> dict[str, int]:
    """Return how many rows each table has."""
    tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    quoted = {table: table.replace('"', '""') for table in tables}
    return {table: _one(database, f'SELECT count(*) FROM "{name}"') for table, name in quoted.items()}  # noqa: S608


def _one(database: sqlite3.Connection, query: str) -> int:
    return int(database.execute(query).fetchone()[0])


@contextlib.contextmanager
def alone(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database to be overwritten, so that nobody else has it open. Raises TargetInUse when somebody does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        try:
            # In WAL mode everyone who has it open holds a shared lock, which this one cannot be had beside.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("BEGIN EXCLUSIVE")
            database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            remedy = "Stop the server that uses it; restoring under it would mix two states."
            raise TargetInUse(f"{path} is in use ({error})", remedy) from None
        except sqlite3.DatabaseError:
            pass  # it is damaged: overwriting it is what a restore is for
        yield database


def put_database(source: Path, target: Path) -> None:
    """Overwrite a database with another. SQLite does it in one transaction: cut short, the old one is there still."""
    try:
        with contextlib.closing(read_only(source, immutable=True)) as copied, alone(target) as database:
            copied.backup(database)
    except sqlite3.DatabaseError as error:
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(read_only(target)) as damaged:
            damaged.execute("SELECT count(*) FROM sqlite_master")
            raise RestoreFailed(f"{target}: {error}", "Look at its directory and disk, and try again.") from None
        # What is there is no database; SQLite will not write into it. A new file takes its place.
        _replace_database(source, target)


def _replace_database(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=target.parent) as scratch:
        draft = Path(scratch) / DATABASE
        put_database(source, draft)
        for suffix in ("-wal", "-shm", "-journal"):
            target.with_name(target.name + suffix).unlink(missing_ok=True)
        draft.replace(target)


def roots(settings: Settings) -> dict[str, Path]:
    """Return the directories whose files are kept, by the name that they have in the archive."""
    return {"data": settings.data, "config": settings.config, "state": settings.state}


def copy_files(settings: Settings, target: Path) -> dict[str, Any]:
    """Archive the regular files of OpenCode's directories, the database and what is made anew left out."""
    names = []
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for root, directory in roots(settings).items():
            # On a read-only root the configuration is the image's, and the next image brings its own.
            if root == "config" and not os.access(directory, os.W_OK):
                continue
            for path in sorted(_files(directory)):
                name = f"{root}/{path.relative_to(directory)}"
                with contextlib.suppress(FileNotFoundError):  # it was removed just now
                    data = path.read_bytes()
                    entry = tarfile.TarInfo(name)
                    seen = path.stat()
                    entry.size, entry.mode, entry.mtime = len(data), seen.st_mode & 0o777, int(seen.st_mtime)
                    archive.addfile(entry, io.BytesIO(data))
                    names.append(name)
    return {"files": len(names)}


def _files(directory: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(directory):
        top = Path(where) == directory
        folders[:] = [name for name in folders if not (top and name in SKIPPED)]
        for name in names:
            path = Path(where) / name
            if path.is_symlink() or not path.is_file() or (top and (name in SKIPPED or name.startswith(DATABASE))):
                continue
            yield path


def members(archive: Path, settings: Settings) -> Iterator[tuple[Path, tarfile.TarInfo, bytes]]:
    """Yield where each file of an archive belongs, what it is and its content. Raises CopyCorrupt."""
    try:
        with tarfile.open(archive) as files:
            for entry in files:
                root, _, rest = entry.name.partition("/")
                content = files.extractfile(entry)
                if (
                    not entry.isfile()
                    or root not in roots(settings)
                    or ".." in rest.split("/")
                    or not rest
                    or not content
                ):
                    raise CopyCorrupt(f"{archive.name}: {entry.name} does not belong there", "Take another backup.")
                yield roots(settings)[root] / rest, entry, content.read()
    except tarfile.TarError as error:
        raise CopyCorrupt(f"{archive.name}: {error}", "Take another backup.") from None


def put_file(path: Path, mode: int, content: bytes) -> None:
    """Write a file whole or not at all."""
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


def same_pages(one: Path, other: Path) -> bool:
    """Say whether two databases hold the same: all but the 100 bytes of their headers, which count changes."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(100)
        right.seek(100)
        while data := left.read(1 << 20):
            if right.read(len(data)) != data:
                return False
    return True


SUFFIXES = ("", "-wal", "-shm", "-journal")


def set_aside(database: Path) -> Path:
    """Move a damaged database and what belongs to it out of the way; return its new name."""
    kept = database.with_name(f"{database.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    for suffix in SUFFIXES:
        with contextlib.suppress(FileNotFoundError):
            database.with_name(database.name + suffix).replace(f"{kept}{suffix}")
    return kept


def put_aside_back(database: Path, kept: Path | None) -> None:
    """Remove a database, and have back what was set aside for it."""
    for suffix in SUFFIXES:
        database.with_name(database.name + suffix).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if kept:
                Path(f"{kept}{suffix}").replace(database.with_name(database.name + suffix))
