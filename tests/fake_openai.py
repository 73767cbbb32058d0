"""A model that costs nothing: OpenAI's protocol on loopback, a mind of a few lines, and an eye for what is malformed.

It converses as ``reply`` says (streaming, tool calls), answers Graphiti's structured prompts by rules that a test can
predict, and embeds by words. ``fail`` and ``down`` make it answer as a model that is rate-limited, ill or silent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
KEY = "sk-of-a-test"
MODEL, EMBEDDER = "fake-model", "fake-embedder"
LATE = -1


@dataclass(frozen=True)
class Call:
    """A tool call, as an answer of the model."""

    name: str
    arguments: Json


Reply = Callable[[list[Json], list[str]], "str | Call"]
"""From the messages and the tools' names to what the model answers."""


def quiet(messages: list[Json], tools: list[str]) -> str | Call:
    """Answer everything with one word."""
    del messages, tools
    return "ok"


class ProbeFailed(Exception):
    """A request that no OpenAI-compatible server should take."""


@dataclass
class Failure:
    """What to do instead of answering: a status, after so many seconds; ``times`` is how often, 0 for ever.

    Only to requests whose path ends with ``path`` and whose body has ``holding`` in it. A status of 0 hangs up, one of
    LATE answers as it should, only late.
    """

    status: int
    times: int = 1
    after: float = 0.0
    path: str = ""
    holding: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeOpenAI:
    """The endpoint's state; ``url`` is its base URL. ``wrong`` is what was malformed: a test ends
    with it empty. ``around`` is what structured answers of /v1/chat/completions are wrapped in.
    """

    reply: Reply = quiet
    key: str = KEY
    dimensions: int = 1024
    around: str = "%s"
    url: str = ""
    port: int = 0
    requests: list[tuple[str, Json]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, status: int, **more: Any) -> Failure:
        """Fail requests from now on; the failure is returned, so that it can be lifted."""
        self.failures.append(failure := Failure(status, **more))
        return failure

    def lift(self, failure: Failure) -> None:
        """End a failure."""
        with contextlib.suppress(ValueError):
            self.failures.remove(failure)

    def asked(self, path: str) -> list[Json]:
        """Return the bodies of requests to a path."""
        return [body for asked, body in self.requests if asked.endswith(path)]

    def failure(self, path: str, body: str) -> Failure | None:
        """Return the failure that this request meets, and count it."""
        with self.lock:
            for failure in self.failures:
                if path.endswith(failure.path) and failure.holding in body:
                    if failure.times:
                        failure.times -= 1
                        if not failure.times:
                            self.failures.remove(failure)
                    return failure
        return None


def check(condition: object, what: str) -> None:
    """Raise ProbeFailed when a request is not as it must be."""
    if not condition:
        raise ProbeFailed(what)


def check_messages(messages: Any) -> None:
    """Check a conversation: roles, contents, and that each tool's answer follows the call that it
    answers.
    """
    check(isinstance(messages, list) and messages, "messages is not a list with something in it")
    open_calls: set[str] = set()
    for message in messages:
        role, content = message.get("role"), message.get("content")
        check(
            role in ("system", "developer", "user", "assistant", "tool"),
            f"there is no role {role!r}",
        )
        calls = message.get("tool_calls") or []
        check(
            isinstance(content, (str, list)) or (calls and content is None),
            f"a message of {role} has no content",
        )
        if role == "tool":
            check(
                message.get("tool_call_id") in open_calls, "a tool's answer follows no call of it"
            )
            open_calls.discard(message["tool_call_id"])
        else:
            check(not open_calls, f"no answer to the calls {open_calls}")
        for call in calls:
            check(
                role == "assistant" and call.get("type") == "function" and call.get("id"),
                "a tool call is malformed",
            )
            check(
                isinstance(json.loads(call["function"]["arguments"]), dict),
                "a call's arguments are no object",
            )
            open_calls.add(call["id"])
    check(not open_calls, f"no answer to the calls {open_calls}")


def text_of(message: Json) -> str:
    """Return a message's text."""
    content = message.get("content") or ""
    return (
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    )


def between(text: str, tag: str) -> str:
    """Return what is between a tag's last opening and its end."""
    found = re.findall(rf"<{tag}>\n(.*?)\n?</{tag}>", text, re.DOTALL)
    return str(found[-1]) if found else ""


def names(text: str) -> list[str]:
    """Return the entities of a text: its capitalised words, each once, but not a sentence's "The"
    and the like.
    """
    words = re.findall(r"\b[A-Z][A-Za-z]*\d*\b", text)
    return [
        word
        for word in dict.fromkeys(words)
        if word.lower() not in ("the", "a", "an", "in", "it", "i", "we", "json")
    ]


