"""What a restore writes to: a server, OpenCode's database, OpenCode's files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lib.backup import opencode_source, rdb, redis_source, replication
from lib.backup.console import log, size
from lib.backup.errors import CopyCorrupt, TargetTooOld, TargetTooSmall
from lib.backup.settings import Settings
from lib.common.databases import Database

LAST_SHARED, FIRST_OF_VALKEY = 11, 80
"""RDB versions: Valkey forked after 11, and counts its own from 80."""


@dataclass(frozen=True)
class Copy:
    """The raw copy of a part, and the facts of its manifest; a safety copy has none."""

    part: str
    path: Path
    facts: Mapping[str, Any]


class Target(Protocol):
    """Where one part is restored to; ``str`` is its name in messages."""

    def check(self, copy: Copy) -> bool:
        """Return whether there is data that would be replaced. Raises Failure if unsuitable."""

    def put(self, copy: Copy) -> None:
        """Restore and compare. Raises Failure."""

    def changed(self) -> bool:
        """Return whether a failed ``put`` may have changed the content."""
        return True

    def clear(self, copy: Copy, safety: Path | None) -> None:
        """Undo ``put`` when there was nothing to save, or remove what ``safety`` does not hold."""


@dataclass(frozen=True)
class ServerTarget(Target):
    """FalkorDB or Valkey."""

    server: Database
    settings: Settings

    def __str__(self) -> str:
        """Return the part and the address."""
        return redis_source.title(self.server)

    def check(self, copy: Copy) -> bool:
        """Return whether there are keys. Raises TargetInUse, TargetTooSmall, TargetTooOld."""
        version = rdb.check(copy.path)
        replication.ensure_master(self.server)
        with redis_source.unreachable(self.server):
            client = redis_source.connect(self.server)
            limit = int(redis_source.info(client, "memory")["maxmemory"])
            newest = redis_source.rdb_version(client)
            modules = redis_source.versions(client)["modules"]
            held = redis_source.holds_data(self.server)
        needed = copy.facts["memory"]
        if 0 < limit < needed:
            what = f"{self} has a maxmemory of {size(limit)}, and the data needs {size(needed)}"
            raise TargetTooSmall(what, "Raise its maxmemory.")
        remedy = "Nothing was changed. Restore to a server of the same kind, at least as new."
        if not readable(version, newest):
            what = f"{self} reads RDB {newest}, and this is RDB {version}"
            raise TargetTooOld(what, remedy)
        for name, number in copy.facts["modules"].items():
            # Until 2026-11, manifests named lua, which is part of Valkey 9 and has no data.
            if name != "lua" and modules.get(name, -1) < number:
                has = f"has {modules[name]}" if name in modules else "has none"
                what = f"{self} {has} of the module {name}, and this needs {number}"
                raise TargetTooOld(what, remedy)
        return held

    def put(self, copy: Copy) -> None:
        """Load the RDB file and compare the content with the facts. Raises Failure."""
        with replication.replicating(self.server, copy.path, self.settings):
            if copy.facts:
                with redis_source.unreachable(self.server):
                    self.compare(copy.facts)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Compare the content with the facts. Raises CopyCorrupt.

        A copy that was made during writes has no exact contents: only the graphs' names are
        compared. Digests are compared between equal versions, since others may reply differently.
        """
        expected = facts["contents"]
        found = redis_source.contents(self.server, expected)
        if not facts["exact"]:
            if missing := expected["graphs"].keys() - found["graphs"].keys():
                names = ", ".join(sorted(missing))
                log(f"{self}: written to during the copy; not in this copy: {names}")
            return
        now = redis_source.versions(redis_source.connect(self.server))
        same = all(facts[name] == now[name] for name in ("kind", "version"))
        wanted, actual = (comparable(each, samples=same) for each in (expected, found))
        for name in sorted(wanted.keys() | actual.keys()):
            if wanted.get(name) != actual.get(name):
                what = f"{self}: {name} is {actual.get(name)}, expected {wanted.get(name)}"
                remedy = "The previous content is restored. Choose another backup: backup list"
                raise CopyCorrupt(what, remedy)

    def changed(self) -> bool:
        """Return whether the marker that was set before the transfer is gone; remove it."""
        with redis_source.unreachable(self.server):
            return not redis_source.connect(self.server).delete(redis_source.MARKER)

    def clear(self, _copy: Copy, safety: Path | None) -> None:
        """Remove all keys."""
        if not safety:
            with redis_source.unreachable(self.server):
                redis_source.connect(self.server).flushall()


