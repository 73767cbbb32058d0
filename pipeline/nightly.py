"""Nights: bump, fetch, build, smoke and release in a copy of the checkout, with nobody watching.

Until the release, nothing is touched that people run or that a build begins with: the pins move and OpenAgents arrives
in a directory of ``build/``. A release is then written down first and done after that; whoever comes next completes it.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline import base, bump, history, openagents, process, prune, release
from pipeline import engine as engines
from pipeline.engine import Engine
from pipeline.errors import LocalEdits, NightFailed, NightSkipped, NotWritable, PipelineError, SourcesUnreachable
from pipeline.image import NIGHTLY, RUNTIME_LOCKS, now, runtime_tag
from pipeline.records import read_json, write_json
from pipeline.report import console, ok, say, warn
from pipeline.settings import BUILD, ROOT, Settings

LEFT_OUT = (".venv", ".venv.lock", ".git", "build", "vendor", "docs", "tests")
UNTOUCHED = "latest, previous, locks/ and vendor/ are as they were."
LOGS = 30
"""How many logs of nights are kept."""


class Outcome(enum.StrEnum):
    """How a night ends."""

    UNCHANGED = "unchanged"
    RELEASED = "released"
    FAILED = "failed"
    SKIPPED = "skipped"


class _Skip(Exception):
    """There is a reason not to go on, and nothing is wrong."""


class Night:
    """One night; ``record`` is what goes into the history, ``step`` where it is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # A name of its own: what a killed one has left running goes on in another directory, if at all.
        self.place = BUILD / f"night-{os.getpid()}-{secrets.token_hex(3)}"
        self.tree = self.place / "tree"
        self.step = "start"
        self.engine: Engine | None = None
        self.record: dict[str, Any] = {"kind": "night", "steps": {}}

    def run(self, *, dry_run: bool) -> Outcome:
        """Go through the steps; raises what they raise."""
        with self.at("engine"):
            self.engine = engine = engines.of(self.settings)
            if not dry_run and release.finish(engine):
                say("nightly: a release that was cut short is complete now")
        with self.at("copy"):
            self.copy()
            before = release.contents(ROOT)
        with self.at("bump"):
            parts = self.settings.nightly.bump.replace(",", " ").split()
            bumped = bump.bump(self.settings, parts, quick=True, root=self.tree)
            bump.show(bumped, dry_run=dry_run)
            self.record |= {"moves": [str(move) for move in bumped.moves], "kept": bumped.kept}
            self.record |= {"remarks": bumped.remarks} if bumped.remarks else {}
        with self.at("compare"):
            stale = self.compare(engine, moving="openagents" not in bumped.kept)
        if stale is None:
            return Outcome.UNCHANGED
        if dry_run:
            say(f"nightly: would fetch, build, smoke and release: {stale}")
            return Outcome.UNCHANGED
        self.record["changes"] = [stale]
        with self.at("fetch"):
            self.copy_vendor()
            self.inv("fetch")
        with self.at("build"):
            self.inv("build", *(["--no-cache"] if stale.startswith("Debian") else []))
            built = read_json(self.tree / f"build/build-{engine.name}.json")
            image = release.find(self.settings, engine, built["id"])
            self.record |= {"image": image["Id"], "size": image["Size"], "build_seconds": built["seconds"]}
            latest = engine.image(engine.local(f"{self.settings.image}:latest"))
            if latest and release.kind(latest) == "openagents" and release.kind(image) == "starter":
                raise _Skip("it holds only the starter, and latest OpenAgents")
        with self.at("smoke"):
            self.inv("smoke", "--image", image["Id"], "--deep")
            smoked = read_json(self.tree / "build/smoke.json")
            self.record |= {"ready_seconds": smoked["ready_seconds"], "probes": release.probes(smoked)}
        with self.at("release"):
            if release.contents(ROOT) != before:
                raise LocalEdits(
                    "locks/ or vendor/OpenAgents changed while the night was at work", "The next one sees it."
                )
            self.record["inputs"] = self.inputs(self.commit())
            self.record["tag"] = release.move(self.settings, engine, image, latest, self.tree)
        return Outcome.RELEASED

    @contextlib.contextmanager
    def at(self, step: str) -> Iterator[None]:
        """Note where the night is, and what the step took."""
        self.step, began = step, time.monotonic()
        yield
        self.record["steps"][step] = round(time.monotonic() - began, 2)

    def copy(self) -> None:
        """Copy the checkout without what is large, and what the tasks remember of this machine."""
        self.clear()
        for leftover in (*BUILD.glob("release-*.part"), *BUILD.glob("nightly-*.part")):
            leftover.unlink(missing_ok=True)
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".bump-*", "*.part")
        self.tree.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name in LEFT_OUT or path.name in ignored(str(ROOT), [path.name]):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, self.tree / path.name, symlinks=True, ignore=ignored)
            else:
                shutil.copy2(path, self.tree / path.name, follow_symlinks=False)
        if (ROOT / ".git").exists():
            (self.tree / ".git").symlink_to(ROOT / ".git")
        (self.tree / "build").mkdir()
        for path in BUILD.glob("*.json"):
            if not path.name.startswith("release-"):
                shutil.copy2(path, self.tree / "build" / path.name)

    def clear(self) -> None:
        """Remove what killed nights have left."""
        for leftover in BUILD.glob("night-*"):
            if leftover != self.place:
                remove(leftover)

    def copy_vendor(self) -> None:
        """Copy ``vendor/`` too."""
        ignored = shutil.ignore_patterns(".incoming-*", ".lock")
        shutil.copytree(ROOT / "vendor", self.tree / "vendor", symlinks=True, ignore=ignored)

    def compare(self, engine: Engine, *, moving: bool) -> str | None:
        """Return why there is something to do, or None. Raises _Skip for what was rolled back."""
        latest = engine.image(engine.local(f"{self.settings.image}:latest"))
        if latest is None:
            return "nothing is released yet"
        pinned = json.loads((self.tree / "locks/openagents.json").read_bytes())["commit"]
        wanted = self.inputs(pinned if moving else self.commit(ROOT) or pinned)
        records = history.read()[0]
        undone = next((each for each in reversed(records) if each["kind"] == "rollback"), None)
        if undone and history.same(undone["image"], latest["Id"]) and history.inputs_of(undone["from"]) == wanted:
            raise _Skip(f"this was rolled back at {undone['at']}; a night goes on when something changes")
        if history.inputs_of(latest["Id"]) != wanted:
            return "; ".join(self.record["moves"]) or "the inputs are not those of latest"
        found = base.here(engine, self.settings)
        runtime = found and engine.image(engine.local(runtime_tag(self.tree, found.reference)))
        age = datetime.fromisoformat(now()) - datetime.fromisoformat(runtime["Created"]) if runtime else None
        days = timedelta(days=self.settings.nightly.refresh_days)
        if age is None or age > days or age < -timedelta(days=1):  # a clock that was set back
            return f"Debian's packages are older than {days.days} days"
        return None

    def commit(self, root: Path | None = None) -> str:
        """Return the commit that is in ``vendor/`` of the copy, or of ``root``; marked where it was edited."""
        vendor = (root or self.tree) / "vendor"
        there = openagents.read(vendor)
        if there is None:
            return ""
        tree = openagents.tree_hash(vendor / openagents.NAME)
        return there.commit if tree == there.tree else f"{there.commit} {tree}"

    def inputs(self, commit: str) -> str:
        """Return the digest of what goes into the image of the copy, with OpenAgents at ``commit``."""
        digest = hashlib.sha256(commit.encode())
        patterns = ("Containerfile", "config.json", "scripts/**/*", "locks/base.json", *RUNTIME_LOCKS)
        for path in sorted(path for pattern in patterns for path in self.tree.glob(pattern) if path.is_file()):
            digest.update(f"\0{path.relative_to(self.tree)}\0".encode() + path.read_bytes())
        return digest.hexdigest()

    def inv(self, *words: str) -> None:
        """Run a task in the copy, its output shown. Raises NightFailed with the failure's own words."""
        assert self.engine  # noqa: S101 -- the first step
        config = self.settings.model_dump(mode="json", exclude={"nightly", "notify"})
        settings = self.place / "settings.json"  # JSON is YAML too; given so, it is above every variable
        write_json(settings, {**config, "engine": self.engine.name, "image": f"{self.settings.image}{NIGHTLY}"})
        argv = [
            sys.executable,
            "-P",
            "-m",
            "invoke",
            "--search-root",
            str(self.tree),
            "--config",
            str(settings),
            *words,
        ]
        done = process.run(argv, on_line=_show, cwd=self.tree, env={"GIT_OPTIONAL_LOCKS": "0", "PYTHONUNBUFFERED": "1"})
        if not done.ok:
            said = re.findall(r"(?m)^(\w+): (.+)\n  -> ", done.stdout + "\n")
            what = ": ".join(said[-1]) if said else f"inv {words[0]} ended with {done.code}"
            raise NightFailed(what, UNTOUCHED, "\n".join(done.stdout.splitlines()[-40:]))


