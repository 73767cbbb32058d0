"""Real nights: real git, real builds, real smokes, by both engines; and what is told and gone back
to afterwards.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.settings import Settings
from pipeline.image.labels import BUILD_OF
from pipeline.image.tags import all_tags
from pipeline.release import history, promote
from tests.conftest import Built, Checkout, Dockerd
from tests.image.conftest import derive

pytestmark = pytest.mark.engine

NAME, DATED = "opencode-server-night", "20260101-aaaaaaa"
DOCKER = pytest.mark.parametrize("built", ["docker"], indirect=True)
PODMAN = pytest.mark.parametrize("built", ["podman"], indirect=True)
AGENT, PLUGIN = ".opencode/agent/core/builder.md", ".opencode/plugin/broken.ts"


@dataclass
class Place:
    """A checkout of its own, an upstream of its own, and images of another name."""

    built: Built
    checkout: Checkout
    upstream: Path

    def night(self, *words: str, env: dict[str, str] | None = None) -> Any:
        return self.checkout.inv("nightly", *words, "--engine", self.built.engine.name, env=env)

    def commit(self, path: str, text: str) -> str:
        (self.upstream / path).write_text(text)
        return commit(self.upstream)

    def tags(self) -> dict[str, str]:
        said = all_tags(Settings(image=NAME), self.built.engine)
        return {tag: identity.removeprefix("sha256:") for tag, identity in said.items()}

    def state(self) -> dict[str, Any]:
        tags = self.tags()
        return {
            **promote.contents(self.checkout.root),
            **{tag: tags.get(tag) for tag in ("latest", "previous")},
        }

    def records(self) -> list[dict[str, Any]]:
        return history.read(self.checkout.root / "build/history.jsonl")[0]


def commit(place: Path) -> str:
    git = ["git", "-C", str(place), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "more"], check=True)
    return subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def untagged(built: Built, *instructions: str) -> str:
    """Build an image on top of the candidate, take its name away, and return its ID."""
    name = derive(built, "untagged", *instructions)
    identity = str(built.inspect(name)["Id"])
    assert built.engine.ask(built.engine.argv("untag", name)).ok
    return identity


@pytest.fixture
def place(built: Built, tmp_path: Path) -> Iterator[Place]:
    upstream, root = tmp_path / "upstream", tmp_path / "checkout"
    shutil.copytree(built.checkout.root / "vendor/starter", upstream)
    subprocess.run(
        ["git", "init", "--quiet", "--initial-branch", "main", str(upstream)], check=True
    )
    commit(upstream)
    shutil.copytree(built.checkout.root, root, symlinks=True)
    (root / "build/history.jsonl").unlink(missing_ok=True)
    env = {
        **built.checkout.env,
        "INVOKE_IMAGE": NAME,
        "INVOKE_OPENAGENTS_URL": str(upstream),
        "INVOKE_NIGHTLY_BUMP": "openagents",
    }
    found = Place(built, replace(built.checkout, root=root, env=env), upstream)
    yield found
    for tag in found.tags():
        built.engine.ask(built.engine.argv("rmi", built.engine.local(f"{NAME}:{tag}")))


@DOCKER
def test_nights_release_what_moved_and_find_nothing_else_to_do(place: Place) -> None:
    first = place.night()
    assert first.code == 0, first.stdout + first.stderr
    assert "nightly: released" in first.stdout
    old = place.state()
    new = place.commit(AGENT, "---\ndescription: another\nmode: primary\n---\nBuild it.\n")
    look = place.night("--dry-run")
    assert f"-> {new[:12]}" in look.stdout
    assert place.state() == old
    moved = place.night()
    assert moved.code == 0, moved.stdout + moved.stderr
    tags, engine = place.tags(), place.built.engine
    assert tags["previous"] == old["latest"]
    image = engine.image(engine.local(f"{NAME}:latest"))
    assert image
    labels = image["Config"]["Labels"]
    assert (labels["opencode-server.openagents.commit"], labels[BUILD_OF]) == (new, NAME)
    assert any(tag.endswith(f"-{new[:7]}") and tags[tag] == tags["latest"] for tag in tags)
    assert json.loads((place.checkout.root / "locks/openagents.json").read_text())["commit"] == new
    assert "another" in (place.checkout.root / "vendor/OpenAgents" / AGENT).read_text()
    record = place.records()[-1]
    assert record["probes"]["agents"][0] is True
    assert record["size"] > 500e6

    before = place.state(), place.built.containers(), place.tags()
    still = place.night()
    assert still.code == 0, still.stdout + still.stderr
    assert "nightly: unchanged" in still.stdout
    assert (place.state(), place.built.containers(), place.tags()) == before
    assert [each["outcome"] for each in place.records()] == ["released", "released", "unchanged"]


@PODMAN
def test_an_upstream_that_breaks_the_image_is_never_released_and_the_next_night_heals(
    place: Place,
) -> None:
    assert place.night().code == 0
    before, containers = place.state(), place.built.containers()
    place.commit(PLUGIN, "process.exit(3)\n")
    done = place.night()
    done.failed("NightFailed", 60, "smoke: ", "latest, previous, locks/ and vendor/ are unchanged")
    assert (place.state(), place.built.containers()) == (before, containers)
    assert place.records()[-1]["where"] == "smoke"

    (place.upstream / PLUGIN).unlink()
    commit(place.upstream)
    night = place.checkout.start("nightly", "--engine", "podman")
    night.until("smoke: ")
    night.end(signal.SIGKILL)
    assert place.state() == before
    healed = place.night()
    assert healed.code == 0, healed.stdout + healed.stderr
    assert place.tags()["previous"] == before["latest"]
    assert place.built.containers() == containers
    assert list((place.checkout.root / "build").glob("night-*")) == []

    healed_latest = place.tags()["latest"]
    back = place.checkout.inv("rollback", "--engine", "podman")
    assert back.code == 0, back.stdout + back.stderr
    assert (place.tags()["latest"], place.tags()["previous"]) == (before["latest"], healed_latest)
    engine = place.built.engine
    ours, theirs = (
        untagged(place.built, f"LABEL {BUILD_OF}={whose}") for whose in (NAME, "somebody-elses")
    )
    pruned = place.checkout.inv("prune", "--keep", "1", "--engine", "podman")
    assert pruned.code == 0, pruned.stdout + pruned.stderr
    assert {before["latest"], healed_latest} <= set(place.tags().values()), (
        "one is latest, one is previous"
    )
    assert (engine.image(ours), engine.image(theirs) is None) == (None, False)
    assert engine.image(place.built.reference), "the image of another name, and what it stands on"
    engine.ask(engine.argv("rmi", theirs))


@pytest.fixture
def released(place: Place) -> Place:
    """A place whose latest, and a dated tag, are the image that is built already: faster than a
    first night.
    """
    place.built.engine.tag(place.built.reference, f"{NAME}:latest", f"{NAME}:{DATED}")
    return place


def one_package_less(place: Place) -> None:
    containerfile = place.checkout.root / "Containerfile"
    containerfile.write_text(
        f"{containerfile.read_text()}\nRUN rm -r /opt/venv/lib/python3*/site-packages/falkordb\n"
    )


def no_agents(place: Place) -> None:
    shutil.rmtree(place.upstream / ".opencode/agent")
    commit(place.upstream)


def agents_that_do_not_load(place: Place) -> None:
    place.commit(AGENT, "---\nname: builder\ndescription: [this is no YAML\n---\nBuild it.\n")


@PODMAN
@pytest.mark.parametrize(
    ("fault", "sentences"),
    [
        (one_package_less, ("smoke: SmokeFailed: ", "probes failed: ", "packages")),
        (no_agents, ("fetch: NotOpenAgents: ", "has no agents in .opencode/")),
        (agents_that_do_not_load, ("smoke: SmokeFailed: ", "probes failed: agent")),
    ],
)
def test_what_would_not_work_is_never_released(
    released: Place, fault: Callable[[Place], None], sentences: tuple[str, ...]
) -> None:
    fault(released)
    before, containers = released.state(), released.built.containers()
    done = released.night()
    done.failed("NightFailed", 60, *sentences, "latest, previous, locks/ and vendor/ are unchanged")
    assert (released.state(), released.built.containers()) == (before, containers)
    assert released.records()[-1]["outcome"] == "failed"
    assert list((released.checkout.root / "build").glob("night-*")) == []


@PODMAN
def test_a_night_with_the_clock_set_back(released: Place) -> None:
    new = released.commit(AGENT, "---\ndescription: another\nmode: primary\n---\nBuild it.\n")
    latest = released.tags()["latest"]
    (library,) = Path("/usr/lib").rglob("libfaketimeMT.so.1")
    back = {"LD_PRELOAD": str(library), "FAKETIME": "-2000d"}
    day = datetime.now(UTC) - timedelta(days=2000)
    done = released.night(env=back)
    assert done.code == 0, done.stdout + done.stderr
    tags = released.tags()
    assert (tags["previous"], tags[DATED]) == (latest, latest)
    assert tags[f"{day:%Y%m%d}-{new[:7]}"] == tags["latest"] != latest
    assert released.records()[-1]["at"].startswith(f"{day:%Y-%m-%d}T")
    # To the right clock, the date of Debian's packages is years old: the next night rebuilds everything.
    look = released.night("--dry-run")
    assert look.code == 0, look.stdout + look.stderr
    assert f"Debian {day:%Y-%m-%d} -> " in look.stdout


@DOCKER
def test_a_daemon_that_is_restarted_in_the_middle_of_a_smoke(
    released: Place, dockerd: Dockerd
) -> None:
    released.commit(AGENT, "---\ndescription: another\nmode: primary\n---\nBuild it.\n")
    before, containers = released.state(), released.built.containers()
    night = released.checkout.start("nightly", "--engine", "docker")
    night.until("ready  ")
    dockerd.end()
    dockerd.start()
    night.end().failed(
        "NightFailed", 60, "smoke: ", "latest, previous, locks/ and vendor/ are unchanged"
    )
    assert released.state() == before
    healed = released.night()
    assert healed.code == 0, healed.stdout + healed.stderr
    assert released.tags()["previous"] == before["latest"]
    assert released.built.containers() == containers
