"""Which tags move, and what a release that was cut short comes to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from invoke.context import Context

import releases
from pipeline.core.errors import NoSuchRelease, NotReleased, SmokeFailed
from pipeline.core.settings import Settings
from pipeline.engines import detect
from pipeline.engines.engine import Engine
from pipeline.image.tags import DATED, dated_tag
from pipeline.release import history, promote
from pipeline.smoke import run
from tests.stub_engine import StubEngine

REAL, STARTER = "openagents", "starter"
REPORT = {"ready_seconds": 1.5, "probes": [{"name": "a", "passed": True, "seconds": 0.5}]}


def smoked(_settings: Settings, engine: Engine, reference: str = "", **_: Any) -> dict[str, Any]:
    """Stand in for a smoke test that passes."""
    image = engine.image(reference or "opencode-server:candidate")
    assert image
    return {**REPORT, "image": image["Id"]}


def promoted(engine: StubEngine, image: dict[str, Any]) -> None:
    promote.promote(Settings(), engine, {**REPORT, "image": image["Id"]})


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubEngine:
    monkeypatch.setattr(promote, "BUILD", tmp_path)
    monkeypatch.setattr(history, "FILE", tmp_path / "history.jsonl")
    monkeypatch.setattr(run, "smoke", smoked)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")  # 2027-01-15
    found = StubEngine("docker", "/d", "20.10", str(tmp_path / "engine.json"))
    monkeypatch.setattr(detect, "of", lambda _: found)
    return found


@pytest.mark.parametrize(
    ("before", "kind", "after"),
    [
        ({}, REAL, {"latest": "new"}),
        ({}, STARTER, {"latest": "new"}),
        ({"latest": ("new", REAL)}, REAL, {"latest": "new"}),
        (
            {"latest": ("new", REAL), "previous": ("old", REAL)},
            REAL,
            {"latest": "new", "previous": "old"},
        ),
        ({"latest": ("old", REAL)}, REAL, {"latest": "new", "previous": "old"}),
        (
            {"latest": ("old", REAL), "previous": ("older", REAL)},
            REAL,
            {"latest": "new", "previous": "old"},
        ),
        ({"latest": ("old", STARTER)}, STARTER, {"latest": "new", "previous": "old"}),
        ({"latest": ("old", STARTER)}, REAL, {"latest": "new", "previous": "old"}),
        ({"latest": ("old", "")}, STARTER, {"latest": "new", "previous": "old"}),
        ({"latest": ("old", REAL)}, STARTER, {"latest": "old"}),
        (
            {"latest": ("old", REAL), "previous": ("older", REAL)},
            STARTER,
            {"latest": "old", "previous": "older"},
        ),
    ],
)
def test_which_tags_move(
    engine: StubEngine, before: dict[str, tuple[str, str]], kind: str, after: dict[str, str]
) -> None:
    for tag, (identity, its_kind) in before.items():
        engine.add(f"opencode-server:{tag}", identity, kind=its_kind)
    image = engine.add("", "new", kind=kind)
    for _ in range(2):  # again: nothing more moves
        promoted(engine, image)
        tags = engine.tags()
        assert {
            name: identity for name, identity in tags.items() if not DATED.fullmatch(name)
        } == after
        moved = before.get("latest", ("", ""))[0] != "new" and after["latest"] == "new"
        assert [each for tag, each in tags.items() if DATED.fullmatch(tag)] == ["new"] * moved


def test_the_dated_tag_is_of_today_and_the_commit_and_never_moves(engine: StubEngine) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    made = []
    for number in range(8):
        image = engine.add("", f"id{number}", commit=commit)
        promoted(engine, image)
        made.append(dated_tag(Settings(), engine, image))
    assert made[:2] == ["20270115-0123456", "20270115-01234567"]
    assert made[5:] == [
        "20270115-0123456789ab",
        "20270115-0123456789ab-2",
        "20270115-0123456789ab-3",
    ]
    tags = engine.tags()
    assert [tags[tag] for tag in made] == [f"id{number}" for number in range(8)]
    edited = dated_tag(Settings(), engine, engine.add("", "e", commit="fedcba9876543210-edited"))
    assert edited == "20270115-fedcba9"
    assert re.fullmatch(DATED, dated_tag(Settings(), engine, engine.add("", "s", commit="starter")))


def test_back_and_forward_again(engine: StubEngine) -> None:
    for identity in ("one", "two"):
        promoted(engine, engine.add("", identity))
    releases.rollback(Context(), dry_run=True)
    assert engine.tags()["latest"] == "two"
    for latest, previous in (("one", "two"), ("two", "one")):
        releases.rollback(Context())
        assert (engine.tags()["latest"], engine.tags()["previous"]) == (latest, previous)
    named = next(
        tag for tag, identity in engine.tags().items() if identity == "one" and DATED.fullmatch(tag)
    )
    releases.rollback(Context(), to=named)
    assert engine.tags()["latest"] == "one"
    records = history.read()[0]
    assert [record["kind"] for record in records] == ["release"] * 2 + ["rollback"] * 3
    assert records[-1]["from"] == "sha256:two"
    with pytest.raises(NoSuchRelease, match="already latest"):
        releases.rollback(Context(), to="one")
    with pytest.raises(NoSuchRelease, match="no image nothing"):
        releases.rollback(Context(), to="nothing")


def test_what_fails_its_smoke_is_not_gone_back_to(
    engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for identity in ("one", "two"):
        promoted(engine, engine.add("", identity))

    def fails(*_: Any, **__: Any) -> None:
        raise SmokeFailed("it fails", "See.")

    monkeypatch.setattr(run, "smoke", fails)
    before = engine.tags()
    with pytest.raises(SmokeFailed):
        releases.rollback(Context())
    assert engine.tags() == before


def test_promote_says_so_when_it_may_not(engine: StubEngine) -> None:
    engine.add("opencode-server:latest", "old")
    engine.add("opencode-server:candidate", "new", kind=STARTER)
    with pytest.raises(NotReleased):
        releases.promote(Context())
    engine.add("opencode-server:candidate", "newer")
    releases.promote(Context(), dry_run=True)
    assert engine.tags()["latest"] == "old"
    releases.promote(Context())
    assert engine.tags()["latest"] == "newer"
    assert history.read()[0][-1]["probes"] == {"a": [True, 0.5]}


def test_a_release_whose_image_is_gone_blocks_nothing(engine: StubEngine, tmp_path: Path) -> None:
    journal = {"image": "opencode-server", "tags": {"latest": "sha256:gone"}, "staged": ""}
    (tmp_path / "release-docker.json").write_text(json.dumps(journal))
    assert promote.finish(engine)
    assert engine.tags() == {}
    assert not promote.finish(engine)


def test_history_survives_a_torn_line(
    engine: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine
    history.append({"kind": "one"})
    history.append({"kind": "two"})
    whole = history.FILE.read_bytes()
    history.FILE.write_bytes(whole[:-9])
    history.append({"kind": "three"})
    assert ([record["kind"] for record in history.read()[0]], history.read()[1]) == (
        ["one", "three"],
        1,
    )
    history.FILE.write_bytes(history.FILE.read_bytes() + b"\x00\x00\xff\n[1]\n")
    assert history.read()[1] == 3
    history.show()
    out = capsys.readouterr().out
    assert "ignoring 3 damaged lines in history.jsonl" in out
    assert "three" in out
    history.show(lines=True)
    lines = [
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    ]
    assert [line["kind"] for line in lines] == ["one", "three"]