def nightly(settings: Settings, *, log: bool = False, delay: int = 0, dry_run: bool = False) -> Outcome:
    """Run one night and return its outcome: unchanged or released. Raises NightFailed, NightSkipped.

    ``log`` writes it to a file of its own in ``build/nights/``; ``delay`` waits up to so many seconds first.
    """
    with _logged() if log else contextlib.nullcontext(""), _alone():
        if delay:
            time.sleep(random.uniform(0, delay))  # noqa: S311 -- so that not everybody asks in the same second
        night, began = Night(settings), time.monotonic()
        outcome, why, details = Outcome.FAILED, "it was interrupted", ""
        try:
            outcome, why, details = _ended(night, dry_run=dry_run)
        finally:
            where = night.step if outcome is Outcome.FAILED else ""
            said = {"outcome": outcome, "where": where, "why": why, "details": details[-8000:]}
            night.record |= {name: value for name, value in said.items() if value}
            night.record["seconds"] = round(time.monotonic() - began, 2)
            if dry_run:
                remove(night.place)
            else:
                _afterwards(night, outcome)
        if outcome is Outcome.FAILED:
            remedy = "The release had begun: the next night completes it." if _begun(night) else UNTOUCHED
            raise NightFailed(f"{where}: {why}", remedy, details)
        if outcome is Outcome.SKIPPED:
            raise NightSkipped(why, "Nothing has changed.", details)
        if not dry_run:
            ok(f"nightly: {outcome} in {night.record['seconds']:.1f} s{_said(night.record)}")
        return outcome


