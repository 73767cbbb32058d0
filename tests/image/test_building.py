"""Build: what it says, what it refuses, and what goes on when it is cut short."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import process
from tests.conftest import IMAGE, Built, Checkout, Dockerd, storage

pytestmark = pytest.mark.engine

PODMAN = pytest.mark.parametrize("built", ["podman"], indirect=True)
DOCKER = pytest.mark.parametrize("built", ["docker"], indirect=True)
WAITING = "\nRUN echo now waiting; sleep 20\n"


def test_it_says_what_it_made_and_what_changed_since(built: Built) -> None:
    image_id = built.inspect()["Id"].removeprefix("sha256:")
    assert re.search(
        rf"built {IMAGE}:candidate  [0-9a-f]{{12}}  \d+\.\d MB  in \d+\.\d s", built.said
    )
    assert "since the last build: the first build here" in built.said

    again = built.inv("build")
    assert again.code == 0, again.stdout + again.stderr
    assert "since the last build: nothing changed" in again.stdout
    assert "(+0.0 MB)" in again.stdout
    assert built.inspect()["Id"].removeprefix("sha256:") != image_id, "its created label is newer"

    config = json.loads((built.checkout.root / "config.json").read_text())
    with (
        built.checkout.changed("config.json", json.dumps({**config, "username": "tester"})),
        built.checkout.changed("scripts/health", append="# edited\n"),
    ):
        edited = built.inv("build")
    assert built.inv("build").code == 0
    assert edited.code == 0, edited.stdout + edited.stderr
    assert "since the last build: config.json changed; scripts/health changed" in edited.stdout
    record = json.loads((built.checkout.root / f"build/build-{built.engine.name}.json").read_text())
    assert record["id"] == built.inspect()["Id"].removeprefix("sha256:")
    assert record["changes"] == ["config.json changed", "scripts/health changed"]


@pytest.mark.usefixtures("unmoved")
def test_a_contributor_builds_the_same_without_inv(built: Built) -> None:
    words = ["--format", "docker"] if built.engine.podman else []
    # By its own name: tests beside this one give node:20-slim to other images.
    (base,) = re.findall(r"build: \w+, (\S+?),? ", built.said)
    words += ["--build-arg", f"BASE={base}"]
    argv = [built.engine.program, *built.engine.flags, "build", *words, *built.engine.limits]
    done = process.run(
        [*argv, "--tag", f"{IMAGE}-plain", "."], cwd=built.checkout.root, env=built.engine.env
    )
    assert done.ok, done.output
    plain, ours = built.inspect(built.engine.local(f"{IMAGE}-plain")), built.inspect()
    assert {**plain["Config"], "Labels": 0, "Image": 0} == {
        **ours["Config"],
        "Labels": 0,
        "Image": 0,
    }
    assert plain["RootFS"]["Layers"] == ours["RootFS"]["Layers"]


@pytest.mark.usefixtures("unmoved")
def test_a_containerfile_that_cannot_be_read(built: Built) -> None:
    with built.checkout.changed("Containerfile", append="\nFRUM nothing\n"):
        done = built.inv("build")
    done.failed("ContainerfileRefused", 32, "FRUM")


@pytest.mark.usefixtures("unmoved")
def test_a_step_that_fails_is_shown(built: Built) -> None:
    with built.checkout.changed(
        "Containerfile", append="\nRUN echo these are; echo my last words; exit 7\n"
    ):
        done = built.inv("build")
    done.failed("BuildFailed", 31, "these are", "my last words", "No tag has moved")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "config.json: Expecting property name"),
        ('{"autoupdaet": false}', "autoupdaet"),
        ('{"share": "perhaps"}', "share: 'perhaps' is not one of"),
    ],
)
@pytest.mark.usefixtures("unmoved")
def test_a_config_that_opencode_would_not_take(built: Built, text: str, sentence: str) -> None:
    with built.checkout.changed("config.json", text):
        built.inv("build").failed("ConfigRefused", 33, sentence)


@pytest.mark.usefixtures("unmoved")
def test_nothing_was_fetched(built: Built) -> None:
    with built.checkout.changed("vendor/OpenAgents"):
        built.inv("build").failed("NothingFetched", 34, "inv fetch")


@pytest.mark.parametrize(
    ("built", "lock", "entry"),
    [
        ("podman", "locks/npm/*/package-lock.json", r'(?s)"node_modules/zod": {.*?}'),
        ("docker", "locks/image.txt", r"(?ms)^redis==.*?(?=^\S)"),
    ],
    indirect=["built"],
)
def test_a_download_that_is_not_what_the_lock_pins(built: Built, lock: str, entry: str) -> None:
    tags = built.tags()
    with contextlib.ExitStack() as stack:
        for path in built.checkout.root.glob(lock):
            found = re.search(entry, path.read_text())
            assert found
            tampered = path.read_text().replace(
                found[0], re.sub("(sha256:|sha512-)....", r"\g<1>aaaa", found[0])
            )
            stack.enter_context(
                built.checkout.changed(str(path.relative_to(built.checkout.root)), tampered)
            )
        done = built.inv("build")
    done.failed("LockBroken", 35, "does not match its hash in locks/")
    assert built.tags() == tags


@DOCKER
def test_a_daemon_that_dies_in_the_middle(built: Built, dockerd: Dockerd) -> None:
    checkout = built.checkout
    tags = built.tags()
    with checkout.changed("Containerfile", append=WAITING):
        build = built.start("build")
        build.until("now waiting\n")
        dockerd.end(signal.SIGKILL)
        try:
            build.end().failed("EngineLost", 14, "docker stopped")
        finally:
            dockerd.start()
    assert built.tags() == tags
    again = built.inv("build")
    assert again.code == 0, again.stdout + again.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB; a build of ours writes 6 MB after what is fetched."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounted if f"{mount}/".startswith(f"{tmp_path}/")]):
        subprocess.run(["umount", "--lazy", mount], check=True)


@PODMAN
def test_a_full_disk(built: Built, small_disk: Path, users_store: str) -> None:
    """The images that podman builds on are on another disk: those of the tests, which it only
    reads.
    """
    checkout = built.checkout
    env = storage(small_disk, built.engine.store, users_store)
    with checkout.changed("Containerfile", append="\nRUN head -c 20000000 /dev/zero > /zeros\n"):
        done = checkout.inv("build", "--engine", "podman", env=env)
    done.failed("DiskFull", 26, "no space is left for the build")


def test_no_engine(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.inv("build", env={"PATH": str(tmp_path)})
    done.failed("NoEngine", 12, "podman is not installed; docker is not installed", "inv setup")


def test_a_docker_client_without_a_daemon_is_no_engine(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.inv(
        "build", "--engine", "docker", env={"DOCKER_HOST": f"unix://{tmp_path}/nobody.sock"}
    )
    done.failed("NoEngine", 12, "Cannot connect to the Docker daemon", "start the daemon of docker")


@PODMAN
def test_an_engine_that_answers_and_can_start_nothing(built: Built, tmp_path: Path) -> None:
    (tmp_path / "conf").write_text('[containers]\nseccomp_profile = "/nowhere"\n')
    with built.checkout.changed("build/engine-podman.json"):
        done = built.inv("build", env={"CONTAINERS_CONF": str(tmp_path / "conf")})
    done.failed("EngineBroken", 13, "cannot start a container")


@pytest.mark.parametrize(
    ("moment", "number"), [("build: ", signal.SIGINT), ("now waiting\n", signal.SIGTERM)]
)
def test_a_signal_leaves_nothing_behind(built: Built, moment: str, number: signal.Signals) -> None:
    tags, containers = built.tags(), built.containers()
    with built.checkout.changed("Containerfile", append=WAITING):
        build = built.start("build")
        build.until(moment)
        build.end(number, seconds=20).failed("Interrupted", 128 + number, number.name)
    assert (built.tags(), built.containers()) == (tags, containers)
    assert built.inv("build").code == 0
