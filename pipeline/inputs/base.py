"""The base image ``node:20-slim``: pulled by digest, or made from packages without a registry."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass, field
from functools import partial

from pipeline.core.console import log, warn
from pipeline.core.errors import BaseUnavailable
from pipeline.core.retry import retry
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.inputs import ca, rootfs
from pipeline.inputs.rootfs import Lock, cache_directory

RECIPE = "3"
"""Raise it when ``rootfs`` changes what it makes, so that an older image is not used."""

PULL_SECONDS = 900
"""Timeout for pulling 80 MB from one registry."""

REMEDY = "Name a mirror in base.mirrors, or set base.make to auto."

NAME = "opencode-server-base"
MADE = "opencode-server.base"
"""The label of a base that was made here; Docker's own has no such label."""


@dataclass(frozen=True)
class Base:
    """A base image on this machine.

    ``reference`` goes after FROM, ``digest`` is that of a registry (empty if the image was made),
    and ``names`` are all tags that the engine has for it.
    """

    reference: str
    image_id: str
    name: str
    digest: str
    made: bool
    names: tuple[str, ...] = field(default=(), compare=False)


def tag_of(lock: Lock, *, made: bool) -> str:
    """Return the local name of a base, with a hash of everything that goes into it."""
    parts = [lock.digest]
    if made:
        packages = [f"{spec}={integrity}" for spec, integrity in lock.packages().items()]
        parts = [
            RECIPE,
            lock.debian,
            lock.node,
            *packages,
        ]
    elif lock.foreign:
        parts.append(lock.platform)
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    return f"{NAME}:{'made' if made else 'pulled'}-{digest[:12]}"


def here(engine: Engine, settings: Settings) -> Base | None:
    """Return the base that this machine has, a pulled one before a made one."""
    lock = Lock.read(platform=engine.platform)
    found = None
    if settings.base.make != "always":
        found = _find(engine, lock, made=False)
    if found is None and settings.base.make != "never":
        found = _find(engine, lock, made=True)
    return found


def _find(engine: Engine, lock: Lock, *, made: bool) -> Base | None:
    reference = engine.local(tag_of(lock, made=made))
    image = engine.image(reference)
    if image is None:
        return None
    return Base(
        reference,
        image["Id"].removeprefix("sha256:"),
        f"{lock.image}:{lock.tag}",
        "" if made else lock.digest,
        made,
        tuple(image.get("RepoTags") or ()),
    )


def ask_argv(engine: Engine, mirror: str = "") -> list[str]:
    """Return the command that asks Docker Hub, or a ``mirror``, for the pinned base."""
    lock = Lock.read()
    return engine.manifest(f"{mirror or lock.image}@{lock.digest}")


def within_reach(engine: Engine) -> bool:
    """Whether a base is here or Docker Hub answers, so that none need be made."""
    if here(engine, Settings()):
        return True
    try:
        return engine.ask(ask_argv(engine), timeout=10).ok
    except subprocess.TimeoutExpired:
        return False


def ensure(engine: Engine, settings: Settings, *, dry_run: bool = False) -> Base | None:
    """Return the base, pulled or made if it is not here; None only if ``dry_run`` found none.

    Raises BaseUnavailable, LockBroken or DiskFull.
    """
    from filelock import FileLock

    found = here(engine, settings)
    if found:
        log(f"base: {found.reference} is here")
        if found.made and not dry_run:
            _name(engine, found)
    elif dry_run:
        log("base: would be pulled, or made if no registry answers")
    else:
        with FileLock(cache_directory() / "base.lock"):
            if here(engine, settings) is None:
                _pull_or_make(engine, settings)
        found = here(engine, settings)
        if found:
            _name(engine, found)
    return found


def _name(engine: Engine, found: Base) -> None:
    """Make FROM node:20-slim in a plain build mean ``found``.

    An image that somebody else gave this name keeps it. A pulled base replaces a made one only,
    because a plain build pulls for itself.
    """
    foreign = Lock.read(platform=engine.platform).foreign
    if foreign or engine.local(found.name) in found.names:
        return
    ours = found.made
    if named := engine.image(found.name):
        ours = MADE in (named["Config"].get("Labels") or {})
    if ours:
        engine.tag(found.reference, found.name)


