"""The base image from a real registry on loopback, and from registries that do not have it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from pipeline.engines.detect import PROOF_IMAGE
from tests.conftest import Built, storage
from tests.servers import free_port, http_server

pytestmark = pytest.mark.engine

ELSEWHERE = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's docker-registry on loopback; yields its host and port."""
    home, host = tmp_path_factory.mktemp("registry"), f"127.0.0.1:{free_port()}"
    program = shutil.which("docker-registry") or shutil.which("registry")
    assert program, "no docker-registry; inv setup --tests installs it"
    (home / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {home}/data}}}}\n"
        f"http: {{addr: '{host}'}}\n"
    )
    with (home / "log").open("wb") as log:
        child = subprocess.Popen(
            [program, "serve", str(home / "config.yml")], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                assert requests.get(f"http://{host}/v2/", timeout=2).ok
                break
            except requests.ConnectionError:
                assert child.poll() is None, (home / "log").read_text()
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.05)
        yield host
    finally:
        child.terminate()
        child.wait(20)


def pushed(built: Built, registry: str) -> str:
    """Push a small image to the registry as node:20-slim and return its digest there."""
    engine, name = built.engine, f"{registry}/library/node:20-slim"
    engine.tag(engine.local(PROOF_IMAGE), name)
    done = engine.ask(engine.argv("push", *(["--tls-verify=false"] if engine.podman else []), name))
    assert done.ok, done.output
    kinds = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
    answer = requests.head(
        f"http://{registry}/v2/library/node/manifests/20-slim", headers={"Accept": kinds}, timeout=5
    )
    engine.ask(engine.argv("rmi", name))
    return answer.headers["Docker-Content-Digest"]


def settings(path: Path, mirror: str, make: str) -> str:
    (path / "mine.yaml").write_text(f"base:\n  mirrors: [{mirror}]\n  make: {make}\n")
    return str(path / "mine.yaml")


def lock(built: Built, digest: str) -> str:
    said = json.loads((built.checkout.root / "locks/base.json").read_text())
    return json.dumps({**said, "digest": digest})


def test_it_is_pulled_by_digest_from_the_first_registry_that_has_it(
    built: Built, registry: str, tmp_path: Path
) -> None:
    mine, before = (
        settings(tmp_path, f"{registry}/library/node", "never"),
        built.inspect("node:20-slim"),
    )
    with built.checkout.changed("locks/base.json", lock(built, pushed(built, registry))):
        done, again = (built.inv("-f", mine, "base") for _ in range(2))
    assert done.code == 0, done.stdout + done.stderr
    tried = re.findall(r"base: pulling (\S+)@sha256:", done.stdout)
    assert tried == ["node", f"{registry}/library/node"]
    assert again.code == 0
    here = re.search(r"base: (\S+:pulled-\w+) is here", again.stdout)
    assert here
    assert (
        built.inspect(here[1])["RootFS"] == built.inspect(built.engine.local(PROOF_IMAGE))["RootFS"]
    )
    # It took the name from the one that other tests build on, which podman may show again by
    # itself.
    name = built.engine.local("node:20-slim")
    for each in (name, here[1]):
        built.engine.ask(built.engine.argv("rmi", each))
    if (built.engine.image(name) or {}).get("Id") != before["Id"]:
        built.engine.tag(before["Id"], name)
    assert built.inspect(name)["Id"] == before["Id"]


def test_a_registry_that_has_another_image(built: Built, registry: str, tmp_path: Path) -> None:
    mine = settings(tmp_path, f"{registry}/library/node", "never")
    pushed(built, registry)
    with built.checkout.changed("locks/base.json", lock(built, ELSEWHERE)):
        done = built.inv("-f", mine, "base")
    done.failed("BaseUnavailable", 30, "node: ", f"{registry}/library/node: ", "base.mirrors")


def test_a_registry_that_is_out_of_order(built: Built, tmp_path: Path) -> None:
    with http_server(lambda _path, _headers: (500, b"out of order")) as port:
        mine = settings(tmp_path, f"127.0.0.1:{port}/library/node", "never")
        done = built.inv("-f", mine, "base")
    done.failed("BaseUnavailable", 30, f"127.0.0.1:{port}/library/node: ", "500")


@pytest.mark.parametrize("built", ["podman"], indirect=True)
def test_it_is_made_where_no_registry_has_it(
    built: Built, registry: str, scratch: Path, tmp_path: Path
) -> None:
    mine = settings(tmp_path, f"{registry}/library/node", "auto")
    with built.checkout.changed("locks/base.json", lock(built, ELSEWHERE)):
        done = built.inv("-f", mine, "base", env=storage(scratch / "fresh"))
    assert done.code == 0, done.stdout + done.stderr
    tried = re.findall(r"base: pulling (\S+)@sha256:", done.stdout)
    assert tried == ["node", f"{registry}/library/node"]
    assert "!!    base: made here" in done.stdout
