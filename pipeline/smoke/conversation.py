"""Probes of ``smoke --deep``: a conversation with a fake model, which needs no account.

The fake model and the fake Datadog Agent are ``fake_upstreams.py``. It runs inside the container,
where the server can reach it with any engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engines.container import Container
from pipeline.smoke import fake_upstreams
from pipeline.smoke.probe import (
    SECONDS,
    Probe,
    ProbeFailed,
    probes,
    request,
    run_inside,
)
from pipeline.smoke.server_probes import Inventory

if TYPE_CHECKING:
    import requests

Call = tuple[str, dict[str, Any]]
"""The name of a tool, and its arguments."""

Message = dict[str, Any]
"""A message as OpenCode returns it, with ``info`` and ``parts``."""

MODEL = {"providerID": "fake", "modelID": "scripted"}

CONFIG = """{
    "model": "fake/scripted",
    "provider": {
        "fake": {
            "npm": "@ai-sdk/openai-compatible",
            "models": {"scripted": {}},
            "options": {"baseURL": "http://127.0.0.1:PORT/v1", "apiKey": "fake"}
        }
    }
}"""
"""OpenCode's configuration for the fake model."""

VARIABLES = {
    "DD_SERVICE": "smoke-service",
    "DD_ENV": "smoke-env",
    "DD_VERSION": "smoke-version",
    "DD_AGENT_HOST": "127.0.0.1",
    "OPENCODE_CONFIG_CONTENT": CONFIG.replace("PORT", str(fake_upstreams.MODEL)),
}

SERVER_TAGS = ("smoke-service", "smoke-env", "smoke-version")
"""What the server's spans must contain."""

PYTHON_TAGS = SERVER_TAGS[:2]
"""What ddtrace's spans must contain; it adds the version to spans of the service itself only."""

QUERY = "import sqlite3; sqlite3.connect(':memory:').execute('select 6 * 7')"
"""A Python program that ddtrace records a span of."""

CURL = "curl -fsS --retry 100 --retry-delay 0 --retry-connrefused --retry-max-time 60"
"""Waits until the fake upstreams listen."""

BUILT_IN = {
    "invalid",
    "list",
    "lsp",
    "plan_enter",
    "plan_exit",
    "todoread",
}
"""The tools of OpenCode itself that need no arguments, in any of its versions."""


def environment() -> list[str]:
    """Return NAME=value for each variable that connects the server to the fake upstreams."""
    return [f"{name}={value}" for name, value in VARIABLES.items()]


def start_upstreams(
    container: Container,
    ports: Sequence[int] = fake_upstreams.PORTS,
) -> None:
    """Start the fake model and the fake Agent in a container, without waiting for them."""
    program = Path(fake_upstreams.__file__).read_text()
    argv = container.engine.exec(
        container.name,
        "/usr/bin/python3",
        "-I",
        "-c",
        program,
        *map(str, ports),
        detach=True,
    )
    container.engine.ask(argv, timeout=30)


def received(
    container: Container,
    *,
    seconds: float = 0,
) -> dict[str, str]:
    """Return what the fake Agent has received, once it listens. Raises ProbeFailed.

    Waits up to ``seconds`` for spans of the server and of a Python program.
    """
    url = f"http://127.0.0.1:{fake_upstreams.MODEL}/received?{seconds}"
    done = container.exec("sh", "-c", f"{CURL} {url}", timeout=seconds + SECONDS)
    if not done.ok:
        raise ProbeFailed(f"the fake model does not answer: {done.output[-300:]}")
    return dict(json.loads(done.stdout))


@dataclass
class Session:
    """A session of the server, and the stream of the server's events.

    ``span_seconds`` is how long spans may take to arrive.
    """

    container: Container
    inventory: Callable[[], Inventory] = dict
    span_seconds: float = SECONDS
    path: str = ""
    events: requests.Response = field(init=False)

    def request(
        self,
        path: str,
        body: object = None,
    ) -> Any:
        """Send a request as ``probe.request`` does."""
        return request(self.container.server, path, body)

    def messages(self) -> list[Message]:
        """Return all messages of the session."""
        return list(self.request(f"{self.path}/message"))

    def message_ids(self) -> list[str]:
        """Return the IDs of all messages of the session."""
        return [message["info"]["id"] for message in self.messages()]

    def prompt(
        self,
        *calls: Call,
        **options: Any,
    ) -> Message:
        """Let the model call tools, given as (name, arguments); return its last message."""
        parts = [{"type": "text", "text": f"PLAN {json.dumps(calls)} END"}]
        body = {"model": MODEL, "parts": parts, **options}
        return dict(self.request(f"{self.path}/message", body))

    def outputs(self) -> dict[str, str]:
        """Return the last output of each tool. Raises ProbeFailed when a tool failed."""
        outputs = {}
        for message in self.messages():
            for part in message["parts"]:
                if part["type"] != "tool":
                    continue
                state = part["state"]
                if state["status"] != "completed":
                    raise ProbeFailed(f"{part['tool']} {state['status']}: {state.get('error')}")
                outputs[part["tool"]] = state["output"]
        return outputs


