"""The build context: the files of the checkout that an engine sees, and which of them changed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import ContainerfileRefused

ALWAYS = ("Containerfile", ".dockerignore", "locks/base.json")
"""Inputs of every build, whether the context has them or not."""

WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Ignored:
    """The rules of a .dockerignore: https://docs.docker.com/build/concepts/context."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self.rules = []
        for line in lines:
            if line and not line.startswith("#"):
                name = os.path.normpath(line.removeprefix("!")).strip("/")
                self.rules.append((not line.startswith("!"), name))

    def __call__(self, path: str) -> bool:
        """Whether the last rule that matches ``path``, or a folder above it, excludes it."""
        for excludes, rule in reversed(self.rules):
            if _matches(rule + "/**", path) or _matches(rule, path):
                return excludes
        return False

    def all_of(self, folder: str) -> bool:
        """Whether nothing in a folder at the top can be included."""
        tops = [rule.partition("/")[0] for excludes, rule in self.rules if not excludes]
        return self(folder) and not any(_matches(top, folder) for top in tops)


def _matches(rule: str, path: str) -> bool:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", rule)
    words = [
        WILDCARDS.get(part) or (part if part[:1] == "[" else re.escape(part)) for part in parts
    ]
    return re.fullmatch("".join(words), path, re.DOTALL) is not None


def files(root: Path) -> Iterator[str]:
    """Yield the path of each file and link of the context, without vendor/."""
    rules = root / ".dockerignore"
    ignored = Ignored(rules.read_text() if rules.exists() else "")
    for folder, names, others in os.walk(root):
        place = Path(folder).relative_to(root)
        if folder == str(root):
            names[:] = [name for name in names if name != "vendor" and not ignored.all_of(name)]
        links = [name for name in names if (root / place / name).is_symlink()]
        for name in others + links:
            path = str(place / name)
            if not ignored(path):
                yield path


def hash_inputs(root: Path, openagents_tree: str, packages: str = "") -> dict[str, str]:
    """Return a hash of mode and content of each input, by path; OpenAgents as one tree.

    ``packages`` is the setting of that name.

    Raises ContainerfileRefused for scripts that cannot run in a container.
    """
    hashes = {}
    for name in sorted({*files(root), *ALWAYS}):
        path = root / name
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
            if content.startswith(b"#!") and b"\r\n" in content:
                raise ContainerfileRefused(
                    f"{name} has the line ends of Windows (CRLF), and cannot run in a container",
                    f"Clone the repository with git, or correct the file: sed -i 's/\\r$//' {name}",
                )
        else:
            continue
        mode = f"{path.lstat().st_mode:o} ".encode()
        hashes[name] = hashlib.sha256(mode + content).hexdigest()
    if packages:
        hashes["the setting packages"] = packages
    return {**hashes, "vendor/OpenAgents": openagents_tree}


def changes(last: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    """Return what changed since the build with the record ``last``, one phrase per input."""
    before = last.get("inputs")
    if not before:
        return ["the first build here"]
    changed = []
    for path, digest in inputs.items():
        if path not in before:
            changed.append(f"{path} is new")
        elif before[path] != digest:
            changed.append(f"{path} changed")
    changed += [f"{path} was removed" for path in before if path not in inputs]
    return changed or ["nothing changed"]
