"""The image's tags.

``candidate`` is the last build, ``latest`` the image in use, and ``previous`` the one that was
latest before.
Each release also has a dated tag, YYYYMMDD-COMMIT, which never moves.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from pipeline.core.clock import now
from pipeline.core.errors import NoSuchRelease
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine

KIND = "opencode-server.openagents.kind"
"""The label that is ``openagents``, or ``starter`` for the embedded package."""

COMMIT = "opencode-server.openagents.commit"

Inspection = dict[str, Any]
"""What ``image inspect`` prints about an image."""

DATED = re.compile(r"\d{8}-[0-9a-z]{7,12}(-\d+)?")


def label(image: Inspection, name: str) -> str:
    """Return a label of an inspected image, or an empty string."""
    labels = image["Config"].get("Labels") or {}
    return str(labels.get(name, ""))


def short_id(image: Inspection) -> str:
    """Return the first twelve digits of an inspected image's ID."""
    return str(image["Id"]).removeprefix("sha256:")[:12]


def same_id(one: str, other: str) -> bool:
    """Return whether two image IDs are equal.

    docker prints them with ``sha256:`` in front, podman without.
    """
    return bool(one) and one.removeprefix("sha256:") == other.removeprefix("sha256:")


def all_tags(settings: Settings, engine: Engine) -> dict[str, str]:
    """Return each tag of our image with the ID of the image behind it."""
    prefix = engine.local(f"{settings.image}:x").removesuffix("x")
    names = engine.image_names()
    return {name.removeprefix(prefix): names[name] for name in names if name.startswith(prefix)}


def find(
    settings: Settings,
    engine: Engine,
    name: str,
) -> Inspection:
    """Inspect the image that ``name`` means: a tag of ours, or any reference or ID.

    Raises NoSuchRelease.
    """
    image = None
    if re.fullmatch(r"[\w.-]+", name):
        image = engine.image(engine.local(f"{settings.image}:{name}"))
    image = image or engine.image(name)
    if image is None:
        existing = ", ".join(sorted(all_tags(settings, engine))) or "none"
        raise NoSuchRelease(
            f"{engine.name} has no image {name}",
            f"Use one of these tags of {settings.image}: {existing}.",
        )
    return image


def dated_tag(
    settings: Settings,
    engine: Engine,
    image: Inspection,
) -> str:
    """Return the dated tag of an image: the one it has, or a new one.

    A new one is today's date and seven digits of OpenAgents' commit. When another image has it, the
    commit gets longer, up to twelve digits, and then a number is added.
    """
    taken = all_tags(settings, engine)
    for tag, identity in taken.items():
        if DATED.fullmatch(tag) and same_id(identity, image["Id"]):
            return tag
    commit = label(image, COMMIT).removesuffix("-edited")
    commit = re.sub("[^0-9a-z]", "", commit) or "unknown"
    day = f"{datetime.fromisoformat(now()):%Y%m%d}"
    names = [f"{day}-{commit[:length]}" for length in range(7, 13)]
    names += [f"{names[-1]}-{number}" for number in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)
