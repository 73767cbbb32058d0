"""Report a released or failed night by a command, a webhook or Datadog.

A notification that fails or hangs is a warning. It never changes the outcome of the night.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from typing import Any

from pipeline.core import process
from pipeline.core.console import ok, warn
from pipeline.core.settings import Settings
from pipeline.release.history import brief

Record = dict[str, Any]
"""The record of a night, as the history has it."""

REQUEST_SECONDS = 15
EVENT_CHARACTERS = 3900
"""Datadog's limit for the text of an event is 4000."""

METRICS = (
    "seconds",
    "build_seconds",
    "ready_seconds",
    "size",
)


def send(settings: Settings, record: Record) -> None:
    """Send ``record`` by every configured way at once, if the night released or failed.

    Each may take ``notify.seconds``.
    """
    if record["outcome"] not in {"released", "failed"}:
        return
    senders = {"command": run_command, "webhook": post_webhook, "datadog": post_datadog}
    errors: dict[str, str] = {}

    def call(name: str) -> None:
        try:
            senders[name](settings, record)
            errors[name] = ""
        except Exception as error:  # noqa: BLE001 -- a notification never changes the outcome
            errors[name] = f"{type(error).__name__}: {str(error)[-500:]}"

    threads = {}
    for name in senders:
        if getattr(settings.notify, name):
            # A daemon, so that one which hangs does not keep the process from its end.
            threads[name] = threading.Thread(
                target=call,
                args=[name],
                daemon=True,
            )
            threads[name].start()
    seconds = settings.notify.seconds
    for name, thread in threads.items():
        thread.join(seconds)
        error = errors.get(name, f"no answer within {seconds:g} s")
        if error:
            warn(f"notify: {name}: {error}")
        else:
            ok(f"notify: {name}: sent")


def run_command(settings: Settings, record: Record) -> None:
    """Run the program ``notify.command`` with the record as JSON on its stdin."""
    argv = shlex.split(settings.notify.command)
    stdin = json.dumps(record).encode()
    result = process.run(
        argv,
        stdin=stdin,
        timeout=settings.notify.seconds,
    )
    if not result.ok:
        raise ChildProcessError(f"exit code {result.code}: {result.output}")


def post_webhook(settings: Settings, record: Record) -> None:
    """Post the record, with a line of text as chat programs show it."""
    # In Slack and Mattermost <!channel> would call everyone, and <URL|text> hide an address.
    text = f"{title(record)}: {brief(record)}".replace(
        "<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}"
    )
    _post(
        settings,
        settings.notify.webhook,
        {"text": text, **record},
    )


def post_datadog(settings: Settings, record: Record) -> None:
    """Post an event and gauges to Datadog's API.

    DD_API_KEY is the key. DD_URL is the API's URL; the default is that of DD_SITE.
    """
    site = os.environ.get("DD_SITE") or "datadoghq.com"
    url = os.environ.get("DD_URL") or f"https://api.{site}"
    headers = {"DD-API-KEY": os.environ["DD_API_KEY"]}
    outcome = record["outcome"]
    tags = [f"image:{settings.image}", f"outcome:{outcome}"]
    event = {
        "title": title(record),
        "text": brief(record)[:EVENT_CHARACTERS] or outcome,
        "alert_type": "success" if outcome == "released" else "error",
        "tags": tags,
    }
    # https://docs.datadoghq.com/api/latest/events/#post-an-event
    _post(settings, f"{url}/api/v1/events", event, headers)
    gauges = {name: record[name] for name in METRICS if name in record}
    gauges["released"] = int(outcome == "released")
    series = []
    for name, value in gauges.items():
        # https://docs.datadoghq.com/api/latest/metrics/#submit-metrics: type 3 is a gauge.
        gauge = {
            "metric": f"opencode_server.nightly.{name}",
            "type": 3,
            "points": [{"timestamp": int(time.time()), "value": value}],
            "tags": tags,
        }
        series.append(gauge)
    _post(
        settings,
        f"{url}/api/v2/series",
        {"series": series},
        headers,
    )


def title(record: Record) -> str:
    """Return a night in one line: the outcome, and the tag or the step that failed."""
    what = record.get("tag") or record.get("where") or ""
    return f"opencode-server: {record['outcome']} {what}".rstrip()


def _post(
    settings: Settings, url: str, content: object, headers: dict[str, str] | None = None
) -> None:
    """Post JSON. Raises ConnectionError without the URL, which may hold a secret."""
    import requests

    timeout = min(settings.notify.seconds, REQUEST_SECONDS)
    verify = settings.ca or None
    try:
        response = requests.post(
            url,
            json=content,
            headers=headers,
            timeout=timeout,
            verify=verify,
        )
    except requests.RequestException as error:
        raise ConnectionError(type(error).__name__) from None
    if not response.ok:
        raise ConnectionError(f"HTTP status {response.status_code}")
