"""Nights: bump, fetch, build, smoke and release in a copy of the checkout, unattended.

Until the release, the checkout and the tags stay as they are. A release is first written down, then
done; the next night completes an interrupted one.
"""

from __future__ import annotations

import contextlib
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
from datetime import UTC, date, datetime
from functools import partial
from typing import Any

from pipeline.core import process
from pipeline.core.clock import now
from pipeline.core.console import console, log, ok, warn
from pipeline.core.errors import (
    LocalEdits,
    NightFailed,
    NightSkipped,
    PipelineError,
    SourcesUnreachable,
    named,
)
from pipeline.core.settings import BUILD, ROOT, Settings
from pipeline.core.state import read_json, write_json
from pipeline.engines import detect
from pipeline.engines.engine import Engine
from pipeline.image import tags
from pipeline.image.context import hash_inputs
from pipeline.image.labels import NIGHTLY
from pipeline.release import bump, history, notify, promote, prune

LEFT_OUT = (".venv", ".venv.lock", ".git", "build", "vendor", "docs", "tests")
UNTOUCHED = "latest, previous, locks/ and vendor/ are unchanged."
LOGS = 30
"""Logs of nights that are kept."""

OUTPUT_LINES = 40
"""Lines of a failed task's output that the error repeats."""

ERROR = re.compile(r"^(\w+: .+)\n  -> ", re.MULTILINE)
"""How a task prints its error; the remedy follows."""


STEPS = ("start", "copy", "bump", "compare", "fetch", "build", "smoke", "release")


