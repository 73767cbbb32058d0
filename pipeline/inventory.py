"""Run inside an image, by its own Python, this prints what is there as JSON; it needs the standard library alone.

With the argument ``files`` every file is listed too. What the engine puts into a container is no part of the image.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

THE_ENGINES = ("/.dockerenv", "/run/.containerenv", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab")

Packages = dict[str, list[Any]]
"""Each package's name, to its version (versions, if it is there more than once) and bytes."""


def walk() -> dict[str, os.stat_result]:
    """Return the status of everything below /, by path."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found = {}
    for directory, names, files in os.walk("/"):
        at = directory.rstrip("/")
        names[:] = [name for name in names if f"{at}/{name}" not in mounts]
        paths = [f"{at}/{name}" for name in names + files]
        found.update({path: os.lstat(path) for path in paths if path not in mounts and path not in THE_ENGINES})
    return found


def listed(path: str, status: os.stat_result) -> list[Any]:
    """Return [mode, owner, bytes, time, SHA-256 of a file or target of a link]."""
    size, content = 0, ""
    if stat.S_ISREG(status.st_mode):
        with Path(path).open("rb") as file:
            size, content = status.st_size, hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = str(Path(path).readlink())
    return [stat.filemode(status.st_mode), f"{status.st_uid}:{status.st_gid}", size, int(status.st_mtime), content]


def debian() -> Packages:
    """Return Debian's packages, each with its source package's name and version besides: advisories name those."""
    form = "${Package}\t${Version}\t${Installed-Size}\t${source:Package}\t${source:Version}\n"
    done = subprocess.run(["dpkg-query", "--show", f"--showformat={form}"], check=True, capture_output=True, text=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: [version, int(size or 0) * 1024, *source] for name, version, size, *source in rows}


def npm(sizes: dict[str, int]) -> Packages:
    """Return npm's packages; what one has in a ``node_modules`` of its own is counted there."""
    root = re.compile(r".*/node_modules/(?:@[^/]+/)?[^/]+(?=/)")
    total: defaultdict[str, int] = defaultdict(int)
    for path, size in sizes.items():
        if "/node_modules/" in path and (match := root.match(path)):
            total[match[0]] += size
    said = [(size, Path(path, "package.json")) for path, size in total.items() if f"{path}/package.json" in sizes]
    parsed = [(size, json.loads(path.read_text())) for size, path in said]
    return _merged((package["name"], package["version"], size) for size, package in parsed if "version" in package)


def python(sizes: dict[str, int]) -> Packages:
    """Return Python's packages, with the byte-code of their modules."""
    rows = []
    for path in (path for path in sizes if path.endswith(".dist-info/METADATA")):
        home = Path(path).parent
        head = home.joinpath("METADATA").read_text(errors="replace").partition("\n\n")[0]
        record = home / "RECORD"
        owned = [line.rsplit(",", 2)[0] for line in record.read_text().splitlines()] if record.exists() else []
        owned += [
            re.sub(r"([^/]+)\.py$", r"__pycache__/\1.cpython-311.pyc", name) for name in owned if name[-3:] == ".py"
        ]
        size = sum(sizes.get(os.path.normpath(home.parent / name), 0) for name in {*owned})
        name, version = (re.findall(rf"(?m)^{key}: *(\S+)", head)[0] for key in ("Name", "Version"))
        rows.append((name, version, size))
    return _merged(rows)


def _merged(rows: Iterable[tuple[str, str, int]]) -> Packages:
    packages: Packages = {}
    for name, version, size in sorted(rows):
        entry = packages.setdefault(name, ["", 0])
        if version not in entry[0].split(", "):
            entry[0] = f"{entry[0]}, {version}".removeprefix(", ")
        entry[1] += size
    return packages


def main() -> None:
    """Print it."""
    found = walk()
    sizes = {path: status.st_size for path, status in found.items() if stat.S_ISREG(status.st_mode)}
    system = dict(re.findall(r'(?m)^(\w+)="?(.*?)"?$', Path("/etc/os-release").read_text()))
    inside: dict[str, Any] = {
        "system": f"{system['PRETTY_NAME']}, {Path('/etc/debian_version').read_text().strip()}",
        "debian": system["VERSION_ID"],
        "node": subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout.strip(),
        "packages": {"debian": debian(), "npm": npm(sizes), "python": python(sizes)},
    }
    if "files" in sys.argv:
        with ThreadPoolExecutor() as pool:
            inside["files"] = dict(zip(found, pool.map(listed, found, found.values()), strict=True))
    print(json.dumps(inside))


if __name__ == "__main__":
    main()
