"""Nights with pins that move, and nights that fail, with real engines and an image of a few bytes: how much they leave."""

from __future__ import annotations

import json
import os
import platform
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.settings import Settings
from pipeline.engines import detect
from pipeline.engines.detect import exit_program
from pipeline.engines.engine import Engine
from pipeline.image.labels import BUILD_OF
from pipeline.image.tags import all_tags
from pipeline.inputs import base
from pipeline.release.nightly import Night
from pipeline.release.prune import STEP
from tests.conftest import Dockerd, storage
from tests.nights import World, failing

NAME = "opencode-server-tiny"
KEEP = 2


@dataclass
class TinyWorld(World):
    """A world whose builds are real: two steps on a base of one program."""

    real: Any = None

    @property
    def engine(self) -> Any:
        return self.real

    def bring_base(self, name: str) -> str:
        """Import a base as if locks/base.json had meant it then."""
        if self.real.image(self.real.local(f"{base.NAME}:{name}")):
            return f"{base.NAME}:{name}"
        program, tar = exit_program(platform.machine()), self.home / "base.tar"
        with tarfile.open(tar, "w") as archive:
            for path, content in (("exit0", program), ("name", name.encode())):
                member = tarfile.TarInfo(path)
                member.size, member.mode = len(content), 0o755
                archive.addfile(member, BytesIO(content))
        done = self.real.ask(self.real.import_(tar, f"{base.NAME}:{name}"))
        assert done.ok, done.output
        return f"{base.NAME}:{name}"

    def inv(self, night: Night, *words: str) -> None:
        if words[0] != "build":
            super().inv(night, *words)
            return
        commit = json.loads((night.tree / "locks/openagents.json").read_text())["commit"]
        number = int(commit[:2], 16)
        (night.tree / "build_scripts").mkdir()
        (night.tree / "build_scripts/bulk").write_bytes(os.urandom(200_000))
        end = '["/exit0"]' if words[0] not in self.broken else '["/missing"]'
        containerfile = self.home / "Containerfile"
        labels = f"{BUILD_OF}={NAME} opencode-server.openagents.commit={commit}"
        base_name = self.bring_base(f"made-{number // 3:012x}")
        containerfile.write_text(
            f"FROM {self.real.local(base_name)}\nCOPY build_scripts/bulk {STEP}\n"
            f'RUN ["/exit0", "{STEP}"]\n'
            f"RUN {end}\n"
            f"LABEL {labels}\n"
        )
        tag = f"{NAME}-nightly:candidate"
        done = self.real.ask(self.real.build(night.tree, tag=tag, containerfile=containerfile))
        if not done.ok:
            raise self.broken.get("build") or AssertionError(done.output)
        image = self.real.image(self.real.local(tag))
        record = {"id": image["Id"], "seconds": 1}
        (night.tree / f"build/build-{self.real.name}.json").write_text(json.dumps(record))


def left(engine: Engine) -> dict[str, float]:
    """Return what is on the engine: images with their steps, and docker's build cache in bytes."""
    images = engine.ask(engine.argv("images", "--all", "--quiet", "--no-trunc")).stdout.split()
    cache = 0
    if not engine.podman:
        listed = engine.ask(
            engine.argv("system df", "--verbose", "--format", "{{json .BuildCache}}")
        )
        cache = len(json.loads(listed.stdout))
    return {"images": len(set(images)), "cache": cache}


@pytest.mark.engine
@pytest.mark.parametrize("name", ["podman", "docker"])
def test_nights_leave_as_much_after_many_as_after_few(
    name: str,
    scratch: Path,
    dockerd: Dockerd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in {**storage(scratch / "podman-nights"), **dockerd.env}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(detect, "BUILD", tmp_path)
    engine = detect.find(name)
    world = TinyWorld(tmp_path / "home", real=engine)
    world.settings = Settings(image=NAME, nightly={"keep": KEEP})
    world.make()
    after = []
    for number in range(1, 7):
        world.upstream = f"{number:02x}" * 20
        task = {2: "build", 4: "smoke", 5: "build"}.get(number)
        world.broken = {task: failing("no")} if task else {}
        assert world.night() == (f"NightFailed: {task}: no" if task else "released")
        after.append(left(engine))
    assert after[5] == after[2], after
    assert {tag for tag in all_tags(world.settings, engine) if tag[0] != "2"} == {
        "latest",
        "previous",
    }
    assert len(all_tags(world.settings, engine)) == 2 + KEEP
