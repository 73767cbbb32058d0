"""The CAs of this network, for the programs in the server's and the backup's container."""

from __future__ import annotations

import hashlib
from pathlib import Path

import certifi

from pipeline.core.state import write_text
from pipeline.inputs import ca

MOUNTED = "/etc/opencode/ca/ca.crt"

VARIABLES = (
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
"""No one variable is read by every program."""


def bundle(setting: str) -> str:
    """Return the public CAs and those of this network as PEM; empty if it needs none.

    The public ones are included because most programs replace their own bundle by it.
    Raises SettingRefused.
    """
    extra = ca.extra(setting).values()
    return "\n".join([Path(certifi.where()).read_text(), *extra, ""]) if extra else ""


def place(home: Path, text: str) -> Path | None:
    """Return the file of a bundle, named by its content; None without a bundle."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return home / f"ca-{digest}.crt" if text else None


def write(path: Path, text: str) -> None:
    """Write the bundle, readable by every user of a container, and remove earlier ones."""
    for old in path.parent.glob("ca-*.crt"):
        if old != path:
            old.unlink()
    if not path.exists():
        write_text(path, text, 0o644)
