"""What ``inv bench`` does: measure the image and the tasks against the naive way, side by side, and print ratios."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.ratio import Ratio
from pipeline import base, ca, host, process
from pipeline.container import Server, running, wait_ready
from pipeline.engine import Engine
from pipeline.errors import BuildFailed, NoSuchImage, SettingRefused
from pipeline.image import now
from pipeline.records import write_json
from pipeline.report import say, table
from pipeline.settings import BUILD, ROOT, Settings

RUNS = 5
NAIVE = "opencode-server-naive:bench"
OURS = "opencode-server-bench"


def bench(settings: Settings, engine: Engine, *, only: str = "", dry_run: bool = False) -> list[Ratio]:
    """Run the benchmark named in ``only`` (list, cold, start, backup, memory; empty is all); write build/bench.json.

    Raises SettingRefused when there is none of that name, NoSuchImage when there is no candidate to start.
    """
    parts: dict[str, Callable[[Settings, Engine], list[Ratio]]]
    parts = {"list": listing, "cold": cold, "start": start, "backup": backup, "memory": remembering}
    chosen = [name for name in parts if only in ("", name)]
    if not chosen:
        raise SettingRefused(f"there is no benchmark {only}", f"There are {', '.join(parts)}.")
    if dry_run:
        say(f"bench: would measure {', '.join(chosen)} with {engine.name}; cold takes about 4 minutes")
        return []
    ratios = [ratio for name in chosen for ratio in parts[name](settings, engine)]
    rows = [
        (each.name, each.against, f"{each.ours:.2f} {each.unit}", f"{each.theirs:.2f} {each.unit}", f"{each.ratio:.3f}",
         f"{each.aim:g}", "reached" if each.ratio <= each.aim else "missed")
        for each in ratios
    ]  # fmt: skip
    table(f"{engine.name} {engine.version}", ("what", "against", "ours", "theirs", "ratio", "aim", ""), rows)
    results = [asdict(each) | {"ratio": round(each.ratio, 4)} for each in ratios]
    write_json(BUILD / "bench.json", {"engine": engine.name, "finished": now(), "results": results})
    return ratios


def backup(_settings: Settings, _engine: Engine) -> list[Ratio]:
    """Time a backup and a restore of 100,000 keys and as many pairs of nodes."""
    from bench import backup as drills

    return drills.bench()


def listing(_settings: Settings, _engine: Engine) -> list[Ratio]:
    """Time ``./inv --list`` against ``invoke --list``."""
    ours, theirs = [], []
    for _ in range(RUNS * 2):
        ours.append(_time([str(ROOT / "inv"), "--list"]))
        theirs.append(_time([str(Path(sys.executable).with_name("invoke")), "--list"]))
    return [Ratio("./inv --list", "invoke --list", "s", statistics.median(ours), statistics.median(theirs), 1.3)]


def cold(settings: Settings, engine: Engine) -> list[Ratio]:
    """Build both images without a cache, then ours again after an edit of each kind, as a user would: by ``inv``."""
    found = base.ensure(engine, settings)
    assert found is not None  # noqa: S101 -- only a dry run finds none
    ca.stage(settings.ca)
    before = set(_images(engine))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "repository"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", "build", "__pycache__"))
        inv = [sys.executable, "-m", "invoke", "--search-root", str(copy), "build", "--engine", engine.name]
        env = {"INVOKE_IMAGE": OURS}
        naive = engine.build(
            ROOT, tag=NAIVE, containerfile=ROOT / "bench" / "naive.Containerfile",
            build_args={"BASE": found.reference}, cache=False,
        )  # fmt: skip
        say("bench: cold build of the naive image")
        theirs = _time(naive, env=engine.env)
        say("bench: cold build of ours")
        _time([*inv, "--dry-run"], env=env)  # asks the engine what it needs here, once a boot
        ours = _time([*inv, "--no-cache"], env=env)
        ratios = [Ratio("cold build", "naive single-stage build", "s", ours, theirs, 0.8)]
        edits = {"config.json": 0.03, "scripts/health": 0.03, "vendor/OpenAgents/README.md": 0.1}
        for name, aim in edits.items():
            took = []
            for edit in range(RUNS):
                with (copy / name).open("a") as file:
                    file.write(" " * (edit + 1) + "\n")
                took.append(_time(inv, env=env))
            ratios.append(
                Ratio(f"rebuild after editing {name}", "our cold build", "s", statistics.median(took), ours, aim)
            )
    sizes = [(engine.image(engine.local(name)) or {})["Size"] / 1e6 for name in (f"{OURS}:candidate", NAIVE)]
    # The runtime that these builds left has the same name and contents as the one before: it stays, the others go.
    engine.ask(engine.argv("rmi", engine.local(f"{OURS}:candidate"), engine.local(NAIVE)))
    for image in _images(engine):
        if image not in before and not (engine.image(image) or {}).get("RepoTags"):
            engine.ask(engine.argv("rmi", image))
    return [*ratios, Ratio("image size", "naive image on the same base", "MB", sizes[0], sizes[1], 0.6)]


def _images(engine: Engine) -> list[str]:
    """Return the IDs of the images here, newest first."""
    return list(dict.fromkeys(engine.ask(engine.argv("images", "--quiet", "--no-trunc")).stdout.split()))


def start(settings: Settings, engine: Engine) -> list[Ratio]:
    """Time from start to the first 200 on /config: the image without a network, against the bare program here."""
    image = engine.local(f"{settings.image}:candidate")
    if engine.image(image) is None:
        raise NoSuchImage(f"{engine.name} has no image {image}", "Build it first: inv fetch build.")
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "opencode"
        with running(engine, image, network="none") as container:
            path = "/usr/local/lib/node_modules/opencode-ai/bin/opencode.exe"
            engine.ask(engine.argv("cp", f"{container.name}:{path}", str(program)))
        for run in range(RUNS):
            theirs.append(_bare(program, Path(scratch) / f"home{run}", settings))
            with running(engine, image, network="none") as container:
                container.wait_ready_inside(settings.smoke.ready_seconds)
                ours.append(container.ready_seconds)
    against = "bare opencode serve, no container"
    return [Ratio("time to healthy", against, "s", statistics.median(ours), statistics.median(theirs), 1.15)]


def remembering(_settings: Settings, _engine: Engine) -> list[Ratio]:
    """Measure the memory against graphiti-core called directly; only the fake model and FalkorDB are in its times."""
    host.ensure_dev_tools()
    from bench import memory

    found = memory.measure()
    naive = "an MCP server that imports Graphiti first"
    directly = "Graphiti's add_episode"
    ms = {name: value * 1000 for name, value in found.items()}
    rows = [
        ("MCP server: start to initialize", naive, "ms", ms["initialize ours"], ms["initialize naive"], 0.6),
        ("MCP server: idle", naive, "MB", found["megabytes ours"], found["megabytes naive"], 0.6),
        ("adding a memory to the queue", directly, "ms", 1000 / found["adds per second"], ms["digest theirs"], 0.05),
        ("digesting a memory", directly, "ms", ms["digest ours"], ms["digest theirs"], 1.1),
    ]
    for count in memory.COUNTS:
        ours, theirs = ms[f"search {count} ours"], ms[f"search {count} theirs"]
        rows.append((f"search among {count:,} facts", "Graphiti's search", "ms", ours, theirs, 1.1))
    return [Ratio(*row) for row in rows]


def _bare(program: Path, home: Path, settings: Settings) -> float:
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"OPENCODE_DISABLE_MODELS_FETCH": "true", "OPENCODE_DISABLE_AUTOUPDATE": "true"}
    began = time.monotonic()
    with subprocess.Popen(
        [program, "serve", "--port", str(port)],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            wait_ready(Server(f"http://127.0.0.1:{port}", timeout=0.5), began + settings.smoke.ready_seconds)
            return time.monotonic() - began
        finally:
            server.kill()


def _time(argv: list[str], env: dict[str, str] | None = None) -> float:
    done = process.run(argv, env=env, cwd=ROOT)
    if not done.ok:
        raise BuildFailed(
            f"{argv[0]} ended with {done.code}", "Its last lines are above.", done.stdout[-2000:] + done.said
        )
    return done.seconds
