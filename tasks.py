"""The tasks: ``inv --list`` lists them, ``inv --help TASK`` explains one.

Those of the stack are in stacks.py, those of releases in releases.py. The work is in ``pipeline/``.
"""

import os

from invoke.context import Context
from invoke.tasks import task

from pipeline.task_context import ENGINE, engine_of, settings_of
from releases import *  # noqa: F403 -- Invoke collects the tasks of this module
from stacks import *  # noqa: F403

if any(name.startswith("INVOKE_") for name in os.environ):
    from pipeline.core.settings import check_environment

    # Invoke reads them right after this file, and reports an invalid number with a traceback.
    check_environment()


@task(help={**ENGINE, "tests": "install what the tests need too: docker, a registry"})
def setup(
    context: Context,
    engine: str = "",
    tests: bool = False,
    dry_run: bool = False,
) -> None:
    """Find a container engine; install podman if there is none."""
    from pipeline.host import setup

    with settings_of(context, engine) as settings:
        setup.setup(
            settings.engine,
            tests=tests,
            dry_run=dry_run,
        )


@task(
    help={
        "ref": "a branch, tag or commit instead of the pinned commit",
        "url": "another repository",
        "latest": "the newest commit of the pinned branch",
        "force": "discard local edits in vendor/OpenAgents",
        "starter": "use vendor/starter if the git host cannot be reached",
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
    """Fetch OpenAgents at its pinned commit, the base image and the CAs of this network."""
    from pipeline.core.console import log
    from pipeline.core.errors import EngineBroken, NoEngine
    from pipeline.engines import detect
    from pipeline.inputs import base, openagents
    from pipeline.inputs.ca import stage

    with settings_of(context, engine, ca) as settings:
        openagents.fetch(
            settings, ref=ref, url=url, latest=latest, force=force, starter=starter, dry_run=dry_run
        )
        if not dry_run:
            stage(settings.ca)
        try:
            found = detect.of(settings)
        except (NoEngine, EngineBroken):
            log("base: not fetched, there is no engine; install one: inv setup")
        else:
            base.ensure(found, settings, dry_run=dry_run)


@task(help=ENGINE)
def base(context: Context, engine: str = "", dry_run: bool = False) -> None:
    """Pull node:20-slim by its digest, or build it from packages if no registry answers."""
    from pipeline.inputs import base

    with engine_of(context, engine) as (settings, found):
        base.ensure(found, settings, dry_run=dry_run)


@task(
    help={
        "ca": "a PEM file of extra certificate authorities",
        "no_cache": "repeat all steps",
        **ENGINE,
    }
)
def build(
    context: Context, engine: str = "", ca: str = "", no_cache: bool = False, dry_run: bool = False
) -> None:
    """Build the Containerfile into opencode-server:candidate."""
    from pipeline.image import build

    with engine_of(context, engine, ca) as (settings, found):
        build.build(
            settings,
            found,
            cache=not no_cache,
            dry_run=dry_run,
        )


@task(
    help={
        "url": "test a running server; OPENCODE_SERVER_PASSWORD is its password",
        "image": "test this image instead of candidate, and move no tag",
        "deep": "add a conversation with a fake model",
        **ENGINE,
    }
)
def smoke(
    context: Context,
    url: str = "",
    image: str = "",
    deep: bool = False,
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Start the candidate, run every probe, and tag it latest when all pass."""
    from pipeline.engines import detect
    from pipeline.release import promote
    from pipeline.smoke import run

    with settings_of(context, engine) as settings:
        if url:
            run.smoke_url(settings, url)
            return
        found = detect.of(settings)
        report = run.smoke(
            settings,
            found,
            image,
            deep=deep,
            dry_run=dry_run,
        )
        if not image:
            promote.promote(
                settings,
                found,
                report,
                dry_run=dry_run,
            )


@task(
    help={
        "image": "an image instead of candidate",
        "sbom": "write an SPDX file too; takes 17 s",
        "engine": ENGINE["engine"],
    }
)
def contents(
    context: Context,
    image: str = "",
    sbom: bool = True,
    engine: str = "",
) -> None:
    """List the packages of an image and their known vulnerabilities."""
    from pipeline.image import contents

    with engine_of(context, engine) as (settings, found):
        contents.contents(settings, found, image, sbom=sbom)


@task(
    help={
        "before": "an image, or a tag of ours: latest",
        "after": "another: candidate",
        "files": "list every file that differs",
        "same": "fail if content or settings differ",
        "engine": ENGINE["engine"],
    }
)
def diff(
    context: Context,
    before: str,
    after: str,
    files: bool = False,
    same: bool = False,
    engine: str = "",
) -> None:
    """Show the differences of two images: versions, sizes, files, settings."""
    from pipeline.image import diff

    with engine_of(context, engine) as (settings, found):
        diff.diff(
            settings,
            found,
            before,
            after,
            files=files,
            same=same,
        )


@task
def lint(context: Context) -> None:
    """Check with ruff, mypy --strict, hadolint and shellcheck."""
    from pipeline.host import checks

    with settings_of(context):
        checks.lint()


@task(
    help={
        "unit": "only tests without an engine or a server",
        "keyword": "only tests that match, as in pytest -k",
    }
)
def test(context: Context, unit: bool = False, keyword: str = "") -> None:
    """Lint, then run the tests: unit, integration, and images with podman and docker."""
    from pipeline.host import checks

    with settings_of(context):
        checks.test(unit=unit, keyword=keyword)


@task(help={"engine": ENGINE["engine"]})
def doctor(context: Context, engine: str = "") -> None:
    """Check this machine and print what to fix."""
    from pipeline.host import doctor

    with settings_of(context, engine) as settings:
        doctor.doctor(settings)


@task(
    help={"only": "list, cold (with sizes and rebuilds), start, night, backup or memory", **ENGINE}
)
def bench(
    context: Context,
    only: str = "",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Measure against a naive image; write the ratios to build/bench.json."""
    from bench import measure

    with engine_of(context, engine) as (settings, found):
        measure.bench(
            settings,
            found,
            only=only,
            dry_run=dry_run,
        )


@task(help={"count": "number of keys, rows and pairs of nodes"})
def drill(context: Context, count: int = 10000) -> None:
    """Back up and restore local test servers, and show how long each step took."""
    from bench import backup

    with settings_of(context):
        backup.drill(count)
