"""``inv bench``: measure the image and the tasks against the naive way, and print ratios."""

from __future__ import annotations

from dataclasses import asdict

from bench import backup, image, memory, night
from bench.ratio import Ratio
from pipeline.core.clock import now
from pipeline.core.console import log, table
from pipeline.core.errors import SettingRefused
from pipeline.core.settings import BUILD, Settings
from pipeline.core.state import write_json
from pipeline.engines.engine import Engine

NAMES = (
    "list",
    "cold",
    "start",
    "night",
    "backup",
    "memory",
)


def bench(
    settings: Settings, engine: Engine, *, only: str = "", dry_run: bool = False
) -> list[Ratio]:
    """Run the benchmark ``only``, by default all; write build/bench.json.

    Raises SettingRefused for an unknown name, NoSuchImage if there is no candidate to start.
    """
    if only and only not in NAMES:
        raise SettingRefused(f"unknown benchmark {only}", f"Choose one of {', '.join(NAMES)}.")
    chosen = [only] if only else NAMES
    if dry_run:
        log(f"bench: would run {', '.join(chosen)} with {engine.name}; cold takes about 3 minutes")
        return []
    ratios: list[Ratio] = []
    for name in chosen:
        ratios += _measure(name, settings, engine)
    rows, results = [], []
    for each in ratios:
        ours, theirs = f"{each.ours:.2f} {each.unit}", f"{each.theirs:.2f} {each.unit}"
        reached = "reached" if each.ratio <= each.aim else "missed"
        numbers = (
            ours,
            theirs,
            f"{each.ratio:.3f}",
            f"{each.aim:g}",
        )
        rows.append(
            (
                each.name,
                each.against,
                *numbers,
                reached,
            )
        )
        results.append(asdict(each) | {"ratio": round(each.ratio, 4)})
    columns = (
        "what",
        "against",
        "ours",
        "theirs",
        "ratio",
        "aim",
        "",
    )
    table(f"{engine.name} {engine.version}", columns, rows)
    record = {"engine": engine.name, "finished": now(), "results": results}
    write_json(BUILD / "bench.json", record)
    return ratios


def _measure(name: str, settings: Settings, engine: Engine) -> list[Ratio]:
    if name == "backup":
        return backup.bench()
    if name == "memory":
        return memory.bench()
    if name == "night":
        return night.bench(settings, engine)
    if name == "list":
        return image.bench_list(settings, engine)
    if name == "cold":
        return image.bench_cold(settings, engine)
    return image.bench_start(settings, engine)
