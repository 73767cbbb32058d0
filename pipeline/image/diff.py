"""What differs between two images: settings, packages and files, on one screen."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.console import log, megabytes, table
from pipeline.core.errors import NotTheSame
from pipeline.core.settings import BUILD, Settings
from pipeline.core.state import write_json
from pipeline.engines.engine import Engine
from pipeline.image import contents

ROWS = 12
"""Rows of each table, so that all tables fit on a screen."""

CREATED = "label org.opencontainers.image.created"

ASPECTS = (
    "mode",
    "owner",
    "size",
    "time",
    "content",
)
"""What the inventory lists of a file, in its order."""

CONFIG = (
    "Entrypoint",
    "Cmd",
    "WorkingDir",
    "User",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "Healthcheck",
)
"""The settings of an image besides variables and labels."""

Changes = list[tuple[str, str, str]]
"""Name, value before, value after; empty where there was or is none."""


@dataclass
class Difference:
    """What differs between two images.

    ``files`` maps a path to what differs, and by how many bytes. ``times`` are the paths whose
    modification time differs. ``size`` is that of both images in bytes.
    """

    size: tuple[int, int]
    settings: Changes
    packages: Changes
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    times: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether content and settings are equal; times and the label ``created`` may differ."""
        names = {name for name, _, _ in self.settings}
        return not (names - {CREATED} or self.packages or self.files)


def compare(
    before: dict[str, Any],
    after: dict[str, Any],
    old: dict[str, Any],
    new: dict[str, Any],
) -> Difference:
    """Compare two images: their inspections, and their inventories with files."""
    found = Difference(
        size=(before["Size"], after["Size"]),
        settings=_changes(settings_of(before), settings_of(after)),
        packages=_changes(versions_of(old), versions_of(new)),
    )
    absent = [
        "",
        "",
        0,
        0,
        "",
    ]
    for path in sorted({*old["files"], *new["files"]}):
        was = old["files"].get(path, absent)
        now = new["files"].get(path, absent)
        what = _aspects(was, now)
        if "time" in what:
            what.remove("time")
            found.times.append(path)
        if what:
            found.files[path] = ", ".join(what), now[2] - was[2]
    return found


def settings_of(image: dict[str, Any]) -> dict[str, str]:
    """Return the settings of an inspected image, each variable and label by its own name."""
    config = image["Config"]
    found = {}
    for variable in config.get("Env") or []:
        name, _, value = variable.partition("=")
        found[f"env {name}"] = value
    for name, value in (config.get("Labels") or {}).items():
        found[f"label {name}"] = value
    for name in CONFIG:
        # podman lists the health check beside Config.
        if value := config.get(name) or image.get(name):
            found[name.lower()] = json.dumps(value, sort_keys=True)
    return found


def versions_of(inventory: dict[str, Any]) -> dict[str, str]:
    """Return the version of each package of an inventory."""
    found = {}
    for kind, packages in inventory["packages"].items():
        for name, entry in packages.items():
            found[f"{kind} {name}"] = entry[0]
    return found


def _changes(old: dict[str, str], new: dict[str, str]) -> Changes:
    changes = []
    for name in sorted({*old, *new}):
        was = old.get(name, "")
        now = new.get(name, "")
        if was != now:
            changes.append((name, was, now))
    return changes


def _aspects(was: list[Any], now: list[Any]) -> list[str]:
    """Return what differs between two entries of a file; the size goes with the content."""
    if not was[0]:
        return ["new"]
    if not now[0]:
        return ["gone"]
    differing = []
    for index, aspect in enumerate(ASPECTS):
        if was[index] != now[index] and aspect != "size":
            differing.append(aspect)
    return differing


def diff(
    settings: Settings,
    engine: Engine,
    before: str,
    after: str,
    *,
    files: bool = False,
    same: bool = False,
) -> None:
    """Print what differs between two images, and write it to ``build/diff.json``.

    ``before`` and ``after`` are names of images, or tags of ours. ``files`` prints every file.
    Raises NoSuchImage, ContentsUnreadable, and with ``same`` NotTheSame where they differ.
    """
    one = contents.find(
        engine,
        before,
        settings.image,
    )
    other = contents.find(
        engine,
        after,
        settings.image,
    )
    with ThreadPoolExecutor() as pool:
        old = pool.submit(
            contents.read,
            engine,
            one,
            files=True,
        )
        new = pool.submit(
            contents.read,
            engine,
            other,
            files=True,
        )
    found = compare(
        one,
        other,
        old.result(),
        new.result(),
    )
    write_json(BUILD / "diff.json", vars(found))
    log(f"diff: {before} -> {after}")
    show(found, every=files)
    if same and not found.same:
        raise NotTheSame(
            f"{before} and {after} differ",
            "See above, or build/diff.json for all differences.",
        )


def show(found: Difference, *, every: bool = False) -> None:
    """Print the difference on one screen, or with ``every`` file."""
    before, after = found.size
    log(f"{megabytes(before)} -> {megabytes(after)} ({(after - before) / 1e6:+.1f} MB)")
    _table("settings", found.settings)
    _table("packages", found.packages)
    files = []
    for path, (what, size) in found.files.items():
        files.append((size, path, what))
    files.sort(key=lambda row: -abs(row[0]))
    rows = [(path, what, f"{size:+,d}") for size, path, what in files]
    limit = len(rows) if every else ROWS
    _table(
        "files",
        rows,
        ("path", "change", "bytes"),
        limit,
    )
    if every:
        for path in found.times:
            log(f"time  {path}")
    if found.same:
        log("the content and the settings are the same")
    log(f"{len(found.times)} files differ in their times")


def _table(
    title: str,
    rows: Changes,
    columns: tuple[str, ...] = ("name", "before", "after"),
    limit: int = ROWS,
) -> None:
    if rows:
        table(
            f"\n{len(rows)} {title}",
            columns,
            rows[:limit],
        )
    if len(rows) > limit:
        log(f"and {len(rows) - limit} more in build/diff.json")
