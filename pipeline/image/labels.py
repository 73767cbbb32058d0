"""The image's labels: what it was built from."""

from __future__ import annotations

import json

from pipeline.core import process
from pipeline.core.clock import now
from pipeline.core.console import without_credentials
from pipeline.core.settings import ROOT
from pipeline.inputs.base import Base
from pipeline.inputs.openagents import Record

OCI = "org.opencontainers.image"
OURS = "opencode-server.openagents"

BUILD_OF = "opencode-server.build"
"""The label that names the image for which a build was made. Only such builds are pruned."""

NIGHTLY = "-nightly"
"""What nightly builds append to the image's name."""


def labels(
    image: str,
    base: Base | None,
    fetched: Record,
    *,
    edited: bool,
    own_base: str = "",
) -> dict[str, str]:
    """Return the labels of a build of ``image``, a name without a tag.

    Without a ``base`` it is ``own_base``, the one that the Containerfile names.
    ``edited`` marks the commit of OpenAgents: the files are not those of the commit.
    """
    revision = _git("rev-parse", "HEAD")
    if revision and _git("status", "--porcelain"):
        revision += "-dirty"
    source = without_credentials(_git("config", "--get", "remote.origin.url"))
    return {
        BUILD_OF: owner_of(image),
        f"{OCI}.title": "opencode-server",
        f"{OCI}.source": source or "unknown",
        f"{OCI}.base.name": base.name if base else own_base,
        f"{OCI}.base.digest": (base.digest or f"sha256:{base.image_id}") if base else "unknown",
        f"{OURS}.kind": fetched.kind,
        f"{OURS}.source": without_credentials(fetched.url),
        f"{OURS}.commit": f"{fetched.commit}-edited" if edited else fetched.commit,
        f"{OCI}.revision": revision or "unknown",
        f"{OCI}.created": now(),
    }


def instruction(values: dict[str, str]) -> str:
    """Return the LABEL instruction that sets ``values``.

    It is one instruction with literal values: podman makes a step of each ``--label``, and its
    cache ignores the value of an ARG that a LABEL uses.
    """
    pairs = []
    for name, value in values.items():
        quoted = json.dumps(value, ensure_ascii=False).replace("$", r"\$")
        pairs.append(f"{name}={quoted}")
    return f"LABEL {' '.join(pairs)}\n"


def owner_of(image: str) -> str:
    """Return the value of ``BUILD_OF``: nightly builds belong to the image that they release."""
    return image.removesuffix(NIGHTLY)


def _git(*words: str) -> str:
    if not (ROOT / ".git").exists():
        return ""  # An unpacked archive. A repository above it is another project's.
    result = process.run(["git", "-C", str(ROOT), *words])
    return result.stdout.strip() if result.ok else ""
