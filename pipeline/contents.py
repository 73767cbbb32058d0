"""What is inside an image, told by the image itself: packages, versions and sizes; and an SPDX bill of materials."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline import advisories, host, process
from pipeline.engine import Engine
from pipeline.errors import ContentsUnreadable, DiskFull, NoSuchImage, SbomFailed
from pipeline.records import read_json, write_json
from pipeline.report import megabytes, say, table
from pipeline.settings import BUILD, Settings

INVENTORY = Path(__file__).with_name("inventory.py").read_text()
"""The program that is run inside."""

RUNS = re.compile(r"(?mi)^\s*RUN\s")


def find(engine: Engine, reference: str, ours: str = "") -> dict[str, Any]:
    """Return the inspection of an image; a bare word may be a tag of the image ``ours``. Raises NoSuchImage."""
    names = [f"{ours}:{reference}"] if ours and not re.search("[:/@]", reference) else []
    image = next((found for name in (*names, reference) if (found := engine.image(engine.local(name)))), None)
    if image is None:
        raise NoSuchImage(f"{engine.name} has no image {reference}", "Build it (inv fetch build), or name another.")
    return image


def look_argv(engine: Engine, image: str, name: str, *, files: bool) -> list[str]:
    """Return what runs inventory.py in a container of ``image``, an ID: it may read every file, and do nothing else."""
    closed = ["--network", "none", "--read-only", "--cap-drop", "all", "--cap-add", "DAC_READ_SEARCH", "--user", "0"]
    words = ["run", "--rm", "--name", name, *engine.limits, *closed, "--no-healthcheck"]
    words += ["--entrypoint", "/usr/bin/python3", image, "-S", "-I", "-c", INVENTORY]
    return engine.argv(*words, *(["files"] if files else []))


def look(engine: Engine, image: dict[str, Any], *, files: bool = False) -> dict[str, Any]:
    """Return what inventory.py says inside ``image``, an inspection; with each of its ``files`` if asked.

    It takes 0.7 s, and 2.6 s with files. Raises ContentsUnreadable.
    """
    name = f"opencode-server-contents-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        done = engine.ask(look_argv(engine, image["Id"], name, files=files))
    except BaseException:
        engine.ask(engine.remove_container(name), timeout=60)
        raise
    if not done.ok:
        remedy = "It is read by its own /usr/bin/python3, which images of this repository have."
        raise ContentsUnreadable(f"{engine.name} cannot look into {image['Id'][:19]}", remedy, done.said)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def manifest(engine: Engine, image: dict[str, Any], inside: dict[str, Any]) -> dict[str, Any]:
    """Return what is written down of an image: which it is, whose OpenAgents it has, and what it said of itself."""
    labels = image["Config"].get("Labels") or {}
    ours = {key.rsplit(".", 1)[1]: value for key, value in labels.items() if ".openagents." in key}
    identity = image["Id"].removeprefix("sha256:")
    return {"id": identity, "engine": engine.name, "bytes": image["Size"], "openagents": ours, **inside}


def keep(engine: Engine, image: dict[str, Any], runtime: str, last_stage: str) -> None:
    """Write the manifest of an image that was built on the image ``runtime`` to ``build/``.

    What is fetched is looked at once for its layers, which takes 0.7 s: a build after an edit adds files to the last
    layers and no packages, unless a RUN in the ``last_stage`` does.
    """
    path = BUILD / f"contents-{engine.name}.json"
    rules = hashlib.sha256(INVENTORY.encode()).hexdigest()
    known, layers = read_json(path), image["RootFS"]["Layers"]
    below = known.get("layers") or [""]
    if (
        known.get("rules") == rules
        and layers[: len(below)] == below
        and (below == layers or not RUNS.search(last_stage))
    ):
        inside = {key: known[key] for key in ("rules", "layers", "system", "debian", "node", "packages")}
    else:
        subject = image if RUNS.search(last_stage) else find(engine, runtime)
        inside = {"rules": rules, "layers": subject["RootFS"]["Layers"], **look(engine, subject)}
    write_json(path, manifest(engine, image, inside))


def contents(settings: Settings, engine: Engine, reference: str = "", *, sbom: bool = True) -> dict[str, Any]:
    """Say what is inside the candidate, or the image ``reference``, and what is known against it.

    Writes the manifest, the bill of materials and the advisories to ``build/``. Raises NoSuchImage, ContentsUnreadable,
    SbomFailed, DiskFull, ToolMissing.
    """
    image = find(engine, reference or "candidate", settings.image)
    said = manifest(engine, image, look(engine, image))
    BUILD.mkdir(exist_ok=True)
    write_json(BUILD / "contents.json", said)
    say(f"contents: {said['id'][:12]}, {megabytes(said['bytes'])}: {said['system']}, node {said['node']}, OpenAgents "
        f"{said['openagents'].get('kind')} {said['openagents'].get('commit', '')[:12]}")  # fmt: skip
    rows = []
    for kind, packages in said["packages"].items():
        largest = sorted(packages, key=lambda name: -packages[name][1])[:5]
        sizes = ", ".join(f"{name} {packages[name][0]} ({packages[name][1] / 1e6:.0f} MB)" for name in largest)
        rows.append((kind, str(len(packages)), megabytes(sum(entry[1] for entry in packages.values())), sizes))
    table("", ("packages", "how many", "size", "the largest"), rows)
    if sbom:
        draft = write_sbom(engine, image)
        say(f"contents: {draft.name} lists {len(json.loads(draft.read_text())['packages'])} packages in SPDX")
    said["advisories"] = advisories.report(settings, said)
    say(f"contents: see contents.json{', sbom.spdx.json' if sbom else ''} and advisories.json in build/")
    return said


def sbom_argv(archive: Path, output: Path) -> list[str]:
    """Return syft's call: an archive of an image in, SPDX JSON out."""
    syft = Path(sys.executable).with_name("syft")
    words = ["--quiet", "--source-name", "opencode-server", "--output", f"spdx-json={output}"]
    return [str(syft), "scan", f"docker-archive:{archive}", *words]


def write_sbom(engine: Engine, image: dict[str, Any]) -> Path:
    """Write ``build/sbom.spdx.json``: 5 s to write the image out, 12 for syft. Raises SbomFailed, DiskFull."""
    host.ensure_dev_tools()
    path = BUILD / "sbom.spdx.json"
    draft = path.with_suffix(f".{os.getpid()}.part")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        archive = Path(scratch) / "image.tar"
        engine.save(image["Id"], archive)
        try:
            # It would ask its makers whether it is the newest.
            done = process.run(sbom_argv(archive, draft), timeout=600, env={"SYFT_CHECK_FOR_APP_UPDATE": "false"})
            if not done.ok:
                failure = DiskFull if "no space left" in done.said.lower() else SbomFailed
                raise failure("syft cannot list what is in the image", "See what it said.", done.said)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return path
