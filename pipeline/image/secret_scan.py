"""Scan the layers, history and settings of an image for secrets and for CAs of this network."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.settings import BUILD
from pipeline.core.state import read_json, write_json
from pipeline.engines.engine import Engine
from pipeline.inputs import ca

RULES = "4"
"""Raise it when the rules change: layers are then scanned again."""

SECRET_NAMES = re.compile(
    r"(?:^|/)(?:"
    r"\.env|\.env\.(?!example|sample|template)[^/]+|\.envrc"
    r"|\.npmrc|\.netrc|\.pypirc|\.git-credentials|\.git"
    r"|id_(?:rsa|dsa|ecdsa|ed25519)|[^/]+\.(?:p12|pfx|jks|kdbx)"
    r"|\.(?:bash|python|node_repl)_history"
    r"|\.docker/config\.json|\.kube/config|\.aws/credentials|gh/hosts\.yml"
    r"|rclone\.conf|share/opencode/auth\.json"
    r"|npm-debug\.log|pip\.log"
    r"|root/(?:\.npm/_logs|\.npm/_cacache|\.cache/(?:pip|uv)|\.aws)"
    r")$"
)
"""Paths that hold secrets, or traces of them."""

RULES_TABLE = rb"""
keys         PRIVATE KEY-----  -----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:\s|\\n)+[A-Za-z0-9+/=]{40}
PuTTY        PuTTY-User-Key    PuTTY-User-Key-File-\d: \S+\s+Encryption: none
age          AGE-SECRET-KEY-1  AGE-SECRET-KEY-1[A-Z0-9]{58}
AWS          AKIA              \bAKIA(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}\b
AWS          ASIA              \bASIA(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}\b
AWS          AWS_              \bAWS_SECRET_ACCESS_KEY["']?[ \t]*[=:][ \t]*["']?[0-9A-Za-z/+]{32,}
AWS          aws_              \baws_secret_access_key["']?[ \t]*[=:][ \t]*["']?[0-9A-Za-z/+]{32,}
Azure        AccountKey=       AccountKey=[A-Za-z0-9+/]{86}==
B2           K00               (?<![\w+/=])K00\d[A-Za-z0-9+/]{27}(?![\w+/=])
Datadog      DD_               \bDD_(?:API|APP)_KEY["']?[ \t]*[=:][ \t]*["']?[0-9A-Za-z/+]{32,}
DigitalOcean _v1_              \bdo[opr]_v1_[0-9a-f]{64}
Docker       dckr_             \bdckr_[op]at_[\w-]{27,}
GitHub       gh                gh[pousr]_[A-Za-z0-9]{36}\b
GitHub       github_pat_       \bgithub_pat_[A-Za-z0-9_]{60,}
GitLab       glpat-            \bglpat-[A-Za-z0-9_-]{20}
Google       AIza              \bAIza[A-Za-z0-9_-]{35}(?![\w-])
Groq         gsk_              \bgsk_[A-Za-z0-9]{52}\b
HuggingFace  hf_               \bhf_[A-Za-z]{34}\b
JWT          .eyJ              \beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}
Linear       lin_api_          \blin_api_[A-Za-z0-9]{40}\b
Notion       ntn_              \bntn_[A-Za-z0-9]{40,}
npm          npm_              \bnpm_[A-Za-z0-9]{36}\b
models       sk-               \bsk-(?:proj|svcacct|ant|or)-[A-Za-z0-9_-]{32,}
OpenAI       T3BlbkFJ          \bsk-[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20}
PyPI         pypi-AgE          \bpypi-AgE[\w-]{50,}
SendGrid     SG.               \bSG\.[\w-]{22}\.[\w-]{43}\b
Shopify      shp               \bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}\b
Slack        xox               \bxox[abeprs]-[A-Za-z0-9-]{24,}
Slack        hooks.slack.com   hooks\.slack\.com/services/T\w+/B\w+/\w{20,}
Stripe       k_live_           \b[rs]k_live_[A-Za-z0-9]{20,}
Telegram     :AA               \b\d{8,10}:AA[\w-]{33}(?![\w-])
Twilio       SK                \bSK[0-9a-f]{32}\b
Vault        hvs.              \bhvs\.[\w-]{90,}
xAI          xai-              \bxai-[A-Za-z0-9]{70,}
URLs         ://               ://[^\s/:@"'<>{}$]{0,60}:(?=[^\s@]*\d)(?=[^\s@]*[A-Za-z])[\w.~+=%!-]{12,}@[\w.]
HTTP         Bearer            \bBearer (?=\S*\d)[\w.~+/-]{32,}
"""
"""Kind, a part that each secret of it contains, and a pattern. A fast search for the part comes
first. Patterns: https://github.com/gitleaks/gitleaks and the vendors' documentation.
"""

SECRETS = [
    (part.rstrip(), re.compile(pattern))
    for _, part, pattern in re.findall(rb"(\S+) +(\S+(?: KEY-----)?) +(.+)", RULES_TABLE)
]

WRAPPED = re.compile(rb"(?<![\w+/])[A-Za-z0-9+/]{48,}(?:\r?\n[A-Za-z0-9+/]+)*")
"""Base64, in one line or in lines as of ``base64``: 36 bytes or more."""

ASSIGNED = re.compile(
    rb"(?i)(?<![\w.-])([\w.-]{0,60}(?:_key|api-?key|token|secret|passw(?:or)?d|credentials?))[\"']?"
    rb"[ \t]*[=:][ \t]*[\"']?([^\s\"'`$<>{}()\[\],;]{1,300})"
)
"""A name of a secret, and its value, unless that refers to another place."""

RANDOM = re.compile(rb"(?=.*\d)(?=.*[A-Za-z])[\w+/=~-]{12,}")
"""A random value. In code and prose, ``token = `` also precedes other things."""

ANYTHING = re.compile(rb".+")

EDITED = (
    "opt/openagents/",
    "app/",
    "root/",
    "workspace/",
    "etc/environment",
)
"""Where people's own files are. There the name of a secret and a random value are enough."""

WRAPPED_LIMIT = 65_536
"""Bytes; in a larger file base64 is not decoded: keys and configurations are small."""

TEXT_LIMIT = 1_000_000
"""Bytes; a larger file is not scanned. Files with keys and certificates are small."""

PUBLIC_CERTIFICATES = "usr/share/ca-certificates/"

CERTIFICATE = b"-----BEGIN CERTIFICATE"

Entry = tuple[str, bool, int, Callable[[], bytes]]
"""A path without leading slash, whether it is a regular file, its bytes, and a reader."""


@dataclass
class Findings:
    """Of one layer: paths that look like secrets, and the certificates of each file as hashes."""

    secrets: list[str] = field(default_factory=list)
    certificates: dict[str, list[str]] = field(default_factory=dict)


def check(
    engine: Engine,
    image: dict[str, Any],
    extra: dict[str, str],
) -> tuple[list[str], int]:
    """Return the faults of an inspected image, and its number of layers.

    ``extra`` are this network's certificates (see ca.extra). Each layer is scanned once: the
    findings are kept in ``build/layers.json`` by the digest of the layer.
    """
    layers = _findings(engine, image)
    public = set()
    for layer in layers:
        for path, certificates in layer.certificates.items():
            if path.startswith(PUBLIC_CERTIFICATES):
                public.update(certificates)
    ours = {ca.short_hash(body) for body in extra} - public
    faults = []
    for layer in layers:
        faults += [f"/{path}" for path in layer.secrets]
    for layer in layers:
        for path, certificates in layer.certificates.items():
            if ours.intersection(certificates):
                faults.append(f"/{path} holds a CA of this network")
    # Build arguments are in the history; an ENV of the base is in the configuration only.
    argv = engine.argv("history", image["Id"], no_trunc=True, format="{{.CreatedBy}}")
    history = engine.ask(argv).stdout
    faults += _faults_in("history", history)
    faults += _faults_in("configuration", "\n".join(_configuration(image)))
    return faults, len(layers)


def _findings(engine: Engine, image: dict[str, Any]) -> list[Findings]:
    digests = image["RootFS"]["Layers"]
    file = BUILD / "layers.json"
    record = read_json(file)
    known = record["layers"] if record.get("rules") == RULES else {}
    missing = set(digests) - set(known)
    if missing:
        for digest, findings in _scan_layers(engine, image, missing):
            known[digest] = asdict(findings)
        known = {digest: known[digest] for digest in digests}
        write_json(file, {"rules": RULES, "layers": known})
    return [Findings(**known[digest]) for digest in digests]


def _configuration(image: dict[str, Any]) -> list[str]:
    config = image.get("Config") or {}
    labels = [f"{name}={value}" for name, value in (config.get("Labels") or {}).items()]
    return [
        *(config.get("Env") or []),
        *labels,
        str(config.get("Entrypoint")),
        str(config.get("Cmd")),
    ]


def _faults_in(where: str, text: str) -> list[str]:
    content = text.encode()
    found = dict.fromkeys(secrets_in(content) + assigned_in(content, ANYTHING))
    faults = [f"the {where} holds {start}…" for start in found]
    if CERTIFICATE in content:
        faults.append(f"the {where} holds a certificate")
    return faults


def scan(entries: Iterator[Entry]) -> Findings:
    """Scan the files of a layer."""
    findings = Findings()
    for path, regular, size, read in entries:
        if SECRET_NAMES.search(path):
            findings.secrets.append(path)
        if not regular or size > TEXT_LIMIT:
            continue
        content = read()
        if b"\0" in content[:1024]:
            continue
        found = secrets_in(content)
        if size < WRAPPED_LIMIT:
            for wrapped in WRAPPED.findall(content):
                text = b"".join(wrapped.split())
                text = text[: len(text) - (len(text) % 4 == 1)]  # no such length exists
                found += secrets_in(base64.b64decode(text + b"=="))
        if path.startswith(EDITED):
            found += assigned_in(content, RANDOM)
        findings.secrets += [f"{path} (holds {start}…)" for start in found]
        if CERTIFICATE in content:
            bodies = ca.certificates(content.decode(errors="replace"))
            findings.certificates[path] = [ca.short_hash(body) for body in bodies]
    return findings


def secrets_in(content: bytes) -> list[str]:
    """Return the first 12 characters of each kind of secret: enough to find it, not to use it."""
    found = []
    for part, pattern in SECRETS:
        if part in content and (match := pattern.search(content)):
            found.append(match[0][:12].decode(errors="replace"))
    return found


def assigned_in(content: bytes, value: re.Pattern[bytes]) -> list[str]:
    """Return the names of secrets to which ``content`` assigns such a ``value``."""
    found = []
    for match in ASSIGNED.finditer(content):
        if value.fullmatch(match[2]) and not secrets_in(match[0]):
            found.append(f"{match[1].decode(errors='replace')}=")
    return found


def _scan_layers(
    engine: Engine,
    image: dict[str, Any],
    wanted: set[str],
) -> Iterator[tuple[str, Findings]]:
    digests = image["RootFS"]["Layers"]
    directories = _directories(image)
    readable = all(os.access(directory, os.R_OK) for directory in directories)
    if readable and len(directories) == len(digests):
        for digest, directory in zip(digests, directories, strict=True):
            if digest in wanted:
                yield digest, scan(_in_directory(Path(directory)))
        return
    # Another storage driver or machine, or no permission: the engine exports the image instead.
    # The archive has 0.8 GB, and /tmp may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        archive = Path(scratch) / "image.tar"
        engine.save(image["Id"], archive)
        with tarfile.open(archive) as outer:
            manifest = outer.extractfile("manifest.json")
            assert manifest is not None  # noqa: S101 -- `save` always writes one
            names = json.load(manifest)[0]["Layers"]
            for digest, name in zip(digests, names, strict=True):
                if digest in wanted:
                    with tarfile.open(fileobj=outer.extractfile(name)) as layer:
                        yield digest, scan(_in_tar(layer))


def _directories(image: dict[str, Any]) -> list[str]:
    """Return the overlay directory of each layer, lowest first; empty with other drivers."""
    data = (image.get("GraphDriver") or {}).get("Data") or {}
    if not data.get("UpperDir"):
        return []
    directories = [data["UpperDir"]]
    if data.get("LowerDir"):
        directories += data["LowerDir"].split(":")
    return directories[::-1]


def _in_directory(root: Path) -> Iterator[Entry]:
    for path in root.rglob("*"):
        status = path.lstat()
        name = str(path.relative_to(root))
        yield name, stat.S_ISREG(status.st_mode), status.st_size, path.read_bytes


def _in_tar(layer: tarfile.TarFile) -> Iterator[Entry]:
    for member in layer:

        def read(member: tarfile.TarInfo = member) -> bytes:
            content = layer.extractfile(member)
            return content.read() if content else b""

        name = member.name.removeprefix("./").rstrip("/")
        yield name, member.isfile(), member.size, read
