"""Images to and from Debian's docker-registry on loopback, with and without a password, by both
engines.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.core import process
from pipeline.core.errors import NoSuchRelease, NotPinned, RegistryRefused, RegistryUnreachable
from pipeline.core.settings import Settings
from pipeline.engines import detect
from pipeline.engines.detect import exit_program
from pipeline.engines.engine import Engine
from pipeline.image.tags import DATED, all_tags, find, same_id
from pipeline.release import bump, history, promote, registry
from tests.conftest import Dockerd, storage
from tests.servers import free_port, http_server

NAME = "opencode-server-pushed"
SETTINGS = Settings(image=NAME, network={"attempts": 2})
Serve = Callable[..., contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def served(home: Path, *, port: int = 0, password: str = "") -> Iterator[str]:
    """Run a registry; yield its host and port."""
    host = f"127.0.0.1:{port or free_port()}"
    program = shutil.which("docker-registry") or shutil.which("registry")
    assert program, "no docker-registry; inv setup --tests installs it"
    auth = ""
    if password:
        line = subprocess.run(
            ["htpasswd", "-nbB", "me", password], check=True, capture_output=True, text=True
        ).stdout
        (home / "htpasswd").write_text(line)
        auth = f"auth: {{htpasswd: {{realm: r, path: {home}/htpasswd}}}}\n"
    (home / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {home}/data}}}}\n"
        f"http: {{addr: '{host}'}}\n{auth}"
    )
    env = {
        key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")
    }  # it reads those
    with (home / "log").open("wb") as log:
        child = subprocess.Popen(
            [program, "serve", str(home / "config.yml")], stdout=log, stderr=log, env=env
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"http://{host}/v2/", timeout=2)
                break
            assert child.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield host
    finally:
        child.terminate()
        child.wait(20)


@pytest.fixture(params=["podman", "docker"])
def engine(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    podman_store: dict[str, str],
    dockerd: Dockerd,
    tmp_path: Path,
) -> Engine:
    """An engine with one small image, called latest."""
    for name, value in {**podman_store, **dockerd.env}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "auth.json").write_text("{}")
    monkeypatch.setenv(
        "REGISTRY_AUTH_FILE", str(tmp_path / "auth.json")
    )  # podman's and docker's own log-ins
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for module in (detect, promote):
        monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setattr(history, "FILE", tmp_path / "history.jsonl")
    found = detect.find(request.param)
    for tag in all_tags(SETTINGS, found):
        found.ask(found.argv("rmi", "--force", found.local(f"{NAME}:{tag}")))
    imported(found, tmp_path, "a" * 40)
    return found


def imported(engine: Engine, tmp_path: Path, commit: str) -> str:
    """Import an image of one program as latest, and return its ID."""
    program, tar = exit_program(platform.machine()), tmp_path / "image.tar"
    with tarfile.open(tar, "w") as archive:
        member = tarfile.TarInfo("exit0")
        member.size, member.mode = len(program), 0o755
        archive.addfile(member, BytesIO(program))
        member = tarfile.TarInfo("commit")
        member.size = len(commit)
        archive.addfile(member, BytesIO(commit.encode()))
    labels = {"kind": "openagents", "commit": commit}
    changes = [
        'CMD ["/exit0"]',
        *(f"LABEL opencode-server.openagents.{key}={value}" for key, value in labels.items()),
    ]
    done = engine.ask(engine.import_(tar, f"{NAME}:latest", changes))
    assert done.ok, done.output
    return str(find(SETTINGS, engine, "latest")["Id"])


def digest_of(repository: str, tag: str) -> str:
    """Return the digest that a registry on loopback has for ``repository:tag``."""
    host, _, path = repository.partition("/")
    kinds = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
    url = f"http://{host}/v2/{path}/manifests/{tag}"
    return requests.head(url, headers={"Accept": kinds}, timeout=5).headers["Docker-Content-Digest"]


def forget(engine: Engine) -> None:
    """Remove every image of ours, as on another machine."""
    for name in engine.ask(
        engine.argv("images", "--format", "{{.ID}} {{.Repository}}")
    ).stdout.splitlines():
        if NAME in name or "/team/" in name or "<none>" in name:
            engine.ask(engine.argv("rmi", "--force", name.split()[0]))


@pytest.mark.engine
def test_what_is_pushed_is_pulled_by_its_digest_and_promoted_elsewhere(
    engine: Engine, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = find(SETTINGS, engine, "latest")["Id"]
    with served(tmp_path) as host:
        assert registry.push(SETTINGS, engine, f"{host}/team/opencode", dry_run=True) == ""
        pinned = registry.push(SETTINGS, engine, f"{host}/team/opencode")
        (tag,) = requests.get(f"http://{host}/v2/team/opencode/tags/list", timeout=5).json()["tags"]
        assert re.fullmatch(r"\d{8}-aaaaaaa", tag)
        assert pinned == f"{host}/team/opencode@{digest_of(f'{host}/team/opencode', tag)}"
        assert history.read()[0][-1]["to"] == pinned
        # A year later the tag means something else; the digest does not.
        other = imported(engine, tmp_path, "a" * 39 + "b")
        engine.tag(other, f"{host}/team/opencode:{tag}")
        plain = engine.push(f"{host}/team/opencode:{tag}")
        assert engine.ask(plain).ok
        assert not pinned.endswith(digest_of(f"{host}/team/opencode", tag))
        forget(engine)
        if engine.podman:
            for name, value in storage(scratch / f"elsewhere-{tmp_path.name}").items():
                monkeypatch.setenv(name, value)
        assert all_tags(SETTINGS, engine) == {}
        registry.pull(SETTINGS, engine, pinned, dry_run=True)
        assert all_tags(SETTINGS, engine) == {}
        registry.pull(SETTINGS, engine, pinned)
    report = {"image": identity, "ready_seconds": 1, "probes": []}
    promote.promote(SETTINGS, engine, report, strict=True)
    tags = all_tags(SETTINGS, engine)
    assert set(tags) == {
        "candidate",
        "latest",
        next(tag for tag in tags if DATED.fullmatch(tag)),
    }
    assert all(same_id(each, identity) for each in tags.values()), "the same image, to the bit"


@pytest.mark.engine
def test_digests_of_two_platforms_become_one_index(engine: Engine, tmp_path: Path) -> None:
    digests = []
    with served(tmp_path) as host:
        repository = f"{host}/team/opencode"
        for architecture in ("amd64", "arm64"):
            forget(engine)
            imported(replace(engine, platform=f"linux/{architecture}"), tmp_path, "a" * 40)
            pinned = registry.push(SETTINGS, engine, repository)
            digests.append(pinned.partition("@")[2])
        for _ in range(2):  # what the first left would be in the way of the second
            index = registry.push_index(SETTINGS, engine, f"{repository}:1.0", digests)
        assert index.startswith(f"{repository}@sha256:")
        kinds = (
            "application/vnd.docker.distribution.manifest.list.v2+json, "
            "application/vnd.oci.image.index.v1+json"
        )
        answer = requests.get(
            f"http://{host}/v2/team/opencode/manifests/1.0", headers={"Accept": kinds}, timeout=5
        )
        assert answer.headers["Docker-Content-Digest"] == index.partition("@")[2]
        found = [
            (each["platform"]["architecture"], each["digest"])
            for each in answer.json()["manifests"]
        ]
        if engine.podman:  # docker 20.10 imports for its own architecture only
            assert sorted(found) == list(zip(("amd64", "arm64"), digests, strict=True))
        assert {digest for _, digest in found} == set(digests)
        with pytest.raises(NotPinned, match="has no tag"):
            registry.push_index(SETTINGS, engine, repository, digests)
        with pytest.raises(NotPinned, match="not pinned by digest"):
            registry.push_index(SETTINGS, engine, f"{repository}:1.0", ["1.0"])
        with pytest.raises(RegistryRefused, match="does not have the image"):
            registry.push_index(SETTINGS, engine, f"{repository}:1.0", ["sha256:" + "1" * 64])
        forget(engine)
        registry.pull(SETTINGS, engine, index)
        image = find(SETTINGS, engine, "candidate")
        assert image["Architecture"] == {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


@pytest.mark.engine
def test_a_registry_with_a_password(engine: Engine, tmp_path: Path) -> None:
    with served(tmp_path, password="letmein") as host:  # noqa: S106
        with pytest.raises(RegistryRefused, match="requires a login"):
            registry.push(SETTINGS, engine, f"{host}/team/opencode")
        plain = ["--tls-verify=false"] if engine.podman else []
        login = engine.argv("login", *plain, "--username", "me", "--password-stdin", host)
        assert process.run(login, stdin=b"letmein").ok
        pinned = registry.push(SETTINGS, engine, f"{host}/team/opencode")
        forget(engine)
        registry.pull(SETTINGS, engine, pinned)
        assert "candidate" in all_tags(SETTINGS, engine)
        assert process.run(engine.argv("logout", host)).ok
        with pytest.raises(RegistryRefused, match="requires a login"):
            registry.pull(SETTINGS, engine, pinned.replace("sha256:", "sha256:0")[: len(pinned)])


@pytest.mark.engine
def test_a_registry_that_comes_back_is_tried_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, tries = free_port(), 0
    with contextlib.ExitStack() as stack:

        def ask(self: Engine, argv: Sequence[str], **kwargs: Any) -> process.Completed:
            nonlocal tries
            if "push" in argv:
                tries += 1
            if tries == 2:
                stack.enter_context(served(tmp_path, port=port))
                tries += 1
            return process.run(argv, timeout=kwargs.get("timeout"), env=self.env)

        monkeypatch.setattr(Engine, "ask", ask)
        assert registry.push(SETTINGS, engine, f"127.0.0.1:{port}/team/opencode")
    assert tries == 3


@pytest.mark.engine
def test_what_a_registry_cannot_give(engine: Engine, tmp_path: Path) -> None:
    digest = "sha256:" + "1" * 64
    with served(tmp_path) as host, pytest.raises(RegistryRefused, match="does not have the image"):
        registry.pull(SETTINGS, engine, f"{host}/team/opencode@{digest}")
    with pytest.raises(RegistryUnreachable):
        registry.pull(SETTINGS, engine, f"{host}/team/opencode@{digest}")
    with (
        http_server(lambda _path, _headers: (500, b"out of order")) as port,
        pytest.raises(RegistryUnreachable),
    ):
        registry.pull(SETTINGS, engine, f"127.0.0.1:{port}/team/opencode@{digest}")
    with pytest.raises(NoSuchRelease):
        registry.push(SETTINGS, engine, f"{host}/team/opencode", "no-such-tag")
    for name in (
        f"{host}/team/opencode:latest",
        f"{host}/team/opencode",
        f"{host}/team/opencode@sha256:1",
    ):
        with pytest.raises(NotPinned):
            registry.pull(SETTINGS, engine, name)
    assert set(all_tags(SETTINGS, engine)) == {"latest"}


@pytest.mark.engine
def test_bump_takes_the_digest_that_the_engine_pulls(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = {
        "image": "node",
        "tag": "20-slim",
        "digest": "sha256:old",
        "debian": "bookworm",
        "node": "20.1.0",
        "npm": {},
    }
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/base.json").write_text(json.dumps(lock))
    monkeypatch.setattr(bump._Update, "base_packages", lambda _: {})
    monkeypatch.setattr(bump._Update, "schema", lambda _: {})
    with served(tmp_path) as host:
        engine.tag(engine.local(f"{NAME}:latest"), f"{host}/library/node:20-slim")
        assert engine.ask(engine.push(f"{host}/library/node:20-slim")).ok
        forget(engine)
        engine.ask(engine.argv("rmi", f"{host}/library/node:20-slim"))
        settings: dict[str, Any] = {"engine": engine.name, "network": {"attempts": 1}}
        if engine.podman:  # a short name is where registries.conf sends it
            conf = f'[[registry]]\nprefix = "docker.io"\nlocation = "{host}"\ninsecure = true\n'
            (tmp_path / "registries.conf").write_text(
                f'unqualified-search-registries = ["docker.io"]\n{conf}'
            )
            monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
        else:
            settings["base"] = {"mirrors": [f"{host}/library/node"]}
        (move,) = bump.bump(Settings(**settings), ["base"], root=tmp_path).moves
        assert (move.name, move.new) == (
            "node:20-slim",
            digest_of(f"{host}/library/node", "20-slim"),
        )
        assert bump.bump(Settings(**settings), ["base"], root=tmp_path).moves == []
