"""Tasks for the stack: the server with its databases and backup on this machine.

``tasks.py`` includes them.
"""

from invoke.context import Context
from invoke.tasks import task

from pipeline.task_context import ENGINE, engine_of

PART = "falkordb, valkey, opencode, gateway, backup or datadog"


@task(
    help={
        "project": "the directory to mount at /workspace, or 'volume'; remembered",
        "clone": "the URL of a git repository, cloned once into the volume",
        **ENGINE,
    }
)
def up(
    context: Context,
    project: str = "",
    clone: str = "",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Start the stack on loopback: server, FalkorDB, Valkey, backup, Agent if DD_API_KEY is set."""
    from pipeline.stack import lifecycle

    with engine_of(context, engine) as (settings, found):
        lifecycle.up(
            settings,
            found,
            project_directory=project,
            clone=clone,
            dry_run=dry_run,
        )


@task(
    help={
        "volumes": "remove the volumes too; needs --yes",
        "yes": "confirm the removal of volumes",
        **ENGINE,
    }
)
def down(
    context: Context,
    volumes: bool = False,
    yes: bool = False,
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Stop and remove the stack; its volumes stay."""
    from pipeline.stack import lifecycle

    with engine_of(context, engine) as (settings, found):
        lifecycle.down(
            settings,
            found,
            volumes=volumes,
            yes=yes,
            dry_run=dry_run,
        )


@task(help={"json_": "as JSON", "engine": ENGINE["engine"]})
def status(context: Context, json_: bool = False, engine: str = "") -> None:
    """Show the health of each part, its memory and data, and the last backup."""
    from pipeline.stack import health

    with engine_of(context, engine) as (settings, found):
        health.status(settings, found, as_json=json_)


@task(
    help={
        "part": PART,
        "follow": "keep printing new lines",
        "lines": "number of lines",
        "engine": ENGINE["engine"],
    }
)
def logs(
    context: Context, part: str = "", follow: bool = False, lines: int = 50, engine: str = ""
) -> None:
    """Print the logs of the stack."""
    from pipeline.stack import lifecycle

    with engine_of(context, engine) as (settings, found):
        lifecycle.logs(
            settings,
            found,
            part,
            follow=follow,
            lines=lines,
        )


@task(help={"part": PART, "engine": ENGINE["engine"]})
def shell(context: Context, part: str = "opencode", engine: str = "") -> None:
    """Open a shell in a part of the stack."""
    from pipeline.stack import lifecycle

    with engine_of(context, engine) as (settings, found):
        lifecycle.shell(settings, found, part)


@task(help={"engine": ENGINE["engine"]})
def attach(context: Context, engine: str = "") -> None:
    """Open OpenCode's terminal interface, in the server's container."""
    from pipeline.stack import lifecycle

    with engine_of(context, engine) as (settings, found):
        lifecycle.attach(settings, found)


@task(help={"engine": ENGINE["engine"]})
def login(context: Context, engine: str = "") -> None:
    """Log in to a provider of models; kept in the state volume. Restarts the server."""
    from pipeline.stack import lifecycle

    with engine_of(context, engine) as (settings, found):
        lifecycle.login(settings, found)


@task(help={"to": "an image or tag instead of latest", **ENGINE})
def upgrade(
    context: Context,
    to: str = "latest",
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Upgrade the stack after a backup; go back to image and data if it is not healthy."""
    from pipeline.stack import data

    with engine_of(context, engine) as (settings, found):
        data.upgrade(settings, found, to, dry_run=dry_run)


@task(
    help={
        "backup": "the ID of a backup or its beginning, instead of the newest",
        "only": "falkordb, valkey, opencode, files, separated by commas",
        "replace": "replace existing data, after a safety backup",
        **ENGINE,
    },
)
def restore(
    context: Context,
    backup: str = "",
    only: str = "",
    replace: bool = False,
    engine: str = "",
    dry_run: bool = False,
) -> None:
    """Restore a backup into the stack; stops the server while its own data is restored."""
    from pipeline.stack import data

    with engine_of(context, engine) as (settings, found):
        data.restore(
            settings,
            found,
            backup,
            only=only,
            replace=replace,
            dry_run=dry_run,
        )
