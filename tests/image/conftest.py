"""For tests of images: whatever a test does, tags and containers are as they were."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IMAGE, Built, Checkout
from tests.stack_up import Up, a_stack


@pytest.fixture
def unmoved(built: Built) -> Iterator[None]:
    """Assert that what fails moves no tag and leaves no container behind."""
    tags, containers = built.tags(), built.containers()
    assert {"candidate", "latest"} <= set(tags)
    yield
    assert built.tags() == tags
    assert built.containers() == containers


@pytest.fixture(params=["podman", "docker"])
def stack(request: pytest.FixtureRequest, checkout: Checkout, tmp_path: Path) -> Iterator[Up]:
    """A stack that is not up yet, on each engine."""
    request.getfixturevalue("engine_environment")
    with a_stack(checkout, request.param, tmp_path / "home") as made:
        yield made


def derive(
    built: Built,
    name: str,
    *instructions: str,
    oci: bool = False,
    files: dict[str, str] | None = None,
    build_args: dict[str, str] | None = None,
) -> str:
    """Build an image on top of the candidate, in a second or so, and return its reference."""
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch)
        (context / "Containerfile").write_text(
            "\n".join([f"FROM {built.reference}", *instructions, ""])
        )
        for path, content in (files or {}).items():
            (context / path).write_text(content)
        argv = built.engine.build(
            context,
            tag=f"{IMAGE}-{name}",
            containerfile=context / "Containerfile",
            build_args=build_args,
        )
        if oci and built.engine.podman:
            argv[argv.index("--format") + 1] = "oci"
        done = built.engine.ask(argv)
    assert done.ok, done.stdout + done.stderr
    return built.engine.local(f"{IMAGE}-{name}")


@pytest.fixture(scope="session")
def office_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority that is in nobody's list."""
    home = tmp_path_factory.mktemp("ca")
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=office", "-days", "2"]
    paths = ["-keyout", str(home / "key.pem"), "-out", str(home / "ca.pem")]
    subprocess.run(["openssl", *words, *paths], check=True, capture_output=True)
    return home / "ca.pem"
