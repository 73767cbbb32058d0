"""Nights that go wrong: whatever happens, what people run stays, and the next night makes up for
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.clock import now
from pipeline.core.errors import GitHostUnreachable, NoSuchRepository, SourcesUnreachable
from pipeline.core.settings import ROOT, Settings
from pipeline.image.tags import DATED, find
from pipeline.release import history, nightly, promote
from tests.nights import NEW, OLD, World, failing


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world whose first night has released, and whose upstream has moved since."""
    return begun(tmp_path)


def begun(home: Path) -> World:
    made = World(home)
    made.make()
    assert made.night() == "released"
    made.upstream = NEW
    return made


def records(world: World) -> list[dict[str, Any]]:
    return history.read(world.root / "build/history.jsonl")[0]


def arrived(world: World) -> bool:
    """Whether all of the new is in place: tags, pins, OpenAgents."""
    tags = world.engine.tags()
    return (
        (tags["latest"], tags["previous"]) == (f"image-of-{NEW}", f"image-of-{OLD}")
        and NEW in (world.root / "locks/openagents.json").read_text()
        and (world.root / "locks/image.txt").read_text() == f"redis=={NEW}\n"
        and (world.root / "vendor/OpenAgents/.opencode/agent/a.md").read_text() == NEW
    )


def clean(world: World) -> bool:
    left = [
        *(world.root / "build").glob("night-*"),
        *(world.root / "build").glob("release-*"),
        *world.root.rglob("*.part"),
    ]
    return not left


def test_a_night_releases_and_the_next_finds_nothing_to_do(world: World) -> None:
    old = world.state()
    assert world.night() == "released"
    assert arrived(world)
    assert clean(world)
    assert world.asked == ["fetch", "build", "smoke"]
    assert world.engine.tags()["previous"] == old["latest"]
    released = records(world)[-1]
    assert released["outcome"] == "released"
    assert released["moves"] == [f"OpenAgents {OLD[:12]} -> {NEW[:12]}"]
    assert released["tag"] in world.engine.tags()
    assert set(released["steps"]) == {
        "start",
        "copy",
        "bump",
        "compare",
        "fetch",
        "build",
        "smoke",
        "release",
    }
    looked = json.loads((world.root / "build/layers.json").read_text())
    assert looked == {"layers": {NEW: {}}}, (
        "what is known of its layers, so that the next need not look"
    )
    new = world.state()
    assert world.night() == "unchanged"
    assert (world.asked, world.state()) == ([], new)