def listed(prompt: str, tag: str) -> list[Any]:
    """Return the list that a prompt has in a tag, as JSON or as Python writes it."""
    text = between(prompt, tag)
    try:
        return list(json.loads(text))
    except ValueError:
        import ast

        return list(ast.literal_eval(text))


FIXED: dict[str, Json] = {
    "EdgeTimestamps": {"valid_at": None, "invalid_at": None},
    "Ping": {"ok": True},
    "SummarizedEntities": {"summaries": []},
}
"""Answers to schemas whose prompt does not matter."""


def structured(name: str, prompt: str) -> Json:
    """Answer one of Graphiti's prompts, by the name of the schema that it asks for."""
    if name == "ExtractedEntities":
        text = next(
            filter(None, (between(prompt, tag) for tag in ("TEXT", "CURRENT MESSAGE", "JSON"))), ""
        )
        return {"extracted_entities": [{"name": each, "entity_type_id": 0} for each in names(text)]}
    if name == "NodeResolutions":
        known = {each["name"]: each["candidate_id"] for each in listed(prompt, "EXISTING ENTITIES")}
        return {
            "entity_resolutions": [
                {
                    "id": each["id"],
                    "name": each["name"],
                    "duplicate_candidate_id": known.get(each["name"], -1),
                }
                for each in listed(prompt, "ENTITIES")
            ]
        }
    if name == "ExtractedEdges":
        text = between(prompt, "CURRENT_MESSAGE")
        found = [each["name"] for each in listed(prompt, "ENTITIES")]
        pairs = [(found[0], other) for other in found[1:2]]
        return {
            "edges": [
                {
                    "source_entity_name": one,
                    "target_entity_name": other,
                    "relation_type": "RELATES",
                    "fact": text.strip(),
                    "valid_at": None,
                    "invalid_at": None,
                }
                for one, other in pairs
            ]
        }
    if name == "EdgeDuplicate":
        new = between(prompt, "NEW FACT").strip()
        same = [each["idx"] for each in listed(prompt, "EXISTING FACTS") if each["fact"] == new]
        other = listed(prompt, "EXISTING FACTS") + listed(prompt, "FACT INVALIDATION CANDIDATES")
        gone = [each["idx"] for each in other if f"{each['fact']} no longer" == new]
        return {"duplicate_facts": same, "contradicted_facts": gone}
    if name in FIXED:
        return FIXED[name]
    raise ProbeFailed(f"nothing here answers a schema named {name}")


def embedding(text: str, dimensions: int) -> list[float]:
    """Return a vector by words: texts that share words are near to each other."""
    vector = [0.0] * dimensions
    for word, count in Counter(re.findall(r"\w+", text.lower())).items():
        place = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        vector[place % dimensions] += count
    length = sum(value * value for value in vector) ** 0.5 or 1.0
    return [value / length for value in vector]


def embeddings(fake: FakeOpenAI, body: Json) -> Json:
    """Answer /v1/embeddings, in base64 when it is asked for as OpenAI's own client does."""
    given = body.get("input")
    texts: list[Any] = given if isinstance(given, list) else [given]
    check(texts and all(isinstance(text, str) for text in texts), "input is no text")
    check(all(text.strip() for text in texts), "an input is empty")  # OpenAI answers 400 too
    vectors = [embedding(text, body.get("dimensions") or fake.dimensions) for text in texts]
    packed = body.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            if packed
            else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "model": body["model"],
        "data": data,
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }


def think(fake: FakeOpenAI, body: Json) -> str | Call:
    """Decide what to answer a chat with."""
    check_messages(body["messages"])
    form = body.get("response_format")
    if form is not None:
        check(
            form.get("type") in ("text", "json_object", "json_schema"),
            f"there is no response format {form}",
        )
    if form and form["type"] == "json_schema":
        check("properties" in form["json_schema"]["schema"], "a schema without properties")
        return json.dumps(structured(form["json_schema"]["name"], text_of(body["messages"][-1])))
    if form and form["type"] == "json_object":
        prompt = "\n".join(text_of(message) for message in body["messages"])
        check("json" in prompt.lower(), "json_object without the word JSON in any message")
        title = re.findall(r'"title": "(\w+)", "type": "object"', prompt)
        return json.dumps(structured(title[-1], text_of(body["messages"][-1]))) if title else "{}"
    tools = body.get("tools") or []
    for tool in tools:
        check(
            tool.get("type") == "function" and tool["function"].get("name"), "a tool is malformed"
        )
        check(
            tool["function"].get("parameters", {}).get("type") == "object",
            "a tool's parameters are no object",
        )
    answer = fake.reply(body["messages"], [tool["function"]["name"] for tool in tools])
    if isinstance(answer, Call):
        check(
            answer.name in [tool["function"]["name"] for tool in tools],
            f"the client offers no tool {answer.name}",
        )
    return answer


