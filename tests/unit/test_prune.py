"""Which images go, and above all which do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.settings import Settings
from pipeline.image.labels import BUILD_OF, owner_of
from pipeline.inputs import base
from pipeline.inputs.rootfs import Lock
from pipeline.release.prune import STEP, prune
from tests.stub_engine import StubEngine


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    return StubEngine("docker", "/d", "20.10", str(tmp_path / "engine.json"))


def add_builds(engine: StubEngine, name: str) -> None:
    """Add six dated builds of the image ``name``, the last one the newest."""
    for number in range(6):
        engine.add(
            f"{name}:2027011{number}-aaaaaaa",
            f"{name}-id{number}",
            created=f"2027-01-1{number}",
            labels={BUILD_OF: name},
        )


def test_prune_keeps_the_newest_and_what_is_in_use(engine: StubEngine) -> None:
    name = "opencode-server"
    add_builds(engine, name)
    engine.add("opencode-server-base:made-1", "base", kind="")
    engine.add("", "untagged", labels={BUILD_OF: name})
    engine.add("", "untagged-running", labels={BUILD_OF: name})
    engine.add("", "somebody's", kind="")
    engine.tag(f"{name}-id1", f"{name}:previous")
    engine.tag(f"{name}-id3", f"{name}:20270113-aaaaaaaa")
    engine.tag(f"{name}-id5", f"{name}:latest")
    content = engine.read()
    content["containers"] |= {"c": f"{name}-id2", "d": "untagged-running"}
    engine.write(content)
    before = engine.read()
    removed = prune(Settings(), engine, 2, dry_run=True)
    assert engine.read() == before
    assert prune(Settings(), engine, 2) == removed
    assert set(removed) == {
        f"{name}:20270110-aaaaaaa",
        f"{name}:20270113-aaaaaaa",
        f"{name}:20270113-aaaaaaaa",
        "untagged",
    }
    assert set(engine.read()["images"]) == {
        *(f"{name}-id{number}" for number in (1, 2, 4, 5)),
        "base",
        "somebody's",
        "untagged-running",
    }
    assert prune(Settings(), engine, 2) == []


def test_prune_removes_nothing_of_another_image_or_without_a_label(engine: StubEngine) -> None:
    other = "opencode-server-test"
    add_builds(engine, other)
    engine.add("", "their-untagged", labels={BUILD_OF: other})
    engine.add("", "without-label")
    engine.add("opencode-server:mine", "mine", created="2020", labels={BUILD_OF: "opencode-server"})
    before = engine.read()
    assert prune(Settings(), engine, 1) == []
    assert engine.read() == before


def test_a_base_goes_when_no_lock_means_it_and_nothing_stands_on_it(engine: StubEngine) -> None:
    current = base.tag_of(Lock.read(), made=True)
    for name, identity in (
        (current, "current"),
        (f"{base.NAME}:made-0123456789ab", "superseded"),
        (f"{base.NAME}:pulled-0123456789ab", "under-a-build"),
        (f"{base.NAME}:made-ba9876543210", "in-a-container"),
        (f"{base.NAME}:made-555555555555", "named-twice"),
    ):
        engine.add(name, identity, kind="", layers=[identity])
    engine.tag("named-twice", "node:20-slim")
    engine.add("opencode-server:latest", "build", layers=["under-a-build", "more"])
    content = engine.read()
    content["containers"]["c"] = "in-a-container"
    engine.write(content)
    assert prune(Settings(), engine, 1) == [f"{base.NAME}:made-0123456789ab"]
    assert "superseded" not in engine.read()["images"]
    assert len(engine.read()["images"]) == 5


def test_a_step_of_a_failed_build_goes_and_those_of_others_stay(engine: StubEngine) -> None:
    steps = {"ours": f"COPY dir in {STEP}", "another's": "COPY dir in /srv"}
    for identity, command in steps.items():
        engine.add("", identity, kind="")
        content = engine.read()
        content["images"][identity]["History"] = [{"created_by": command}, {}]
        engine.write(content)
    assert prune(Settings(), engine, 1) == ["ours"]
    assert set(engine.read()["images"]) == {"another's"}


@pytest.mark.parametrize("image", ["opencode-server", "opencode-server-nightly"])
def test_a_nights_builds_are_those_of_the_image_that_it_releases(image: str) -> None:
    assert owner_of(image) == "opencode-server"
