"""ddtrace-run and what it puts before every Python, with Datadog's own test agent at the other end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import ask, datadog_agent, free_port, silent_server, until

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEADLINE = 60.0
PRINT = "import json, os; print(json.dumps(dict(os.environ)))"
NOBODY = "127.0.0.1:1"
OFF = {
    "DD_TRACE_ENABLED",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED",
    "DD_REMOTE_CONFIGURATION_ENABLED",
}
RESOURCE = {
    "service.name": "opencode",
    "service.version": "1.18",
    "deployment.environment.name": "latest",
    "kept": "k",
}
SPANS = {
    "resourceSpans": [
        {
            "resource": {
                "attributes": [
                    {"key": key, "value": {"stringValue": RESOURCE[key]}} for key in RESOURCE
                ]
            },
            "scopeSpans": [
                {
                    "scope": {"name": "s"},
                    "spans": [
                        {
                            "traceId": "5b8aa5a2d2c872e8321cf37308d69df2",
                            "spanId": "051581bf3cb55c13",
                            "name": "a span",
                            "kind": 1,
                            "startTimeUnixNano": "1",
                            "endTimeUnixNano": "2",
                        }
                    ],
                }
            ],
        }
    ]
}


def run(
    *program: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program under ddtrace-run, with nothing of ours in its environment."""
    argv = [sys.executable, "-IS", str(SCRIPTS / "ddtrace-run"), *program]
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **(env or {})}
    return subprocess.run(
        argv, env=environ, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def told(**env: str) -> dict[str, str]:
    """Return the environment that a program gets."""
    done = run(sys.executable, "-c", PRINT, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def test_it_becomes_the_program_and_a_missing_one_is_named() -> None:
    done = run("sh", "-c", 'echo "$1"; exit 7', "sh", "two words")
    assert (done.returncode, done.stdout) == (7, "two words\n")
    done = run("no-such-program")
    assert (done.returncode, done.stderr) == (
        1,
        "ddtrace-run: no-such-program: No such file or directory\n",
    )


def test_without_an_agent_everything_of_datadogs_is_off_unless_said_otherwise() -> None:
    environ = told(PYTHONPATH="/theirs")
    assert environ["PYTHONPATH"] == f"{SCRIPTS}/lib/tracing:/theirs"
    assert {environ[name] for name in OFF} == {"false"}
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in environ
    assert told(DD_TRACE_ENABLED="true")["DD_TRACE_ENABLED"] == "true"


@pytest.mark.parametrize(
    ("env", "endpoint"),
    [
        ({"DD_AGENT_HOST": "agent"}, "http://agent:4318"),
        ({"DD_TRACE_AGENT_URL": "http://10.0.0.9:8126/"}, "http://10.0.0.9:4318"),
        ({"DD_TRACE_AGENT_URL": "https://agent.example.com"}, "http://agent.example.com:4318"),
        ({"DD_AGENT_HOST": "a", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1/"}, "http://b:1"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1/"}, "http://b:1/"),
        ({"DD_TRACE_AGENT_URL": "unix:///var/run/datadog/apm.socket"}, None),
        ({"DD_AGENT_HOST": "agent", "DD_TRACE_ENABLED": "false", "DD_SERVICE": "s"}, None),
    ],
)
def test_where_the_servers_own_spans_go(env: dict[str, str], endpoint: str | None) -> None:
    assert told(**env).get("OTEL_EXPORTER_OTLP_ENDPOINT") == endpoint


@pytest.fixture
def traceable(tmp_path: Path) -> Path:
    """A directory with a ddtrace that says that it traces, and a sitecustomize of the user's."""
    (tmp_path / "ddtrace").mkdir()
    (tmp_path / "ddtrace/__init__.py").write_text("")
    (tmp_path / "ddtrace/auto.py").write_text("print('traced')")
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    return tmp_path


def test_a_python_is_traced_while_an_agent_answers(traceable: Path) -> None:
    path = {"PYTHONPATH": str(traceable)}
    say = (
        sys.executable,
        "-c",
        "import os, sitecustomize; print(os.environ.get('DD_TRACE_ENABLED'))",
    )
    with silent_server() as port:
        for agent in (
            {"DD_TRACE_AGENT_URL": f"http://127.0.0.1:{port}"},
            {"DD_AGENT_HOST": "127.0.0.1", "DD_TRACE_AGENT_PORT": str(port)},
        ):
            assert run(*say, env={**path, **agent}).stdout == "theirs\ntraced\nNone\n"
            off = run(*say, env={**path, **agent, "DD_TRACE_ENABLED": "0"})
            assert off.stdout == "theirs\n0\n"
    for silent in (
        {},
        {"DD_TRACE_AGENT_URL": f"http://{NOBODY}"},
        {"DD_TRACE_AGENT_URL": "unix:///nowhere"},
    ):
        done = run(*say, env={**path, **silent})
        assert (done.stdout, done.stderr) == ("theirs\nfalse\n", "")


@pytest.mark.parametrize("agent", [{}, {"DD_TRACE_AGENT_URL": f"http://{NOBODY}"}, "listening"])
def test_a_python_without_ddtrace_says_nothing(agent: dict[str, str] | str, tmp_path: Path) -> None:
    (tmp_path / "ddtrace").mkdir()  # a project's directory of that name is no package
    with silent_server() as port:
        env = (
            {"DD_TRACE_AGENT_URL": f"http://127.0.0.1:{port}"} if isinstance(agent, str) else agent
        )
        done = run(
            sys.executable,
            "-c",
            "import sys; print('ddtrace' in sys.modules)",
            cwd=tmp_path,
            env=env,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_fault_in_the_users_own_sitecustomize_is_still_seen(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import no_such_module")
    assert (
        "no_such_module"
        in run(sys.executable, "-c", "pass", env={"PYTHONPATH": str(tmp_path)}).stderr
    )


POST = """
import http.client, os, sys, urllib.parse
url = urllib.parse.urlsplit(os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"])
connection = http.client.HTTPConnection(url.netloc, timeout=30)
body = sys.stdin.buffer.read()
for _ in range(int(sys.argv[1])):
    connection.request("POST", "/v1/traces", body, {"Content-Type": "application/json", "X-Kept": "1"})
    assert connection.getresponse().read() == b"{}"
print("sent", flush=True)
sys.stdin = open(0)
input()
"""


@contextlib.contextmanager
def posting(count: int, body: bytes, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that sends OTLP ``count`` times where it is told to, and then waits."""
    with tempfile.TemporaryFile() as spans:
        spans.write(body)
        spans.seek(0)
        program = POST.replace(
            "sys.stdin = open(0)\ninput()", "import time\nwhile True: time.sleep(60)"
        )
        argv = [
            sys.executable,
            "-IS",
            str(SCRIPTS / "ddtrace-run"),
            sys.executable,
            "-c",
            program,
            str(count),
        ]
        with subprocess.Popen(
            argv, env={**os.environ, **env}, stdin=spans, stdout=subprocess.PIPE
        ) as child:
            try:
                assert child.stdout
                assert child.stdout.readline() == b"sent\n"
                yield child
            finally:
                child.kill()


def test_the_agent_gets_the_servers_spans_under_the_names_it_was_given() -> None:
    traces, otlp = free_port(), free_port()
    names = {"DD_SERVICE": "shop", "DD_ENV": "prod=1, really", "DD_VERSION": "7"}
    where = {
        "DD_TRACE_AGENT_URL": f"http://127.0.0.1:{traces}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{otlp}",
    }
    with datadog_agent(traces, otlp), posting(1, json.dumps(SPANS).encode(), **where, **names):
        (request,) = until(lambda: ask(otlp, "/test/session/traces"))
    (received,) = request["resourceSpans"]
    attributes = {
        entry["key"]: entry["value"]["stringValue"] for entry in received["resource"]["attributes"]
    }
    expected = {"service.name": "shop", "service.version": "7", "kept": "k"}
    assert attributes == expected | dict.fromkeys(
        ["deployment.environment", "deployment.environment.name"], "prod=1, really"
    )
    assert [span["name"] for scope in received["scopeSpans"] for span in scope["spans"]] == [
        "a span"
    ]


def resident(pid: int) -> int:
    """Return how many bytes of memory a process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def relays(parent: int) -> list[int]:
    """Return the processes that ``parent`` has left beside itself."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.parametrize("agent", ["silent", "refusing", "no JSON"])
def test_an_agent_that_takes_nothing_costs_nothing(agent: str) -> None:
    body = (
        json.dumps({"resourceSpans": "x" * 1_000_000}).encode()
        if agent != "no JSON"
        else b"\xff" * 1_000_000
    )
    with silent_server() as port:
        place = NOBODY if agent == "refusing" else f"127.0.0.1:{port}"
        env = {
            "DD_AGENT_HOST": "127.0.0.1",
            "DD_SERVICE": "s",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{place}",
        }
        with posting(100, body, **env) as child:
            (relay,) = relays(child.pid)
            assert resident(relay) < 70_000_000, "of 100 MB it keeps no more than it queues"
        until(
            lambda: (
                not Path(f"/proc/{relay}").exists()
                or "Z" in Path(f"/proc/{relay}/stat").read_text().split()[2]
            )
        )


def test_what_is_too_large_is_refused_and_the_next_is_taken() -> None:
    threads = threading.active_count()
    with silent_server() as port:
        env = {
            "DD_AGENT_HOST": "x",
            "DD_ENV": "e",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        }
        program = (
            "import http.client, os\n"
            "for size in (5_000_000, 10):\n"
            "    at = http.client.HTTPConnection(os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'][7:], timeout=30)\n"
            "    at.putrequest('POST', '/v1/logs'); at.putheader('Content-Length', str(size)); at.endheaders()\n"
            "    at.send(b'x' * 10)\n"
            "    print(at.getresponse().status)\n"
        )
        done = run(sys.executable, "-c", program, env=env)
    assert (done.stdout, done.stderr) == ("413\n200\n", "")
    assert threading.active_count() == threads
