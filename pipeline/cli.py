"""What the tasks have in common: their settings and their engine, with every failure named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from invoke.context import Context

    from pipeline.engine import Engine
    from pipeline.settings import Settings

ENGINE = {"engine": "podman or docker; otherwise the one that answers", "dry_run": "say what would be done, and stop"}


@contextlib.contextmanager
def settings_of(context: Context, engine: str = "", ca: str = "") -> Iterator[Settings]:
    """Yield the settings of a task; signals and what any step can meet become failures with a name."""
    from pipeline import errors, process, settings

    process.echo = context.config.run.echo
    flags = {"engine": engine, "ca": ca}
    config = dict(context.config.items()) | {key: value for key, value in flags.items() if value}
    with process.interruptible(), errors.named():
        yield settings.load(config)


@contextlib.contextmanager
def engine_of(context: Context, engine: str = "", ca: str = "") -> Iterator[tuple[Settings, Engine]]:
    """Yield the settings of a task and the engine that answers. Raises NoEngine, EngineBroken."""
    from pipeline import engine as engines

    with settings_of(context, engine, ca) as settings:
        yield settings, engines.of(settings)
