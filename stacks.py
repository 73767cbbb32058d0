"""The tasks of the stack, which ``tasks.py`` takes in: the server with its databases and backup, on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.tasks import task

from pipeline.cli import ENGINE, engine_of

if TYPE_CHECKING:
    from invoke.context import Context

PART = "falkordb, valkey, opencode, backup or datadog"


@task(help=ENGINE)
def up(context: Context, engine: str = "", dry_run: bool = False) -> None:
    """Start the stack on loopback: the server, FalkorDB, Valkey, the backup, and with a DD_API_KEY an Agent."""
    from pipeline.stack import life

    with engine_of(context, engine) as (settings, found):
        life.up(settings, found, dry_run=dry_run)


@task(help={"volumes": "remove its volumes too, with --yes", "yes": "yes, remove them for good", **ENGINE})
def down(context: Context, volumes: bool = False, yes: bool = False, engine: str = "", dry_run: bool = False) -> None:
    """End the stack; its volumes stay."""
    from pipeline.stack import life

    with engine_of(context, engine) as (settings, found):
        life.end(settings, found, volumes=volumes, yes=yes, dry_run=dry_run)


@task(help={"json_": "as JSON", "engine": ENGINE["engine"]})
def status(context: Context, json_: bool = False, engine: str = "") -> None:
    """Say what is healthy, how old the last backup is, memory and sizes, and what is wrong."""
    from pipeline.stack import health

    with engine_of(context, engine) as (settings, found):
        health.status(settings, found, as_json=json_)


@task(help={"part": PART, "follow": "go on as it writes", "lines": "how many", "engine": ENGINE["engine"]})
def logs(context: Context, part: str = "", follow: bool = False, lines: int = 50, engine: str = "") -> None:
    """Print what the stack's parts have written last."""
    from pipeline.stack import life

    with engine_of(context, engine) as (settings, found):
        life.logs(settings, found, part, follow=follow, lines=lines)


@task(help={"part": PART, "engine": ENGINE["engine"]})
def shell(context: Context, part: str = "opencode", engine: str = "") -> None:
    """Open a shell in a part of the stack."""
    from pipeline.stack import life

    with engine_of(context, engine) as (settings, found):
        life.shell(settings, found, part)


@task(help={"to": "an image, or a tag of ours, instead of latest", **ENGINE})
def upgrade(context: Context, to: str = "latest", engine: str = "", dry_run: bool = False) -> None:
    """Move the stack to the newest released image: a backup before, and back to image and data if it is not healthy."""
    from pipeline.stack import upgrade as upgrading

    with engine_of(context, engine) as (settings, found):
        upgrading.upgrade(settings, found, to, dry_run=dry_run)


@task(
    help={
        "backup": "the beginning of its ID; without one the newest",
        "only": "falkordb, valkey, opencode, files, with commas between",
        "replace": "also where something is, which is saved first",
        **ENGINE,
    },
)
def restore(
    context: Context, backup: str = "", only: str = "", replace: bool = False, engine: str = "", dry_run: bool = False
) -> None:
    """Put a backup back into the stack; the server is stopped meanwhile if its own data comes back."""
    from pipeline.stack import restore as restoring

    with engine_of(context, engine) as (settings, found):
        restoring.restore(settings, found, backup, only=only, replace=replace, dry_run=dry_run)