def test_a_forced_push_is_in_the_record_and_the_night_goes_on(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.remarks = ["OpenAgents: main was rewritten"]
    assert world.night() == "released"
    assert records(world)[-1]["remarks"] == world.remarks
    said = capsys.readouterr().out
    assert "!!    OpenAgents: main was rewritten" in said
    assert "-> bbbbbbbbbbbb; OpenAgents: main was rewritten" in said, (
        "in the last line too, and so in the history"
    )


def test_a_dry_run_changes_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before, lines = world.state(), len(records(world))
    assert world.night(dry_run=True) == "unchanged"
    assert (world.state(), len(records(world)), world.asked) == (before, lines, [])
    assert (
        f"would fetch, build, smoke and release: OpenAgents {OLD[:12]} -> {NEW[:12]}"
        in capsys.readouterr().out
    )
    assert clean(world)


def test_an_edit_of_ours_is_built_too(world: World) -> None:
    world.upstream = OLD
    (world.root / "scripts/status").write_text("edited")
    assert world.night() == "released"
    assert world.night() == "unchanged"


def test_debian_is_asked_once_a_week(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.upstream = OLD
    for epoch in ("2051222400", ""):  # in 2035; then the clock is set back
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        assert world.night(dry_run=True) == "unchanged"
        assert world.night() == "released"
        (move,) = records(world)[-1]["moves"]
        assert re.fullmatch(r"Debian [\d-]+ -> " + now()[:10], move)
        assert (world.root / "locks/debian.txt").read_text() == f"{now()[:10]}\n"
        assert world.night() == "unchanged"


def test_killed_before_every_change_to_the_disk(world: World, tmp_path: Path) -> None:
    """Cut anywhere, everything is as it was, or as it is to be once the next night has been."""
    old, kept = world.state(), tmp_path.parent / f"{tmp_path.name}-kept"
    shutil.copytree(world.home, kept, symlinks=True)
    moment, outcomes = 0, set()
    while True:
        moment += 1

        def kill(change: int, moment: int = moment) -> None:
            if change == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        if world.forked(kill) != -signal.SIGKILL:
            break
        begun_release = (world.root / "build/release-docker.json").exists()
        assert begun_release or world.state() == old or arrived(world), moment
        again = world.night()
        outcomes.add(again)
        assert again in {"released", "unchanged"}, (moment, again)
        assert arrived(world), moment
        assert clean(world), moment
        shutil.rmtree(world.home)
        shutil.copytree(kept, world.home, symlinks=True)
    assert moment > 60
    assert outcomes == {"released", "unchanged"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_the_disk_fills_before_every_change_to_it(
    small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = begun(small_disk / "world")
    old, kept = world.state(), tmp_path_factory.mktemp("kept") / "world"
    shutil.copytree(world.home, kept, symlinks=True)
    ballast, moment, codes = small_disk / "ballast", 0, set()
    while True:
        moment += 1

        def fill(change: int, moment: int = moment) -> None:
            if change == moment:
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass

        code = world.forked(fill)
        filled = ballast.exists()
        ballast.unlink(missing_ok=True)
        if not filled:
            break
        codes.add(code)
        assert code in {1, 2}, moment
        begun_release = (world.root / "build/release-docker.json").exists()
        assert begun_release or world.state() == old or arrived(world), moment
        again = world.night()
        assert again in {"released", "unchanged"}, (moment, again)
        assert arrived(world), moment
        assert clean(world), moment
        shutil.rmtree(world.home)
        shutil.copytree(kept, world.home, symlinks=True)
    assert moment > 60
    assert codes == {1, 2}


@pytest.mark.parametrize(
    ("step", "failure"),
    [
        ("bump", NoSuchRepository("it has vanished", "Check.")),
        ("fetch", GitHostUnreachable("it stopped in the middle", "Later.")),
        ("build", failing("BuildFailed: a package does not import")),
        ("smoke", failing("ServerDied: the server does not start")),
        ("smoke", failing("SmokeFailed: 1 of 17 probes failed: agents")),
        ("build", failing("EngineLost: docker went away during the build")),
    ],
    ids=["vanished", "cut", "import", "no server", "no agents", "daemon"],
)
def test_a_step_that_fails_leaves_all_as_it_was(
    world: World, step: str, failure: Exception
) -> None:
    before = world.state()
    world.broken[step] = failure
    for _ in range(2):
        assert world.night().startswith(f"NightFailed: {step}: ")
        assert (world.state(), clean(world)) == (before, True)
    last = records(world)[-1]
    assert (last["outcome"], last["where"]) == ("failed", step)
    world.broken.clear()
    assert world.night() == "released"
    assert arrived(world)


def test_no_network(world: World) -> None:
    before = world.state()
    world.broken["bump"] = SourcesUnreachable("not one source of the pins answers", "Later.")
    assert world.night() == "NightSkipped: not one source of the pins answers"
    assert world.state() == before
    assert records(world)[-1]["outcome"] == "skipped"


def test_a_defect_is_a_failure_like_any_other(world: World) -> None:
    before = world.state()
    world.broken["build"] = KeyError("nobody thought of this")
    assert world.night() == "NightFailed: build: KeyError: 'nobody thought of this'"
    assert "Traceback" in records(world)[-1]["details"]
    assert world.state() == before


def test_the_starter_is_never_released_over_openagents(world: World) -> None:
    before = world.state()
    world.kind = "starter"
    assert world.night() == (
        "NightSkipped: the build has only the starter package, and latest has OpenAgents"
    )
    assert world.state() == before


def test_what_was_rolled_back_does_not_come_again(world: World) -> None:
    assert world.night() == "released"
    with world.patched():
        image = find(Settings(), world.engine, "previous")
        report = {"image": image["Id"], "ready_seconds": 1, "probes": []}
        promote.rollback(Settings(), world.engine, report, "previous")
    assert world.engine.tags()["latest"] == f"image-of-{OLD}"
    assert world.night().startswith("NightSkipped: these inputs were rolled back at ")
    world.upstream = "c" * 40
    assert world.night() == "released"


def test_somebody_edits_a_pin_meanwhile(world: World) -> None:
    inv = world.inv

    def edit(night: nightly.Night, *words: str) -> None:
        inv(night, *words)
        (world.root / "locks/image.txt").write_text("mine")

    world.inv = edit  # type: ignore[method-assign]
    latest = world.engine.tags()["latest"]
    assert world.night().startswith(
        "NightFailed: release: locks/ or vendor/OpenAgents was edited during the night"
    )
    assert (world.root / "locks/image.txt").read_text() == "mine"
    assert world.engine.tags()["latest"] == latest


def test_two_nights_at_once(world: World) -> None:
    inv, second = world.inv, []

    def meanwhile(night: nightly.Night, *words: str) -> None:
        inv(night, *words)
        script = "import sys, pathlib, tests.nights as nights; print(nights.World(pathlib.Path(sys.argv[1])).night())"
        argv = [sys.executable, "-c", script, str(world.home)]
        second.append(
            subprocess.run(
                argv, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        )

    world.inv = meanwhile  # type: ignore[method-assign]
    assert world.night() == "released"
    assert len(second) == 3
    assert all(
        f"another night is running: process {os.getpid()} since 20" in said for said in second
    )


def test_a_clock_that_is_set_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(1_900_000_000))
    assert world.night() == "released"
    for number, epoch in enumerate((1_800_000_000, 1_700_000_000)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(epoch))
        world.upstream = f"{number}" * 40
        tags = world.engine.tags()
        assert world.night() == "released"
        dated = {tag: identity for tag, identity in tags.items() if DATED.fullmatch(tag)}
        assert dated.items() <= world.engine.tags().items()
        assert world.engine.tags()["latest"].startswith(f"image-of-{world.upstream}")
    assert [record["at"][:4] for record in records(world)[-3:]] == ["2030", "2027", "2023"]


def test_a_history_torn_in_the_middle(world: World) -> None:
    file = world.root / "build/history.jsonl"
    assert world.night() == "released"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    assert world.night() == "released", (
        "what latest was made of is no longer known, so it is made again"
    )
    assert arrived(world)
    assert world.night() == "unchanged"
    assert len(records(world)) >= 2


def test_a_hundred_nights_grow_nothing_but_history(world: World) -> None:
    world.settings = Settings(nightly={"keep": 3})
    sizes = []
    for number in range(100):
        if number % 3:
            world.upstream = f"{number:040x}"
        world.broken = {"smoke": failing("x")} if number % 7 == 3 else {}
        assert world.night(log_file=True).split(":")[0] in {"released", "unchanged", "NightFailed"}
        if number >= 40:
            files = [
                path
                for path in world.home.rglob("*")
                if path.is_file() and path.name != "history.jsonl"
            ]
            said = world.engine.read()
            sizes.append((len(files), len(said["images"]), len(said["names"])))
    assert max(sizes[30:]) <= max(sizes[:30])
    assert len(records(world)) == 101
    assert len(list((world.root / "build/nights").glob("*.log"))) == nightly.LOGS


def test_the_log_of_a_night_is_a_file_of_its_own(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    world.broken["build"] = failing("BuildFailed: it broke")
    assert world.night(log_file=True).startswith("NightFailed")
    (log,) = (world.root / "build/nights").glob("*.log")
    assert "its last words" in log.read_text()
    assert "NightFailed: build: BuildFailed: it broke" in log.read_text()
    assert capfd.readouterr().out == ""
    assert (
        json.loads((world.root / "build/history.jsonl").read_text().splitlines()[-1])["outcome"]
        == "failed"
    )
