"""What a stack adds to compose.yaml on this machine: a file for Compose next to the secrets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.settings import Stack
from pipeline.core.state import write_json
from pipeline.stack import trust
from pipeline.stack.secrets import BACKUP, GATEWAY, SERVER
from pipeline.stack.workspace import Workspace

LABEL = "opencode-server.settings"
"""The label with the digest of what a container was started with."""


HOST = "host.containers.internal"
"""Podman's name for the machine, in its containers."""


def services(
    workspace: Workspace, ca: Path | None = None, *, podman: bool = True
) -> dict[str, dict[str, Any]]:
    """Return what is added to each service, by part; ``ca`` is a bundle that they trust."""
    mounts = [f"{ca}:{trust.MOUNTED}:ro,z"] if ca else []
    project = [f"{workspace.directory}:/workspace:z"] if workspace.directory else []
    # The backup reads and writes the server's state: both have its owner.
    both = {
        "user": workspace.user,
        "environment": dict.fromkeys(trust.VARIABLES, trust.MOUNTED) if ca else {},
    }
    return {
        "opencode": {
            **both,
            "volumes": [*mounts, *project],
            "extra_hosts": [] if podman else [f"{HOST}:host-gateway"],
        },
        "backup": {**both, "volumes": mounts},
        "gateway": {},
        "egress": {},
    }


def digests(
    added: Mapping[str, Any], secrets: Mapping[str, Mapping[str, str]], stack: Stack
) -> dict[str, str]:
    """Return for each part a digest of its settings; another one means: start it again."""
    settings = {
        "gateway": [stack.address, stack.port, stack.host, stack.tls],
        "egress": [stack.egress_hosts],
    }
    files = {"opencode": [SERVER], "backup": [BACKUP], "gateway": [SERVER, GATEWAY], "egress": []}
    found = {}
    for part, service in added.items():
        values = [service, *(secrets[name] for name in files[part])]
        text = json.dumps([*values, settings.get(part, "")], sort_keys=True)
        found[part] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def write(path: Path, added: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Write the file; Compose reads JSON as YAML, and replaces $ by variables."""
    content = {}
    for part, service in added.items():
        name = "opencode" if part == "opencode" else f"opencode-{part}"
        content[name] = service | {"labels": {LABEL: labels[part]}}
    text = json.dumps({"services": content}).replace("$", "$$")
    write_json(path, json.loads(text))
