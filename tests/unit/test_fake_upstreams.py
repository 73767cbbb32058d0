"""The fake model and the fake Datadog Agent of the deep smoke test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
import requests

from pipeline.smoke import fake_upstreams


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve what the test names."""
    with ThreadingHTTPServer(("127.0.0.1", 0), request.param) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("url", [fake_upstreams.Handler], indirect=True)
def test_the_peer_answers_when_there_are_spans_of_both_kinds(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_upstreams, "received", {"version": "7", "server": "", "python": ""})
    assert requests.get(f"{url}/received?0.1", timeout=5).json()["server"] == ""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(requests.get, f"{url}/received?20", timeout=30)
        requests.post(f"{url}/v1/traces", data=b'{"service.name": "it"}', timeout=5)
        requests.post(f"{url}/telemetry", data=b"{}", timeout=5)
        assert not waiting.done()
        requests.put(f"{url}/v0.4/traces", data=b"\x93\xacsqlite.query\x01", timeout=5)
        spans = waiting.result(10).json()
    assert (spans["server"], spans["python"]) == ('{"service.name": "it"}', " sqlite.query ")


@pytest.mark.parametrize("url", [fake_upstreams.Handler], indirect=True)
def test_the_model_carries_out_the_plan_of_the_last_prompt(url: str) -> None:
    def reply(*messages: dict[str, Any], tools: Sequence[dict[str, Any]] = ({},)) -> Any:
        request = {"messages": messages, "tools": tools}
        lines = requests.post(f"{url}/v1/chat/completions", json=request, timeout=5).text.split(
            "\n\n"
        )
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:2]]
        assert lines[2:] == ["data: [DONE]", ""]
        delta = chunks[0]["delta"]
        assert chunks[1]["finish_reason"] == ("tool_calls" if "tool_calls" in delta else "stop")
        if "content" in delta:
            return delta["content"]
        function = delta["tool_calls"][0]["function"]
        return function["name"], json.loads(function["arguments"])

    old = [
        {"role": "user", "content": 'PLAN [["old", {}]] END'},
        {"role": "tool", "content": "old output"},
    ]
    user = {
        "role": "user",
        "content": [{"text": 'PLAN [["a", {"x": 1}], '}, {"text": '["b", {}]] END'}],
    }
    assert reply(*old, user) == ("a", {"x": 1})
    assert reply(*old, user, tools=[]) == "Nothing to do."
    first = {"role": "tool", "content": "one"}
    assert reply(*old, user, {"role": "assistant"}, first) == ("b", {})
    assert (
        reply(*old, user, first, {"role": "tool", "content": "two"})
        == "The last tool returned: two"
    )
