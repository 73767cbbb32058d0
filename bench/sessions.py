"""Sessions at once against a running server with the fake model of ``pipeline.smoke.conversation``.

OPENCODE_SERVER_PASSWORD=... python -m bench.sessions http://127.0.0.1:4096 50
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import requests

from pipeline.smoke.conversation import MODEL

PLAN = 'PLAN [["bash", {"command": "echo %s", "description": "echo"}]] END'
SECONDS = 300


def talk(url: str, number: int) -> tuple[float, float]:
    """Create a session and have its agent run a command; return the seconds of both requests."""
    auth = ("opencode", os.environ["OPENCODE_SERVER_PASSWORD"])
    began = time.monotonic()
    session = requests.post(f"{url}/session", json={}, auth=auth, timeout=SECONDS).json()["id"]
    created = time.monotonic()
    text = f"mark-{number}"
    body = {"model": MODEL, "parts": [{"type": "text", "text": PLAN % text}]}
    path = f"{url}/session/{session}/message"
    answer = requests.post(path, json=body, auth=auth, timeout=SECONDS)
    if f"returned: {text}" not in answer.text:
        raise RuntimeError(f"session {number}: {answer.status_code} {answer.text[:200]}")
    return created - began, time.monotonic() - created


def main(url: str, count: int) -> None:
    """Run ``count`` sessions at once and print the median and the 95th percentile, in seconds."""
    with ThreadPoolExecutor(count) as pool:
        times = list(pool.map(lambda number: talk(url, number), range(count)))
    for name, values in zip(("create", "prompt"), zip(*times, strict=True), strict=True):
        p95 = statistics.quantiles(values, n=20)[-1]
        print(f"{name}: p50 {statistics.median(values):.2f} s, p95 {p95:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
