"""Remove old builds of our image, what failed builds have left, and superseded base images."""

from __future__ import annotations

import re

from pipeline.core.console import log
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.image.labels import BUILD_OF, owner_of
from pipeline.image.tags import DATED, Inspection, label
from pipeline.inputs import base
from pipeline.inputs.rootfs import Lock

STEP = "/usr/local/share/opencode-server/"
"""What the first step of the Containerfile makes; the history of every later step has it."""


def prune(
    settings: Settings,
    engine: Engine,
    keep: int,
    *,
    dry_run: bool = False,
) -> list[str]:
    """Remove all but the ``keep`` newest dated builds, superseded bases, and what has no name.

    Dated builds and bases are found by their names, builds without a name by their label, and the
    last steps of podman's failed builds by their history. An image stays when it has any other
    name, or a container, running or not. Returns the names and IDs that were removed.
    """
    prefix = re.escape(engine.local(f"{settings.image}:x")[:-1])
    dated = re.compile(prefix + DATED.pattern)
    images, names = _images(engine)
    in_use = engine.images_in_use()
    builds = [each for each in names if any(map(dated.fullmatch, names[each]))]
    builds.sort(key=lambda each: str(images[each]["Created"]), reverse=True)
    removed: list[str] = []
    for each in builds[keep:]:
        if each not in in_use and all(map(dated.fullmatch, names[each])):
            removed += _remove(engine, names[each], dry_run=dry_run)

    images, names = _images(engine)
    bases = set(_old_bases(engine, images, names)) - in_use
    for each in sorted(bases):
        removed += _remove(engine, names[each], dry_run=dry_run)

    # Only now: a base that has lost its name may be here still, by the digest of a registry.
    images, names = _images(engine)
    owner = owner_of(settings.image)
    for each in sorted(images.keys() - names.keys() - in_use):
        if each in bases or _owner(images[each], owner) == owner:
            removed += _remove(engine, [each], dry_run=dry_run)
    if not dry_run:
        engine.prune_build_cache(STEP)
    return removed


def _images(engine: Engine) -> tuple[dict[str, Inspection], dict[str, list[str]]]:
    """Return each image by ID, and the names of each that has some; IDs without ``sha256:``."""
    images = engine.images()
    names: dict[str, list[str]] = {}
    for name, identity in engine.image_names().items():
        if identity.removeprefix("sha256:") in images:
            names.setdefault(identity.removeprefix("sha256:"), []).append(name)
    return images, names


def _old_bases(
    engine: Engine, images: dict[str, Inspection], names: dict[str, list[str]]
) -> list[str]:
    """Return the bases that locks/base.json no longer means and that no other image stands on."""
    lock = Lock.read(platform=engine.platform)
    current = {engine.local(base.tag_of(lock, made=made)) for made in (True, False)}
    prefix = engine.local(f"{base.NAME}:x")[:-1]
    found = []
    for identity, tags in names.items():
        if all(tag.startswith(prefix) for tag in tags) and not current.intersection(tags):
            layers = images[identity]["RootFS"]["Layers"]
            stacks = [image["RootFS"]["Layers"][: len(layers)] for image in images.values()]
            if stacks.count(layers) == 1:
                found.append(identity)
    return found


def _owner(image: Inspection, owner: str) -> str:
    """Return whose build an image is; a step of a build has no label, and is ``owner``'s."""
    steps = any(STEP in str(step.get("created_by")) for step in image.get("History") or ())
    return label(image, BUILD_OF) or (owner if steps else "")


def _remove(engine: Engine, names: list[str], *, dry_run: bool) -> list[str]:
    for name in names:
        log(f"prune: {'would remove' if dry_run else 'removing'} {name}")
        if not dry_run:
            engine.ask(engine.remove_image(name))
    return names
