"""Which images are no longer needed, and surely ours to remove: by their tag or by their label, never by a guess."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline import base
from pipeline.engine import Engine
from pipeline.image import BUILD_OF, RUNTIME, RUNTIME_OF, owner_of
from pipeline.release import DATED, kind
from pipeline.report import say
from pipeline.settings import Settings


@dataclass(frozen=True)
class Images:
    """The images that an engine has, by ID: what it says of each, their names, and which of them have a container."""

    engine: Engine
    said: dict[str, dict[str, Any]]
    names: dict[str, list[str]]
    used: set[str]

    def tags(self, identity: str, repository: str) -> list[str]:
        """Return the tags of an image in a repository."""
        prefix = self.engine.local(f"{repository}:x")[:-1]
        return [name[len(prefix) :] for name in self.names[identity] if name.startswith(prefix)]

    def free(self, identity: str, repository: str) -> bool:
        """Whether an image has tags in this repository, and neither other names nor a container."""
        return identity not in self.used and 0 < len(self.names[identity]) == len(self.tags(identity, repository))

    def loose(self, identity: str) -> bool:
        """Whether an image has neither name nor container."""
        return identity not in self.used and not self.names[identity]

    def created(self, identity: str) -> str:
        """Return when an image was made, in a form that sorts; nothing for no image."""
        return str(self.said[identity]["Created"]) if identity else ""

    def newest(self, repository: str, some: Iterable[str]) -> str:
        """Return the newest of ``some`` that is tagged in a repository, or nothing."""
        return max((each for each in some if self.tags(each, repository)), key=self.created, default="")

    def label(self, identity: str, name: str) -> str:
        """Return a label of an image, or nothing."""
        return str((self.said[identity]["Config"].get("Labels") or {}).get(name, ""))

    def unneeded(self, some: Iterable[str], going: Iterable[str]) -> list[str]:
        """Return those of ``some`` on which nothing stands, apart from themselves and what is ``going``."""
        some = list(some)
        staying = [self.said[each]["RootFS"]["Layers"] for each in self.said.keys() - {*some, *going}]
        return [each for each in some if not _carries(self.said[each]["RootFS"]["Layers"], staying)]


def prune(settings: Settings, engine: Engine, keep: int, *, dry_run: bool = False) -> list[str]:
    """Remove all but the ``keep`` newest dated builds, and what no build stands on any more; return what went.

    Only what says that it is of this image's name: dated builds by their tag, untagged ones and runtimes by their
    label. A base, which is the same for everybody, goes with the last that stood on it. Never an image that has another
    tag, or a container, running or not.
    """
    images, whose = look(engine), owner_of(settings.image)
    dated = {each: list(filter(DATED.fullmatch, images.tags(each, settings.image))) for each in images.names}
    builds = sorted(filter(dated.get, dated), key=images.created, reverse=True)
    going = [each for each in builds[keep:] if images.free(each, settings.image)]
    going = [each for each in going if len(dated[each]) == len(images.names[each])]
    going += [each for each in images.names if images.loose(each) and images.label(each, BUILD_OF) == whose]

    # Each build has its runtime's label too.
    runtimes = [each for each in images.names if not images.label(each, BUILD_OF)]
    mine = [each for each in runtimes if images.label(each, RUNTIME_OF) == whose]
    latest = images.newest(RUNTIME, mine)  # it may be waiting for its first build
    spare = [each for each in mine if images.free(each, RUNTIME) and each != latest]
    # Made anew, without a cache, one has lost its tag to the newer; what is newer still may be a build in the making.
    spare += [each for each in mine if images.loose(each) and images.created(each) < images.created(latest)]
    going += images.unneeded(spare, going)

    latest = images.newest(base.NAME, images.names)
    spare = [each for each in images.names if images.free(each, base.NAME) and each != latest]
    layers = [images.said[each]["RootFS"]["Layers"] for each in going]
    spare = [each for each in spare if _carries(images.said[each]["RootFS"]["Layers"], layers)]
    going += images.unneeded(spare, going)

    gone = [name for each in going for name in images.names[each] or [each]]
    for name in gone:
        say(f"prune: {'would remove' if dry_run else 'removing'} {name}")
        if not dry_run:
            engine.ask(engine.argv("rmi", name))
    nobodys = [each for each in runtimes if not images.label(each, RUNTIME_OF)]
    nobodys = [each for each in nobodys if images.free(each, RUNTIME) or (images.loose(each) and _build(images, each))]
    if nobodys := images.unneeded(nobodys, going):
        names = " ".join(sorted(name for each in nobodys for name in images.names[each] or [each[:12]]))
        say(f"prune: these do not say whose they are, and stay; where nobody needs them: {engine.name} rmi {names}")
    return gone


def look(engine: Engine) -> Images:
    """Ask the engine which images and containers it has."""
    done = engine.ask(engine.argv("images", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"))
    named: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        identity, name = line.removeprefix("sha256:").split()
        named.setdefault(identity, []).extend([] if "<none>" in name else [name])
    inspected = json.loads(engine.ask(engine.argv("image", "inspect", *named)).stdout or "[]") if named else []
    said = {str(image["Id"]).removeprefix("sha256:"): image for image in inspected}
    containers = engine.ask(engine.argv("ps", "--all", "--quiet", "--no-trunc")).stdout.split()
    words = engine.argv("inspect", "--format", "{{.Image}}", *containers)
    used = engine.ask(words).stdout.replace("sha256:", "").split() if containers else []
    return Images(engine, said, {each: names for each, names in named.items() if each in said}, set(used))


def _build(images: Images, identity: str) -> bool:
    return bool(kind(images.said[identity]))


def _carries(layers: list[str], others: Iterable[list[str]]) -> bool:
    """Whether one of ``others`` has these layers at its bottom, and more."""
    return any(len(other) > len(layers) and other[: len(layers)] == layers for other in others)
