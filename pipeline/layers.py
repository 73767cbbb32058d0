"""Look into every layer of an image and its history for what must not be there: secrets, and this network's CAs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import ca
from pipeline.engine import Engine
from pipeline.records import read_json, write_json
from pipeline.settings import BUILD

RULES = "2"
"""Raised when what is looked for changes, so that layers are looked at again."""

KEPT = 200
"""How many layers are remembered; a build after an edit has three new ones, and a night may make such a build."""

SECRET_NAMES = re.compile(
    r"(?:^|/)(?:\.env|\.env\.(?!example|sample|template)[^/]+|\.envrc|\.npmrc|\.netrc|\.pypirc|\.git-credentials|\.git"
    r"|id_(?:rsa|dsa|ecdsa|ed25519)|[^/]+\.(?:p12|pfx|jks|kdbx)|\.(?:bash|python|node_repl)_history|\.docker/config\.json"
    r"|\.kube/config|\.aws/credentials|rclone\.conf|gh/hosts\.yml|share/opencode/auth\.json|npm-debug\.log|pip\.log"
    r"|root/(?:\.npm/_logs|\.npm/_cacache|\.cache/(?:pip|uv)|\.aws))$"
)
_SHAPES: dict[bytes, bytes] = {
    b"PRIVATE KEY-----": rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:\s|\\n)+[A-Za-z0-9+/=]{40}",
    **{kind: rb"\b%s(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}\b" % kind for kind in (b"AKIA", b"ASIA")},  # AWS
    **{b"gh%c_" % kind: rb"\bgh%c_[A-Za-z0-9]{36}\b" % kind for kind in b"pousr"},
    b"github_pat_": rb"\bgithub_pat_[A-Za-z0-9_]{60,}",
    b"glpat-": rb"\bglpat-[A-Za-z0-9_-]{20}",
    b"npm_": rb"\bnpm_[A-Za-z0-9]{36}\b",
    **{b"sk-%s-" % kind: rb"\bsk-%s-[A-Za-z0-9_-]{32,}" % kind for kind in (b"proj", b"svcacct", b"ant", b"or")},
    b"T3BlbkFJ": rb"\bsk-[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20}",  # the word OpenAI in base64, in its older keys
    b"AIza": rb"\bAIza[A-Za-z0-9_-]{35}(?![\w-])",  # Google
    b"K00": rb"(?<![\w+/=])K00\d[A-Za-z0-9+/]{27}(?![\w+/=])",  # Backblaze B2
    b".eyJ": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}",  # a JWT
    **{
        name: rb"\b%s[\"']?[ \t]*[=:][ \t]*[\"']?[0-9A-Za-z/+]{32,}" % name
        for name in (b"DD_API_KEY", b"DD_APP_KEY", b"AWS_SECRET_ACCESS_KEY", b"aws_secret_access_key")
    },
}
SECRET_TEXT = {part: re.compile(shape) for part, shape in _SHAPES.items()}
"""What a secret looks like, by a part that is quick to search for: a layer holds hundreds of megabytes of text."""

ASSIGNED = re.compile(
    rb"(?i)(?<![\w.-])([\w.-]{0,60}(?:_key|api-?key|token|secret|passw(?:or)?d|credentials?))[\"']?"
    rb"[ \t]*[=:][ \t]*[\"']?([^\s\"'`$<>{}()\[\],;]{1,300})"
)
"""A name that says that its value is a secret, and the value, unless it is a reference to another place."""

RANDOM = re.compile(rb"(?=(?:.*\d){3})(?=.*[A-Za-z])[\w+/=~-]{16,}")
"""A value that nobody would write by hand. In code and prose ``token = `` has other ends as well."""

ANYTHING = re.compile(rb".+")

EDITED = ("opt/openagents/", "app/", "root/", "workspace/", "etc/environment")
"""Where people's own files are: there a name is enough to make a random value suspicious."""

TEXT_LIMIT = 1_000_000
"""Bytes; a larger file is not read. Keys and certificates are written by people and tools into small ones."""

PUBLIC_CERTIFICATES = "usr/share/ca-certificates/"

Entry = tuple[str, bool, int, Callable[[], bytes]]
"""A path without leading slash, whether it is a regular file, its size in bytes, and how to read it."""


@dataclass
class Findings:
    """What one layer holds: paths that look like secrets, and each file's certificates as short hashes."""

    secrets: list[str] = field(default_factory=list)
    certificates: dict[str, list[str]] = field(default_factory=dict)


def look(entries: Iterator[Entry]) -> Findings:
    """Look at each file of a layer."""
    findings = Findings()
    for path, regular, size, read in entries:
        if SECRET_NAMES.search(path):
            findings.secrets.append(path)
        if not regular or size > TEXT_LIMIT:
            continue
        content = read()
        if b"\0" in content[:1024]:
            continue
        found = secrets_in(content) + (assigned_in(content, RANDOM) if path.startswith(EDITED) else [])
        findings.secrets += [f"{path} (holds {start}…)" for start in found]
        if b"-----BEGIN CERTIFICATE" in content:
            findings.certificates[path] = [_short(body) for body in ca.certificates(content.decode(errors="replace"))]
    return findings


