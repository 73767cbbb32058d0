"""Build the image from the Containerfile, and record what was built."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.clock import now
from pipeline.core.console import log, megabytes
from pipeline.core.errors import (
    BuildFailed,
    ConfigRefused,
    ContainerfileRefused,
    DiskFull,
    EngineLost,
    LockBroken,
    NothingFetched,
    PipelineError,
    ToolMissing,
)
from pipeline.core.process import Completed
from pipeline.core.settings import BUILD, ROOT, Settings
from pipeline.core.state import read_json, read_jsonc, write_json
from pipeline.engines.engine import Engine
from pipeline.image import context, labels
from pipeline.inputs import base, ca, openagents
from pipeline.inputs.rootfs import Lock

TAIL = 25
"""Lines of a failed build's output that its error repeats."""


def build(
    settings: Settings,
    engine: Engine,
    *,
    cache: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Build ``settings.image:candidate``; return its record, which is also written to ``build/``.

    The tag moves only if every step passes. Without ``cache`` every step runs again, which brings
    newer Debian packages. Raises ConfigRefused, NothingFetched, BaseUnavailable, ToolMissing,
    BuildFailed, ContainerfileRefused, LockBroken, EngineLost, DiskFull, NotWritable.
    """
    check_config(ROOT / "config.json")
    fetched = openagents.read(ROOT / "vendor")
    if fetched is None:
        raise NothingFetched("vendor/OpenAgents does not exist", "Fetch it first: inv fetch")
    if not (engine.podman or engine.buildkit):
        raise ToolMissing(
            "this docker has no BuildKit, which `RUN --mount` in the Containerfile needs",
            "Install docker-buildx (package docker-buildx or docker-buildx-plugin), or use podman.",
        )
    found = None
    text = (ROOT / "Containerfile").read_text()
    if own_base := base_of(text):
        log(f"base: {own_base}, which the Containerfile names; locks/base.json is not used")
    else:
        found = base.ensure(engine, settings, dry_run=dry_run)
    tree = openagents.tree_hash(ROOT / "vendor" / openagents.NAME)
    inputs = context.hash_inputs(ROOT, tree, settings.packages)
    record_file = BUILD / f"build-{engine.name}.json"
    last = read_json(record_file)
    changed = context.changes(last, inputs)
    tag = f"{settings.image}:candidate"
    if dry_run:
        log(f"build: would build {tag} with {engine.name}; {'; '.join(changed)}")
        return {}
    BUILD.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=BUILD).close()  # a read-only checkout fails before the tag moves
    certificates = ca.stage(settings.ca)
    source = f"{fetched.kind} {fetched.commit[:12]}"
    reference = found.reference if found else own_base
    log(f"build: {engine.name}, {reference}, {source}, {certificates} extra CAs")
    edited = tree != fetched.tree
    values = labels.labels(settings.image, found, fetched, edited=edited, own_base=own_base)
    began = time.monotonic()
    text = f"{text}\n{labels.instruction(values)}"
    _run(engine, tag, found, text, settings.packages, cache=cache)
    seconds = time.monotonic() - began
    # Inspect by tag: the ID that buildx reports is not always one that docker knows
    # (https://github.com/moby/moby/issues/45458).
    image = engine.image(engine.local(tag))
    if image is None:
        raise EngineLost(
            f"{engine.name} built {tag}, but does not have it",
            "Check whether a remote builder is in use.",
        )
    record = {
        "image": tag,
        "id": image["Id"].removeprefix("sha256:"),
        "engine": engine.name,
        "size": image["Size"],
        "seconds": round(seconds, 2),
        "finished": now(),
        "changes": changed,
        "inputs": inputs,
    }
    write_json(record_file, record)
    _report(record, last)
    return record


def base_of(containerfile: str) -> str:
    """Return the base that a Containerfile names, or nothing if it is that of locks/base.json."""
    lock = Lock.read()
    pinned = f"{lock.image}:{lock.tag}"
    bases = re.findall(r"(?im)^FROM\s+(?:--\S+\s+)?(\S+)", containerfile)
    default = re.search(r"(?m)^ARG BASE=(\S+)", containerfile)
    if {"${BASE}", "$BASE"} & {*bases}:
        return default[1] if default and default[1] != pinned else ""
    return "" if pinned in bases else " ".join(bases[-1:])


def _run(
    engine: Engine,
    tag: str,
    found: base.Base | None,
    text: str,
    packages: str,
    *,
    cache: bool,
) -> None:
    # A podman that is killed leaves files in TMPDIR. Layers pass through it: not on a tmpfs.
    temporary = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 -- podman's own default
    with tempfile.TemporaryDirectory(dir=temporary, ignore_cleanup_errors=True) as scratch:
        containerfile = Path(scratch) / "Containerfile"
        containerfile.write_text(text)
        build_args = {"BASE": found.reference} if found else {}
        if packages:
            build_args["PACKAGES"] = packages
        argv = engine.build(
            ROOT, tag=tag, containerfile=containerfile, build_args=build_args, cache=cache
        )
        began = time.time()
        try:
            result = engine.ask(
                argv, on_line=partial(log, style="dim"), timeout=None, env={"TMPDIR": scratch}
            )
        except BaseException:
            if found:
                engine.remove_working_containers(began, found.reference)
            raise
    if not result.ok:
        raise explain(result, engine)


def explain(result: Completed, engine: Engine) -> PipelineError:
    """Return the error that the output of a failed build describes, with its last lines."""
    output = result.stdout
    lines = output.splitlines()
    details = "\n".join(lines[-TAIL:])
    if _mentions(output, "no space left on device|ENOSPC|disk quota exceeded"):
        return DiskFull(
            "no space is left for the build",
            "Free up about 6 GB; inv doctor lists disks.",
            details,
        )
    # Messages of the engine itself. docker's about its daemon do not begin with `error`.
    marks = (
        "error",
        "failed to",
        "unexpected eof",
        "cannot connect",
    )
    errors = "\n".join(line for line in lines[-10:] if line.lower().startswith(marks))
    if _mentions(errors, "parse error|unknown instruction|no FROM statement|unable to process"):
        return ContainerfileRefused(
            f"{engine.name} cannot read the Containerfile",
            "Correct the line that it names. Heredocs need buildah 1.33 or a newer docker.",
            details,
        )
    gone = "error during connect|unexpected EOF|Cannot connect to the Docker|transport is closing"
    if result.code < 0 or _mentions(errors, gone) or not engine.answers():
        return EngineLost(
            f"{engine.name} stopped during the build",
            "Start it and build again: inv build. No tag has moved.",
            details,
        )
    if _mentions(output, "EINTEGRITY|DO NOT MATCH THE HASHES|hash mismatch"):
        return LockBroken(
            "a download does not match its hash in locks/",
            "The download or the lock was changed: do not use it.",
            details,
        )
    return BuildFailed(
        "a step of the Containerfile failed; its last lines are above",
        "Correct it and build again: inv build. No tag has moved.",
        details,
    )


def _mentions(text: str, pattern: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


def check_config(path: Path) -> None:
    """Check OpenCode's configuration against its schema: the server ignores unknown keys.

    Raises ConfigRefused.
    """
    import jsonschema

    schema = json.loads((ROOT / "locks" / "opencode-config.schema.json").read_text())
    try:
        config = read_jsonc(path)
    except (OSError, ValueError) as error:
        remedy = "It must be JSON; comments and trailing commas are allowed."
        raise ConfigRefused(f"{path.name}: {error}", remedy) from error
    faults = []
    for fault in jsonschema.Draft202012Validator(schema).iter_errors(config):
        where = ".".join(map(str, fault.path)) or "top level"
        faults.append(f"{path.name}: {where}: {fault.message}"[:500])
    if faults:
        raise ConfigRefused(
            f"{path.name} is not a valid OpenCode configuration",
            "See https://opencode.ai/docs/config for the keys.",
            "\n".join(sorted(faults)),
        )


def _report(record: dict[str, Any], last: dict[str, Any]) -> None:
    size = megabytes(record["size"])
    if "size" in last:
        grown = round((record["size"] - last["size"]) / 1e6, 1)
        size += f" ({grown + 0.0:+.1f} MB)"  # + 0.0 turns -0.0 into 0.0
    log(f"built {record['image']}  {record['id'][:12]}  {size}  in {record['seconds']:.1f} s")
    log(f"since the last build: {'; '.join(record['changes'])}")
