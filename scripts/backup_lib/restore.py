"""Restore: look at everything first, take a safety copy, put the data there, compare, and put back if that fails."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backup_lib import manifest, master, opencode, rdb, run, servers, work
from backup_lib.errors import (
    CopyCorrupt,
    Failure,
    RestoreFailed,
    SafetyCopyNeeded,
    TargetCannotReachUs,
    TargetNotEmpty,
    TargetTooOld,
    TargetTooSmall,
)
from backup_lib.manifest import Backup
from backup_lib.opencode import members
from backup_lib.remote import Remote
from backup_lib.say import say, size
from backup_lib.settings import Settings, place

FOREIGN, VALKEY = 11, 80
"""Valkey went its own way after RDB 11, and numbers its own from 80."""


@dataclass(frozen=True)
class Request:
    """What was asked for; ``to`` are pairs of a part and where it is to go."""

    id: str
    only: tuple[str, ...] = ()
    to: Iterable[tuple[str, str]] = ()
    replace: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Copy:
    """A part's raw copy, here, and what its manifest says of it."""

    part: str
    path: Path
    facts: Mapping[str, Any]


def restore(settings: Settings, request: Request) -> dict[str, Any]:
    """Restore a backup; return what was done. Raises Failure: see errors; the target is then as it was."""
    began = time.monotonic()
    to = dict(request.to)
    there = aim(settings, to)
    remote = Remote(settings)
    wanted = request.only or tuple(to)
    chosen = manifest.choose(manifest.catalog(remote), request.id, wanted or _usual(settings, request))
    parts = [part for part in chosen.parts if part in (wanted or settings.parts)]
    with work.working(settings.work) as scratch:
        say(f"restore {chosen.id}: fetching {', '.join(parts)}")
        copies = fetch(remote, chosen, parts, scratch)
        held = [each.part for each in copies if look(each, there)]
        if held and not request.replace:
            what = ", ".join(where(part, there) for part in held)
            raise TargetNotEmpty(f"{what}: not empty", "Give --replace to replace it; a safety copy is taken first.")
        if request.dry_run:
            say(f"restore {chosen.id}: would replace {', '.join(held) or 'nothing'}, and restore {', '.join(parts)}")
            return {"id": chosen.id, "parts": parts, "replaces": held}
        safety = take_safety(there, held, scratch)
        _put_all(copies, there, scratch, safety)
    seconds = round(time.monotonic() - began, 2)
    say(
        f"restore {chosen.id}: done in {seconds:g} s, compared and equal" + (f"; before it: {safety}" if safety else "")
    )
    return {"id": chosen.id, "parts": parts, "safety": safety, "seconds": seconds}


def _usual(settings: Settings, request: Request) -> tuple[str, ...]:
    return settings.parts if request.id in ("", "latest") else ()


def aim(settings: Settings, to: Mapping[str, str]) -> Settings:
    """Return the settings of the place to restore to. Raises NotConfigured."""
    moved: dict[str, Any] = {}
    placed = {part: place(part, to[part], old) if part in to else old for part, old in settings.servers.items()}
    if "opencode" in to:
        moved["database"] = Path(to["opencode"]).absolute() / opencode.DATABASE
    if "files" in to:
        moved |= {name: Path(to["files"]).absolute() / name for name in ("data", "config", "state")}
    return replace(settings, servers=placed, **moved)


def where(part: str, there: Settings) -> str:
    """Return what messages call the target of a part."""
    if part in there.servers:
        return str(there.servers[part])
    return str(there.database if part == "opencode" else there.data)


def fetch(remote: Remote, backup: Backup, parts: Iterable[str], scratch: Path) -> list[Copy]:
    """Download parts and check them against the manifest. Raises BackupDamaged."""
    chosen = {name: backup.parts[name] for name in parts}
    remote.download(backup.id, [part.object for part in chosen.values()], scratch)
    return [Copy(name, run.unpack(scratch / part.object, part), part.facts) for name, part in chosen.items()]


def look(copied: Copy, there: Settings) -> bool:
    """Say whether the target holds something that would be replaced; raise Failure for what could not be restored."""
    if copied.part in there.servers:
        return _look_at_server(copied, there)
    if copied.part == "opencode":
        opencode.look_at_database(copied.path)
        if not there.database.exists():
            return False
        with opencode.alone(there.database):
            return there.database.stat().st_size > 0
    return any(path.is_file() and path.read_bytes() != content for path, _, content in members(copied.path, there))


def _look_at_server(copied: Copy, there: Settings) -> bool:
    target, facts = there.servers[copied.part], copied.facts
    version = rdb.look(copied.path).version
    master.ready(target)
    with servers.named(target):
        client = servers.connect(target)
        limit = int(servers.info(client, "memory")["maxmemory"])
        if 0 < limit < facts["memory"]:
            what = f"{target} may use {size(limit)}, and this needs {size(facts['memory'])}"
            raise TargetTooSmall(what, "Raise its maxmemory.")
        reads = servers.rdb_version(client)
        modules = servers.versions(client)["modules"]
    remedy = "Nothing was changed. Restore to a server at least as new as the one that was backed up."
    if version > reads or FOREIGN < version < VALKEY <= reads:
        raise TargetTooOld(f"{target} reads RDB {reads}, and this is RDB {version}", remedy)
    for name, number in facts["modules"].items():
        if modules.get(name, -1) < number:
            there_is = f"has {modules[name]}" if name in modules else "has none"
            raise TargetTooOld(f"{target} {there_is} of the module {name}, and this needs {number}", remedy)
    return servers.holds_something(target)


