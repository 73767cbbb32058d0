"""What all tasks share: settings, engine and the handling of signals and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from invoke.context import Context

    from pipeline.core.settings import Settings
    from pipeline.engines.engine import Engine

ENGINE = {
    "engine": "podman or docker; the default is the one that works",
    "dry_run": "print what would be done",
}


@contextlib.contextmanager
def settings_of(
    context: Context,
    engine: str = "",
    ca: str = "",
) -> Iterator[Settings]:
    """Yield the settings; signals and errors of the operating system become PipelineErrors."""
    from pipeline.core import errors, process, settings

    process.echo = context.config.run.echo
    flags = {"engine": engine, "ca": ca}
    config = dict(context.config.items())
    config |= {key: value for key, value in flags.items() if value}
    with process.interruptible(), errors.named():
        yield settings.load(config)


@contextlib.contextmanager
def engine_of(
    context: Context,
    engine: str = "",
    ca: str = "",
) -> Iterator[tuple[Settings, Engine]]:
    """Yield the settings and the engine that works. Raises NoEngine, EngineBroken."""
    from pipeline.engines import detect

    with settings_of(context, engine, ca) as settings:
        yield settings, detect.of(settings)