def newest_digest(engine: Engine, settings: Settings, lock: Lock) -> str:
    """Pull the base by its tag and return the digest that the registry has for it.

    An unchanged tag costs one request for its manifest. The pinned digest is returned if the
    image has it too: then nothing changed for this platform. Raises BaseUnavailable.
    """
    image, repository = _pull(engine, settings, lock, f":{lock.tag}")
    inspected = engine.image(image) or {}
    names: list[str] = inspected.get("RepoDigests") or []
    digests = list(dict.fromkeys(name.partition("@")[2] for name in names))
    if lock.digest in digests:
        return lock.digest
    if len(digests) == 1:
        return digests[0]
    # podman lists the index of all architectures and the image of one, sorted by hash.
    for digest in digests:
        manifest = engine.ask(engine.manifest(f"{repository}@{digest}"))
        if '"manifests"' in manifest.stdout:
            return digest
    raise BaseUnavailable(
        f"{engine.name} reports no digest of {repository}:{lock.tag}",
        f"Remove the image and try again: {engine.name} rmi {lock.image}:{lock.tag}",
    )


def _pull_or_make(engine: Engine, settings: Settings) -> None:
    lock = Lock.read(platform=engine.platform)
    if settings.base.make != "always":
        try:
            image, _ = _pull(engine, settings, lock, f"@{lock.digest}")
        except BaseUnavailable as failure:
            if settings.base.make == "never":
                raise
            log(f"base: {failure.what}")
        else:
            engine.tag(image, tag_of(lock, made=False))
            return
    _make(engine, settings, lock)


def _pull(engine: Engine, settings: Settings, lock: Lock, version: str) -> tuple[str, str]:
    """Pull ``version`` (:tag or @digest) from Docker Hub, else from the first mirror that has it.

    Return the image's name for the engine, and the repository. Raises BaseUnavailable.
    """
    reasons = []
    for repository in (lock.image, *settings.base.mirrors):
        log(f"base: pulling {repository}{version}")
        pull = partial(_pull_once, engine, repository, version)
        try:
            image = retry(pull, on=BaseUnavailable, attempts=settings.network.attempts)
        except BaseUnavailable as failure:
            reasons.append(failure.what)
        except subprocess.TimeoutExpired:
            reasons.append(f"{repository}: not complete after {PULL_SECONDS} s")
        else:
            return image, repository
    raise BaseUnavailable("; ".join(reasons), REMEDY)


def _pull_once(engine: Engine, repository: str, version: str) -> str:
    """Pull once and return the last word of the output, which names the image in both engines."""
    result = engine.ask(engine.pull(f"{repository}{version}"), timeout=PULL_SECONDS)
    if result.ok:
        return result.stdout.split()[-1]
    lines = result.output.splitlines() or ["no answer"]
    raise BaseUnavailable(f"{repository}: {lines[-1]}", REMEDY)


def _make(engine: Engine, settings: Settings, lock: Lock) -> None:
    """Import a root file system that was made of packages, or was kept from an earlier call."""
    tag, name = tag_of(lock, made=True), f"{lock.image}:{lock.tag}"
    tar = cache_directory() / f"{tag.partition(':')[2]}.tar"
    if not tar.exists():
        log(f"base: making {name} from packages of Debian {lock.debian} and npm")
        mirror = settings.base.debian_mirror
        rootfs.make_tar(lock, mirror, ca.environment(settings.ca), tar)
    changes = [
        f"ENV NODE_VERSION={lock.node}",
        f"ENV YARN_VERSION={lock.version('yarn')}",
        'ENTRYPOINT ["docker-entrypoint.sh"]',
        'CMD ["node"]',
        f"LABEL {MADE}=made-from-debian-and-npm-packages",
    ]
    result = engine.ask(engine.import_(tar, tag, changes))
    rootfs.require(result, f"{engine.name} cannot import the base image", "Run: inv doctor")
    warn(
        f"base: made here, not Docker's own {name}; the label {MADE} says so.\n"
        f"Other projects' FROM {name} uses it too, until: {engine.name} rmi {name}"
    )
