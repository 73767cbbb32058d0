"""Move the tags ``latest`` and ``previous`` to images that passed the smoke test.

A release is a retag by image ID. All tags of a release are written to ``build/release-ENGINE.json``
before the first one moves. After an interruption ``finish`` completes the release from that file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.core.console import log, warn
from pipeline.core.errors import NoSuchRelease, NotReleased
from pipeline.core.settings import BUILD, ROOT, Settings
from pipeline.core.state import read_json, write_json
from pipeline.engines.engine import Engine
from pipeline.image import advisories, contents, tags
from pipeline.image.tags import Inspection
from pipeline.inputs import openagents
from pipeline.release import history

Report = dict[str, Any]
"""What the smoke test returns: the image's ID, ready_seconds, and the result of each probe."""

INPUTS = ("locks", f"vendor/{openagents.NAME}")
"""The directories of the checkout that a nightly release replaces, besides moving tags."""


def promote(
    settings: Settings,
    engine: Engine,
    report: Report,
    *,
    strict: bool = False,
    dry_run: bool = False,
) -> None:
    """Tag the image of a smoke ``report`` latest, the former latest previous, and add a dated tag.

    An image with the starter package never replaces one with OpenAgents. Then no tag moves, with a
    warning, or, when ``strict``, NotReleased is raised.
    """
    image = tags.find(settings, engine, report["image"])
    latest = engine.image(engine.local(f"{settings.image}:latest"))
    if dry_run:
        log(f"promote: would tag {tags.short_id(image)} {settings.image}:latest")
    elif latest and latest["Id"] == image["Id"]:
        log(f"{settings.image}:latest is already {tags.short_id(image)}")
    elif latest and is_downgrade(latest, image):
        reason = "latest has OpenAgents, and this image only the starter package"
        if strict:
            raise NotReleased(reason, "Fetch OpenAgents and build again: inv fetch build smoke")
        warn(f"{reason}; latest stays as it is")
    else:
        check_advisories(settings, engine, image)
        dated = move(settings, engine, image, latest)
        _record(report, kind="release", tag=dated, size=image.get("Size"))


def check_advisories(settings: Settings, engine: Engine, image: Inspection) -> None:
    """Raise NotReleased if the image has a vulnerability that ``advisories.block`` names."""
    severity = settings.advisories.block
    if not severity:
        return
    rows = advisories.report(settings, contents.read(engine, image))
    if rows is None:
        reason = "advisories.block is set, and no service lists the vulnerabilities of the image"
        raise NotReleased(reason, "Set advisories.url to a service that answers.")
    found = advisories.blocking(severity, rows)
    if found:
        raise NotReleased(
            f"{len(found)} known vulnerabilities, {severity} or worse: {', '.join(found)}"[:1000],
            "Move the pins (inv bump), or change advisories.block; inv contents lists them.",
        )


def is_downgrade(
    latest: Inspection,
    image: Inspection,
) -> bool:
    """Return whether ``image`` would replace OpenAgents by the starter package."""
    former = tags.label(latest, tags.KIND)
    return former == "openagents" and tags.label(image, tags.KIND) == "starter"


def rollback_target(
    settings: Settings,
    engine: Engine,
    to: str,
) -> Inspection:
    """Inspect the image ``to``. Raises NoSuchRelease, also when it is latest."""
    image = tags.find(settings, engine, to)
    if image["Id"] == tags.find(settings, engine, "latest")["Id"]:
        raise NoSuchRelease(f"{to} is already latest", "Name another tag or ID with --to.")
    return image


def rollback(
    settings: Settings,
    engine: Engine,
    report: Report,
    to: str,
    *,
    dry_run: bool = False,
) -> None:
    """Tag the image of a smoke ``report`` latest and the former latest previous.

    A second rollback to ``previous`` undoes the first. ``to`` is its name in the history.
    """
    image = tags.find(settings, engine, report["image"])
    if dry_run:
        log(f"rollback: would tag {tags.short_id(image)} {settings.image}:latest")
        return
    latest = tags.find(settings, engine, "latest")
    dated = move(settings, engine, image, latest)
    _record(report, kind="rollback", tag=dated, to=to, **{"from": latest["Id"]})


def _record(
    report: Report,
    **details: Any,
) -> None:
    history.append(
        {
            **details,
            "image": report["image"],
            "ready_seconds": report["ready_seconds"],
            "probes": probe_results(report),
        }
    )


def move(
    settings: Settings,
    engine: Engine,
    image: Inspection,
    latest: Inspection | None,
    staged: Path | None = None,
) -> str:
    """Tag ``image`` latest and ``latest`` previous, and install the inputs in ``staged``.

    Returns the dated tag of ``image``.
    """
    dated = tags.dated_tag(settings, engine, image)
    moves = {dated: image["Id"]}
    if latest and latest["Id"] != image["Id"]:
        moves["previous"] = latest["Id"]
    moves["latest"] = image["Id"]
    journal = {"image": settings.image, "tags": moves}
    if staged:
        journal |= {"staged": str(staged), "content": hashes(staged)}
    os.sync()  # the journal must not reach the disk before what it names
    write_json(_journal(engine), journal)
    finish(engine)
    former = f"; previous is {tags.short_id(latest)}" if latest else ""
    log(f"{settings.image}:latest is now {tags.short_id(image)}{former}")
    return dated


def finish(engine: Engine) -> bool:
    """Complete an interrupted release; return whether there was one. Safe to repeat."""
    journal = read_json(_journal(engine))
    if not journal:
        return False
    moves = journal["tags"]
    if all(engine.image(identity) for identity in moves.values()):
        for tag, identity in moves.items():
            engine.tag(identity, f"{journal['image']}:{tag}")
        _install(Path(journal.get("staged", "")), journal.get("content", {}))
    else:
        warn("cannot complete an interrupted release: its image was removed; no tag was moved")
    _journal(engine).unlink()
    return True


def _install(
    staged: Path,
    content: dict[str, str],
) -> None:
    """Swap each staged directory into the checkout, unless an earlier attempt already did."""
    for name, digest in content.items():
        installed = hashes(ROOT).get(name) == digest
        available = hashes(staged).get(name) == digest
        if available and not installed:
            # An atomic rename: it needs no disk space.
            openagents.swap(staged / name, ROOT / name)


def hashes(root: Path) -> dict[str, str]:
    """Return a hash of each directory of INPUTS that exists in the checkout ``root``."""
    found = {}
    for name in INPUTS:
        if (root / name).is_dir():
            found[name] = openagents.tree_hash(root / name)
    return found


def pending(engine: Engine) -> bool:
    """Return whether a release was interrupted, which ``finish`` completes."""
    return _journal(engine).exists()


def probe_results(report: Report) -> dict[str, list[Any]]:
    """Return [passed, seconds] of each probe of a smoke report, as the history records it."""
    results = {}
    for probe in report["probes"]:
        results[probe["name"]] = [probe["passed"], probe["seconds"]]
    return results


def _journal(engine: Engine) -> Path:
    return BUILD / f"release-{engine.name}.json"
