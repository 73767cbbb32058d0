"""The tasks: ``inv --list`` names them, ``inv --help TASK`` explains one. What they do is in ``pipeline/``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from invoke.tasks import task

from pipeline.cli import ENGINE, engine_of
from pipeline.cli import settings_of as _settings
from releases import bump, history, nightly, promote, prune, pull, push, report, rollback, schedule
from stacks import down, logs, restore, shell, status, up, upgrade

if TYPE_CHECKING:
    from invoke.context import Context

__all__ = [
    "bump", "down", "history", "logs", "nightly", "promote", "prune", "pull", "push", "report", "restore", "rollback",
    "schedule", "shell", "status", "up", "upgrade",
]  # fmt: skip

if any(name.startswith("INVOKE_") for name in os.environ):
    from pipeline.settings import check_environment

    check_environment()  # Invoke reads them right after this file, and meets a number that is none with a traceback


@task(help={**ENGINE, "tests": "also what the tests need: docker, a registry"})
def setup(context: Context, engine: str = "", tests: bool = False, dry_run: bool = False) -> None:
    """Say which engine answers; install podman, with what it needs for networks, when none does."""
    from pipeline import host

    with _settings(context, engine) as settings:
        host.setup(settings.engine, tests=tests, dry_run=dry_run)


@task(
    help={
        "ref": "a branch, tag or commit instead of the pinned commit",
        "url": "another repository",
        "latest": "the newest commit of the pinned branch",
        "force": "throw away local edits in vendor/OpenAgents",
        "starter": "take the small package of this repository where the git host cannot be reached",
        "ca": "a PEM file of extra certificate authorities",
        **ENGINE,
    }
)
def fetch(
    context: Context,
    ref: str = "",
    url: str = "",
    latest: bool = False,
    force: bool = False,
    starter: bool = True,
    ca: str = "",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Fetch the inputs: OpenAgents at its pinned commit, the base image, this network's CAs."""
    from pipeline import base, openagents
    from pipeline import ca as authorities
    from pipeline import engine as engines
    from pipeline.errors import EngineBroken, NoEngine
    from pipeline.report import say

    with _settings(context, engine, ca) as settings:
        openagents.fetch(settings, ref=ref, url=url, latest=latest, force=force, starter=starter, dry_run=dry_run)
        if not dry_run:
            authorities.stage(settings.ca)
        try:
            found = engines.of(settings)
        except (NoEngine, EngineBroken):
            say("base: waits for an engine; inv setup installs one")
        else:
            base.ensure(found, settings, dry_run=dry_run)


@task(help=ENGINE)
def base(context: Context, engine: str = "", dry_run: bool = False) -> None:
    """Pull node:20-slim by its digest, or make it from packages where no registry answers."""
    from pipeline import base as images

    with engine_of(context, engine) as (settings, found):
        images.ensure(found, settings, dry_run=dry_run)


@task(
    help={
        "ca": "a PEM file of extra certificate authorities",
        "no_cache": "do every step anew, so that newer Debian packages come in",
        **ENGINE,
    }
)
def build(context: Context, engine: str = "", ca: str = "", no_cache: bool = False, dry_run: bool = False) -> None:
    """Build the Containerfile into opencode-server:candidate."""
    from pipeline import image

    with engine_of(context, engine, ca) as (settings, found):
        image.build(settings, found, cache=not no_cache, dry_run=dry_run)


@task(
    help={
        "url": "ask a server that already runs, instead; OPENCODE_SERVER_PASSWORD is its password",
        "image": "another image than opencode-server:candidate; no tag is moved",
        "deep": "have a whole conversation too, with a model that needs no account",
        **ENGINE,
    }
)
def smoke(
    context: Context, url: str = "", image: str = "", deep: bool = False, engine: str = "", dry_run: bool = False
) -> None:
    """Start the candidate, ask it everything, and tag it latest when every answer is right."""
    from pipeline import engine as engines
    from pipeline import smoke as smoking

    with _settings(context, engine) as settings:
        if url:
            smoking.smoke_url(settings, url)
        else:
            smoking.smoke(settings, engines.of(settings), image, deep=deep, dry_run=dry_run)


@task(help={"image": "another than the candidate", "sbom": "also SPDX, which takes 17 s", "engine": ENGINE["engine"]})
def contents(context: Context, image: str = "", sbom: bool = True, engine: str = "") -> None:
    """Say what is inside an image, and what is known against it: packages, SPDX, advisories."""
    from pipeline import contents as inside

    with engine_of(context, engine) as (settings, found):
        inside.contents(settings, found, image, sbom=sbom)


@task(
    help={
        "before": "an image, or a tag of ours: latest",
        "after": "another: candidate",
        "files": "name every file that differs",
        "same": "fail unless content and settings are the same",
        "engine": ENGINE["engine"],
    }
)
def diff(context: Context, before: str, after: str, files: bool = False, same: bool = False, engine: str = "") -> None:
    """Say on one screen what changed between two images: versions, sizes, files, settings."""
    from pipeline import diff as differences

    with engine_of(context, engine) as (settings, found):
        differences.diff(settings, found, before, after, files=files, same=same)


@task
def lint(context: Context) -> None:
    """Check with ruff, mypy --strict, hadolint and shellcheck."""
    from pipeline import checks

    with _settings(context):
        checks.lint()


@task(
    help={"unit": "only what needs no engine and no server", "keyword": "only tests whose name matches, as pytest -k"}
)
def test(context: Context, unit: bool = False, keyword: str = "") -> None:
    """Lint, then every test: units, servers on loopback, and images built and smoked by podman and docker."""
    from pipeline import checks

    with _settings(context):
        checks.test(unit=unit, keyword=keyword)


@task(help={"engine": ENGINE["engine"]})
def doctor(context: Context, engine: str = "") -> None:
    """Say what this machine can do and what to fix."""
    from pipeline import doctor as diagnosis

    with _settings(context, engine) as settings:
        diagnosis.doctor(settings)


@task(help={"only": "one of list, cold (sizes and rebuilds too), start, backup and memory", **ENGINE})
def bench(context: Context, only: str = "", engine: str = "", dry_run: bool = False) -> None:
    """Measure against the naive way, side by side, and write the ratios to build/bench.json."""
    from bench import measure

    with engine_of(context, engine) as (settings, found):
        measure.bench(settings, found, only=only, dry_run=dry_run)


@task(help={"count": "how many keys, rows and pairs of nodes"})
def drill(context: Context, count: int = 10000) -> None:
    """Back up servers of its own, lose them, restore, compare, and say how long each step took."""
    from bench import backup

    with _settings(context):
        backup.drill(count)
