"""What a server talks to in a deep smoke: a model that does what it is told, and a Datadog Agent that remembers.

It runs inside the container, by the image's own Python, and so imports the standard library alone. The model speaks
OpenAI's streaming chat protocol. A plan in the user's message, ``PLAN [[tool, arguments], …] END``, is carried out a
call at a time; then it says what the last tool answered. GET /seen on any port tells what was received, and
/seen?SECONDS when there are spans of the server and of a Python that queried, or after that time.
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, TRACES, OTLP = 14096, 8126, 4318
"""Ports: of the model, and the Agent's own two."""

KEY = "a-key-of-no-account"

QUERIED = "sqlite.query"
"""What ddtrace calls the span of a query."""

changed = threading.Condition()
seen: dict[str, Any] = {"resources": [], "spans": 0, "traces": "", "faults": []}


def text_of(message: dict[str, Any]) -> str:
    """Return a message's text, whose parts may come one by one."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def fault_in(request: dict[str, Any], key: str) -> str:
    """Return what is wrong with a chat request, or nothing."""
    if key != f"Bearer {KEY}":
        return "another key than the provider's"
    calls = [call["id"] for message in request["messages"] for call in message.get("tool_calls") or []]
    answered = [message["tool_call_id"] for message in request["messages"] if message["role"] == "tool"]
    if calls != answered:
        return f"calls {calls} were answered as {answered}"
    return "" if request.get("stream") else "a request that is not streamed"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the next message of the model: the plan's next call, or what the last tool said."""
    messages = request["messages"]
    last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=0)
    plan = re.search(r"PLAN (\[.*\]) END", text_of(messages[last]), re.DOTALL)
    steps = json.loads(plan[1]) if plan else []
    said = [text_of(message) for message in messages[last:] if message["role"] == "tool"]
    offered = {tool["function"]["name"] for tool in request.get("tools") or []}
    if offered and len(said) < len(steps):
        name, arguments = steps[len(said)]
        if name not in offered:
            seen["faults"].append(f"{name} is not offered to the model")
        function = {"name": name, "arguments": json.dumps(arguments)}
        identity = f"call_{last}_{len(said)}"
        return {"tool_calls": [{"index": 0, "id": identity, "type": "function", "function": function}]}
    return {"content": f"The last tool said: {said[-1]}" if said else "Nothing to do."}


def stream(request: dict[str, Any]) -> Iterator[str]:
    """Yield the answer as OpenAI's events: the message, how it ended, the usage, the end."""
    message = answer(request)
    ended = "tool_calls" if "tool_calls" in message else "stop"
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    for delta, finish in (({"role": "assistant", **message}, None), ({}, ended)):
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        yield json.dumps({**chunk, "choices": [choice], **({"usage": usage} if finish else {})})
    yield "[DONE]"


class Handler(BaseHTTPRequestHandler):
    """All ports: a path says which of the three it is for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Tell what was seen, or that this is an Agent."""
        path, _, seconds = self.path.partition("?")
        if path != "/seen":
            self.reply(200, {"version": "7.0.0", "endpoints": ["/v0.4/traces"]})
            return
        with changed:
            changed.wait_for(lambda: seen["resources"] and QUERIED in seen["traces"], float(seconds or 0))
            self.reply(200, seen)

    def do_POST(self) -> None:
        """Answer as the model, or take spans."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/v1/chat/completions":
            request = json.loads(body)
            fault = fault_in(request, self.headers.get("Authorization", ""))
            if fault:
                seen["faults"].append(fault)
                self.reply(400, {"error": {"message": fault}})
                return
            self.reply(200, "".join(f"data: {event}\n\n" for event in stream(request)))
            return
        with changed:
            if self.path == "/v1/traces":
                for each in json.loads(body)["resourceSpans"]:
                    attributes = {entry["key"]: entry["value"] for entry in each["resource"]["attributes"]}
                    seen["resources"].append({key: value.get("stringValue") for key, value in attributes.items()})
                    seen["spans"] += sum(len(scope["spans"]) for scope in each["scopeSpans"])
            elif self.path.endswith("/traces"):
                seen["traces"] += re.sub("[^\x20-\x7e]+", " ", body.decode("latin-1"))  # of msgpack, its strings
            changed.notify_all()
        self.reply(200, {})

    def do_PUT(self) -> None:
        """Take spans: ddtrace puts them."""
        self.do_POST()

    def chunk(self) -> bytes:
        """Read one chunk."""
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def reply(self, status: int, body: object) -> None:
        """Send events as they are, anything else as JSON."""
        kind, data = ("text/event-stream", body) if isinstance(body, str) else ("application/json", json.dumps(body))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data.encode())))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve until killed; say so on stdout once every port listens."""
    servers = [ThreadingHTTPServer(("127.0.0.1", port), Handler) for port in map(int, sys.argv[1:])]
    for server in servers:
        threading.Thread(target=server.serve_forever).start()
    print("ready", flush=True)


if __name__ == "__main__":
    main()
