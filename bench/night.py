"""Benchmark of nights: when nothing, OpenAgents or OpenCode moved, against a rebuild."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from bench.image import OURS, seconds_of
from bench.ratio import Ratio
from pipeline.core import process
from pipeline.core.console import log
from pipeline.core.settings import ROOT, Settings
from pipeline.engines.engine import Engine
from pipeline.image import tags
from pipeline.inputs.rootfs import architecture

RUNS = 3


def bench(_settings: Settings, engine: Engine) -> list[Ratio]:
    """Run nights in a copy of this checkout, with an upstream of its own; remove their images."""
    settings = Settings(image=OURS)
    with tempfile.TemporaryDirectory() as scratch:
        copy, upstream = Path(scratch, "repository"), Path(scratch, "upstream")
        ignored = shutil.ignore_patterns(".venv", "build", "__pycache__", ".git")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        fetched = ROOT / "vendor/OpenAgents"
        source = fetched if fetched.is_dir() else ROOT / "vendor/starter"
        shutil.copytree(source, upstream, symlinks=True)
        _git(upstream, "init", "--quiet", "--initial-branch", "main")
        argv = [sys.executable, "-P", "-m", "invoke", "--search-root", str(copy), "nightly"]
        argv += ["--engine", engine.name]
        env = {"INVOKE_IMAGE": OURS, "INVOKE_OPENAGENTS_URL": str(upstream)}
        env["INVOKE_OPENAGENTS_REF"] = "main"

        def night(what: str, file: Path) -> float:
            """Edit a file, and return the seconds of the night that finds it."""
            with file.open("a") as edited:
                edited.write("\n")
            if upstream in file.parents:
                _git(upstream, "add", "--all")
                _git(upstream, "commit", "--quiet", "--message", "more")
            log(f"bench: a night after an edit of {what}")
            return seconds_of(argv, env)

        try:
            readme = upstream / "README.md"
            night("all", readme)  # fetches, and finds the engine's flags
            # No step of an earlier build is in the cache.
            script = copy / "build_scripts/install_debian.sh"
            script.write_text(f"{script.read_text()}# {scratch}\n")
            rebuild = night("build_scripts", script)
            lock = copy / f"locks/npm/{architecture()}/package.json"
            moved = {
                "OpenAgents moved": ([night("OpenAgents", readme) for _ in range(RUNS)], 0.2),
                "OpenCode moved": ([night("locks/npm", lock) for _ in range(RUNS)], 0.45),
                "nothing moved": ([seconds_of(argv, env) for _ in range(RUNS)], 0.05),
            }
        finally:
            for tag in tags.all_tags(settings, engine):
                engine.ask(engine.remove_image(engine.local(f"{OURS}:{tag}")))
    return [
        Ratio.of_medians(f"night, {what}", "a night that rebuilds", took, [rebuild], aim)
        for what, (took, aim) in moved.items()
    ]


def _git(place: Path, *words: str) -> None:
    """Run git in a repository of this benchmark's own."""
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    process.run(["git", "-C", str(place), *identity, *words])
