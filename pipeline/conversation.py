"""The questions of a deep smoke: a whole conversation, with a model that needs no account, and what is left of it.

The model and the Datadog Agent are ``peer.py``, run inside the container, where any engine lets the server reach them.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import peer
from pipeline.container import Container
from pipeline.probes import Probe, Subject, Wrong

SECONDS = 60.0
"""How long a turn of the conversation, or a span, may take to arrive."""

MODEL = {"providerID": "peer", "modelID": "told"}
NAMES = {"DD_SERVICE": "smoke-service", "DD_ENV": "smoke-env", "DD_VERSION": "smoke-version"}
CHILD = "import sqlite3; sqlite3.connect(':memory:').execute('select 6 * 7')"
"""A Python program that ddtrace sees doing something."""


def environment() -> list[str]:
    """Return what a server is started with, so that it talks to the peer and to nobody else."""
    options = {"baseURL": f"http://127.0.0.1:{peer.MODEL}/v1", "apiKey": peer.KEY}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {MODEL["modelID"]: {}}}
    config = {"provider": {MODEL["providerID"]: provider}, "model": "/".join(MODEL.values())}
    settings = {**NAMES, "DD_AGENT_HOST": "127.0.0.1", "OPENCODE_CONFIG_CONTENT": json.dumps(config)}
    return [f"{name}={value}" for name, value in settings.items()]


BUILT_IN = {"invalid", "list", "lsp", "plan_enter", "plan_exit", "todoread"}
"""OpenCode's own tools that need no arguments, in some version or other."""


@dataclass
class Talk(Subject):
    """A conversation: its ``session``, and the ``events`` that the server sent meanwhile."""

    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Send a request that may take long, and return its JSON. Raises Wrong."""
        answer = self.server.send(method, path, body, timeout=SECONDS)
        if not answer.ok:
            raise Wrong(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()

    def say(self, *plan: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Have the model carry out ``plan``, a (tool, arguments) after the other; return its last message."""
        parts = [{"type": "text", "text": f"PLAN {json.dumps(plan)} END"}]
        return dict(self.ask("POST", f"/session/{self.session}/message", {"model": MODEL, "parts": parts, **more}))

    def tools(self) -> dict[str, dict[str, Any]]:
        """Return the state of each tool that was called, the latest of a name. Raises Wrong when one failed."""
        messages = self.ask("GET", f"/session/{self.session}/message")
        calls = [part for message in messages for part in message["parts"] if part["type"] == "tool"]
        if failed := [f"{part['tool']}: {part['state'].get('error')}" for part in calls if _state(part) != "completed"]:
            raise Wrong("; ".join(failed)[:500])
        return {part["tool"]: part["state"] for part in calls}


def _state(part: dict[str, Any]) -> str:
    return str(part["state"]["status"])


def _text(message: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in message["parts"])


def bring(container: Container, *, agent: bool = True) -> None:
    """Start the peer inside, as model and as ``agent``, and wait until it listens. Raises Wrong."""
    program = Path(peer.__file__).read_text()
    ports = map(str, (peer.MODEL, *((peer.TRACES, peer.OTLP) if agent else ())))
    argv = container.engine.exec(container.name, "/usr/bin/python3", "-I", "-c", program, *ports, detach=True)
    container.engine.ask(argv, timeout=30)
    seen(container, retry=10)


@contextmanager
def begun(subject: Subject) -> Iterator[Talk]:
    """Begin a session, with a peer that was brought, and listen to the server's events."""
    talk = Talk(subject.settings, subject.server, subject.engine, subject.image, subject.container)
    listening = subject.server.listen("/event", timeout=SECONDS)

    def listen() -> None:
        try:
            for line in listening.iter_lines():
                if line.startswith(b"data: "):
                    talk.events.append(json.loads(line[6:]))
        except Exception:  # noqa: BLE001 -- requests has a dozen for a stream that is closed under it
            return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        talk.session = talk.ask("POST", "/session", {"title": "a deep smoke"})["id"]
        yield talk
    finally:
        # A stream that another thread reads cannot be closed before that has got something: a heartbeat, every 10 s.
        connection = listening.raw.connection
        if connection and connection.sock:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        thread.join(1)
        listening.close()


def seen(container: Container, *, retry: int = 1, spans: float = 0) -> dict[str, Any]:
    """Return what the peer has received, after at most ``spans`` seconds' wait for some of each kind. Raises Wrong.

    It is tried for ``retry`` seconds, until it listens.
    """
    url = f"http://127.0.0.1:{peer.MODEL}/seen?{spans}"
    tried = ("--retry", str(retry * 10), "--retry-delay", "0", "--retry-connrefused", "--retry-max-time", str(retry))
    done = container.exec("curl", "-fsS", *tried, url, timeout=spans + 30)
    if not done.ok:
        raise Wrong(f"what the server talks to does not answer: {done.said[-300:]}")
    return dict(json.loads(done.stdout))


