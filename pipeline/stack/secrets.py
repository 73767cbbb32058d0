"""The stack's secrets: four files of NAME=value, mode 0600, with generated passwords."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import SecretsRefused
from pipeline.core.settings import ROOT, Settings

SERVER = "server.env"
GATEWAY = "gateway.env"
BACKUP = "backup.env"
AGENT = "datadog.env"

HEADERS = {
    SERVER: "# The server's variables: passwords, and API keys such as ANTHROPIC_API_KEY.",
    GATEWAY: "# The password of clients; the server has another, which only the gateway uses.",
    BACKUP: "# The backup's variables: BACKUP_REMOTE, RCLONE_CONFIG_*. Keep a copy.",
    AGENT: "# Variables of the Datadog Agent. With DD_API_KEY set, `inv up` starts an Agent.",
}

SERVER_PASSWORDS = (
    "OPENCODE_SERVER_PASSWORD",
    "FALKORDB_PASSWORD",
    "VALKEY_PASSWORD",
    "FALKORDB_ADMIN_PASSWORD",
    "VALKEY_ADMIN_PASSWORD",
)
UNSAFE = set("\"'\\$")

PASSWORDS = {
    SERVER: SERVER_PASSWORDS,
    GATEWAY: ("GATEWAY_PASSWORD",),
    BACKUP: ("BACKUP_PASSWORD",),
    AGENT: (),
}
"""The passwords that are generated, by file."""

FROM_ENVIRONMENT = ("DD_API_KEY", "DD_SITE")
"""Variables that ``inv up`` copies from its environment to datadog.env if they are not in it."""


def home(settings: Settings) -> Path:
    """Return the directory of the stack's secrets, lock and upgrade record."""
    if settings.stack.home:
        return ROOT / Path(settings.stack.home).expanduser()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return config / "opencode-server" / settings.stack.name


def read(where: Path) -> dict[str, dict[str, str]]:
    """Return the variables of each file in the directory ``where``; a missing file has none.

    Raises SecretsRefused.
    """
    return {name: _read_file(where / name) for name in HEADERS}


def ensure(where: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Write the files that are missing and add the passwords that a file lacks.

    Returns the names of the files written. Raises SecretsRefused.
    """
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    written = []
    for name, header in HEADERS.items():
        path = where / name
        existing = _read_file(path)
        text = path.read_text().rstrip() if path.exists() else header
        lines = [text]
        for key in PASSWORDS[name]:
            if not existing.get(key):
                lines.append(f"{key}={secrets.token_urlsafe(24)}")
        if name == AGENT:
            for key in FROM_ENVIRONMENT:
                if environ.get(key) and not existing.get(key):
                    lines.append(f"{key}={environ[key]}")
        if len(lines) > 1 or not path.exists():
            _write(path, "\n".join([*lines, ""]))
            written.append(name)
    return written


def check_passwords(known: Mapping[str, Mapping[str, str]]) -> None:
    """Raise SecretsRefused if a password is missing in what ``read`` returned."""
    for name, passwords in PASSWORDS.items():
        for key in passwords:
            if not known[name].get(key):
                raise SecretsRefused(f"{name} has no {key}", "inv up generates it.")


def _read_file(path: Path) -> dict[str, str]:
    """Return the variables of one file. Raises SecretsRefused."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return {}
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretsRefused(
            f"{path} is accessible by other users",
            f"chmod 600 {path}, and replace the passwords and keys in it.",
        )
    variables = {}
    for line in path.read_text().splitlines():
        name, separator, value = line.strip().partition("=")
        if not separator or name.startswith("#"):
            continue
        variables[name] = value
        if set(value) & UNSAFE and name.endswith(("_PASSWORD", "_KEY")):
            raise SecretsRefused(
                f"{name} in {path} contains a quote, a backslash or a $",
                "Use a value without them: Compose, Redis and kustomize parse them differently.",
            )
    return variables


def _write(path: Path, text: str) -> None:
    """Replace a file atomically, mode 0600."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(text)
    draft.replace(path)
