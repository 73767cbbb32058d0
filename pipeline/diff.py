"""What changed between two images: settings, packages and files, on one screen."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline import contents
from pipeline.engine import Engine
from pipeline.errors import NotTheSame
from pipeline.records import write_json
from pipeline.report import megabytes, say, table
from pipeline.settings import BUILD, Settings

ROWS = 12
"""How many lines each part may have, so that all fit on a screen."""

CREATED = "label org.opencontainers.image.created"

ASPECTS = ("mode", "owner", "size", "time", "content")
"""What the inventory says of a file, in its order."""


@dataclass(frozen=True)
class Difference:
    """What differs: settings and packages as (name, before, after), files as path: what of it; sizes in bytes."""

    size: tuple[int, int]
    settings: list[tuple[str, ...]] = field(default_factory=list)
    packages: list[tuple[str, str, str, int]] = field(default_factory=list)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    times: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether content and settings are the same; times may differ: of files, and when each was made."""
        return not (self.packages or self.files or any(name != CREATED for name, *_ in self.settings))


def settings_of(image: dict[str, Any]) -> dict[str, str]:
    """Return an image's settings by name, each variable and label its own."""
    config = image["Config"]
    found = {f"env {name}": value for name, _, value in (each.partition("=") for each in config.get("Env") or [])}
    found |= {f"label {name}": value for name, value in (config.get("Labels") or {}).items()}
    health = config.get("Healthcheck") or image.get(
        "Healthcheck"
    )  # docker has it in the one place, podman in the other
    names = ("Entrypoint", "Cmd", "WorkingDir", "User", "ExposedPorts", "Volumes", "StopSignal")
    some = {
        **{name: config.get(name) for name in names},
        "Healthcheck": health,
        "Architecture": image.get("Architecture"),
    }
    return found | {name.lower(): json.dumps(value, sort_keys=True) for name, value in some.items() if value}


def compare(before: dict[str, Any], after: dict[str, Any], was: dict[str, Any], now: dict[str, Any]) -> Difference:
    """Return what differs between two images: their inspections, and what ``contents.look`` said with files."""
    sets = settings_of(before), settings_of(after)
    settings = [(name, *(each.get(name, "") for each in sets)) for name in sorted({*sets[0], *sets[1]})]
    packages = []
    for kind in was["packages"]:
        old, new = was["packages"][kind], now["packages"][kind]
        for name in sorted({*old, *new}):
            first, second = old.get(name, ["", 0]), new.get(name, ["", 0])
            if first[0] != second[0]:
                packages.append((f"{kind} {name}", first[0], second[0], second[1] - first[1]))
    files, times = {}, []
    for path in sorted({*was["files"], *now["files"]}):
        one, other = was["files"].get(path), now["files"].get(path)
        if one and other:
            aspects = [aspect for aspect, old, new in zip(ASPECTS, one, other, strict=True) if old != new]
            times += [path] * ("time" in aspects)
            if what := ", ".join(aspect for aspect in aspects if aspect not in {"time", "size"}):
                files[path] = what, other[2] - one[2]
        else:
            files[path] = ("new", other[2]) if other else ("gone", -one[2])
    changed = [row for row in settings if row[1] != row[2]]
    return Difference((before["Size"], after["Size"]), changed, packages, files, times)


def diff(
    settings: Settings, engine: Engine, before: str, after: str, *, files: bool = False, same: bool = False
) -> None:
    """Say what changed from the image ``before`` to ``after``, each a name or a tag of ours; with ``files``, name each.

    All of it is written to ``build/diff.json``. Raises NoSuchImage, ContentsUnreadable, and, where they should be the
    ``same`` and are not, NotTheSame.
    """
    images = [contents.find(engine, name, settings.image) for name in (before, after)]
    with ThreadPoolExecutor() as pool:
        inside = list(pool.map(lambda image: contents.look(engine, image, files=True), images))
    found = compare(*images, *inside)
    write_json(BUILD / "diff.json", vars(found))
    show(found, before, after, every=files)
    if same and not found.same:
        raise NotTheSame(f"{before} and {after} differ", "It is said above; all of it is in build/diff.json.")


def show(found: Difference, before: str, after: str, *, every: bool = False) -> None:
    """Print it: on one screen, or with ``every`` file."""
    grown = found.size[1] - found.size[0]
    say(f"diff: {before} {megabytes(found.size[0])} -> {after} {megabytes(found.size[1])} ({grown / 1e6:+.1f} MB)")
    _part("settings", ("setting", "was", "is"), [tuple(cell[:60] for cell in row) for row in found.settings])
    largest = sorted(found.packages, key=lambda row: -abs(row[3]))
    _part("packages", ("package", "was", "is", "MB"), [(*row[:3], f"{row[3] / 1e6:+.1f}") for row in largest])
    if every:
        for path, (what, size) in [*found.files.items(), *((path, ("time", 0)) for path in found.times)]:
            say(f"{what:8} {size:+10,d}  {path}")
    else:
        where: dict[str, Counter[str]] = {}
        for path, (what, size) in found.files.items():
            counts = where.setdefault("/".join(path.split("/")[:3]), Counter())
            counts[what if what in {"new", "gone"} else "changed"] += 1
            counts["bytes"] += size
        rows = sorted(where.items(), key=lambda row: -abs(row[1]["bytes"]))
        cells = [
            (path, *(str(n[key]) for key in ("new", "gone", "changed")), f"{n['bytes'] / 1e6:+.2f}") for path, n in rows
        ]
        _part(f"{len(found.files)} files; --files names them", ("where", "new", "gone", "changed", "MB"), cells)
    same = "the same content and settings; " if found.same else ""
    say(f"{same}{len(found.times)} files differ in their times")


def _part(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if rows:
        table(f"\n{title}", columns, rows[:ROWS])
    if len(rows) > ROWS:
        say(f"and {len(rows) - ROWS} more in build/diff.json")
