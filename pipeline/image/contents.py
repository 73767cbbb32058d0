"""What is inside an image: packages, a bill of materials (SPDX), and known vulnerabilities."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.core import process
from pipeline.core.clock import now
from pipeline.core.console import log, megabytes, table, warn
from pipeline.core.dev_tools import ensure_dev_tools
from pipeline.core.errors import ContentsUnreadable, DiskFull, NoSuchImage, SbomFailed
from pipeline.core.settings import BUILD, Settings
from pipeline.core.state import write_json
from pipeline.engines.engine import Engine
from pipeline.image import advisories
from pipeline.image.tags import COMMIT, KIND, label, short_id

INVENTORY = Path(__file__).with_name("inventory.py").read_text()
"""The program that runs inside the image."""

NODE_ENDS = {"20": "2026-04-30", "22": "2027-04-30", "24": "2028-04-30"}
"""When Node's releases stop getting fixes: https://github.com/nodejs/release#release-schedule."""

LARGEST = 5
"""Packages of each kind that the table names."""


def find(
    engine: Engine,
    reference: str,
    image: str = "",
) -> dict[str, Any]:
    """Inspect ``reference``, a tag of ``image`` or any other image. Raises NoSuchImage."""
    names = [reference]
    if image and not re.search("[:/@]", reference):
        names.insert(0, f"{image}:{reference}")
    for name in names:
        found = engine.image(engine.local(name))
        if found:
            return found
    raise NoSuchImage(
        f"{engine.name} has no image {reference}", "Build it: inv fetch build. Or name another."
    )


def read(
    engine: Engine,
    image: dict[str, Any],
    *,
    files: bool = False,
) -> dict[str, Any]:
    """Return the output of inventory.py in an inspected image: 0.7 s, with ``files`` 2.6 s.

    Raises ContentsUnreadable.
    """
    name = f"opencode-server-contents-{os.getpid()}-{secrets.token_hex(3)}"
    program = ["-S", "-I", "-c", INVENTORY, *(["files"] if files else [])]
    # Root without capabilities but that to read every file.
    argv = engine.run(
        image["Id"],
        *program,
        hardened=False,
        rm=True,
        name=name,
        network="none",
        user="0",
        cap_drop="all",
        cap_add="DAC_READ_SEARCH",
        no_healthcheck=True,
        entrypoint="/usr/bin/python3",
    )
    try:
        result = engine.ask(argv)
    except BaseException:
        engine.ask(engine.remove_container(name), timeout=60)
        raise
    if not result.ok:
        raise ContentsUnreadable(
            f"{engine.name} cannot read the contents of {short_id(image)}",
            "The image needs Debian's /usr/bin/python3, as images of this repository have.",
            result.output,
        )
    return dict(json.loads(result.stdout))


def contents(
    settings: Settings,
    engine: Engine,
    reference: str = "",
    *,
    sbom: bool = True,
) -> dict[str, Any]:
    """Print what is inside the candidate, or the image ``reference``, and write it to ``build/``.

    Raises NoSuchImage, ContentsUnreadable, SbomFailed, DiskFull, ToolMissing.
    """
    image = find(engine, reference or "candidate", settings.image)
    inventory = read(engine, image)
    kind, commit = label(image, KIND), label(image, COMMIT)
    inventory |= {
        "id": image["Id"].removeprefix("sha256:"),
        "engine": engine.name,
        "bytes": image["Size"],
        "openagents": {"kind": kind, "commit": commit},
    }
    write_json(BUILD / "contents.json", inventory)
    log(
        f"contents: {short_id(image)}, {megabytes(image['Size'])}: {inventory['system']}, "
        f"node {inventory['node']}, OpenAgents {kind} {commit[:12]}"
    )
    major = inventory["node"].strip("v").partition(".")[0]
    if now()[:10] > (end := NODE_ENDS.get(major, "9999")):
        warn(f"Node {major} has had no fixes since {end}; node:{major}-slim is not rebuilt.")
    rows = [_summary(*item) for item in inventory["packages"].items()]
    table("", ("packages", "count", "size", "largest"), rows)
    if sbom:
        path = write_sbom(engine, image)
        count = len(json.loads(path.read_text())["packages"])
        log(f"contents: {path.name} lists {count} packages in SPDX")
    inventory["advisories"] = advisories.report(settings, inventory)
    log("contents: written to build/ (contents.json, sbom.spdx.json, advisories.json)")
    return inventory


def _summary(kind: str, packages: dict[str, list[Any]]) -> tuple[str, ...]:
    rows = sorted(((entry[1], name, entry[0]) for name, entry in packages.items()), reverse=True)
    largest = [f"{name} {version} ({size / 1e6:.0f} MB)" for size, name, version in rows[:LARGEST]]
    return kind, str(len(rows)), megabytes(sum(row[0] for row in rows)), ", ".join(largest)


def sbom_argv(archive: Path, output: Path) -> list[str]:
    """Return the call of syft: an image archive in, SPDX JSON out."""
    syft = Path(sys.executable).with_name("syft")
    words = ["--quiet", "--source-name", "opencode-server", "--output", f"spdx-json={output}"]
    return [str(syft), "scan", f"docker-archive:{archive}", *words]


def write_sbom(engine: Engine, image: dict[str, Any]) -> Path:
    """Write ``build/sbom.spdx.json``: 5 s to export the image, 12 s for syft.

    Raises ToolMissing, SbomFailed, DiskFull.
    """
    ensure_dev_tools()
    path = BUILD / "sbom.spdx.json"
    # The archive has 0.8 GB, and /tmp may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        archive, draft = Path(scratch, "image.tar"), path.with_suffix(f".{os.getpid()}.part")
        engine.save(image["Id"], archive)
        try:
            # Without the variable, syft asks its makers for a newer version.
            env = {"SYFT_CHECK_FOR_APP_UPDATE": "false"}
            result = process.run(sbom_argv(archive, draft), timeout=600, env=env)
            if not result.ok:
                error = DiskFull if "no space left" in result.output.lower() else SbomFailed
                raise error(
                    "syft cannot list the packages of the image",
                    "Its output is above. Skip it with: inv contents --no-sbom",
                    result.output,
                )
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return path
