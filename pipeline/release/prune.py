"""Remove old builds of our image, and nothing else."""

from __future__ import annotations

from collections import Counter

from pipeline.core.console import log
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.image.labels import BUILD_OF, owner_of
from pipeline.image.tags import DATED, all_tags, label


def prune(
    settings: Settings,
    engine: Engine,
    keep: int,
    *,
    dry_run: bool = False,
) -> list[str]:
    """Remove all but the ``keep`` newest dated builds, and untagged builds.

    Dated builds are found by their tags, untagged ones by their label. An image stays when it has
    any other name, or a container, running or not. Returns the names and IDs that were removed.
    """
    images = engine.images()
    unused = images.keys() - engine.images_in_use()
    name_counts = Counter(
        identity.removeprefix("sha256:") for identity in engine.image_names().values()
    )
    obsolete = []

    dated = _dated_names(settings, engine)
    newest_first = sorted(
        dated,
        key=lambda identity: str(images[identity]["Created"]),
        reverse=True,
    )
    for identity in newest_first[keep:]:
        if identity in unused and len(dated[identity]) == name_counts[identity]:
            obsolete += dated[identity]

    owner = owner_of(settings.image)
    for identity in sorted(unused - name_counts.keys()):
        if label(images[identity], BUILD_OF) == owner:
            obsolete.append(identity)

    for name in obsolete:
        log(f"prune: {'would remove' if dry_run else 'removing'} {name}")
        if not dry_run:
            engine.ask(engine.remove_image(name))
    return obsolete


def _dated_names(
    settings: Settings,
    engine: Engine,
) -> dict[str, list[str]]:
    """Return the dated names of each image that has some, by the image's ID without ``sha256:``."""
    names: dict[str, list[str]] = {}
    for tag, identity in all_tags(settings, engine).items():
        if DATED.fullmatch(tag):
            image_id = identity.removeprefix("sha256:")
            name = engine.local(f"{settings.image}:{tag}")
            names.setdefault(image_id, []).append(name)
    return names
