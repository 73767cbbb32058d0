"""A whole conversation with the image, and what Datadog sees of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

import pytest

from pipeline.engines.container import Container, running
from pipeline.smoke import conversation, fake_upstreams
from tests.conftest import DOCKER, PODMAN, Built
from tests.image.conftest import derive
from tests.servers import ask, datadog_agent, until

pytestmark = pytest.mark.engine

CLIENT = """
import { createOpencodeClient } from "/usr/local/lib/opencode-plugin/node_modules/@opencode-ai/sdk/dist/client.js"
const credentials = Buffer.from("opencode:" + process.env.OPENCODE_SERVER_PASSWORD).toString("base64")
const headers = { Authorization: "Basic " + credentials }
const client = createOpencodeClient({ baseUrl: "http://localhost:4096", headers, throwOnError: true })
const seen = new Set()
let connected
const open = new Promise((resolve) => { connected = resolve })
const idle = (async () => {
  for await (const event of (await client.event.subscribe()).stream) {
    seen.add(event.type)
    connected()
    if (event.type === "session.idle") return
  }
})()
await open
const session = (await client.session.create({ body: { title: "with the SDK" } })).data
const text = 'PLAN [["bash", {"command": "echo from the SDK", "description": "says it"}]] END'
const body = { model: { providerID: "fake", modelID: "scripted" }, parts: [{ type: "text", text }] }
const answer = (await client.session.prompt({ path: { id: session.id }, body })).data
await idle
const found = (await client.session.list()).data.map((each) => each.title)
console.log(JSON.stringify({ said: answer.parts.map((part) => part.text ?? "").join(""), seen: [...seen], found }))
process.exit(0)
"""


@contextlib.contextmanager
def talking(
    built: Built,
    *,
    ports: Sequence[int] = (fake_upstreams.MODEL,),
    env: dict[str, str] | None = None,
) -> Iterator[conversation.Session]:
    """A conversation with a container that has no network but its own loopback and the published
    port.
    """
    words = [
        *conversation.environment(),
        *(f"{name}={value}" for name, value in (env or {}).items()),
    ]
    with running(
        built.engine,
        built.inspect()["Id"],
        password="pw",  # noqa: S106
        env=words,
        timeout=30,
    ) as container:
        container.wait_ready(60)
        conversation.start_upstreams(container, ports=ports)
        session = conversation.Session(container)
        conversation.session(session)
        with contextlib.closing(session.events):
            yield session


def test_every_deep_probe_passes_and_is_a_line(built: Built) -> None:
    done = built.inv("smoke", "--deep")
    assert done.code == 0, done.stdout + done.stderr
    passed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok ")}
    assert {probe.name for probe in (*conversation.PROBES, conversation.RESTART)} <= passed


@pytest.mark.parametrize(
    "built", ["podman"], indirect=True
)  # a probe asks the server, whatever the engine
@pytest.mark.usefixtures("unmoved")
def test_each_deep_probe_sees_what_it_is_there_for(built: Built) -> None:
    broken = derive(
        built,
        "broken",
        "RUN rm -r /opt/openagents/.opencode/tool /opt/openagents/.opencode/agent /opt/openagents/.opencode/command",
        "RUN echo > /app/scripts/lib/tracing/sitecustomize.py",
        "ENV XDG_DATA_HOME=/tmp",
    )
    done = built.inv("smoke", "--deep", "--image", broken, env={"INVOKE_SMOKE_READY_SECONDS": "60"})
    done.failed("SmokeFailed", 43, "probes failed")
    report = json.loads((built.checkout.root / "build/smoke.json").read_text())
    failed = {probe["name"]: probe["detail"] for probe in report["probes"] if not probe["passed"]}
    sentences = {
        "conversation": "OpenAgents has no tool that needs no arguments",
        "agent": "no agent of OpenAgents can be chosen",
        "command": "ValueError",
        "tracing": "no spans of the server or of Python: ",
        "restart": "returned 404",
    }
    assert {
        name: words for name, words in sentences.items() if words not in failed.get(name, "")
    } == {}, failed


@DOCKER
@pytest.mark.usefixtures("unmoved")
def test_opencodes_own_client_has_a_conversation(built: Built) -> None:
    with talking(built) as talk:
        done = talk.container.exec("node", "--input-type=module", "--eval", CLIENT, timeout=60)
        assert done.ok, done.output
        told = json.loads(done.stdout)
        assert told["said"] == "The last tool returned: from the SDK\n"
        assert {
            "server.connected",
            "session.created",
            "message.part.updated",
            "session.idle",
        } <= set(told["seen"])
        assert "with the SDK" in told["found"]


def within(container: Container) -> tuple[str, ...]:
    """Return what runs a program of this machine in the container's network."""
    argv = container.engine.argv("inspect", "--format", "{{.State.Pid}}", container.name)
    return "nsenter", f"--net=/proc/{container.engine.ask(argv).stdout.strip()}/ns/net"


@PODMAN
@pytest.mark.usefixtures("unmoved")
def test_datadogs_own_test_agent_gets_spans_of_the_server_and_of_pythons_it_starts(
    built: Built,
) -> None:
    with talking(built) as talk:
        inside = within(talk.container)
        with datadog_agent(fake_upstreams.TRACES, fake_upstreams.OTLP, *inside):
            conversation.conversation(talk)
            until(lambda: ask(fake_upstreams.OTLP, "/test/session/traces", *inside))
            traces = until(lambda: ask(fake_upstreams.TRACES, "/test/traces", *inside))
            batches = ask(fake_upstreams.OTLP, "/test/session/traces", *inside)
    names = conversation.VARIABLES
    (queried,) = [span for trace in traces for span in trace if span["name"] == "sqlite.query"]
    tags = {"env": names["DD_ENV"], "component": "sqlite"}
    assert tags.items() <= queried["meta"].items()
    bases = {queried["service"], queried["meta"].get("_dd.base_service")}
    assert names["DD_SERVICE"] in bases
    resources = [
        each["resource"]["attributes"] for batch in batches for each in batch["resourceSpans"]
    ]
    for attributes in resources:
        said = {entry["key"]: entry["value"].get("stringValue") for entry in attributes}
        assert said["service.name"] == names["DD_SERVICE"]
        assert (
            said["deployment.environment"] == said["deployment.environment.name"] == names["DD_ENV"]
        )
        assert said["service.version"] == names["DD_VERSION"]
    spans = [
        span["name"]
        for batch in batches
        for each in batch["resourceSpans"]
        for scope in each["scopeSpans"]
        for span in scope["spans"]
    ]
    assert any("message" in name.lower() or "session" in name.lower() for name in spans), sorted(
        set(spans)
    )[:50]


OWN_VENV = "python3 -m venv --without-pip /tmp/v && /tmp/v/bin/python -c 'print(6)' && /opt/venv/bin/python -c 'print(7)'"


@DOCKER
@pytest.mark.parametrize(
    "host", ["", "127.0.0.1"], ids=["no agent", "an agent that does not answer"]
)
@pytest.mark.usefixtures("unmoved")
def test_without_an_agent_pythons_say_nothing_of_datadog(built: Built, host: str) -> None:
    with talking(built, env={"DD_AGENT_HOST": host}) as talk:
        talk.prompt(("bash", {"command": OWN_VENV, "description": "starts two Pythons"}))
        assert talk.outputs()["bash"].strip() == "6\n7"
        log = talk.container.logs()
    assert "datadog" not in log.lower()
    assert "ddtrace" not in log.lower()
    assert "Error" not in log
