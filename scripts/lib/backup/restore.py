"""Restore: check everything, take a safety backup, restore, compare, and roll back on failure."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.backup import create, manifest, opencode_source, work
from lib.backup.console import log
from lib.backup.errors import (
    Failure,
    RestoreFailed,
    SafetyCopyNeeded,
    TargetNotEmpty,
)
from lib.backup.manifest import Backup
from lib.backup.remote import Remote
from lib.backup.settings import Settings, server_at
from lib.backup.targets import Copy, Target, target_for


def restore(
    settings: Settings,
    wanted: str,
    *,
    only: tuple[str, ...] = (),
    to: Mapping[str, str],
    replace: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Restore the backup ``wanted`` and return a summary.

    ``only`` names parts, ``to`` other targets by part. Raises Failure: the targets are then as
    they were, unless it is SafetyCopyNeeded.
    """
    began = time.monotonic()
    there = redirect(settings, to)
    remote = Remote(settings)
    selected = only or tuple(to)
    needed = selected
    if not needed and wanted in ("", "latest"):
        needed = settings.parts
    chosen = manifest.choose(manifest.catalog(remote), wanted, needed)
    parts = [part for part in chosen.parts if part in (selected or settings.parts)]
    targets = {part: target_for(part, there) for part in parts}
    with work.working(settings.work) as scratch:
        log(f"restore {chosen.id}: downloading {', '.join(parts)}")
        copies = download(remote, chosen, parts, scratch)
        held = [copy.part for copy in copies if targets[copy.part].check(copy)]
        if held and not replace:
            names = ", ".join(str(targets[part]) for part in held)
            remedy = "Add --replace to replace the content. A safety backup is taken first."
            raise TargetNotEmpty(f"not empty: {names}", remedy)
        if dry_run:
            log(f"restore {chosen.id}: would replace {', '.join(held) or 'nothing'}")
            return {"id": chosen.id, "parts": parts, "replaces": held}
        safety = save(there, held, scratch)
        put_all(copies, targets, safety)
    seconds = round(time.monotonic() - began, 2)
    saved = f"; the previous content is backup {safety.id}" if safety.id else ""
    log(f"restore {chosen.id}: complete in {seconds:g} s, compared{saved}")
    return {
        "id": chosen.id,
        "parts": parts,
        "safety": safety.id,
        "seconds": seconds,
    }


def redirect(settings: Settings, to: Mapping[str, str]) -> Settings:
    """Return the settings with the targets of ``to``. Raises NotConfigured."""
    servers = dict(settings.servers)
    moved: dict[str, Any] = {"servers": servers}
    for part, where in to.items():
        if part in servers:
            servers[part] = server_at(where, servers[part])
        elif part == "opencode":
            moved["database"] = Path(where).absolute() / opencode_source.DATABASE
        else:
            for name in ("data", "config", "state"):
                moved[name] = Path(where).absolute() / name
    return settings.model_copy(update=moved)


def download(remote: Remote, backup: Backup, parts: Iterable[str], scratch: Path) -> list[Copy]:
    """Download parts and verify them. Raises BackupDamaged."""
    chosen = {name: backup.parts[name] for name in parts}
    remote.download(backup.id, [part.object for part in chosen.values()], scratch)
    copies = []
    for name, part in chosen.items():
        raw = create.unpack(scratch / part.object, part)
        copies.append(Copy(name, raw, part.facts))
    return copies


@dataclass(frozen=True)
class Safety:
    """The previous content: the ``id`` of a backup, its raw copies in ``folder``.

    ``aside`` is the new name of a damaged database, which cannot be copied.
    """

    id: str
    folder: Path
    database: Path
    aside: Path | None

    def copy_of(self, part: str) -> Path | None:
        """Return the raw copy of a part, or None when it was empty."""
        path = self.folder / create.OBJECTS[part]
        return path if path.exists() else None


def save(there: Settings, held: list[str], scratch: Path) -> Safety:
    """Back up what is about to be replaced. Raises the Failures of a backup."""
    folder = scratch / "safety"
    folder.mkdir()
    aside, backup_id = None, ""
    parts = list(held)
    if "opencode" in parts and opencode_source.is_damaged(there.database):
        parts.remove("opencode")
    if parts:
        kept = there.model_copy(update={"remote": there.safety_remote or there.remote})
        create_remote = bool(there.safety_remote)
        made = create.make(kept, parts, folder, kind="safety", create=create_remote)
        backup_id = made.id
    if len(parts) < len(held):
        aside = opencode_source.move_aside(there.database)
        log(f"{there.database} is damaged and cannot be copied; renamed to {aside.name}")
    return Safety(backup_id, folder, there.database, aside)


def put_all(copies: list[Copy], targets: Mapping[str, Target], safety: Safety) -> None:
    """Restore all parts side by side; if one fails, put back all.

    Raises RestoreFailed, SafetyCopyNeeded.
    """

    def put(copy: Copy) -> None:
        log(f"restoring {targets[copy.part]}")
        targets[copy.part].put(copy)

    try:
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(put, copies):
                pass
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if not isinstance(error, Exception):
            reason = "interrupted"
        log(f"failed ({reason}); putting back the previous content")
        put_back(copies, targets, safety, reason)
        if not isinstance(error, Exception):
            raise
        remedy = error.remedy if isinstance(error, Failure) else "Check its log."
        raise RestoreFailed(f"{reason}; the target is as it was before", remedy) from None


def put_back(
    copies: list[Copy], targets: Mapping[str, Target], safety: Safety, reason: str
) -> None:
    """Restore the previous content of each changed part. Raises SafetyCopyNeeded."""
    failed = []
    for copy in copies:
        target = targets[copy.part]
        previous = safety.copy_of(copy.part)
        try:
            if not target.changed():
                continue
            if previous:
                target.put(Copy(copy.part, previous, {}))
            target.clear(copy, previous)
            if copy.part == "opencode" and safety.aside:
                opencode_source.rename(safety.aside, safety.database)
        except Exception as error:  # noqa: BLE001 -- the other parts are put back all the same
            failed.append(f"{target} ({type(error).__name__}: {error})")
    if failed:
        remedy = "The target was empty before."
        if safety.id:
            remedy = f"When the target works again: backup restore {safety.id} --replace"
        if safety.aside:
            remedy += f" (its database is {safety.aside})"
        what = f"{reason}; the previous content could not be put back: {', '.join(failed)}"
        raise SafetyCopyNeeded(what, remedy)
