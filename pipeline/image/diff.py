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

ASPECTS = ("mode", "owner", "size", "time", "content")
"""What the inventory lists of a file, in its order."""

ABSENT = ["", "", 0, 0, ""]

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
    files, times = {}, []
    for path, was, now in changes(old["files"], new["files"], ABSENT):
        aspects = [
            name
            for name, one, other in zip(ASPECTS, was, now, strict=True)
            if one != other and name != "size"
        ]
        if not (was[0] and now[0]):
            aspects = ["gone" if was[0] else "new"]
        elif "time" in aspects:
            aspects.remove("time")
            times.append(path)
        if aspects:
            files[path] = ", ".join(aspects), now[2] - was[2]
    return Difference(
        size=(before["Size"], after["Size"]),
        settings=changes(settings_of(before), settings_of(after), ""),
        packages=changes(versions_of(old), versions_of(new), ""),
        files=files,
        times=times,
    )


def settings_of(image: dict[str, Any]) -> dict[str, str]:
    """Return the settings of an inspected image, each variable and label by its own name."""
    config = image["Config"]
    variables = [variable.partition("=") for variable in config.get("Env") or []]
    found = {f"env {name}": value for name, _, value in variables}
    found |= {f"label {name}": value for name, value in (config.get("Labels") or {}).items()}
    for name in CONFIG:
        # podman lists the health check beside Config.
        if value := config.get(name) or image.get(name):
            found[name.lower()] = json.dumps(value, sort_keys=True)
    return found


def versions_of(inventory: dict[str, Any]) -> dict[str, str]:
    """Return the version of each package of an inventory."""
    return {
        f"{kind} {name}": entry[0]
        for kind, packages in inventory["packages"].items()
        for name, entry in packages.items()
    }


def changes(
    old: dict[str, Any],
    new: dict[str, Any],
    absent: Any,
) -> list[tuple[str, Any, Any]]:
    """Return what differs between two maps, in the order of the names."""
    pairs = [(name, old.get(name, absent), new.get(name, absent)) for name in {*old, *new}]
    return sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: pair[0])


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
    images = [contents.find(engine, name, settings.image) for name in (before, after)]
    with ThreadPoolExecutor() as pool:
        inside = pool.map(lambda image: contents.read(engine, image, files=True), images)
        found = compare(*images, *inside)
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
    files = [(path, what, f"{size:+,d}") for path, (what, size) in found.files.items()]
    files.sort(key=lambda row: -abs(found.files[row[0]][1]))
    limit = len(files) if every else ROWS
    _table("files", files, ("path", "change", "bytes"), limit)
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
        table(f"\n{len(rows)} {title}", columns, rows[:limit])
    if len(rows) > limit:
        log(f"and {len(rows) - limit} more in build/diff.json")
