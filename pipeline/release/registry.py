"""Push images to a registry, and pull them by digest.

A digest always means the image that was pushed, whatever the tags in the registry mean by then.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from pipeline.core import process
from pipeline.core.console import log, ok
from pipeline.core.errors import NotPinned, PipelineError, RegistryRefused, RegistryUnreachable
from pipeline.core.retry import retry
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.image import tags
from pipeline.release import history

TRANSFER_SECONDS = 1800
"""How long one attempt to push or pull a whole image may take."""

DIGEST = "sha256:[0-9a-f]{64}"

DENIED = re.compile(
    "unauthorized|authentication required|denied|no basic auth|username",
    re.IGNORECASE,
)
"""How engines report that a registry requires a login."""

MISSING = re.compile("manifest unknown|no such manifest|name unknown|not found", re.IGNORECASE)


def push(
    settings: Settings,
    engine: Engine,
    repository: str,
    name: str = "latest",
    *,
    dry_run: bool = False,
) -> str:
    """Push the image ``name`` with its dated tag; return REPOSITORY@sha256:DIGEST.

    Raises NoSuchRelease, RegistryRefused, RegistryUnreachable.
    """
    image = tags.find(settings, engine, name)
    tag = tags.dated_tag(settings, engine, image)
    target = f"{repository}:{tag}"
    if dry_run:
        log(f"push: would push {tags.short_id(image)} to {target}")
        return ""
    engine.tag(image["Id"], target)
    try:
        done = _transfer(settings, engine, engine.push(target))
    finally:
        engine.ask(engine.remove_image(target))
    return _pushed(repository, tag, done, image=image["Id"])


def push_index(
    settings: Settings,
    engine: Engine,
    target: str,
    digests: Sequence[str],
    *,
    dry_run: bool = False,
) -> str:
    """Push an index of images of several platforms, which ``digests`` name in its repository.

    ``target`` is REGISTRY/REPOSITORY:TAG. Returns REPOSITORY@sha256:DIGEST.
    Raises NotPinned, RegistryRefused, RegistryUnreachable.
    """
    repository, colon, tag = target.rpartition(":")
    if not colon or "/" in tag:
        raise NotPinned(f"{target} has no tag", "Use --to REGISTRY/REPOSITORY:TAG.")
    images = [f"{repository}@{digest}" for digest in digests]
    for image in images:
        _require_digest(image)
    if dry_run:
        log(f"push: would make {target} of {', '.join(images)}")
        return ""
    try:
        for argv in engine.index(target, images):
            done = _transfer(settings, engine, argv)
    finally:
        engine.ask(engine.argv("manifest rm", target))
    return _pushed(repository, tag, done)


def _pushed(
    repository: str,
    tag: str,
    done: process.Completed,
    **details: str,
) -> str:
    """Record a push and return the image by the digest that the engine printed."""
    digests = re.findall(DIGEST, done.stdout)
    if not digests:
        what = f"{done.argv[0]} pushed {repository}:{tag} without printing its digest"
        raise RegistryRefused(what, "Repeat the push.", done.output)
    pinned = f"{repository}@{digests[-1]}"
    ok(f"pushed {tag}; to use it on another machine: inv pull --image {pinned} promote")
    history.append({"kind": "push", "to": pinned, "tag": tag, **details})
    return pinned


def pull(
    settings: Settings,
    engine: Engine,
    pinned: str,
    *,
    dry_run: bool = False,
) -> None:
    """Pull REPOSITORY@sha256:DIGEST and tag it candidate.

    Raises NotPinned, NoSuchRelease, RegistryRefused, RegistryUnreachable.
    """
    _require_digest(pinned)
    candidate = f"{settings.image}:candidate"
    if dry_run:
        log(f"pull: would pull {pinned} and tag it {candidate}")
        return
    _transfer(settings, engine, engine.pull(pinned))
    image = tags.find(settings, engine, pinned)
    engine.tag(image["Id"], candidate)
    ok(f"{candidate} is now {tags.short_id(image)}, pulled from {pinned}")


def _require_digest(image: str) -> None:
    if not re.search(f"@{DIGEST}$", image):
        raise NotPinned(
            f"{image} is not pinned by digest",
            "Use REPOSITORY@sha256:DIGEST, as printed by inv push.",
        )


def _transfer(
    settings: Settings,
    engine: Engine,
    argv: list[str],
) -> process.Completed:
    """Run a push or pull, as often as network.attempts allows."""

    def attempt() -> process.Completed:
        try:
            done = engine.ask(argv, timeout=TRANSFER_SECONDS)
        except subprocess.TimeoutExpired as error:
            what = f"{argv[-1]}: not transferred within {TRANSFER_SECONDS} s"
            raise RegistryUnreachable(what, "Try again later.") from error
        if not done.ok:
            raise _failure(engine, argv[-1], done.output)
        return done

    return retry(attempt, on=RegistryUnreachable, attempts=settings.network.attempts)


def _failure(
    engine: Engine,
    reference: str,
    output: str,
) -> PipelineError:
    host = reference.removeprefix("docker://").partition("/")[0]
    reason = output.splitlines()[-1] if output else "no error message"
    if DENIED.search(output):
        return RegistryRefused(
            f"{host} requires a login: {reason}", f"Log in: {engine.name} login {host}"
        )
    if MISSING.search(output):
        return RegistryRefused(
            f"{host} does not have the image: {reason}",
            "Compare the digest with the one that inv push printed.",
        )
    return RegistryUnreachable(f"{host}: {reason}", "Try again later, or run inv doctor.", output)
