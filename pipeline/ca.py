"""Certificate authorities that this network needs besides the public ones.

Offices and clouds that intercept TLS hand their machines a CA; a fresh container does not have it, and npm and pip
fail in it. The stages of the Containerfile that fetch copy ``vendor/ca/``; the stages that stay never do.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from pipeline.errors import SettingRefused
from pipeline.settings import ROOT

VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "PIP_CERT")
STAGED = ROOT / "vendor" / "ca" / "extra.crt"

PUBLIC = Path("/usr/share/ca-certificates/mozilla")
"""Where Debian's ca-certificates keeps the public ones, a file each."""

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)\s+-----END CERTIFICATE-----")


def source(setting: str, environ: Mapping[str, str] = os.environ) -> tuple[str, Path] | None:
    """Return which setting or variable names a bundle, and the bundle. Raises SettingRefused when it cannot be read."""
    named = [("ca", setting)] if setting else [(name, environ[name]) for name in VARIABLES if environ.get(name)]
    for name, value in named:
        path = Path(value).expanduser()
        if not os.access(path, os.R_OK) or not path.is_file():
            raise SettingRefused(f"{name} names {path}, which cannot be read", "Correct it, or unset it.")
        return name, path
    return None


def certificates(pem: str) -> dict[str, str]:
    """Return the certificates in ``pem``: base64 body without white space, to the block as it stands."""
    return {"".join(match[1].split()): match[0] for match in _PEM.finditer(pem)}


def extra(setting: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the certificates of the bundle that are not public: in neither certifi nor Debian's package of Mozilla's.

    The two differ by the age of their list; a public CA that one of them dropped is no secret of this network.
    """
    found = source(setting, environ)
    if not found:
        return {}
    ours = certificates(found[1].read_text(errors="replace"))
    if not ours:
        raise SettingRefused(f"{found[0]} names {found[1]}, which holds no PEM certificate", "Convert or correct it.")
    return _without_public(ours)


def staged(folder: Path = STAGED.parent) -> dict[str, str]:
    """Return the certificates that the Containerfile's fetching stages copy, without public ones."""
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.crt"))]
    return _without_public(certificates("\n".join(texts)))


def _without_public(ours: dict[str, str]) -> dict[str, str]:
    for listed in (*_certifi(), *PUBLIC.glob("*.crt")):
        for body in certificates(listed.read_text(errors="replace")):
            ours.pop(body, None)
    return ours


def _certifi() -> list[Path]:
    """Return certifi's list if it is as published: people add their office's CA to it, which makes it no public one."""
    for file in metadata.files("certifi") or []:
        if file.name == "cacert.pem" and file.hash:
            digest = hashlib.sha256(file.read_binary()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value:
                return [Path(str(file.locate()))]
    return []


def stage(setting: str, environ: Mapping[str, str] = os.environ, place: Path = STAGED) -> int:
    """Write the extra certificates where the Containerfile's fetching stages find them; return how many are there.

    Where no bundle is named, what an earlier call put there stays. The file is left untouched when it says the same
    already, since an engine's cache looks at its time too.
    """
    if source(setting, environ):
        text = "".join(f"{block}\n" for block in extra(setting, environ).values())
        if (place.read_text() if place.exists() else "") != text:
            draft = place.with_suffix(".part")
            draft.write_text(text)
            draft.replace(place)
    return len(staged(place.parent))