def readable(version: int, newest: int) -> bool:
    """Return whether a server that writes RDB version ``newest`` loads one of ``version``."""
    return version <= newest and not LAST_SHARED < version < FIRST_OF_VALKEY <= newest


def comparable(contents: Mapping[str, Any], *, samples: bool) -> dict[str, Any]:
    """Return the counts, and the samples if wanted, as a flat mapping."""
    # Until 2026-11, manifests had a digest of all keys, and databases in which all keys expire.
    dropped = {"expiring", "digest"} if samples else {"expiring", "digest", "sample"}
    flat = {}
    for kind in ("databases", "graphs"):
        for name, counts in contents[kind].items():
            if counts.get("keys") != 0:
                kept = {key: value for key, value in counts.items() if key not in dropped}
                flat[f"{kind} {name}"] = kept
    return flat


@dataclass(frozen=True)
class DatabaseTarget(Target):
    """OpenCode's database."""

    database: Path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.database)

    def check(self, copy: Copy) -> bool:
        """Return whether the database has content. Raises CopyCorrupt, TargetInUse."""
        opencode_source.inspect_database(copy.path)
        if not self.database.exists():
            return False
        with opencode_source.exclusive(self.database):
            return self.database.stat().st_size > 0

    def put(self, copy: Copy) -> None:
        """Overwrite the database and compare its rows. Raises Failure."""
        opencode_source.put_database(copy.path, self.database)
        restored = opencode_source.inspect_database(self.database)
        if restored != opencode_source.inspect_database(copy.path):
            raise CopyCorrupt(f"{self} differs from the copy", "Check its disk.")

    def clear(self, _copy: Copy, safety: Path | None) -> None:
        """Remove the database."""
        if not safety:
            opencode_source.remove(self.database)


@dataclass(frozen=True)
class FilesTarget(Target):
    """OpenCode's files."""

    settings: Settings

    def __str__(self) -> str:
        """Return the path of the data directory."""
        return str(self.settings.data)

    def check(self, copy: Copy) -> bool:
        """Return whether a file exists with another content. Raises CopyCorrupt."""
        changed = False
        for path, _, content in opencode_source.members(copy.path, self.settings):
            if path.is_file() and path.read_bytes() != content:
                changed = True
        return changed

    def put(self, copy: Copy) -> None:
        """Write the files and compare them. Raises Failure."""
        for path, mode, content in opencode_source.members(copy.path, self.settings):
            opencode_source.put_file(path, mode, content)
            if path.read_bytes() != content:
                raise CopyCorrupt(f"{path} differs from the copy", "Check its disk.")

    def clear(self, copy: Copy, safety: Path | None) -> None:
        """Remove the files of the copy that the safety copy does not hold."""
        kept = set()
        if safety:
            kept = {path for path, _, _ in opencode_source.members(safety, self.settings)}
        for path, _, _ in opencode_source.members(copy.path, self.settings):
            if path not in kept:
                path.unlink(missing_ok=True)


def target_for(part: str, settings: Settings) -> Target:
    """Return the target of a part."""
    if part in settings.servers:
        return ServerTarget(settings.servers[part], settings)
    return DatabaseTarget(settings.database) if part == "opencode" else FilesTarget(settings)