def chat(fake: FakeOpenAI, body: Json) -> tuple[Json, list[Json]]:
    """Answer /v1/chat/completions: the whole answer, and the same as a stream's chunks."""
    answer = think(fake, body)
    if body.get("response_format") and isinstance(answer, str):
        answer = fake.around.replace("%s", answer)
    stamp: Json = {"id": "chatcmpl-1", "created": int(time.time()), "model": body["model"]}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    if isinstance(answer, Call):
        called = f"call_{len(body['messages'])}"
        function = {"name": answer.name, "arguments": json.dumps(answer.arguments)}
        calls = [{"id": called, "type": "function", "function": function}]
        message, finish = {"role": "assistant", "content": None, "tool_calls": calls}, "tool_calls"
        deltas: list[Json] = [{"role": "assistant", "tool_calls": [{"index": 0, **calls[0]}]}]
    else:
        message, finish = {"role": "assistant", "content": answer}, "stop"
        deltas = [
            {"role": "assistant", "content": ""},
            *({"content": part} for part in re.findall(r"\S*\s*", answer) if part),
        ]
    whole = {
        **stamp,
        "object": "chat.completion",
        "usage": usage,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    chunk = {**stamp, "object": "chat.completion.chunk"}
    chunks = [
        {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    chunks.append(
        {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": usage}
    )
    return whole, chunks


def responses(fake: FakeOpenAI, body: Json) -> Json:
    """Answer /v1/responses, which OpenAI's structured outputs come by; without streams and tools."""
    given = body.get("input")
    messages: list[Json] = (
        given if isinstance(given, list) else [{"role": "user", "content": given}]
    )
    form = (body.get("text") or {}).get("format")
    if form and form.get("type") == "json_schema":
        check(
            form.get("strict") and form["schema"].get("additionalProperties") is False,
            "a schema that is not strict",
        )
        check_messages(messages)
        text = json.dumps(structured(form["name"], text_of(messages[-1])))
    else:
        text = str(think(fake, {"messages": messages}))
    output = {"type": "output_text", "text": text, "annotations": []}
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [output],
    }
    details = {
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": time.time(),
        "model": body["model"],
        "status": "completed",
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2, **details},
    }


class Handler(BaseHTTPRequestHandler):
    """Speak HTTP for a FakeOpenAI, which is the server's ``fake``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeOpenAI

    def do_GET(self) -> None:
        if self.path.endswith("/models"):
            models = [
                {"id": name, "object": "model", "created": 0, "owned_by": "test"}
                for name in (MODEL, EMBEDDER)
            ]
            self._answer(200, {"object": "list", "data": models})
        else:
            self._error(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        fake, length = self.fake, int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(length)
        if len(raw) < length:  # the client was killed in the middle
            self.close_connection = True
            return
        if failure := fake.failure(self.path, raw.decode()):
            if failure.after:
                fake.over.wait(failure.after)
            if failure.status == 0:
                self.close_connection = True
                return
            if failure.status != LATE:
                self._error(failure.status, "as the test wants it", failure.headers)
                return
        if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
            self._error(401, "Incorrect API key provided")
            return
        try:
            body = json.loads(raw)
            fake.requests.append((self.path, body))
            check(isinstance(body.get("model"), str) and body["model"], "no model is named")
            self._route(body)
        except (ProbeFailed, ValueError, KeyError, TypeError, AttributeError) as error:
            fake.wrong.append(f"{self.path}: {type(error).__name__}: {error}")
            self._error(400, str(error))

    def _route(self, body: Json) -> None:
        if self.path.endswith("/embeddings"):
            self._answer(200, embeddings(self.fake, body))
        elif self.path.endswith("/responses"):
            self._answer(200, responses(self.fake, body))
        elif self.path.endswith("/chat/completions"):
            whole, chunks = chat(self.fake, body)
            if body.get("stream"):
                events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
                self._send(
                    200, "text/event-stream", "".join([*events, "data: [DONE]\n\n"]).encode()
                )
            else:
                self._answer(200, whole)
        else:
            self._error(404, f"there is no {self.path}")

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._answer(
            status, {"error": {"message": message, "type": "fake", "code": status}}, headers
        )

    def _answer(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(body).encode(), headers)

    def _send(
        self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        with contextlib.suppress(OSError):  # a client that was killed
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on the test's stderr."""


class Server(ThreadingHTTPServer):
    """A server whose clients may be killed at any time."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: a client that went away is no fault."""


@contextlib.contextmanager
def fake_openai(
    reply: Reply = quiet, *, host: str = "127.0.0.1", port: int = 0, key: str = KEY
) -> Iterator[FakeOpenAI]:
    """Serve on ``host`` and yield the endpoint; its ``url`` is what OPENAI_BASE_URL should be."""
    fake = FakeOpenAI(reply, key)
    server = Server((host, port), type("Bound", (Handler,), {"fake": fake}))
    fake.port = server.server_port
    fake.url = f"http://{host}:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