class Night:
    """One night. Its steps are methods; one that returns an outcome ends the night.

    ``record`` goes into the history; ``step`` is the current step.
    """

    engine: Engine
    latest: dict[str, Any] | None
    image: dict[str, Any]

    def __init__(self, settings: Settings, *, dry_run: bool = False) -> None:
        self.settings = settings
        self.dry_run = dry_run
        # A directory of its own: tasks of a killed night may still run for some seconds.
        self.directory = BUILD / f"night-{os.getpid()}-{secrets.token_hex(3)}"
        self.tree = self.directory / "tree"
        self.step = STEPS[0]
        self.began = time.monotonic()
        self.record: dict[str, Any] = {"kind": "night", "steps": {}}

    def run(self) -> None:
        """Go through the steps. Raises NightFailed, NightSkipped."""
        try:
            with named():
                for self.step in STEPS:
                    began = time.monotonic()
                    outcome = getattr(self, self.step)()
                    self.record["steps"][self.step] = round(time.monotonic() - began, 2)
                    if outcome:
                        self.record["outcome"] = outcome
                        return
        except Exception as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> PipelineError:
        """Record why the night ended; return NightFailed or NightSkipped."""
        what = getattr(error, "what", f"{type(error).__name__}: {error}")
        details = getattr(error, "details", traceback.format_exc())
        self.record |= {"where": self.step, "why": what, "details": details[-8000:]}
        if isinstance(error, (NightSkipped, SourcesUnreachable)):
            self.record["outcome"] = "skipped"
            return NightSkipped(what, "Nothing has changed.", details)
        self.record["outcome"] = "failed"
        remedy = "The next night completes the release." if self.pending() else UNTOUCHED
        return NightFailed(f"{self.step}: {what}", remedy, details)

    def start(self) -> None:
        """Find the engine, and complete an interrupted release."""
        self.engine = detect.of(self.settings)
        self.settings = self.settings.model_copy(update={"engine": self.engine.name})
        if not self.dry_run and promote.finish(self.engine):
            log("nightly: completed an interrupted release")
        self.latest = self.engine.image(self.engine.local(f"{self.settings.image}:latest"))

    def copy(self) -> None:
        """Copy the checkout and the state in ``build/``, without what is large."""
        self.remove_leftovers()
        junk = shutil.ignore_patterns(
            "__pycache__",
            ".*_cache",
            ".bump-*",
            "*.part",
        )

        def ignore(folder: str, names: list[str]) -> set[str]:
            left_out = LEFT_OUT if folder == str(ROOT) else ()
            return {*junk(folder, names), *left_out}

        shutil.copytree(
            ROOT,
            self.tree,
            symlinks=True,
            ignore=ignore,
        )
        if (ROOT / ".git").exists():
            (self.tree / ".git").symlink_to(ROOT / ".git")
        (self.tree / "build").mkdir()
        for path in BUILD.glob("*.json"):
            if not path.name.startswith("release-"):
                shutil.copy2(path, self.tree / "build")
        self.before = promote.hashes(ROOT)

    def bump(self) -> None:
        """Move the pins of the copy, and the date of Debian's packages if it is too old."""
        parts = self.settings.nightly.bump.replace(",", " ").split()
        bumped = bump.bump(
            self.settings,
            parts,
            quick=True,
            root=self.tree,
        )
        file = self.tree / "locks/debian.txt"
        today, old = now()[:10], file.read_text().strip()
        age = date.fromisoformat(today) - date.fromisoformat(old)
        # A date in the future: the clock was wrong then. One day may be a matter of time zones.
        if not -1 <= age.days <= self.settings.nightly.refresh_days:
            file.write_text(f"{today}\n")
            bumped.moves.append(bump.Move(file.name, "Debian", old, today))
        bump.show(bumped, dry_run=self.dry_run)
        self.record["moves"] = [str(move) for move in bumped.moves]
        self.record["kept"] = bumped.kept
        self.record["remarks"] = bumped.remarks

    def compare(self) -> str:
        """End the night if nothing changed since latest was built.

        Raises NightSkipped if a rollback undid exactly these inputs.
        """
        pin = read_json(self.tree / "locks/openagents.json")
        inputs = self.inputs(pin["commit"])
        latest = self.latest["Id"] if self.latest else ""
        rollbacks = [each for each in history.read()[0] if each["kind"] == "rollback"]
        for rollback in rollbacks[-1:]:
            undone = history.inputs_of(rollback["from"])
            if tags.same_id(rollback["image"], latest) and undone == inputs:
                reason = f"these inputs were rolled back at {rollback['at']}"
                raise NightSkipped(reason, "A night runs again when an input changes.")
        if history.inputs_of(latest) == inputs:
            return "unchanged"
        reason = "; ".join(self.record["moves"]) or "the inputs differ from those of latest"
        self.record["changes"] = [reason]
        if not self.dry_run:
            return ""
        log(f"nightly: would fetch, build, smoke and release: {reason}")
        return "unchanged"

    def fetch(self) -> None:
        """Fetch the inputs into the copy."""
        ignore = shutil.ignore_patterns(".incoming-*", ".lock")
        shutil.copytree(
            ROOT / "vendor",
            self.tree / "vendor",
            symlinks=True,
            ignore=ignore,
        )
        self.inv("fetch")

    def build(self) -> None:
        """Build the copy. Raises NightSkipped if OpenAgents could not be fetched."""
        self.inv("build")
        built = read_json(self.tree / f"build/build-{self.engine.name}.json")
        self.image = tags.find(
            self.settings,
            self.engine,
            built["id"],
        )
        self.record["image"] = self.image["Id"]
        self.record["size"] = self.image["Size"]
        self.record["build_seconds"] = built["seconds"]
        if self.latest and promote.is_downgrade(self.latest, self.image):
            reason = "the build has only the starter package, and latest has OpenAgents"
            raise NightSkipped(reason, "Check the git host: inv doctor")

    def smoke(self) -> None:
        """Test the image, with a conversation."""
        self.inv("smoke", "--image", self.image["Id"], "--deep")
        report = read_json(self.tree / "build/smoke.json")
        self.record["ready_seconds"] = report["ready_seconds"]
        self.record["probes"] = promote.probe_results(report)

    def release(self) -> str:
        """Move the tags, the pins and OpenAgents. Raises LocalEdits, NotReleased."""
        if promote.hashes(ROOT) != self.before:
            what = "locks/ or vendor/OpenAgents was edited during the night"
            raise LocalEdits(what, "Keep the edit; the next night includes it.")
        promote.check_advisories(self.settings, self.engine, self.image)
        self.record["inputs"] = self.inputs(tags.label(self.image, tags.COMMIT))
        tag = promote.move(
            self.settings,
            self.engine,
            self.image,
            self.latest,
            self.tree,
        )
        self.record["tag"] = tag
        return "released"

    def inputs(self, commit: str) -> str:
        """Return a hash of what goes into the copy's image, with OpenAgents at ``commit``."""
        hashes = json.dumps(hash_inputs(self.tree, commit, self.settings.packages), sort_keys=True)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def inv(self, *words: str) -> None:
        """Run a task in the copy and show its output. Raises NightFailed with the task's error."""
        config = self.settings.model_dump(mode="json", exclude={"nightly", "notify"})
        config["image"] += NIGHTLY
        # JSON is YAML too. A file that is given by --config overrides the environment.
        file = self.directory / "settings.json"
        write_json(file, config)
        argv = [sys.executable, "-P", "-m", "invoke", "--search-root", str(self.tree)]
        argv += ["--config", str(file), *words]
        env = {"GIT_OPTIONAL_LOCKS": "0", "PYTHONUNBUFFERED": "1"}
        result = process.run(
            argv,
            on_line=lambda line: log(f"  {line}", "dim"),
            cwd=self.tree,
            env=env,
        )
        if not result.ok:
            errors = ERROR.findall(result.stdout + "\n")
            what = errors[-1] if errors else f"inv {words[0]} exited with {result.code}"
            output = result.stdout.splitlines()[-OUTPUT_LINES:]
            raise NightFailed(
                what,
                UNTOUCHED,
                "\n".join(output),
            )

    def pending(self) -> bool:
        """Return whether the release was begun and not completed."""
        return self.step == "release" and promote.pending(self.engine)

    def remove_leftovers(self) -> None:
        """Remove what killed nights have left."""
        for file in (*BUILD.glob("release-*.part"), *BUILD.glob("nightly-*.part")):
            file.unlink()
        for directory in BUILD.glob("night-*"):
            if directory != self.directory:
                shutil.rmtree(directory, ignore_errors=True)

    def finish(self) -> None:
        """Record and report the night, and clean up. An error here does not change the outcome."""
        if "outcome" not in self.record:
            self.record |= {"outcome": "failed", "where": self.step, "why": "interrupted"}
        self.record["seconds"] = round(time.monotonic() - self.began, 2)
        actions: list[Callable[[], None]] = [
            partial(history.append, self.record),
            partial(notify.send, self.settings, self.record),
            self.clean_up,
        ]
        for action in actions[2:] if self.dry_run else actions:
            try:
                action()
            except Exception as error:  # noqa: BLE001 -- see above
                warn(f"nightly: {type(error).__name__}: {error}")

    def clean_up(self) -> None:
        """Remove the copy and older images, unless the next night completes the release."""
        if self.pending():
            return
        layers = self.tree / "build/layers.json"
        if self.record["outcome"] == "released" and layers.exists():
            # What the secret scan knows of each layer: the next build need not look again.
            layers.replace(BUILD / layers.name)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.step != STEPS[0]:
            self.remove_leftovers()
        if self.step in STEPS[STEPS.index("build") :]:
            candidate = self.engine.local(f"{self.settings.image}{NIGHTLY}:candidate")
            self.engine.ask(self.engine.remove_image(candidate))
            prune.prune(
                self.settings,
                self.engine,
                self.settings.nightly.keep,
            )


