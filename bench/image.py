"""Benchmarks of the launcher and of the image: build time, size and time to healthy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.ratio import Ratio
from pipeline.core import process
from pipeline.core.console import log
from pipeline.core.errors import BuildFailed, NoSuchImage
from pipeline.core.settings import ROOT, Settings
from pipeline.engines.container import Server, running, wait_ready
from pipeline.engines.engine import Engine
from pipeline.inputs import base, ca

RUNS = 5
NAIVE = "opencode-server-naive:bench"
OURS = "opencode-server-bench"
EDITS = ("config.json", "scripts/health", "vendor/OpenAgents/README.md")
PROGRAM = "/usr/local/lib/node_modules/opencode-ai/bin/opencode.exe"


def bench_list(_settings: Settings, _engine: Engine) -> list[Ratio]:
    """Compare ``./inv --list`` with ``invoke --list``."""
    invoke = str(Path(sys.executable).with_name("invoke"))
    ours, theirs = [], []
    for _ in range(2 * RUNS):
        ours.append(seconds_of([str(ROOT / "inv"), "--list"]))
        theirs.append(seconds_of([invoke, "--list"]))
    return [Ratio.of_medians("./inv --list", "invoke --list", ours, theirs, 1.3)]


def bench_cold(settings: Settings, engine: Engine) -> list[Ratio]:
    """Build both images without a cache, then ours after each kind of edit, and compare sizes."""
    found = base.ensure(engine, settings)
    reference = found.reference if found else ""
    ca.stage(settings.ca)
    before = engine.images()
    containerfile = ROOT / "bench" / "naive.Containerfile"
    arguments = {"BASE": reference}
    naive = engine.build(
        ROOT, tag=NAIVE, containerfile=containerfile, build_args=arguments, cache=False
    )
    log("bench: cold build of the naive image")
    theirs = seconds_of(naive, engine.env)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "repository"
        ignored = shutil.ignore_patterns(".venv", "build", "__pycache__")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        words = [
            "--search-root",
            str(copy),
            "build",
            "--engine",
            engine.name,
        ]
        inv = [
            sys.executable,
            "-m",
            "invoke",
            *words,
        ]
        env = {"INVOKE_IMAGE": OURS}
        log("bench: cold build of ours")
        seconds_of([*inv, "--dry-run"], env)  # finds the engine's flags, once a boot
        ours = seconds_of([*inv, "--no-cache"], env)
        ratios = [
            Ratio(
                "cold build",
                "naive single-stage build",
                "s",
                ours,
                theirs,
                0.75,
            )
        ]
        for name in EDITS:
            took = []
            for edit in range(RUNS):
                with (copy / name).open("a") as file:
                    file.write(" " * (edit + 1) + "\n")
                took.append(seconds_of(inv, env))
            what = f"rebuild after editing {name}"
            ratios.append(Ratio.of_medians(what, "our cold build", took, [ours], 0.02))
    names = [engine.local(f"{OURS}:candidate"), engine.local(NAIVE)]
    ours, theirs = [(engine.image(name) or {})["Size"] / 1e6 for name in names]
    for name in names:
        engine.ask(engine.remove_image(name))
    for identity, image in engine.images().items():
        if identity not in before and not image.get("RepoTags"):
            engine.ask(engine.remove_image(identity))
    ratios.append(
        Ratio(
            "image size",
            "naive image on the same base",
            "MB",
            ours,
            theirs,
            0.6,
        )
    )
    return ratios


def bench_start(settings: Settings, engine: Engine) -> list[Ratio]:
    """Compare the image's time to the first 200 on /config with the bare program's."""
    image = engine.local(f"{settings.image}:candidate")
    if engine.image(image) is None:
        raise NoSuchImage(f"{engine.name} has no image {image}", "Run: inv fetch build")
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "opencode"
        with running(engine, image, network="none") as container:
            engine.must("cp", f"{container.name}:{PROGRAM}", str(program))
        for number in range(RUNS):
            home = Path(scratch) / f"home{number}"
            home.mkdir()
            theirs.append(bare_start(program, home, settings.smoke.ready_seconds))
            with running(engine, image, network="none") as container:
                container.wait_ready_inside(settings.smoke.ready_seconds)
                ours.append(container.ready_seconds)
    against = "bare opencode serve, no container"
    return [Ratio.of_medians("time to healthy", against, ours, theirs, 1.15)]


def bare_start(program: Path, home: Path, seconds: float) -> float:
    """Run OpenCode on this machine; return the seconds until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OPENCODE_DISABLE_MODELS_FETCH": "true",
        "OPENCODE_DISABLE_AUTOUPDATE": "true",
    }
    argv = [
        str(program),
        "serve",
        "--port",
        str(port),
    ]
    quiet = subprocess.DEVNULL
    began = time.monotonic()
    with subprocess.Popen(argv, cwd=home, env=env, stdout=quiet, stderr=quiet) as server:
        try:
            wait_ready(Server(f"http://127.0.0.1:{port}", timeout=0.5), began + seconds)
            return time.monotonic() - began
        finally:
            server.kill()


def seconds_of(argv: list[str], env: dict[str, str] | None = None) -> float:
    """Run a command and return its seconds. Raises BuildFailed."""
    result = process.run(argv, env=env, cwd=ROOT)
    if not result.ok:
        output = result.stdout[-2000:] + result.output
        what = f"{argv[0]} exited with {result.code}"
        raise BuildFailed(
            what,
            "See the end of its output above.",
            output,
        )
    return result.seconds