def take_safety(there: Settings, held: list[str], scratch: Path) -> str:
    """Back up what is about to be replaced; return its ID. Its raw copies stay in ``scratch/safety``."""
    if "opencode" in held and opencode.is_damaged(there.database):
        kept = opencode.set_aside(there.database)
        say(f"{there.database} is damaged, and cannot be copied: it is kept as {kept.name}")
        held = [part for part in held if part != "opencode"]
    if not held:
        return ""
    (scratch / "safety").mkdir()
    if there.safety_remote:
        there = replace(there, remote=there.safety_remote)
    made = run.make(there, held, scratch / "safety", kind="safety", create=bool(there.safety_remote))
    return made.id


def _put_all(copies: list[Copy], there: Settings, scratch: Path, safety: str) -> None:
    touched: list[Copy] = []
    try:
        for each in copies:
            touched.append(each)
            say(f"restoring {where(each.part, there)}")
            put(each, there)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "interrupted"
        say(f"that failed ({said}); putting back what was there")
        if isinstance(error, TargetCannotReachUs):
            touched.pop()
        remedy = error.remedy if isinstance(error, Failure) else "Look at its log."
        _put_back(touched, there, scratch, f"{said}; and what was there could not be put back", safety)
        if not isinstance(error, Exception):
            raise
        raise RestoreFailed(f"{said}; the target is as it was before", remedy) from None


def _put_back(touched: list[Copy], there: Settings, scratch: Path, said: str, safety: str) -> None:
    failed = []
    for each in reversed(touched):
        kept = scratch / "safety" / run.OBJECTS[each.part]
        try:
            if kept.exists():
                put(Copy(each.part, kept, {}), there)
                if each.part == "files":
                    before = {path for path, _, _ in members(kept, there)}
                    for path in {path for path, _, _ in members(each.path, there)} - before:
                        path.unlink(missing_ok=True)
            else:
                empty(each, there)
        except Exception as error:  # noqa: BLE001 -- the others are put back all the same
            failed.append(f"{where(each.part, there)} ({type(error).__name__}: {error})")
    if failed:
        remedy = f"When it is well again: backup restore {safety} --replace" if safety else "It was empty before."
        raise SafetyCopyNeeded(f"{said}: {', '.join(failed)}", remedy)


def put(copied: Copy, there: Settings) -> None:
    """Put a part there, and compare. A copy without facts is a safety copy: it is put, and not compared."""
    if copied.part in there.servers:
        target = there.servers[copied.part]
        with master.replicating(target, copied.path, there):
            if copied.facts:
                with servers.named(target):
                    client = servers.connect(target)
                    found = servers.contents(target) | {"keys": servers.keys(client)}
                    compare(copied.facts, found, servers.versions(client), target)
    elif copied.part == "opencode":
        opencode.put_database(copied.path, there.database)
        if not opencode.same_pages(copied.path, there.database):
            raise CopyCorrupt(f"{there.database} is not what was put there", "Look at its disk.")
    else:
        for path, entry, content in members(copied.path, there):
            opencode.put_file(path, entry.mode, content)
            if path.read_bytes() != content:
                raise CopyCorrupt(f"{path} is not what was put there", "Look at its disk.")


def empty(copied: Copy, there: Settings) -> None:
    """Make a target as empty as it was before."""
    if copied.part in there.servers:
        with servers.named(there.servers[copied.part]):
            servers.connect(there.servers[copied.part]).execute_command("FLUSHALL")
    elif copied.part == "opencode":
        opencode.put_aside_back(there.database)
    else:
        for path, _, _ in members(copied.path, there):
            path.unlink(missing_ok=True)


def compare(facts: Mapping[str, Any], found: Mapping[str, Any], now: Mapping[str, Any], target: object) -> None:
    """Compare what a server holds with what was copied. Raises CopyCorrupt.

    Digests are of what a server answers, which other versions may word differently: then only counts are compared. A
    copy that was made under writes has no exact contents: then keys are compared, where the RDB tells how many.
    """
    remedy = "What was there before is put back. Restore another backup, and keep this one to be looked at."
    same = (facts["version"], facts["modules"]) == (now["version"], now["modules"])
    if facts["exact"]:
        told, holds = _comparable(facts["contents"], digests=same), _comparable(found, digests=same)
        if told != holds:
            differ = [key for key in told.keys() | holds.keys() if told.get(key) != holds.get(key)]
            key = min(differ)
            raise CopyCorrupt(f"{target}: {key} is {holds.get(key)} and was {told.get(key)}", remedy)
        return
    missing = set(facts["contents"]["graphs"]) - set(found["graphs"])
    if missing:
        say(f"{target}: it was written to while it was copied; not in this copy: {', '.join(sorted(missing))}")
    if facts["first"] and not facts["contents"]["graphs"]:  # a big graph takes further keys, while it is saved
        number, keys = facts["first"]
        # As a replica it has not yet removed what has expired since, so this is exact.
        if (here := found["keys"].get(number, 0)) != keys:
            raise CopyCorrupt(f"{target}: {here} keys, and the copy has {keys}", remedy)


def _comparable(contents: Mapping[str, Any], *, digests: bool) -> dict[str, Any]:
    """Return a flat mapping without what may rightly differ: keys that expire, and digests of other versions."""
    dropped = {"expiring"} if digests else {"expiring", "digest"}
    flat = {}
    for kind in ("databases", "graphs"):
        for name, said in contents[kind].items():
            kept = {key: value for key, value in said.items() if key not in dropped}
            if kind == "graphs" or said["keys"]:
                flat[f"{kind} {name}"] = kept
    return flat
