"""Datadog: tracing where an Agent answers, and the queue's depth and age as metrics where a key is."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from .settings import env

AGENT_SECONDS = 0.5
METRICS_SECONDS = 5.0


def agent_answers() -> bool:
    """Say whether tracing is wanted and a Datadog Agent listens where the environment says."""
    url, host = env("DD_TRACE_AGENT_URL"), env("DD_AGENT_HOST")
    if not (url or host) or env("DD_TRACE_ENABLED", "true").lower() in ("0", "false"):
        return False
    try:
        parts = urlsplit(url)
        port = parts.port or int(env("DD_TRACE_AGENT_PORT", "8126"))
        agent = http.client.HTTPConnection(parts.hostname or host or "localhost", port, timeout=AGENT_SECONDS)
        with contextlib.closing(agent):
            if parts.scheme == "unix":
                agent.sock = socket.socket(socket.AF_UNIX)
                agent.sock.settimeout(AGENT_SECONDS)
                agent.sock.connect(parts.path)
            agent.request("GET", "/info")
            return agent.getresponse().status == http.HTTPStatus.OK
    except (OSError, ValueError, http.client.HTTPException):
        return False


def start() -> None:
    """Trace from here on what Graphiti does, where an Agent answers; call it before Graphiti is imported.

    An Agent that does not answer would cost three seconds at the end of this process.
    """
    if agent_answers():
        os.environ.setdefault("DD_SERVICE", "opencode-memory")
        import ddtrace.auto  # noqa: F401 -- importing it is what instruments the rest


@contextlib.contextmanager
def span(name: str, project: str) -> Iterator[None]:
    """Trace a piece of work, if anything is traced."""
    tracing = sys.modules.get("ddtrace.trace")
    if tracing is None:
        yield
        return
    with tracing.tracer.trace(f"memory.{name}", resource=project):
        yield


def end() -> None:
    """Hand in the last spans; takes at most a second."""
    if tracing := sys.modules.get("ddtrace.trace"):
        tracing.tracer.shutdown(timeout=1)


def report(states: Mapping[str, Mapping[str, Any]]) -> str:
    """Send each project's queue depth, age and dead letters to Datadog; return why it did not work, "" when it did.

    ``states`` is from a project to what ``Queue.state`` says. DD_URL is where to send it, if not to DD_SITE.
    """
    from datadog_api_client import ApiClient, Configuration
    from datadog_api_client.v2.api.metrics_api import MetricsApi
    from datadog_api_client.v2.model.metric_intake_type import MetricIntakeType
    from datadog_api_client.v2.model.metric_payload import MetricPayload
    from datadog_api_client.v2.model.metric_point import MetricPoint
    from datadog_api_client.v2.model.metric_resource import MetricResource
    from datadog_api_client.v2.model.metric_series import MetricSeries

    now = int(time.time())
    series = [
        MetricSeries(
            metric=f"opencode.memory.queue.{name}",
            type=MetricIntakeType.GAUGE,
            points=[MetricPoint(timestamp=now, value=float(state[key]))],
            tags=[f"project:{project}"],
            resources=[MetricResource(name=socket.gethostname(), type="host")],
        )
        for project, state in states.items()
        for name, key in (("depth", "waiting"), ("age", "oldest_seconds"), ("dead", "dead"))
    ]
    try:
        with ApiClient(Configuration(host=env("DD_URL") or None, request_timeout=METRICS_SECONDS)) as client:
            MetricsApi(client).submit_metrics(body=MetricPayload(series=series))
    except Exception as error:  # noqa: BLE001 -- metrics are never a reason to stop
        return type(error).__name__
    return ""
