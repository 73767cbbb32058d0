"""Print what is inside an image as JSON; with the argument ``files`` also each file.

It runs with the image's own Python, and only uses the standard library. Packages are
``{name: [version, bytes]}``. Files are ``{path: [mode, owner, bytes, time, content]}``, where the
content is the SHA-256 of a file or the target of a link.
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
from importlib import metadata
from pathlib import Path
from typing import Any

OF_THE_ENGINE = {
    "/.dockerenv",
    "/run/.containerenv",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/etc/mtab",
}
"""Files that the engine adds to a container."""

NPM_PACKAGE = re.compile(r".*/node_modules/(?:@[^/]+/)?[^/]+(?=/)")
DPKG_FIELDS = "Package", "Version", "Installed-Size", "source:Package", "source:Version"

Packages = dict[str, list[Any]]


def walk() -> dict[str, os.stat_result]:
    """Return the status of each path of the image."""
    skipped = set(OF_THE_ENGINE)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        skipped.add(line.split()[4])
    found = {}
    for directory, names, files in os.walk("/"):
        parent = directory.rstrip("/")
        names[:] = [name for name in names if f"{parent}/{name}" not in skipped]
        for name in names + files:
            path = f"{parent}/{name}"
            if path not in skipped:
                found[path] = os.lstat(path)
    return found


def describe(path: str, status: os.stat_result) -> list[Any]:
    """Return the mode, owner, size, time and content of a path."""
    size, content = 0, ""
    if stat.S_ISREG(status.st_mode):
        size = status.st_size
        with Path(path).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = str(Path(path).readlink())
    owner = f"{status.st_uid}:{status.st_gid}"
    return [stat.filemode(status.st_mode), owner, size, int(status.st_mtime), content]


def debian() -> Packages:
    """Return Debian's packages; name and version of the source follow, which advisories name."""
    line = "\t".join(f"${{{field}}}" for field in DPKG_FIELDS)
    packages = {}
    for row in output("dpkg-query", "--show", f"--showformat={line}\n").splitlines():
        name, version, kilobytes, *source = row.split("\t")
        packages[name] = [version, int(kilobytes or 0) * 1024, *source]
    return packages


def npm(sizes: dict[str, int]) -> Packages:
    """Return npm's packages. The size of one does not include its own ``node_modules``."""
    folders: defaultdict[str, int] = defaultdict(int)
    for path, size in sizes.items():
        if match := NPM_PACKAGE.match(path):
            folders[match[0]] += size
    packages: Packages = {}
    for folder, size in sorted(folders.items()):
        file = f"{folder}/package.json"
        package = json.loads(Path(file).read_text()) if file in sizes else {}
        if "version" in package:
            add(packages, package["name"], package["version"], size)
    return packages


def python(sizes: dict[str, int]) -> Packages:
    """Return Python's packages, of the virtual environment and of Debian."""
    packages: Packages = {}
    folders = ["/usr/lib/python3/dist-packages"]
    folders += map(str, Path("/opt/venv/lib").glob("python3*/site-packages"))
    for package in metadata.distributions(path=folders):
        paths = [str(package.locate_file(file)) for file in package.files or []]
        size = sum(sizes.get(path, 0) for path in paths)
        add(packages, package.metadata["Name"], package.version, size)
    return packages


def add(
    packages: Packages,
    name: str,
    version: str,
    size: int,
) -> None:
    """Add a package. One that exists in several versions has all of them in its version."""
    entry = packages.setdefault(name, [version, 0])
    if version not in entry[0].split(", "):
        entry[0] += f", {version}"
    entry[1] += size


def output(*argv: str) -> str:
    """Return the output of a command."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Print the inventory."""
    found = walk()
    sizes = {path: each.st_size for path, each in found.items() if stat.S_ISREG(each.st_mode)}
    system = dict(re.findall(r'(?m)^(\w+)="?(.*?)"?$', Path("/etc/os-release").read_text()))
    release = Path("/etc/debian_version").read_text().strip()
    inventory: dict[str, Any] = {
        "system": f"{system['PRETTY_NAME']}, {release}",
        "debian": system["VERSION_ID"],
        "node": output("node", "--version"),
        "packages": {"debian": debian(), "npm": npm(sizes), "python": python(sizes)},
    }
    if "files" in sys.argv:
        inventory["files"] = {path: describe(path, status) for path, status in found.items()}
    print(json.dumps(inventory))


if __name__ == "__main__":
    main()
