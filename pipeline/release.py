"""Which image people run: promote, roll back. A release is a retag of an image that passed, by its ID."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import history, openagents
from pipeline.engine import Engine
from pipeline.errors import NoSuchRelease, NotReleased
from pipeline.image import OURS, now
from pipeline.records import read_json, write_json
from pipeline.report import say, warn
from pipeline.settings import BUILD, ROOT, Settings

BROUGHT = ("locks", f"vendor/{openagents.NAME}")

DATED = re.compile(r"\d{8}-[0-9a-z]{7,12}(-\d+)?")


def kind(image: dict[str, Any]) -> str:
    """Return ``openagents`` or ``starter``, or nothing for an image that is none of ours."""
    return _label(image, "kind")


def short(image: dict[str, Any]) -> str:
    """Return an image's ID as people read it."""
    return str(image["Id"]).removeprefix("sha256:")[:12]


def find(settings: Settings, engine: Engine, name: str) -> dict[str, Any]:
    """Return the image that ``name`` means: a tag of ours, or any reference or ID. Raises NoSuchRelease."""
    image = engine.image(engine.local(f"{settings.image}:{name}")) if re.fullmatch(r"[\w.-]+", name) else None
    image = image or engine.image(name)
    if image is None:
        names = ", ".join(sorted(tags(settings, engine))) or "none"
        raise NoSuchRelease(f"{engine.name} has no image {name}", f"There are the tags {names}.")
    return image


def tags(settings: Settings, engine: Engine) -> dict[str, str]:
    """Return each tag of our image, and the ID behind it."""
    prefix = engine.local(f"{settings.image}:x")[:-1]
    done = engine.ask(engine.argv("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"))
    pairs = (line.split() for line in done.stdout.splitlines())
    return {name[len(prefix) :]: identity for name, identity in pairs if name.startswith(prefix)}


def dated_tag(settings: Settings, engine: Engine, image: dict[str, Any]) -> str:
    """Return the immutable tag of an image: the one it has, or a free one out of today and OpenAgents' commit."""
    taken = tags(settings, engine)
    for tag, identity in taken.items():
        if DATED.fullmatch(tag) and history.same(identity, image["Id"]):
            return tag
    commit = re.sub("[^0-9a-z]", "", _label(image, "commit").removesuffix("-edited")) or "unknown"
    day = f"{datetime.fromisoformat(now()):%Y%m%d}"
    names = [f"{day}-{commit[:length]}" for length in range(7, 13)]
    names += [f"{names[-1]}-{number}" for number in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)


def promote(settings: Settings, engine: Engine, image: dict[str, Any], report: dict[str, Any] | None = None) -> bool:
    """Tag an image that passed ``latest``, what was latest ``previous``, and give it its immutable tag.

    One with the starter in it never takes the place of one with OpenAgents: then nothing moves, and this is False.
    """
    latest = engine.image(engine.local(f"{settings.image}:latest"))
    if latest and latest["Id"] == image["Id"]:
        say(f"{settings.image}:latest is this image already")
        return True
    if latest and kind(latest) == "openagents" and kind(image) == "starter":
        warn(f"{settings.image}:latest holds OpenAgents, and this image only the starter: latest stays as it is")
        return False
    moved = move(settings, engine, image, latest)
    proven = {"ready_seconds": report["ready_seconds"], "probes": probes(report)} if report else {}
    history.append({"kind": "release", "image": image["Id"], "tag": moved, "size": image.get("Size"), **proven})
    return True


def move(
    settings: Settings, engine: Engine, image: dict[str, Any], latest: dict[str, Any] | None, staged: Path | None = None
) -> str:
    """Make ``image`` latest, ``latest`` previous, and bring in what is ``staged``; return the immutable tag.

    What is to be is written down first. Killed at any moment, ``finish`` makes it so.
    """
    tag = dated_tag(settings, engine, image)
    before = {"previous": latest["Id"]} if latest and latest["Id"] != image["Id"] else {}
    names = {tag: image["Id"], **before, "latest": image["Id"]}
    bring = {"staged": str(staged), "content": contents(staged)} if staged else {}
    os.sync()  # what is staged must be on disk before anything says so
    write_json(_journal(engine), {"image": settings.image, "tags": names, **bring})
    finish(engine)
    say(f"{settings.image}:latest is now {short(image)}" + (f"; previous is {short(latest)}" if latest else ""))
    return tag


def finish(engine: Engine) -> bool:
    """Complete a release that was cut short; return whether there was one. Doing it twice changes nothing."""
    journal = read_json(_journal(engine))
    if not journal:
        return False
    if all(engine.image(identity) for identity in journal["tags"].values()):
        for tag, identity in journal["tags"].items():
            engine.tag(identity, f"{journal['image']}:{tag}")
        for name, content in journal.get("content", {}).items():
            new, old = Path(journal["staged"]) / name, ROOT / name
            # Renames alone: from here on no space is needed, and what was done already is not undone.
            if contents(ROOT).get(name) != content and contents(Path(journal["staged"])).get(name) == content:
                openagents.swap(new, old)
    else:
        warn("a release that was cut short cannot be completed, its image is gone: the tags stay as they are")
    _journal(engine).unlink()
    return True


def contents(root: Path) -> dict[str, str]:
    """Return what a release brings in besides tags: each directory in the checkout ``root``, to a hash of all in it."""
    return {name: openagents.tree_hash(root / name) for name in BROUGHT if (root / name).is_dir()}


def pending(engine: Engine) -> bool:
    """Whether a release was cut short, which ``finish`` completes."""
    return _journal(engine).exists()


def rollback(settings: Settings, engine: Engine, to: str = "previous", *, dry_run: bool = False) -> None:
    """Smoke the image ``to`` and make it latest; what was latest becomes previous, so that twice is forward again.

    Raises NoSuchRelease, and what smoke raises; then no tag has moved.
    """
    from pipeline import smoke

    latest, image = find(settings, engine, "latest"), find(settings, engine, to)
    if latest["Id"] == image["Id"]:
        raise NoSuchRelease(f"{to} is latest already", f"Name another: {', '.join(sorted(tags(settings, engine)))}.")
    if dry_run:
        say(f"rollback: would smoke {to} {short(image)} and make it latest, in place of {short(latest)}")
        return
    report = smoke.smoke(settings, engine, image["Id"])
    tag = move(settings, engine, image, latest)
    moved = {"from": latest["Id"], "image": image["Id"], "tag": tag, "to": to}
    history.append({"kind": "rollback", **moved, "probes": probes(report)})


def release(settings: Settings, engine: Engine, name: str = "", *, dry_run: bool = False) -> None:
    """Smoke the candidate, or the image ``name``, and make it latest. Raises NotReleased, and what smoke raises."""
    from pipeline import smoke

    image = find(settings, engine, name or "candidate")
    if dry_run:
        say(f"promote: would smoke {short(image)} and make it latest")
        return
    if not promote(settings, engine, image, smoke.smoke(settings, engine, image["Id"])):
        raise NotReleased("the image holds only the starter, and latest OpenAgents", "Fetch OpenAgents, and build.")


def _label(image: dict[str, Any], name: str) -> str:
    return str((image["Config"].get("Labels") or {}).get(f"{OURS}.{name}", ""))


def probes(report: dict[str, Any]) -> dict[str, list[Any]]:
    """Return each probe of a smoke: whether it passed, and seconds."""
    return {probe["name"]: [probe["passed"], probe["seconds"]] for probe in report["probes"]}


def _journal(engine: Engine) -> Path:
    return BUILD / f"release-{engine.name}.json"
