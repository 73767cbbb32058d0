"""The certificate authorities (CAs) that this network needs besides the public ones.

Networks that intercept TLS give their machines a CA. A fresh container lacks it, and npm and pip
fail in it. The Containerfile mounts ``vendor/ca/`` in the steps that download; no layer keeps it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from pipeline.core.errors import SettingRefused
from pipeline.core.settings import ROOT

VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
)
STAGED = ROOT / "vendor" / "ca" / "extra.crt"

PUBLIC = Path("/usr/share/ca-certificates/mozilla")
"""Debian's package ca-certificates has the public ones here, one file each."""

KNOWN = Path(__file__).with_name("public_cas.txt")
"""The ``short_hash`` of the public ones of the last twelve years, also those that are gone."""

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)\s+-----END CERTIFICATE-----")


def source(setting: str, environ: Mapping[str, str] = os.environ) -> tuple[str, Path] | None:
    """Return the setting or variable that names a bundle, and the bundle; None if there is none.

    Raises SettingRefused if the bundle cannot be read.
    """
    values = {"ca": setting}
    if not setting:
        values = {name: environ.get(name, "") for name in VARIABLES}
    for name, value in values.items():
        if not value:
            continue
        path = Path(value).expanduser()
        if path.is_file() and os.access(path, os.R_OK):
            return name, path
        remedy = f"Correct or unset {name}."
        raise SettingRefused(f"{name}={value}: the file cannot be read", remedy)
    return None


def environment(setting: str) -> dict[str, str]:
    """Return the variables that make a program trust the bundle. Raises SettingRefused."""
    found = source(setting)
    return dict.fromkeys(VARIABLES, str(found[1])) if found else {}


def certificates(pem: str) -> dict[str, str]:
    """Return the certificates in ``pem``: base64 body without white space to whole block."""
    return {"".join(match[1].split()): match[0] for match in _PEM.finditer(pem)}


def extra(setting: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the certificates of the bundle that are not public. Raises SettingRefused."""
    found = source(setting, environ)
    if not found:
        return {}
    name, path = found
    bundle = certificates(path.read_text(errors="replace"))
    if not bundle:
        remedy = f"Convert it to PEM, or correct {name}."
        raise SettingRefused(f"{name}={path}: the file has no PEM certificate", remedy)
    return _without_public(bundle)


def staged(folder: Path = STAGED.parent) -> dict[str, str]:
    """Return the certificates that the Containerfile mounts, without public ones."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.crt")):
        found |= certificates(path.read_text(errors="replace"))
    return _without_public(found)


def short_hash(body: str) -> str:
    """Return what identifies a certificate here: 16 digits of the SHA-256 of its base64."""
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _without_public(bundle: dict[str, str]) -> dict[str, str]:
    """Leave out what Mozilla's list has or had: copies of it differ by age, and none is private."""
    public = set(certificates(_certifi()))
    for path in PUBLIC.glob("*.crt"):
        public |= certificates(path.read_text(errors="replace")).keys()
    known = set(KNOWN.read_text().split())
    return {
        body: block
        for body, block in bundle.items()
        if body not in public and short_hash(body) not in known
    }


def _certifi() -> str:
    """Return certifi's list as published; empty if someone added a private CA to it, as some do."""
    for file in metadata.files("certifi") or []:
        if file.name == "cacert.pem" and file.hash:
            content = file.read_binary()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            if digest.decode().rstrip("=") == file.hash.value:
                return content.decode()
    return ""


def stage(setting: str, environ: Mapping[str, str] = os.environ, place: Path = STAGED) -> int:
    """Write the extra certificates where the Containerfile mounts them; return how many are there.

    Without a bundle, those of an earlier call stay. Raises SettingRefused.
    """
    if source(setting, environ):
        blocks = extra(setting, environ).values()
        text = "".join(f"{block}\n" for block in blocks)
        # An unchanged file keeps its time, which an engine's cache may look at.
        if not place.exists() or place.read_text() != text:
            draft = place.with_suffix(".part")
            draft.write_text(text)
            draft.replace(place)
    return len(staged(place.parent))
