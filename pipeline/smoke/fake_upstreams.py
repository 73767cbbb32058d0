"""A fake model and a fake Datadog Agent, for the deep smoke test.

Runs inside the container with the image's Python, so it uses the standard library only. The
arguments are the ports to listen on; every port serves all of this:

- POST /v1/chat/completions: OpenAI's streaming chat API. ``PLAN [[tool, arguments], ...] END`` in
  the user's message makes the model call these tools one by one and repeat the last one's output.
- POST /v1/traces: the server's spans, as OpenTelemetry's JSON.
- PUT /v0.4/traces or /v0.5/traces: ddtrace's spans of Python programs, as MessagePack.
- GET /received?SECONDS: all spans, as soon as there are some of both kinds, or after that time.
"""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = 14096
"""The port of the model."""

TRACES = 8126
"""The Agent's port for ddtrace."""

OTLP = 4318
"""The Agent's port for OpenTelemetry."""

PORTS = (MODEL, TRACES, OTLP)

QUERY_SPAN = "sqlite.query"
"""The name of ddtrace's span of an SQLite query."""

Message = dict[str, Any]

arrived = threading.Condition()

received = {"version": "7.0.0", "server": "", "python": ""}
"""The Agent's version, and all spans so far as printable text."""


def text_of(message: Message) -> str:
    """Return the text of a message, which is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def reply_to(request: Message) -> Message:
    """Return the model's next message: the next call of the plan, or the last tool's output."""
    outputs: list[str] = []
    for message in reversed(request["messages"]):
        if message["role"] == "user":
            break
        if message["role"] == "tool":
            outputs.append(text_of(message))
    plan = re.search(r"PLAN (\[.*\]) END", text_of(message), re.DOTALL)
    calls = json.loads(plan[1]) if plan else []
    # Without tools, OpenCode asks for a title of the session.
    if len(outputs) < len(calls) and request.get("tools"):
        name, arguments = calls[len(outputs)]
        call = {
            "index": 0,
            "id": f"call_{len(request['messages'])}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps(arguments),
            },
        }
        return {"tool_calls": [call]}
    text = f"The last tool returned: {outputs[0]}" if outputs else "Nothing to do."
    return {"content": text}


def events_of(request: Message) -> str:
    """Return the model's message as OpenAI's server-sent events."""
    delta = {"role": "assistant", **reply_to(request)}
    finish = "tool_calls" if "tool_calls" in delta else "stop"
    choices = [
        {"index": 0, "delta": delta},
        {"index": 0, "delta": {}, "finish_reason": finish},
    ]
    events = [json.dumps({"choices": [choice]}) for choice in choices]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


def has_both_kinds() -> bool:
    """Return whether spans of the server and of a Python program have arrived."""
    return bool(received["server"]) and QUERY_SPAN in received["python"]


class Handler(BaseHTTPRequestHandler):
    """Serves model and Agent; the path says which."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Report all spans; as the Agent's /info too, of which only the version is read."""
        seconds = self.path.partition("?")[2] or "0"
        with arrived:
            arrived.wait_for(has_both_kinds, float(seconds))
            self.send(json.dumps(received))

    def do_POST(self) -> None:
        """Answer as the model, or record spans."""
        body = self.read_body()
        if self.path == "/v1/chat/completions":
            self.send(events_of(json.loads(body)), "text/event-stream")
            return
        if self.path.endswith("/traces"):
            source = "server" if self.path == "/v1/traces" else "python"
            text = re.sub("[^\x20-\x7e]+", " ", body.decode("latin-1"))
            with arrived:
                received[source] += text
                arrived.notify_all()
        self.send("{}")

    def do_PUT(self) -> None:
        """Record spans, which ddtrace sends with PUT."""
        self.do_POST()

    def read_body(self) -> bytes:
        """Read the request's body, which may be chunked."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self.read_chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def read_chunk(self) -> bytes:
        """Read one chunk; the last one is empty."""
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def send(
        self,
        text: str,
        content_type: str = "application/json",
    ) -> None:
        """Send a response."""
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def main() -> None:
    """Serve every port until killed."""
    for port in sys.argv[1:]:
        server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
        threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
