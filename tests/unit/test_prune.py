"""Which images go, and above all which do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.image import BUILD_OF, RUNTIME_OF, owner_of
from pipeline.prune import prune
from pipeline.settings import Settings
from tests.stub_engine import StubEngine


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    return StubEngine("docker", "/d", "20.10", str(tmp_path / "engine.json"))


def standing(engine: StubEngine, whose: str) -> None:
    """Add six dated builds of the image ``whose``, each on a runtime of its own, all on one base."""
    for number in range(6):
        layers, day = ["base", f"{whose} runtime{number}", "top"], f"2027-01-1{number}"
        runtime = {RUNTIME_OF: whose}
        engine.add(f"opencode-server-runtime:{whose}{number}", f"{whose}-run{number}", kind="", layers=layers[:2],
                   created=day, labels=runtime)  # fmt: skip
        engine.add(f"{whose}:2027011{number}-aaaaaaa", f"{whose}-id{number}", layers=layers, created=day,
                   labels={**runtime, BUILD_OF: whose})  # fmt: skip


def test_prune_keeps_the_newest_and_what_is_in_use(engine: StubEngine, capsys: pytest.CaptureFixture[str]) -> None:
    name = "opencode-server"
    standing(engine, name)
    engine.add("opencode-server-base:made-1", "base", kind="", layers=["base"])
    engine.add("", "loose", layers=["base", "x"], labels={BUILD_OF: name})
    engine.add("", "replaced", kind="", created="2027-01-01", layers=["base", "r"], labels={RUNTIME_OF: name})
    engine.add("", "being-built", kind="", created="2027-01-31", layers=["base", "b"], labels={RUNTIME_OF: name})
    engine.add("", "somebody's", kind="")
    engine.tag(f"{name}-id1", f"{name}:previous")
    engine.tag(f"{name}-id5", f"{name}:latest")
    said = engine.read()
    said["containers"]["c"] = f"{name}-id2"
    engine.write(said)
    before = engine.read()
    gone = prune(Settings(), engine, 2, dry_run=True)
    assert engine.read() == before
    assert prune(Settings(), engine, 2) == gone
    assert set(gone) == {
        f"{name}:20270110-aaaaaaa", f"{name}:20270113-aaaaaaa", "loose", "replaced",
        f"opencode-server-runtime:{name}0", f"opencode-server-runtime:{name}3",
    }  # fmt: skip
    staying = {f"{name}-{kind}{number}" for kind in ("id", "run") for number in (1, 2, 4, 5)}
    assert {*staying, "base", "somebody's", "being-built"} == set(engine.read()["images"])
    assert prune(Settings(), engine, 2) == []
    assert "whose they are" not in capsys.readouterr().out


def test_prune_removes_nothing_of_another_images_nor_what_does_not_say_whose_it_is(
    engine: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    name, other = "opencode-server", "opencode-server-test"
    standing(engine, other)
    engine.add("", "their-loose-one", layers=["x"], labels={BUILD_OF: other, RUNTIME_OF: name})
    engine.add("", "their-spare-runtime", kind="", created="2020", layers=["y"], labels={RUNTIME_OF: other})
    engine.add("", "an-older", layers=["z"])
    engine.add("opencode-server-runtime:old", "old", kind="", created="2020", layers=["w"])
    engine.add("opencode-server-base:made-0", "their-base", kind="", created="2020", layers=["their"])
    before = engine.read()
    standing(engine, name)
    gone = prune(Settings(), engine, 6)
    assert gone == []
    assert engine.read()["images"].keys() >= before["images"].keys()
    for number in range(6):
        engine.ask(["docker", "rmi", f"{name}:2027011{number}-aaaaaaa"])
    left = prune(Settings(), engine, 1)
    assert left == [f"opencode-server-runtime:{name}{number}" for number in range(5)]
    assert engine.read()["names"].items() >= before["names"].items()
    said = capsys.readouterr().out
    assert said.count("docker rmi an-older opencode-server-runtime:old") == 2


def test_prune_takes_a_base_with_the_last_that_stood_on_it(engine: StubEngine) -> None:
    whose = {RUNTIME_OF: "opencode-server"}
    for number, day in ((1, "2027-01-01"), (2, "2027-01-02"), (3, "2027-01-03")):
        base = f"opencode-server-base:made-{number}"
        engine.add(base, f"base{number}", kind="", created=day, layers=[f"base{number}"])
        engine.add(f"opencode-server-runtime:{number}", f"run{number}", kind="", created=day,
                   layers=[f"base{number}", "run"], labels=whose)  # fmt: skip
    engine.add("somebody:1", "theirs", kind="", created="2027", layers=["base2", "their own"])
    engine.tag("base3", "node:20-slim")
    runtimes = ["opencode-server-runtime:1", "opencode-server-runtime:2"]
    assert prune(Settings(), engine, 1) == [*runtimes, "opencode-server-base:made-1"]


@pytest.mark.parametrize("image", ["opencode-server", "opencode-server-nightly"])
def test_a_nights_builds_are_those_of_the_image_that_it_releases(image: str) -> None:
    assert owner_of(image) == "opencode-server"
