"""What a probe is: one check of a server or an image, independent of all others."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import ServerSilent
from pipeline.engines.container import Container, Server

SECONDS = 60.0
"""How long a response may take; the server is ready by then, but the machine may be busy."""


class ProbeFailed(Exception):
    """What a probe requires is not true; the ``message`` says what was found instead."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ProbeLate(ProbeFailed):
    """What a probe requires was not true in time; a busy machine is the most likely cause."""


@dataclass(frozen=True)
class Probe:
    """A named check. It returns one line of detail, or raises ProbeFailed or another exception."""

    name: str
    check: Callable[[Any], str]


def probes(*checks: Callable[[Any], str]) -> tuple[Probe, ...]:
    """Return a probe for each function, with its name. The docstring is what must be true."""
    return tuple(Probe(check.__name__.replace("_", " "), check) for check in checks)


def request(
    server: Server,
    path: str,
    body: object = None,
) -> Any:
    """GET ``path``, or POST ``body`` as JSON, and return the JSON of the response.

    Raises ProbeFailed for a status other than 2xx, and requests.RequestException.
    """
    method = "GET" if body is None else "POST"
    response = server.send(method, path, body, timeout=SECONDS)
    if not response.ok:
        raise ProbeFailed(f"{path} returned {response.status_code}: {response.text[:300]}")
    return response.json()


def was_late(error: Exception) -> bool:
    """Return whether a probe failed only because something took longer than it may."""
    import requests

    late = (ProbeLate, ServerSilent, TimeoutError, subprocess.TimeoutExpired, requests.Timeout)
    return isinstance(error, late)


def run_inside(container: Container, *command: str) -> str:
    """Run a command in a container and return its output. Raises ProbeFailed when it fails."""
    done = container.exec(*command, timeout=SECONDS)
    if not done.ok:
        raise ProbeFailed(f"{command[0]} exited with code {done.code}: {done.output[-300:]}")
    return done.stdout.strip()