def nightly(
    settings: Settings, *, log_file: bool = False, delay: int = 0, dry_run: bool = False
) -> str:
    """Run one night and return its outcome, unchanged or released.

    ``log_file`` writes the output to a file in ``build/nights/``; ``delay`` first waits a random
    time of at most so many seconds. Raises NightFailed, NightSkipped.
    """
    with _log_file() if log_file else contextlib.nullcontext(), _lock():
        time.sleep(random.uniform(0, delay))  # noqa: S311 -- spreads the load on registries
        night = Night(settings, dry_run=dry_run)
        try:
            night.run()
        finally:
            night.finish()
        record = night.record
        if not dry_run:
            summary = f"nightly: {record['outcome']} in {record['seconds']:.1f} s: "
            ok((summary + history.brief(record)).removesuffix(": "))
        return str(record["outcome"])


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """Hold the lock of nights. Raises NightSkipped, with the process that holds it."""
    from filelock import FileLock, Timeout

    BUILD.mkdir(exist_ok=True)
    holder = BUILD / "nightly-holder.json"
    lock = FileLock(BUILD / "nightly.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = read_json(holder)
        who = f"process {other.get('pid', '?')} since {other.get('since', 'a moment ago')}"
        raise NightSkipped(f"another night is running: {who}", "Wait for it.") from None
    try:
        with contextlib.suppress(OSError):
            write_json(holder, {"pid": os.getpid(), "since": now()})
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _log_file() -> Iterator[None]:
    """Write stdout and stderr to a new file in ``build/nights/``; remove the oldest."""
    folder = BUILD / "nights"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"))[: 1 - LOGS]:
        old.unlink()
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.log"
    with (
        path.open("w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        console.cache_clear()
        try:
            yield
        except PipelineError as error:
            print(error.message)
            raise
        finally:
            console.cache_clear()
