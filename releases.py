"""The tasks of releases, which ``tasks.py`` takes in: pins, nights, and which image people run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.tasks import task

from pipeline.cli import ENGINE, engine_of, settings_of

if TYPE_CHECKING:
    from invoke.context import Context


@task(help={"only": "parts, separated by commas: openagents, base, npm, python, tools", **ENGINE})
def bump(context: Context, only: str = "", engine: str = "", dry_run: bool = False) -> None:
    """Move every pin in locks/ to the newest that satisfies its constraints, and say which moved."""
    from pipeline import bump as pins

    with settings_of(context, engine) as settings:
        pins.show(pins.bump(settings, only.replace(",", " ").split(), dry_run=dry_run), dry_run=dry_run)


@task(
    help={
        "log": "write to a file of its own in build/nights, as under cron",
        "delay": "wait a random time first, at most this many seconds",
        **ENGINE,
    }
)
def nightly(context: Context, log: bool = False, delay: int = 0, engine: str = "", dry_run: bool = False) -> None:
    """Bump, fetch, build, smoke and release, in a copy; whatever fails, nothing that people run has changed."""
    from pipeline import nightly as nights

    with settings_of(context, engine) as settings:
        nights.nightly(settings, log=log, delay=delay, dry_run=dry_run)


@task(help={"image": "another image than the candidate", **ENGINE})
def promote(context: Context, image: str = "", engine: str = "", dry_run: bool = False) -> None:
    """Smoke the candidate, and make it latest; what was latest becomes previous."""
    from pipeline import release

    with engine_of(context, engine) as (settings, found):
        release.release(settings, found, image, dry_run=dry_run)


@task(help={"to": "a tag or an ID instead of previous", **ENGINE})
def rollback(context: Context, to: str = "previous", engine: str = "", dry_run: bool = False) -> None:
    """Smoke what was released before, and make it latest; once more goes forward again."""
    from pipeline import release

    with engine_of(context, engine) as (settings, found):
        release.rollback(settings, found, to, dry_run=dry_run)


@task(help={"keep": "how many dated builds to keep; nightly.keep otherwise", **ENGINE})
def prune(context: Context, keep: int = 0, engine: str = "", dry_run: bool = False) -> None:
    """Remove old builds and what they stood on; never what is tagged otherwise, or running."""
    from pipeline import prune as images

    with engine_of(context, engine) as (settings, found):
        images.prune(settings, found, keep or settings.nightly.keep, dry_run=dry_run)


@task(help={"to": "REGISTRY/REPOSITORY", "image": "another image than latest", **ENGINE})
def push(context: Context, to: str, image: str = "latest", engine: str = "", dry_run: bool = False) -> None:
    """Push latest to a registry, and say the digest by which another machine pulls it."""
    from pipeline import registry

    with engine_of(context, engine) as (settings, found):
        registry.push(settings, found, to, image, dry_run=dry_run)


@task(help={"image": "REGISTRY/REPOSITORY@sha256:DIGEST", **ENGINE})
def pull(context: Context, image: str, engine: str = "", dry_run: bool = False) -> None:
    """Pull an image by its digest, and tag it candidate; promote makes it latest."""
    from pipeline import registry

    with engine_of(context, engine) as (settings, found):
        registry.pull(settings, found, image, dry_run=dry_run)


@task(help={"json": "every record, as JSON lines", "last": "how many of them"})
def history(context: Context, json: bool = False, last: int = 20) -> None:
    """Print what was built and released here."""
    from pipeline import history as records

    with settings_of(context):
        records.show(lines=json, last=last)


@task(help={"output": "where to"})
def report(context: Context, output: str = "build/report.html") -> None:
    """Write the history as one HTML page, with plots."""
    from pipeline import page

    with settings_of(context):
        page.write(output)


@task(
    help={
        "at": "HH:MM; a minute of the small hours of this machine's own otherwise",
        "remove": "take it out again",
        "show": "only show what is there",
        "systemd": "a timer instead of cron's table",
        "dry_run": ENGINE["dry_run"],
    }
)
def schedule(
    context: Context, at: str = "", remove: bool = False, show: bool = False, systemd: bool = False,
    dry_run: bool = False,
) -> None:  # fmt: skip
    """Have cron, or a systemd timer, run nightly every night."""
    from pipeline import schedule as timing

    with settings_of(context) as settings:
        timing.schedule(settings, at=at, remove=remove, show=show, systemd=systemd, dry_run=dry_run)