def text_of(message: Message) -> str:
    """Return the text of a message."""
    return "".join(part.get("text", "") for part in message["parts"])


def session(session: Session) -> str:
    """The fake model listens, and the server creates a session."""
    received(session.container)
    session.events = session.container.server.listen("/event", timeout=SECONDS)
    created = session.request("/session", {"title": "smoke test"})
    session.path = f"/session/{created['id']}"
    return f"created {created['id']}"


def conversation(session: Session) -> str:
    """The model can call bash, write, read and a tool of OpenAgents, and sees their output."""
    path = "/workspace/smoke.txt"
    tools = session.request("/experimental/tool?provider=fake&model=scripted")
    # A tool is in a file of OpenAgents or in a plugin of it; any without arguments will do.
    free = [
        tool["id"]
        for tool in tools
        if not tool["parameters"].get("required") and tool["id"] not in BUILT_IN
    ]
    if not free:
        raise ProbeFailed("OpenAgents has no tool that needs no arguments")
    script = f'/opt/venv/bin/python -c "{QUERY}"; echo $((6 * 7))'
    last = session.prompt(
        ("bash", {"command": script, "description": "multiplies"}),
        (free[0], {}),
        ("write", {"filePath": path, "content": "the answer\n"}),
        ("read", {"filePath": path}),
    )
    outputs = session.outputs()
    missing = {
        "bash",
        "write",
        "read",
        free[0],
    } - outputs.keys()
    if missing:
        raise ProbeFailed(f"not called: {', '.join(sorted(missing))}")
    if outputs["bash"].strip() != "42":
        raise ProbeFailed(f"bash printed {outputs['bash'][:200]!r}")
    written = run_inside(session.container, "cat", path)
    if written != "the answer" or "the answer" not in text_of(last):
        raise ProbeFailed(f"{path} is {written!r}, and the model read {text_of(last)[:200]!r}")
    return f"the model called {', '.join(outputs)}"


def events(session: Session) -> str:
    """The event stream has reported the conversation, up to its end."""
    expected = {
        "server.connected",
        "session.created",
        "message.part.updated",
        "session.idle",
    }
    deadline = time.monotonic() + SECONDS
    for line in session.events.iter_lines():
        if line.startswith(b"data: "):
            expected.discard(json.loads(line[6:])["type"])
        # The stream never ends: the server sends heartbeats.
        if not expected or time.monotonic() > deadline:
            break
    session.events.close()
    if expected:
        raise ProbeFailed(f"no event {', '.join(sorted(expected))}")
    return "from session.created to session.idle"


def agent(session: Session) -> str:
    """A prompt can choose an agent of OpenAgents by name."""
    listed = session.request("/agent")
    primary = {agent["name"] for agent in listed if agent["mode"] != "subagent"}
    name = min(primary.intersection(session.inventory()["agent"]), default="")
    if not name:
        raise ProbeFailed("no agent of OpenAgents can be chosen")
    answered = session.prompt(agent=name)["info"]["agent"]
    if answered != name:
        raise ProbeFailed(f"chose {name}, and {answered} answered")
    return f"{name} answers"


def command(session: Session) -> str:
    """A command of OpenAgents can be run by name."""
    name = min(session.inventory()["command"])
    body = {"command": name, "arguments": "nothing", "model": "fake/scripted"}
    if not text_of(session.request(f"{session.path}/command", body)):
        raise ProbeFailed(f"/{name} returned no text")
    return f"/{name} answers"


def tracing(session: Session) -> str:
    """Spans of the server and of a Python program reach the Agent, with the tags in DD_*."""
    spans = received(session.container, seconds=session.span_seconds)
    server, python = spans["server"], spans["python"]
    if not server or fake_upstreams.QUERY_SPAN not in python:
        raise ProbeFailed(f"no spans of the server or of Python: {server[:100]!r} {python[:100]!r}")
    missing = [tag for tag in SERVER_TAGS if tag not in server]
    missing += [tag for tag in PYTHON_TAGS if tag not in python]
    if missing:
        raise ProbeFailed(f"tags are missing in the spans: {', '.join(missing)}")
    return "spans of the server and of a Python program"


def restart(session: Session) -> str:
    """The session and its messages are there after a restart of the container."""
    before = session.message_ids()
    session.container.restart(session.span_seconds)
    after = session.message_ids()
    if after != before:
        raise ProbeFailed(f"{len(before)} messages before and {len(after)} after the restart")
    return f"{len(after)} messages after a restart"


PROBES = probes(session, conversation, events, agent, command, tracing)
"""Run one after the other, with one session."""

RESTART = Probe("restart", restart)
"""Run last: no other probe can reach the server meanwhile."""
