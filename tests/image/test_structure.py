"""Google's container-structure-test, with its own file, on the image of each engine.

Its docker driver speaks to docker's daemon, and to podman's service just as well. Its tar driver unpacks the whole
archive anew for each question, which took nine minutes, and runs no command.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import process
from pipeline.core.settings import ROOT
from tests.conftest import DOCKER, Built
from tests.image.conftest import derive

pytestmark = pytest.mark.engine

STRUCTURE = ROOT / "tests/image/structure.yaml"


@contextlib.contextmanager
def podman_service(built: Built, home: Path) -> Iterator[dict[str, str]]:
    """podman's own daemon, on a socket that docker's clients can ask; it takes no flags for what it
    starts.
    """
    engine = built.engine
    limits = [limit for limit in engine.limits if limit != "--ulimit"]
    runtime = f'[engine]\nruntime = "{engine.flags[1]}"\n' if engine.flags else ""
    (home / "containers.conf").write_text(f"[containers]\ndefault_ulimits = {limits}\n{runtime}")
    socket = home / "podman.sock"
    env = {**os.environ, **built.checkout.env, "CONTAINERS_CONF": str(home / "containers.conf")}
    with (home / "log").open("wb") as log:
        words = [engine.program, "system", "service", "--time", "0", f"unix://{socket}"]
        service = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not socket.exists():
            assert service.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield {"DOCKER_HOST": f"unix://{socket}"}
    finally:
        service.terminate()
        service.wait(60)


@pytest.fixture
def structure(built: Built, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which container-structure-test finds the image."""
    if built.engine.podman:
        with podman_service(built, tmp_path) as env:
            yield env
    else:
        yield built.checkout.env


def check(image: str, config: Path, env: dict[str, str]) -> process.Completed:
    program = Path(sys.executable).with_name("container-structure-test")
    return process.run(
        [str(program), "test", "--image", image, "--config", str(config)], env=env, timeout=120
    )


@pytest.mark.usefixtures("unmoved")
def test_the_image_has_the_structure_that_is_written_down(
    built: Built, structure: dict[str, str]
) -> None:
    done = check(built.reference, STRUCTURE, structure)
    assert done.ok, done.stdout + done.stderr
    count = 1 + len(re.findall(r"(?m)^  - (?:\{ )?name:", STRUCTURE.read_text()))
    assert f"Passes:      {count}" in done.stdout


@DOCKER
def test_it_sees_what_is_missing(built: Built, structure: dict[str, str], tmp_path: Path) -> None:
    """Of what needs no container of its own; each of those takes half a second."""
    (tmp_path / "brief.yaml").write_text(STRUCTURE.read_text().partition("\ncommandTests:")[0])
    lines = ["RUN rm /app/scripts/status && mkdir /root/.npm", "ENV VALKEY_PORT=1"]
    done = check(derive(built, "other", *lines), tmp_path / "brief.yaml", structure)
    assert not done.ok
    assert "Failures:    3\n" in done.stdout
