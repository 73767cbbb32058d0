"""Build: what it says, what it refuses, and what goes on when it is cut short."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import process
from pipeline.image.context import files
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


def plain_build(built: Built) -> process.Completed:
    """Build as a contributor does who does not know of inv."""
    words = ["--format", "docker"] if built.engine.podman else []
    # By its own name: tests beside this one give node:20-slim to other images.
    (base,) = re.findall(r"build: \w+, (\S+?),? ", built.said)
    if ARG in (built.checkout.root / "Containerfile").read_text():
        words += ["--build-arg", f"BASE={base}"]
    argv = [built.engine.program, *built.engine.flags, "build", *words, *built.engine.limits]
    argv += ["--file", "Containerfile", "--tag", f"{IMAGE}-plain", "."]
    return built.engine.ask(argv, cwd=built.checkout.root)


# Edits of a Containerfile. Each is small: what is compared is how the file is read.
ARG, FROM = "ARG BASE=node:20-slim\n", "FROM ${BASE}\n"
BASE = ARG + FROM
OTHER = "FROM opencode-server-proof:1\n"
EDITS = {
    "args before FROM": f"ARG TEAM=platform\n{BASE}ARG TEAM\nRUN echo team $TEAM > /team\n",
    "another base": f"ARG BASE=opencode-server-proof:1\n{FROM}COPY config.json /\n",
    "a base by name": f"{OTHER}COPY --chown=1000:1000 config.json /\nUSER 1000",
    "no base": "FROM scratch\nADD config.json /\nENV A='b c'\nENTRYPOINT [\"/x\"]\n",
    "stages": f"{ARG}{OTHER.strip()} AS tools\nCOPY config.json /x\n{FROM}COPY --from=tools /x /y\n",
    "a stage after the last": f"{BASE.strip()} as server\nCOPY inv /\nfrom server AS debug\nUSER 1\n",
    "a stage beside it": f"{BASE.strip()} AS system\nFROM system AS lint\nWORKDIR /lint\n",
    "an image's file": f"{BASE}COPY --from=opencode-server-proof:1 /exit0 /exit0\n",
    "a directive": f"# escape=`\n{BASE}COPY `\n config.json `\n /\n",
    "a heredoc": f"{BASE}RUN <<END\necho heredoc > /h\nEND\n",
    "a file that is not in the context": f"{BASE}COPY docs/image.md /\n",
    "a new file": f"{BASE}COPY extra/ /extra/\nRUN --mount=type=bind,source=extra,target=/m ls /m",
}


def test_what_the_containerfile_says_is_what_is_built(built: Built) -> None:
    """Each row by inv and by the engine alone: the same layers and configuration, or both fail."""
    checkout = built.checkout
    (checkout.root / "extra").mkdir()
    (checkout.root / "extra/tool.sh").write_text("one")
    rows = {"none": (checkout.root / "Containerfile").read_text(), **EDITS}
    try:
        with checkout.changed(".dockerignore", append="!extra\n!inv\n"):
            for row, text in rows.items():
                with checkout.changed("Containerfile", text):
                    done, plain = built.inv("build"), plain_build(built)
                    assert (done.code == 0) == plain.ok, (row, done.stderr, plain.output)
                    if not plain.ok:
                        assert row in {"a heredoc", "a file that is not in the context"}, (
                            plain.output
                        )
                        continue
                    images = built.inspect(built.engine.local(f"{IMAGE}-plain")), built.inspect()
                    assert images[0]["RootFS"] == images[1]["RootFS"], row
                    configs = [{**image["Config"], "Labels": 0, "Image": 0} for image in images]
                    assert configs[0] == configs[1], row
            with checkout.changed("Containerfile", EDITS["a new file"]):
                assert built.inv("build").code == 0
                (checkout.root / "extra/tool.sh").write_text("two")
                assert "since the last build: extra/tool.sh changed" in built.inv("build").stdout
                assert built.inspect()["RootFS"] != images[1]["RootFS"]
    finally:
        shutil.rmtree(checkout.root / "extra")
        assert built.inv("build").code == 0


RULES = r"""
# a comment
*
!one
one/a.*
!**/keep
two
!two/x/y
/three/
!three/*/q
!sp ace
**/deep/*.k
!name[0-9]
!./four/../five
five/?
"""
PATHS = (
    "one/a.b one/ab one/c/a.b one/keep keep x/keep/z two/x/y two/x/z two/y three/q three/a/q "
    "three/a/b/q sp name1 namex five/a five/ab four/a deep/a.k one/deep/a.k one/deep/b/a.k"
)


def test_the_context_is_what_the_engine_sees(built: Built, tmp_path: Path) -> None:
    for name in [*PATHS.split(), "sp ace/b"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "one/link").symlink_to("nowhere")
    (tmp_path / ".dockerignore").write_text(RULES)
    file = tmp_path / "Containerfile"
    file.write_text("FROM scratch\nCOPY . /context/\n")
    done = built.engine.ask(
        built.engine.build(tmp_path, tag=f"{IMAGE}-context", containerfile=file)
    )
    assert done.ok, done.output
    archive = tmp_path / "image.tar"
    built.engine.save(built.engine.local(f"{IMAGE}-context"), archive)
    seen: set[str] = set()
    with tarfile.open(archive) as outer:
        manifest = json.load(outer.extractfile("manifest.json") or io.BytesIO())
        for name in manifest[0]["Layers"]:
            with tarfile.open(fileobj=outer.extractfile(name)) as layer:
                seen |= {member.name for member in layer if not member.isdir()}
    archive.unlink()
    ours = {f"context/{path}" for path in files(tmp_path)}
    # podman 4.3 and docker 20.10 do not look into a folder that one line excludes for what another
    # includes by a wildcard; BuildKit of docker 26 does.
    assert seen <= ours
    assert ours - seen <= {"context/three/a/q", "context/x/keep/z"}


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
