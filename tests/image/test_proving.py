"""Smoke: what it says of a good image, and of images that are broken in each way."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from pipeline.core.settings import Settings
from pipeline.engines.container import SECRET, Container
from pipeline.smoke import image_probes, server_probes
from pipeline.smoke.image_probes import ImageSubject
from pipeline.smoke.probe import ProbeFailed
from tests.conftest import DOCKER, IMAGE, PODMAN, Built
from tests.image.conftest import derive

pytestmark = pytest.mark.engine

PATIENCE = {"INVOKE_SMOKE_READY_SECONDS": "10"}
NODE = 'ENTRYPOINT ["node", "-e", "require(\'http\').createServer((ask, answer) => {%s}).listen(4096)"]'


def test_every_probe_of_a_good_image_passes_and_is_a_line(built: Built) -> None:
    lines = [
        line.split() for line in built.smoked.splitlines() if line.startswith(("ok ", "FAIL "))
    ]
    groups = (server_probes.PROBES, image_probes.STARTING, image_probes.READY, image_probes.OFFLINE)
    named = [probe.name for group in groups for probe in group]
    said = [line[1] for line in lines]
    assert sorted(said) == sorted(["ready", *(name.split()[0] for name in named)])
    assert all(line[0] == "ok" for line in lines)
    assert f"{len(said)} of {len(said)} probes passed" in built.smoked


@DOCKER
def test_what_passed_becomes_latest_and_what_was_latest_previous(built: Built) -> None:
    was = built.tags()["latest"]
    assert built.inv("build").code == 0
    new = built.tags()["candidate"]
    assert new != was
    containers = built.containers()
    done = built.inv("smoke")
    assert done.code == 0, done.stdout + done.stderr
    assert f"{IMAGE}:latest is now {new.removeprefix('sha256:')[:12]}; previous is " in done.stdout
    assert {"latest": new, "previous": was}.items() <= built.tags().items()
    assert built.containers() == containers

    report = json.loads((built.checkout.root / "build/smoke.json").read_text())
    assert report["passed"]
    assert report["target"] == built.reference
    assert all(probe["passed"] for probe in report["probes"])


@PODMAN
def test_the_starter_never_takes_the_place_of_openagents(built: Built) -> None:
    before = built.tags()
    label = "LABEL opencode-server.openagents.kind=starter"
    try:
        built.engine.tag(derive(built, "starter", label), f"{IMAGE}:candidate")
        done = built.inv("smoke")
        assert done.code == 0, done.stdout + done.stderr
        assert "latest stays as it is" in done.stdout
        assert built.tags()["latest"] == before["latest"]
    finally:
        built.engine.tag(before["candidate"], f"{IMAGE}:candidate")


@PODMAN
@pytest.mark.parametrize(
    ("entrypoint", "sentences"),
    [
        (
            'ENTRYPOINT ["sh", "-c", "echo no such key; exit 3"]',
            ("the container exited with 3", "no such key"),
        ),
        (
            'ENTRYPOINT ["sh", "-c", "sleep 1; echo gave up; exit 4"]',
            ("the container exited with 4", "gave up"),
        ),
        ('ENTRYPOINT ["no-such-program"]', ("no-such-program", "cannot be started")),
    ],
    ids=["at once", "after a second", "before it began"],
)
@pytest.mark.usefixtures("unmoved")
def test_an_image_that_dies(built: Built, entrypoint: str, sentences: tuple[str, ...]) -> None:
    done = built.inv("smoke", "--image", derive(built, "dies", entrypoint))
    done.failed("ServerDied", 41, *sentences)


@DOCKER
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            "answer.statusCode = 500; answer.end('out of order')",
            "/config answered 500: out of order",
        ),
        ("console.log('asked')", "/config accepted a request and did not answer"),
        ("answer.end('<html>')", "/config answered 200, but not JSON: <html>"),
    ],
    ids=["500", "hangs", "not JSON"],
)
@pytest.mark.usefixtures("unmoved")
def test_a_config_that_is_no_answer(built: Built, answer: str, sentence: str) -> None:
    done = built.inv("smoke", "--image", derive(built, "silent", NODE % answer), env=PATIENCE)
    done.failed("ServerSilent", 42, sentence)


@PODMAN
@pytest.mark.usefixtures("unmoved")
def test_each_probe_sees_what_it_is_there_for(built: Built, office_ca: Path) -> None:
    rotten = derive(
        built,
        "rotten",
        "COPY office.crt id_rsa /opt/",
        "RUN rm /opt/office.crt /opt/id_rsa",
        "RUN rm -r /opt/venv/lib/python3*/site-packages/redis /opt/openagents/.opencode/agent /usr/bin/rclone",
        "RUN rm /opt/openagents/.opencode/tool/*.ts",
        "ENV VALKEY_PORT=1",
        "LABEL org.opencontainers.image.revision=",
        "HEALTHCHECK NONE",
        f"ENTRYPOINT {json.dumps(image_probes.COMMAND)}",
        oci=True,
        files={"office.crt": office_ca.read_text(), "id_rsa": "x"},
    )
    done = built.inv("smoke", "--image", rotten, env={"INVOKE_CA": str(office_ca)})
    done.failed("SmokeFailed", 43, "probes failed")
    report = json.loads((built.checkout.root / "build/smoke.json").read_text())
    failed = {probe["name"]: probe["detail"] for probe in report["probes"] if not probe["passed"]}
    sentences = {
        "agents": "no agents are listed",
        "health check": "no health check" if built.engine.podman else "differs from the contract",
        "labels": "missing labels: org.opencontainers.image.revision",
        "offline": "no agents of OpenAgents without a network",
        "packages": "No module named 'redis'",
        "programs": "rclone",
        "secrets": "/opt/id_rsa; /opt/office.crt holds a CA of this network",
        "settings": "VALKEY_PORT",
        "shutdown": "PID 1 ignores signals",
    }
    assert set(failed) == set(sentences)
    assert [name for name, sentence in sentences.items() if sentence not in failed[name]] == []
    assert "server listening" in done.stdout, "the container's log is shown"


def test_a_password_that_is_baked_in_is_seen(built: Built) -> None:
    image = built.inspect(derive(built, "baked", f"ENV {SECRET}=letmein"))
    with pytest.raises(ProbeFailed, match=f"{SECRET} is set in the image"):
        image_probes.settings(ImageSubject(Settings(), image, Container(built.engine, "none", 0)))


@pytest.mark.usefixtures("unmoved")
def test_a_port_that_is_taken(built: Built) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = built.inv("smoke", env={"INVOKE_SMOKE_PORT": str(port)})
    done.failed("PortTaken", 44, f"port {port} on 127.0.0.1 is already in use")


@DOCKER
@pytest.mark.usefixtures("unmoved")
def test_an_image_that_is_not_here(built: Built) -> None:
    built.inv("smoke", "--image", "no-such-image:1").failed("NoSuchImage", 40, "no-such-image:1")


@pytest.mark.parametrize(
    ("built", "moment", "number"),
    [
        ("podman", "smoke: ", signal.SIGINT),
        ("docker", "settings", signal.SIGTERM),
        ("podman", "ready", signal.SIGINT),
        ("docker", "packages", signal.SIGHUP),
    ],
    ids=["podman-smoke", "docker-settings", "podman-ready", "docker-packages"],
    indirect=["built"],
)
@pytest.mark.usefixtures("unmoved")
def test_a_signal_leaves_nothing_running(built: Built, moment: str, number: signal.Signals) -> None:
    smoke = built.start("smoke")
    smoke.until(moment)
    smoke.end(number, seconds=20).failed("Interrupted", 128 + number, number.name)


@DOCKER
def test_a_smoke_that_was_killed_is_cleaned_up_by_the_next(built: Built) -> None:
    before = built.containers()
    smoke = built.start("smoke")
    smoke.until("ready")
    smoke.end(signal.SIGKILL)
    assert len(built.containers() - before) >= 1
    done = built.inv("smoke")
    assert done.code == 0, done.stdout + done.stderr
    assert "containers of killed smoke tests" in done.stdout
    assert built.containers() == before
