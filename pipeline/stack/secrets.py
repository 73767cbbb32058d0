"""The stack's secrets: three files of NAME=value, which only their owner may read, and a password for each lock."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import SecretsRefused
from pipeline.settings import ROOT, Settings
from pipeline.stack.manifests import read_env

SERVER, BACKUP, AGENT = "server.env", "backup.env", "datadog.env"

BEGINNINGS = {
    SERVER: (
        "# What the server is given: its password, the databases', and models' keys (ANTHROPIC_API_KEY=… and so on).",
        ("OPENCODE_SERVER_PASSWORD", "FALKORDB_PASSWORD", "VALKEY_PASSWORD"),
    ),
    BACKUP: (
        "# What only the backup is given: BACKUP_REMOTE, RCLONE_CONFIG_* (docs/backup.md). Keep a copy elsewhere.",
        ("BACKUP_PASSWORD",),
    ),
    AGENT: ("# What only the Datadog Agent is given. With a DD_API_KEY here, inv up starts one.", ()),
}
"""What each file begins with, and the passwords that are made for it."""

PASSED_ON = ("DD_API_KEY", "DD_SITE")
"""Variables of who starts the stack that the Agent's file is given, once: who starts it next may lack them."""


def home(settings: Settings) -> Path:
    """Return the directory of a stack's secrets and of what is known of it."""
    if settings.stack.home:
        return ROOT / Path(settings.stack.home).expanduser()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return config / "opencode-server" / settings.stack.name


def read(where: Path) -> dict[str, dict[str, str]]:
    """Return the secrets by the names of their Secrets, as far as their files are there. Raises SecretsRefused."""
    found: dict[str, dict[str, str]] = {}
    for name in BEGINNINGS:
        path = where / name
        variables = read_env(path) if _is_private(path) else {}
        _check(path, variables)
        found[_secret(name)] = variables
    return found


def ensure(where: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Make what is not there yet, each file 0600 and with passwords of its own; return the names of those written.

    A password that a file of the user's lacks is added to it. Raises SecretsRefused.
    """
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = []
    for name, (comment, passwords) in BEGINNINGS.items():
        path = where / name
        there = read_env(path) if _is_private(path) else {}
        lines = [f"{key}={secrets.token_urlsafe(24)}" for key in passwords if key not in there]
        if name == AGENT:
            lines = [f"{key}={environ[key]}" for key in PASSED_ON if environ.get(key) and not there.get(key)]
        if path.exists() and not lines:
            continue
        text = path.read_text() if path.exists() else f"{comment}\n"
        _write(path, "\n".join([text.rstrip("\n"), *lines, ""]))
        made.append(name)
    return made


def check_passwords(known: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to go on without a password that a part is to be locked with. Raises SecretsRefused."""
    for name, (_, passwords) in BEGINNINGS.items():
        for key in passwords:
            if not known[_secret(name)].get(key):
                raise SecretsRefused(f"{name} has no {key}", "inv up makes one, and starts with it what is not up.")


def _secret(name: str) -> str:
    return f"opencode-{name.removesuffix('.env')}"


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _is_private(path: Path) -> bool:
    try:
        seen = path.stat()
    except FileNotFoundError:
        return False
    if seen.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretsRefused(f"{path} can be read by others", f"chmod 600 {path}, and change what is in it.")
    return True


def _check(path: Path, variables: Mapping[str, str]) -> None:
    """Refuse what one reader of such files would take for something else than another does. Raises SecretsRefused."""
    for key, value in variables.items():
        if key.endswith("_PASSWORD") and not value:
            raise SecretsRefused(f"{key} in {path} is empty", "Give it a value, or remove the line: one is made then.")
        if set(value) & set("\"'\\$\n") and key.endswith(("_PASSWORD", "_KEY")):
            remedy = "Compose, Redis and kustomize read those differently: take a value without them."
            raise SecretsRefused(f"{key} in {path} has a quote, a backslash or a $ in it", remedy)
