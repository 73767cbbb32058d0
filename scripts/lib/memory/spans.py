"""Datadog traces of the memory's work, where an Agent answers."""

import contextlib
import os
import sys
from collections.abc import Iterator

from lib.common.datadog import Datadog


def start() -> None:
    """Start tracing if an Agent answers; call this before Graphiti is imported.

    Without an Agent a traced process takes three seconds to exit.
    """
    if Datadog.read(os.environ, "DD_").agent_answers():
        os.environ.setdefault("DD_SERVICE", "opencode-memory")
        # The longest name of a command; the rest of a command holds the text of memories.
        os.environ["DD_REDIS_CMD_MAX_LENGTH"] = "12"
        import ddtrace.auto  # noqa: F401 -- the import starts tracing


@contextlib.contextmanager
def span(name: str, project: str) -> Iterator[None]:
    """Trace the body as ``memory.NAME`` if tracing has started."""
    tracing = sys.modules.get("ddtrace.trace")
    if tracing is None:
        yield
        return
    with tracing.tracer.trace(f"memory.{name}", resource=project):
        yield


def stop() -> None:
    """Send the last spans; takes at most a second."""
    if tracing := sys.modules.get("ddtrace.trace"):
        tracing.tracer.shutdown(timeout=1)