def secrets_in(content: bytes) -> list[str]:
    """Return the first characters of each kind of secret in ``content``: enough to find it, not enough to use it."""
    found = [pattern.search(content) for part, pattern in SECRET_TEXT.items() if part in content]
    return [match[0][:12].decode(errors="replace") for match in found if match]


def assigned_in(content: bytes, value: re.Pattern[bytes]) -> list[str]:
    """Return the names that say that theirs is a secret, and have such a ``value`` in ``content``."""
    found = [match for match in ASSIGNED.finditer(content) if value.fullmatch(match[2]) and not secrets_in(match[0])]
    return [f"{match[1].decode(errors='replace')}=" for match in found]


def check(engine: Engine, image: dict[str, Any], extra: dict[str, str]) -> tuple[list[str], int]:
    """Return what is wrong with an image's layers, and how many there are.

    ``image`` is its inspection, ``extra`` this network's certificates (see ca.extra). A layer is looked at once: what
    was found is kept in ``build/layers.json`` under the layer's own digest.
    """
    digests: list[str] = image["RootFS"]["Layers"]
    kept_file = BUILD / "layers.json"
    kept = read_json(kept_file)
    known = kept["layers"] if kept.get("rules") == RULES else {}
    missing = [digest for digest in digests if digest not in known]
    if missing:
        known |= {digest: vars(findings) for digest, findings in _look_at(engine, image, set(missing))}
        # The layers of this image last, so that they are the last to be forgotten.
        known = {digest: known[digest] for digest in [*(each for each in known if each not in digests), *digests]}
        write_json(kept_file, {"rules": RULES, "layers": dict([*known.items()][-KEPT:])})
    layers = [Findings(**known[digest]) for digest in digests]
    public = {
        certificate
        for layer in layers
        for path, certificates in layer.certificates.items()
        if path.startswith(PUBLIC_CERTIFICATES)
        for certificate in certificates
    }
    ours = {_short(body) for body in extra} - public
    faults = [f"/{path}" for layer in layers for path in layer.secrets]
    faults += [
        f"/{path} holds a CA of this network"
        for layer in layers
        for path, certificates in layer.certificates.items()
        if ours & set(certificates)
    ]
    history = engine.argv("history", "--no-trunc", "--format", "{{.CreatedBy}}", image["Id"])
    config = image.get("Config") or {}
    labels = [f"{name}={value}" for name, value in (config.get("Labels") or {}).items()]
    settings = [*(config.get("Env") or []), *labels, *map(str, (config.get("Entrypoint"), config.get("Cmd")))]
    # What was built with --build-arg is in the history, and an ENV of an earlier stage is in the settings only.
    for where, text in (("history", engine.ask(history).stdout), ("configuration", "\n".join(settings))):
        content = text.encode()
        found = dict.fromkeys(secrets_in(content) + assigned_in(content, ANYTHING))
        faults += [f"the {where} holds {start}…" for start in found]
        if b"-----BEGIN CERTIFICATE" in content:
            faults.append(f"the {where} holds a certificate")
    return faults, len(digests)


def _look_at(engine: Engine, image: dict[str, Any], wanted: set[str]) -> Iterator[tuple[str, Findings]]:
    digests = image["RootFS"]["Layers"]
    directories = _directories(image)
    if len(directories) == len(digests) and all(os.access(directory, os.R_OK) for directory in directories):
        for digest, directory in zip(digests, directories, strict=True):
            if digest in wanted:
                yield digest, look(_in_directory(Path(directory)))
        return
    # Another storage driver, another machine, or not ours to read: the engine writes the image out instead.
    # It is 0.8 GB, and /tmp may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        archive = Path(scratch) / "image.tar"
        engine.save(image["Id"], archive)
        with tarfile.open(archive) as outer:
            manifest = outer.extractfile("manifest.json")
            assert manifest is not None  # noqa: S101 -- `save` always writes one
            for digest, name in zip(digests, json.load(manifest)[0]["Layers"], strict=True):
                if digest in wanted:
                    with tarfile.open(fileobj=outer.extractfile(name)) as layer:
                        yield digest, look(_in_tar(layer))


def _directories(image: dict[str, Any]) -> list[str]:
    """Return the overlay directory of each layer, lowest first, or nothing where the engine has none."""
    data = (image.get("GraphDriver") or {}).get("Data") or {}
    lower = data.get("LowerDir", "").split(":") if data.get("LowerDir") else []
    return list(reversed([data["UpperDir"], *lower])) if data.get("UpperDir") else []


def _in_directory(root: Path) -> Iterator[Entry]:
    for directory, names, files in os.walk(root):
        relative = os.path.relpath(directory, root)
        prefix = "" if relative == "." else f"{relative}/"
        for name in names:
            yield f"{prefix}{name}", False, 0, bytes
        for name in files:
            path = Path(directory, name)
            status = path.lstat()
            yield f"{prefix}{name}", stat.S_ISREG(status.st_mode), status.st_size, path.read_bytes


def _in_tar(layer: tarfile.TarFile) -> Iterator[Entry]:
    for member in layer:

        def read(member: tarfile.TarInfo = member) -> bytes:
            content = layer.extractfile(member)
            return content.read() if content else b""

        yield member.name.removeprefix("./").rstrip("/"), member.isfile(), member.size, read


def _short(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]