def _ended(night: Night, *, dry_run: bool) -> tuple[Outcome, str, str]:
    """Run the night; return its outcome, why, and the last lines of what tells of it."""
    try:
        return night.run(dry_run=dry_run), "", ""
    except (_Skip, SourcesUnreachable) as reason:
        return Outcome.SKIPPED, getattr(reason, "what", str(reason)), getattr(reason, "details", "")
    except PipelineError as error:
        return Outcome.FAILED, error.what, error.details
    except OSError as error:
        return Outcome.FAILED, f"{error.strerror or error}: {error.filename or 'somewhere'}", ""
    except Exception as defect:  # noqa: BLE001 -- nobody is watching: it is recorded and told like any failure
        return Outcome.FAILED, f"{type(defect).__name__}: {defect}", traceback.format_exc()


def _afterwards(night: Night, outcome: Outcome) -> None:
    """Record the night, tell whoever wants to know, and tidy up. Nothing here changes the outcome."""
    from pipeline import notify

    steps: list[Callable[[], None]] = [
        lambda: history.append(night.record),
        lambda: notify.tell(night.settings, night.engine, night.record),
        lambda: _tidy(night) if outcome is Outcome.RELEASED else None,
        lambda: _learn(night) if outcome is Outcome.RELEASED else None,
        # What is staged is still to be brought in, and without an engine nobody knows what is.
        lambda: None if _begun(night) else remove(night.place),
        # Again: the task of a killed night may have gone on for some seconds, and written.
        lambda: night.clear() if night.engine and not _begun(night) else None,
    ]
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 -- see above
            warn(f"nightly: {type(error).__name__}: {error}")


def _begun(night: Night) -> bool:
    return night.engine is not None and release.pending(night.engine)


def _tidy(night: Night) -> None:
    assert night.engine  # noqa: S101 -- it has released
    night.engine.ask(night.engine.argv("rmi", night.engine.local(f"{night.settings.image}{NIGHTLY}:candidate")))
    prune.prune(night.settings, night.engine, night.settings.nightly.keep)


def _learn(night: Night) -> None:
    """Keep what was found out about layers, by their digests: neither a night nor a build here looks at one twice."""
    assert night.engine  # noqa: S101 -- it has released
    for name in ("layers.json", f"contents-{night.engine.name}.json"):
        if (night.tree / "build" / name).exists():
            (night.tree / "build" / name).replace(BUILD / name)


def remove(place: Path) -> None:
    """Remove a directory, as far as nobody is still writing into it."""
    shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the night's lock. Raises NightSkipped, naming who holds it and since when."""
    from filelock import FileLock, Timeout

    BUILD.mkdir(exist_ok=True)
    holder, lock = BUILD / "nightly-holder.json", FileLock(BUILD / "nightly.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = read_json(holder)
        said = f"process {who.get('pid', '?')} has been at it since {who.get('since', 'a moment ago')}"
        raise NightSkipped(f"another night is at work: {said}", "Wait for it.") from None
    except OSError as error:
        raise NotWritable(
            f"{BUILD}: {error.strerror}", "Make it a directory of yours, with room on its disk."
        ) from error
    try:
        with contextlib.suppress(OSError):
            write_json(holder, {"pid": os.getpid(), "since": now()})
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Write stdout and stderr to a new file in ``build/nights/``, and keep the newest of those."""
    folder = BUILD / "nights"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in sorted(folder.glob("*.log"))[: -LOGS + 1]:
        stale.unlink()
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.log"
    with path.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        console.cache_clear()
        try:
            yield
        except PipelineError as error:
            print(error.message)
            raise
        finally:
            console.cache_clear()


def _show(line: str) -> None:
    console().print(f"  {line}", markup=False, style="dim")


def _said(record: dict[str, Any]) -> str:
    said = history.brief(record)
    return f": {said}" if said else ""