def conversation(talk: Talk) -> str:
    """The model calls bash, write, read and a tool of OpenAgents, and answers."""
    path = "/workspace/smoke.txt"
    listed = talk.ask("GET", "/experimental/tool?provider={providerID}&model={modelID}".format(**MODEL))
    # A tool may come from a file of the package or from a plugin of it; one is chosen that needs no arguments.
    free = [tool["id"] for tool in listed if not tool["parameters"].get("required") and tool["id"] not in BUILT_IN]
    if not free:
        raise Wrong("no tool of OpenAgents can be called without arguments")
    bash = {"command": f'/opt/venv/bin/python -c "{CHILD}"; echo $((6 * 7))', "description": "multiplies"}
    written = {"filePath": path, "content": "the answer\n"}
    last = talk.say(("bash", bash), (free[0], {}), ("write", written), ("read", {"filePath": path}))
    states = talk.tools()
    if wrong := [name for name in ("bash", "write", "read", free[0]) if name not in states]:
        raise Wrong(f"the model's calls of {', '.join(wrong)} came to nothing")
    if states["bash"]["output"].strip() != "42":
        raise Wrong(f"bash printed {states['bash']['output'][:200]!r}")
    if talk.inside("cat", path) != "the answer" or "the answer" not in _text(last):
        raise Wrong(f"what was written is not what was read: {_text(last)[:200]!r}")
    assert talk.container  # noqa: S101 -- it has a peer
    if faults := seen(talk.container)["faults"]:
        raise Wrong(f"the model was asked wrongly: {faults[0]}")
    return f"the model called {', '.join(states)}, and answered"


def events(talk: Talk) -> str:
    """The event stream tells of the conversation as it goes on."""
    kinds = {event.get("type") for event in talk.events}
    if missing := {"server.connected", "session.created", "message.part.updated", "session.idle"} - kinds:
        raise Wrong(f"no event {', '.join(sorted(missing))} among {len(talk.events)}")
    return f"{len(talk.events)} events of {len(kinds)} kinds"


def agent(talk: Talk) -> str:
    """An agent of OpenAgents answers, chosen by name."""
    names = talk.inventory("agent")
    primary = [each["name"] for each in talk.ask("GET", "/agent") if each["mode"] != "subagent"]
    name = next((name for name in names if name in primary), "")
    if not name:
        raise Wrong("no agent of OpenAgents can be chosen")
    answered = talk.say(agent=name)["info"]["agent"]
    if answered != name:
        raise Wrong(f"{name} was asked and {answered} answered")
    return f"{name} answers"


def command(talk: Talk) -> str:
    """A command of OpenAgents is carried out, chosen by name."""
    name = min(talk.inventory("command"))
    body = {"command": name, "arguments": "nothing", "model": "/".join(MODEL.values())}
    answered = talk.ask("POST", f"/session/{talk.session}/command", body)
    if not _text(answered):
        raise Wrong(f"/{name} got no answer")
    return f"/{name} is answered"


def traced(talk: Talk) -> str:
    """The server's spans and those of a Python it started reach the Agent under DD_SERVICE, DD_ENV and DD_VERSION."""
    wanted = dict(zip(("service.name", "deployment.environment.name", "service.version"), NAMES.values(), strict=True))
    assert talk.container  # noqa: S101 -- it has a peer
    got = seen(talk.container, spans=talk.settings.smoke.ready_seconds)
    if not got["resources"] or peer.QUERIED not in got["traces"]:
        raise Wrong(f"{len(got['resources'])} batches of the server's spans, and of Python: {got['traces'][:100]}")
    for resource in got["resources"]:
        if wrong := [f"{key}={resource.get(key)}" for key, value in wanted.items() if resource.get(key) != value]:
            raise Wrong(f"the server's spans say {', '.join(wrong)}")
    if missing := [value for value in list(NAMES.values())[:2] if value not in got["traces"]]:
        raise Wrong(f"Python's spans do not say {', '.join(missing)}")
    return f"{got['spans']} spans of the server, and of the Python it started"


def resumes(talk: Talk) -> str:
    """After a restart of the container the session is found again, with all that was said."""
    assert talk.container  # noqa: S101 -- asked only of an image
    before = talk.ask("GET", f"/session/{talk.session}/message")
    talk.server = talk.container.restart(SECONDS)
    after = talk.ask("GET", f"/session/{talk.session}/message")
    if [message["info"]["id"] for message in after] != [message["info"]["id"] for message in before]:
        raise Wrong(f"{len(before)} messages before, {len(after)} after the restart")
    return f"{len(after)} messages are there after a restart"


PROBES = tuple(Probe(each.__name__, "deep", each) for each in (conversation, events, agent, command, traced))
"""Asked one after the other: each goes on with the session."""

LAST = Probe("resumes", "deep", resumes)
"""Asked when nothing else is: meanwhile nobody answers."""
