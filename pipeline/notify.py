"""Tell somebody of a release or a failure. Whoever does not listen, fails or hangs changes nothing."""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections.abc import Callable
from typing import Any

from pipeline import ca, process
from pipeline.engine import Engine
from pipeline.errors import NoSuchRelease
from pipeline.history import brief
from pipeline.report import ok, warn
from pipeline.settings import Settings

TOLD = ("released", "failed")

DATADOG = """
import json, os, sys, time
from datadog_api_client import ApiClient, Configuration
from datadog_api_client.v1.api.events_api import EventsApi
from datadog_api_client.v1.model.event_create_request import EventCreateRequest
from datadog_api_client.v2.api.metrics_api import MetricsApi
from datadog_api_client.v2.model.metric_payload import MetricPayload
from datadog_api_client.v2.model.metric_point import MetricPoint
from datadog_api_client.v2.model.metric_series import MetricSeries
said = json.load(sys.stdin)
own = {"host": os.environ["DD_API_URL"]} if os.environ.get("DD_API_URL") else {}
configuration = Configuration(request_timeout=15, ssl_ca_cert=os.environ.get("SSL_CERT_FILE"), **own)
configuration.api_key["apiKeyAuth"] = os.environ["DD_API_KEY"]
with ApiClient(configuration) as client:
    event = {name: said[name] for name in ("title", "text", "tags", "alert_type")}
    EventsApi(client).create_event(EventCreateRequest(**event))
    now = int(time.time())
    MetricsApi(client).submit_metrics(MetricPayload(series=[
        MetricSeries(metric=name, type=3, points=[MetricPoint(timestamp=now, value=float(value))], tags=said["tags"])
        for name, value in said["metrics"].items()]))
"""
"""Runs inside the released image, with its own client: the tasks need none."""


def tell(settings: Settings, engine: Engine | None, record: dict[str, Any]) -> None:
    """Tell everyone who is set up of a night's ``record``, side by side, for ``notify.seconds`` at most."""
    told, seconds = settings.notify, settings.notify.seconds
    if record["outcome"] not in TOLD:
        return
    ways: dict[str, Callable[[], None]] = {}
    if told.command:
        ways["command"] = lambda: _command(told.command, record, seconds)
    if told.webhook:
        ways["webhook"] = lambda: _webhook(told.webhook, record, seconds)
    if told.datadog:
        ways["datadog"] = lambda: _datadog(settings, engine, record, seconds)
    done: dict[str, str] = {}
    threads = {}
    for name, way in ways.items():
        threads[name] = threading.Thread(target=_try, args=(way, name, done), daemon=True)
        threads[name].start()
    for name, thread in threads.items():
        thread.join(seconds)
        said = done.get(name, f"no answer within {seconds:g} s")
        if said:
            warn(f"notify: {name}: {said}")
        else:
            ok(f"notify: {name} was told")


def title(record: dict[str, Any]) -> str:
    """Return a night in one line."""
    what = record.get("tag") or record.get("where") or ""
    return f"opencode-server: {record['outcome']} {what}".rstrip()


def datadog_payload(record: dict[str, Any], image: str) -> dict[str, Any]:
    """Return the event and the gauges of a night: seconds, bytes, and 1 or 0 for the outcome."""
    measured = {name: record[name] for name in ("seconds", "build_seconds", "ready_seconds", "size") if name in record}
    released = record["outcome"] == "released"
    metrics = {f"opencode_server.nightly.{name}": value for name, value in measured.items()}
    return {
        "title": title(record),
        "text": brief(record)[:3900] or record["outcome"],
        "alert_type": "success" if released else "error",
        "tags": [f"image:{image}", f"outcome:{record['outcome']}"],
        "metrics": {**metrics, "opencode_server.nightly.released": int(released)},
    }


def _try(way: Callable[[], None], name: str, done: dict[str, str]) -> None:
    try:
        way()
        done[name] = ""
    except Exception as error:  # noqa: BLE001 -- a notifier never changes the outcome
        done[name] = f"{type(error).__name__}: {str(error)[-500:]}"


def _command(command: str, record: dict[str, Any], seconds: float) -> None:
    done = process.run(shlex.split(command), stdin=json.dumps(record).encode(), timeout=seconds)
    if not done.ok:
        raise ChildProcessError(f"exit code {done.code}: {done.said}")


def _webhook(url: str, record: dict[str, Any], seconds: float) -> None:
    import requests

    try:
        answer = requests.post(
            url, json={"text": f"{title(record)}: {brief(record)}", **record}, timeout=min(seconds, 15)
        )
    except requests.RequestException as error:
        raise ConnectionError(type(error).__name__) from None  # its words hold the address, and that a secret
    if not answer.ok:
        raise ConnectionError(f"it answered {answer.status_code}")


def _datadog(settings: Settings, engine: Engine | None, record: dict[str, Any], seconds: float) -> None:
    if engine is None or engine.image(latest := engine.local(f"{settings.image}:latest")) is None:
        raise NoSuchRelease("no image is released whose client could tell", "inv promote")
    names = [name for name in ("DD_API_KEY", "DD_SITE", "DD_API_URL") if os.environ.get(name)]
    env = [word for name in names for word in ("--env", name)]
    if found := ca.source(settings.ca):
        env += ["--volume", f"{found[1].resolve()}:/tmp/ca.pem:ro", "--env", "SSL_CERT_FILE=/tmp/ca.pem"]
    for quiet in ("DD_TRACE_ENABLED", "DD_INSTRUMENTATION_TELEMETRY_ENABLED"):
        env += ["--env", f"{quiet}=false"]
    words = [
        "run",
        "--rm",
        "--interactive",
        "--network",
        "host",
        *engine.limits,
        *env,
        "--entrypoint",
        "/opt/venv/bin/python",
    ]
    payload = json.dumps(datadog_payload(record, settings.image)).encode()
    done = process.run(engine.argv(*words, latest, "-c", DATADOG), stdin=payload, timeout=seconds, env=engine.env)
    if not done.ok:
        raise ChildProcessError(done.said[-500:])
