"""Tasks for releases: pins, nights, and the image that people run. ``tasks.py`` includes them."""

from invoke.context import Context
from invoke.tasks import task

from pipeline.task_context import ENGINE, engine_of, settings_of


@task(help={"only": "parts, with commas: openagents, base, npm, python, tools", **ENGINE})
def bump(
    context: Context,
    only: str = "",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Move the pins in locks/ to the newest versions that their constraints allow."""
    from pipeline.release import bump

    parts = only.replace(",", " ").split()
    with settings_of(context, engine) as settings:
        result = bump.bump(settings, parts, dry_run=dry_run)
        bump.show(result, dry_run=dry_run)


@task(
    help={
        "log": "write the output to a new file in build/nights, as cron does",
        "delay": "first wait a random time, at most this many seconds",
        **ENGINE,
    }
)
def nightly(
    context: Context,
    log: bool = False,
    delay: int = 0,
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Bump, fetch, build, smoke and release in a copy; a failure changes nothing."""
    from pipeline.release import nightly

    with settings_of(context, engine) as settings:
        nightly.nightly(
            settings,
            log_file=log,
            delay=delay,
            dry_run=dry_run,
        )


@task(help={"image": "an image or tag instead of candidate", **ENGINE})
def promote(
    context: Context,
    image: str = "candidate",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Test the candidate and tag it latest; the former latest becomes previous."""
    from pipeline.image import tags
    from pipeline.release import promote
    from pipeline.smoke import run

    with engine_of(context, engine) as (settings, found):
        target = tags.find(settings, found, image)
        report = run.smoke(
            settings,
            found,
            target["Id"],
            dry_run=dry_run,
        )
        promote.promote(
            settings,
            found,
            report,
            strict=True,
            dry_run=dry_run,
        )


@task(help={"to": "a tag or an ID instead of previous", **ENGINE})
def rollback(
    context: Context,
    to: str = "previous",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Test the previous image and tag it latest; a second rollback undoes the first."""
    from pipeline.release import promote
    from pipeline.smoke import run

    with engine_of(context, engine) as (settings, found):
        target = promote.rollback_target(settings, found, to)
        report = run.smoke(
            settings,
            found,
            target["Id"],
            dry_run=dry_run,
        )
        promote.rollback(
            settings,
            found,
            report,
            to,
            dry_run=dry_run,
        )


@task(help={"keep": "number of dated builds to keep instead of nightly.keep", **ENGINE})
def prune(
    context: Context,
    keep: int = 0,
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Remove old builds of this image; never one with another tag or a container."""
    from pipeline.release import prune

    with engine_of(context, engine) as (settings, found):
        prune.prune(
            settings,
            found,
            keep or settings.nightly.keep,
            dry_run=dry_run,
        )


@task(
    help={
        "to": "REGISTRY/REPOSITORY",
        "image": "an image instead of latest",
        "digests": "pushed before, with commas: join them as REGISTRY/REPOSITORY:TAG",
        **ENGINE,
    }
)
def push(
    context: Context,
    to: str,
    image: str = "latest",
    digests: str = "",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Push latest to a registry, or join pushed digests; print the digest for inv pull."""
    from pipeline.release import registry

    with engine_of(context, engine) as (settings, found):
        if digests:
            registry.push_index(settings, found, to, digests.split(","), dry_run=dry_run)
            return
        registry.push(
            settings,
            found,
            to,
            image,
            dry_run=dry_run,
        )


@task(help={"image": "REGISTRY/REPOSITORY@sha256:DIGEST", **ENGINE})
def pull(
    context: Context,
    image: str,
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Pull an image by its digest and tag it candidate; promote makes it latest."""
    from pipeline.release import registry

    with engine_of(context, engine) as (settings, found):
        registry.pull(settings, found, image, dry_run=dry_run)


@task(help={"json": "all records as JSON lines", "last": "number of records"})
def history(context: Context, json: bool = False, last: int = 20) -> None:
    """Show the builds and releases on this machine."""
    from pipeline.release import history

    with settings_of(context):
        history.show(lines=json, last=last)


@task(help={"output": "the file to write"})
def report(context: Context, output: str = "build/report.html") -> None:
    """Write the history as an HTML page with plots."""
    from pipeline.release import html_report

    with settings_of(context):
        html_report.write(output)


@task(
    help={
        "at": "HH:MM instead of a random minute between 01:00 and 04:59",
        "remove": "remove the entry",
        "show": "show the entry and change nothing",
        "dry_run": ENGINE["dry_run"],
    }
)
def schedule(
    context: Context,
    at: str = "",
    remove: bool = False,
    show: bool = False,
    dry_run: bool = False,
) -> None:
    """Run nightly every night by an entry in your crontab."""
    from pipeline.release import schedule

    with settings_of(context):
        schedule.schedule(
            at=at,
            remove=remove,
            show=show,
            dry_run=dry_run,
        )
