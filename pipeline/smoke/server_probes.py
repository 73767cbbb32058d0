"""Probes of a running server over HTTP. ``smoke --url`` runs these alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.settings import ROOT
from pipeline.core.state import read_jsonc
from pipeline.engines.container import Container, Server
from pipeline.inputs.rootfs import architecture
from pipeline.smoke.probe import (
    Probe,
    ProbeFailed,
    probes,
    request,
    run_inside,
)

OPENAGENTS = "/opt/openagents/.opencode"

INVENTORY = """
import json, pathlib, re, sys
root = pathlib.Path(sys.argv[1])
patterns = {"agent": "**/*.md", "command": "**/*.md", "skill": "**/SKILL.md", "tool": "*.ts",
            "context": "**/*.md"}
found = {kind: [] for kind in patterns}
for kind, pattern in patterns.items():
    for folder in (root / kind, root / (kind + "s")):
        for path in sorted(folder.glob(pattern)):
            front = re.match(r"---\\n(.*?)\\n---", path.read_text(), re.S)
            named = re.search(r"^name: *(.*?) *$", front[1], re.M) if front else None
            if kind in ("agent", "skill") and named:
                found[kind].append(named[1].strip(chr(34) + chr(39)))
            elif front or kind in ("tool", "command", "context"):
                found[kind].append(path.relative_to(folder).with_suffix("").as_posix())
print(json.dumps({kind: sorted(set(names)) for kind, names in found.items()}))
"""
"""A program that prints the names OpenAgents should have in OpenCode.

Agents and skills are named in their front matter, commands and tools by their path.
"""

Inventory = Mapping[str, list[str]]
"""The names in OpenAgents by kind: agent, command, skill, tool, context."""


@dataclass(frozen=True)
class ServerSubject:
    """The server to check.

    ``inventory`` returns the names in its OpenAgents; by default they are not known. ``machine`` is
    the architecture of its image, as the engines write it; by default this machine's.
    """

    server: Server
    inventory: Callable[[], Inventory] = dict
    machine: str = ""


def read_inventory(container: Container) -> Inventory:
    """Return the names in the OpenAgents of a running container. Raises ProbeFailed."""
    output = run_inside(container, "/usr/bin/python3", "-S", "-c", INVENTORY, OPENAGENTS)
    return dict(json.loads(output))


def config(subject: ServerSubject) -> str:
    """/config has every setting of config.json; OpenCode adds its own."""
    served = request(subject.server, "/config")
    wanted = read_jsonc(ROOT / "config.json")
    missing = [key for key, value in wanted.items() if not _includes(served.get(key), value)]
    if missing:
        raise ProbeFailed(f"/config differs from config.json in {', '.join(missing)}")
    return f"has all {len(wanted)} settings of config.json"


def _includes(
    served: Any,
    wanted: Any,
) -> bool:
    if isinstance(wanted, dict) and isinstance(served, dict):
        return all(_includes(served.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(served, list):
        return all(value in served for value in wanted)
    return bool(served == wanted)


def health(subject: ServerSubject) -> str:
    """/global/health is healthy, with the OpenCode version that locks/npm pins."""
    answer = request(subject.server, "/global/health")
    version = pinned_version(subject.machine)
    expected = {"healthy": True, "version": version}
    if not expected.items() <= answer.items():
        raise ProbeFailed(f"/global/health returned {answer}, expected {expected}")
    return f"healthy, OpenCode {version}"


def pinned_version(machine: str = "") -> str:
    """Return the version of OpenCode that ``locks/npm`` pins; for this machine by default."""
    lock = ROOT / "locks" / "npm" / architecture(machine) / "package.json"
    return str(json.loads(lock.read_text())["dependencies"]["opencode-ai"])


def tools(subject: ServerSubject) -> str:
    """Each tool file of OpenAgents has a tool.

    OpenCode calls a file's default export FILE, and any other FILE_EXPORT.
    """
    listed = request(subject.server, "/experimental/tool/ids")
    files = subject.inventory().get("tool", [])
    missing = set(files)
    for tool in listed:
        missing -= {name for name in files if f"{tool}_".startswith(f"{name}_")}
    if missing:
        raise ProbeFailed(f"no tool is listed for {', '.join(sorted(missing))}")
    if not listed:
        raise ProbeFailed("no tools are listed")
    return f"{len(listed)} tools, including all of OpenAgents"


def _list_probe(kind: str) -> Probe:
    def check(subject: ServerSubject) -> str:
        """All agents, commands or skills of OpenAgents are listed."""
        entries = request(subject.server, f"/{kind}")
        listed = [entry["name"] for entry in entries if not entry.get("native")]
        wanted = subject.inventory().get(kind, [])
        missing = sorted(set(wanted) - set(listed))
        if missing:
            names = ", ".join(missing[:5])
            raise ProbeFailed(f"{len(missing)} of {len(wanted)} {kind}s are not listed: {names}")
        if not listed:
            raise ProbeFailed(f"no {kind}s are listed")
        return f"{len(listed)} {kind}s, including all {len(wanted)} of OpenAgents"

    return Probe(f"{kind}s", check)


PROBES = (
    *probes(config, health, tools),
    *map(_list_probe, ("agent", "command", "skill")),
)
