"""A small checkout and an engine in a file, for nights that are cut short anywhere, a hundred times a minute.

What talks to the world is stubbed: bump, the three tasks, the engine. What a night itself does on disk is real.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.clock import now
from pipeline.core.errors import NightFailed, PipelineError
from pipeline.core.settings import ROOT, Settings
from pipeline.engines import detect
from pipeline.image.labels import BUILD_OF
from pipeline.inputs import openagents
from pipeline.release import bump, history, nightly, promote
from pipeline.release.bump import Bumped, Move
from pipeline.release.nightly import Night
from tests.stub_engine import StubEngine

OLD, NEW = "a" * 40, "b" * 40
RECENT = now()[:10]


@dataclass
class World:
    """``upstream`` is what bump finds; ``broken`` maps a task to the failure it ends with;
    ``asked`` are those run.
    """

    home: Path
    upstream: str = OLD
    kept: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    broken: dict[str, Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    kind: str = "openagents"

    @property
    def root(self) -> Path:
        return self.home / "checkout"

    @property
    def engine(self) -> StubEngine:
        return StubEngine("docker", "/d", "20.10", str(self.home / "engine.json"))

    def make(self) -> None:
        for name in (
            "Containerfile",
            "config.json",
            "scripts/status",
            "locks/image.txt",
            "locks/base.json",
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(f"{name}\n")
        shutil.copy(ROOT / ".dockerignore", self.root)
        (self.root / "locks/debian.txt").write_text(f"{RECENT}\n")
        self.pin(self.root, OLD)
        self.fetch(self.root, OLD)

    def pin(self, root: Path, commit: str) -> None:
        (root / "locks/openagents.json").write_text(
            json.dumps({"url": "u", "ref": "main", "commit": commit})
        )
        (root / "locks/image.txt").write_text(f"redis=={commit}\n")

    def fetch(self, root: Path, commit: str) -> None:
        place = root / "vendor/OpenAgents"
        shutil.rmtree(place, ignore_errors=True)
        (place / ".opencode/agent").mkdir(parents=True)
        (place / ".opencode/agent/a.md").write_text(commit)
        record = openagents.Record(kind="openagents", url="u", ref="main", commit=commit)
        openagents._sealed(place, record)

    def bump(self, _settings: Settings, _parts: list[str], *, quick: bool, root: Path) -> Bumped:
        assert quick
        if "bump" in self.broken:
            raise self.broken["bump"]
        old = json.loads((root / "locks/openagents.json").read_text())["commit"]
        if old == self.upstream:
            return Bumped([], self.kept)
        self.pin(root, self.upstream)
        return Bumped(
            [Move("openagents.json", "OpenAgents", old, self.upstream)], self.kept, self.remarks
        )

    def inv(self, night: Night, *words: str) -> None:
        self.asked.append(words[0])
        if failure := self.broken.get(words[0]):
            raise failure
        commit = json.loads((night.tree / "locks/openagents.json").read_text())["commit"]
        identity = f"image-of-{commit}"
        match words[0]:
            case "fetch":
                if openagents.read(night.tree / "vendor").commit != commit:  # type: ignore[union-attr]
                    self.fetch(night.tree, commit)
            case "build":
                made_with = (night.tree / "locks/debian.txt").read_text().strip()
                identity += "" if made_with == RECENT else f"-{made_with}"
                made: dict[str, Any] = {
                    "commit": commit,
                    "kind": self.kind,
                    "created": now(),
                    "layers": ["base", identity],
                    "labels": {BUILD_OF: "opencode-server"},
                }
                self.engine.add("opencode-server-nightly:candidate", identity, **made)
                record = {"id": identity, "seconds": 5}
                (night.tree / "build/build-docker.json").write_text(json.dumps(record))
            case "smoke":
                report = {
                    "ready_seconds": 2,
                    "probes": [{"name": "a", "passed": True, "seconds": 1}],
                }
                (night.tree / "build/smoke.json").write_text(json.dumps(report))
                (night.tree / "build/layers.json").write_text(json.dumps({"layers": {commit: {}}}))

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Let nights in this process happen in this world."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (nightly, promote):
                patch.setattr(module, "ROOT", self.root)
                patch.setattr(module, "BUILD", self.root / "build")
            patch.setattr(history, "FILE", self.root / "build/history.jsonl")
            patch.setattr(
                detect, "find", lambda _, platform: replace(self.engine, platform=platform)
            )
            patch.setattr(bump, "bump", self.bump)
            patch.setattr(
                os, "sync", lambda: None
            )  # of all disks of this machine, it would be most of the time
            patch.setattr(Night, "inv", lambda night, *words: self.inv(night, *words))  # noqa: PLW0108 -- unbound
            yield

    def night(self, **flags: Any) -> str:
        """Run a night here; return its outcome, or the failure it ended with, in words."""
        self.asked.clear()
        with self.patched():
            try:
                return str(nightly.nightly(self.settings, **flags))
            except PipelineError as error:
                return f"{type(error).__name__}: {error.what}"

    def state(self) -> dict[str, Any]:
        """Return all that a failure must leave as it was."""
        tags = self.engine.tags()
        content = {
            str(path.relative_to(self.root)): path.read_text()
            for name in promote.INPUTS
            for path in (self.root / name).rglob("*")
            if path.is_file() and path.name != openagents.RECORD
        }
        return {**content, "latest": tags.get("latest"), "previous": tags.get("previous")}

    def forked(self, action: Callable[[int], None]) -> int:
        """Run a night in a fork, with ``action`` called before each change to the disk; return how
        the fork ended.
        """
        child = os.fork()
        if not child:
            code = 70
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                changes = 0

                def hook(event: str, arguments: tuple[Any, ...]) -> None:
                    nonlocal changes
                    if _changes(event, arguments):
                        changes += 1
                        action(changes)

                sys.addaudithook(hook)
                said = self.night()
                code = {"unchanged": 0, "released": 1}.get(said, 2)
                (self.home / "said").write_text(said)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(
            arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
    if event == "ctypes.dlsym":
        return bool(arguments[1] == "renameat2")
    return event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate"}


def failing(what: str) -> NightFailed:
    return NightFailed(what, "Nothing.", "its last words")
