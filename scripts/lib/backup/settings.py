"""The settings of backup, from the environment and from files of secrets."""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from lib.backup.errors import NotConfigured
from lib.common.databases import Database
from lib.common.datadog import Datadog
from lib.common.environment import Environment, InvalidConfiguration

PARTS = (
    "falkordb",
    "valkey",
    "opencode",
    "files",
)
CRYPT = "OPENCODEBACKUP"
"""The rclone remote that encrypts when BACKUP_PASSWORD is set."""

SECRET = re.compile(
    "FALKORDB_PASSWORD|VALKEY_PASSWORD|BACKUP_PASSWORD|DD_API_KEY|RCLONE_CONFIG_[A-Z0-9_]+_"
    "(ACCOUNT|KEY|PASS|PASSWORD|PASSWORD2|TOKEN|ACCESS_KEY_ID|SECRET_ACCESS_KEY|CLIENT_SECRET)"
)
# AWS_CA_BUNDLE is not among them: it breaks rclone's S3 backend.
PASSED_ON = re.compile(
    "PATH|HOME|LANG|TZ|SSL_CERT_(FILE|DIR)|((HTTPS?|NO|ALL)_PROXY)|(https?|no|all)_proxy|RCLONE_.*"
)
SHORTEST_SECRET = 4
"""Shorter values are not replaced in messages: they occur in ordinary words."""

DERIVED = ("database", "keep", "servers", "datadog", "environ", "secrets")
"""Fields that are not variables: ``load`` computes them."""

Count = Annotated[int, Field(ge=0, le=1_000_000)]


def split_parts(value: object) -> object:
    """Return the parts in a list that is separated by commas or spaces. Raises ValueError."""
    parts = tuple(value.replace(",", " ").split()) if isinstance(value, str) else value
    if isinstance(parts, tuple) and (unknown := set(parts) - set(PARTS)):
        raise ValueError(f"unknown part {min(unknown)}; the parts are {', '.join(PARTS)}")
    return parts


class Keep(Environment):
    """How many backups retention keeps; BACKUP_KEEP_LAST and so on."""

    last: Count = 7
    daily: Count = 7
    weekly: Count = 4
    monthly: Count = 6
    safety: Count = 3


class Settings(Environment):
    """All settings. ``environ`` is what child processes get: no secret but rclone's own."""

    remote: str = Field("", alias="BACKUP_REMOTE")
    safety_remote: str = Field("", alias="BACKUP_SAFETY_REMOTE")
    stack: str = Field("opencode", alias="BACKUP_STACK")
    # rclone takes the first line only.
    password: str = Field("", alias="BACKUP_PASSWORD", repr=False, pattern=r"^[^\r\n]*$")
    parts: Annotated[tuple[str, ...], BeforeValidator(split_parts)] = Field(
        PARTS, alias="BACKUP_PARTS"
    )
    work: Path = Field(Path(f"/var/tmp/opencode-backup-{os.getuid()}"), alias="BACKUP_WORK_DIR")  # noqa: S108 -- its owner is checked
    max_age_hours: float = Field(26, alias="BACKUP_MAX_AGE_HOURS", ge=0, le=1e6)
    stall_seconds: float = Field(60, alias="BACKUP_STALL_SECONDS", gt=0, le=1e6)
    restore_seconds: float = Field(3600, alias="BACKUP_RESTORE_SECONDS", gt=0, le=1e6)
    advertise: str = Field("", alias="BACKUP_ADVERTISE", pattern=r"^(.+:\d+)?$")
    schedule: str = Field("23 3 * * *", alias="BACKUP_SCHEDULE")
    host: str = Field(default_factory=socket.gethostname, alias="DD_HOSTNAME")
    home: Path = Path("/root")
    data: Path = Field(Path(), alias="XDG_DATA_HOME")
    config: Path = Field(Path(), alias="XDG_CONFIG_HOME")
    state: Path = Field(Path(), alias="XDG_STATE_HOME")
    database: Path = Path()
    keep: Keep = Keep()
    servers: dict[str, Database] = Field(default_factory=dict)
    datadog: Datadog = Datadog()
    environ: dict[str, str] = Field(default_factory=dict, repr=False)
    secrets: frozenset[str] = Field(frozenset(), repr=False)

    def hide(self, text: str) -> str:
        """Return the output of another program with ``***`` for each secret."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def load(given: Mapping[str, str]) -> Settings:
    """Return the settings of an environment. Raises NotConfigured."""
    environ = read_secrets(given)
    variables = {name: value for name, value in environ.items() if name.lower() not in DERIVED}
    try:
        settings = Settings.read(variables)
        keep = Keep.read(environ, "BACKUP_KEEP_")
        servers = {part: Database.of(part.upper(), environ) for part in ("falkordb", "valkey")}
        datadog = Datadog.read(environ, "DD_")
    except InvalidConfiguration as error:
        raise NotConfigured(str(error), "Correct it; docs/backup.md lists the variables.") from None
    for remote in (settings.remote, settings.safety_remote):
        check_remote(remote, environ)
    # The paths are those of the server: XDG's variables move them as they do for OpenCode.
    defaults = {"data": ".local/share", "config": ".config", "state": ".local/state"}
    paths = {}
    for name, default in defaults.items():
        base = settings.home / default
        if getattr(settings, name) != Path():
            base = getattr(settings, name)
        paths[name] = base / "opencode"
    derived = {
        "database": paths["data"] / "opencode.db",
        "keep": keep,
        "servers": servers,
        "datadog": datadog,
        "environ": {name: value for name, value in environ.items() if PASSED_ON.fullmatch(name)},
        "secrets": frozenset(
            value
            for name, value in environ.items()
            if SECRET.fullmatch(name) and len(value) >= SHORTEST_SECRET
        ),
    }
    return settings.model_copy(update=paths | derived)


def read_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which each variable NAME_FILE of a secret is replaced by NAME.

    Raises NotConfigured when a file cannot be read, or when both variables are set.
    """
    found = {name: value for name, value in environ.items() if value}
    for variable in list(found):
        name = variable.removesuffix("_FILE")
        # rclone's sftp has an option key_file of its own.
        sftp = environ.get(name.removesuffix("_KEY") + "_TYPE") == "sftp"
        if name == variable or sftp or not SECRET.fullmatch(name):
            continue
        if name in found:
            raise NotConfigured(f"both {name} and {variable} are set", "Set one of them.")
        try:
            found[name] = Path(found.pop(variable)).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise NotConfigured(
                f"{variable}={environ[variable]}: {reason}", "Mount a readable file there."
            ) from None
    return found


def check_remote(remote: str, environ: Mapping[str, str]) -> None:
    """Check that a remote is ``NAME:PATH``, described by RCLONE_CONFIG_NAME_*, or ``/PATH``.

    Raises NotConfigured.
    """
    if not remote or remote.startswith("/"):
        return
    name, colon, _ = remote.partition(":")
    kind = f"RCLONE_CONFIG_{name.upper()}_TYPE"
    example = "Example: BACKUP_REMOTE=b2:bucket/path with RCLONE_CONFIG_B2_TYPE=b2, _ACCOUNT, _KEY."
    # rclone also accepts secrets in a connection string; they would show in the process list.
    if not colon or not re.fullmatch(r"[\w.+@ -]+", name):
        raise NotConfigured("a remote must be NAME:PATH or /PATH", example)
    if kind not in environ and "RCLONE_CONFIG" not in environ:
        raise NotConfigured(f"{kind} is not set", example)
    encryption = f"RCLONE_CONFIG_{name.upper()}_FILENAME_ENCRYPTION"
    if environ.get(kind) == "crypt" and environ.get(encryption) != "off":
        # With encrypted names and a wrong password rclone lists nothing and exits with 0.
        raise NotConfigured(
            f"the remote {name} encrypts file names",
            f"Set {encryption}=off, or use BACKUP_PASSWORD instead of crypt.",
        )


def server_at(address: str, server: Database) -> Database:
    """Return ``server`` at another ``HOST:PORT``. Raises NotConfigured."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[^\s/]+", host) or not re.fullmatch("[0-9]{1,5}", port):
        raise NotConfigured(f"{address} is not HOST:PORT", "Example: localhost:6379.")
    return server.model_copy(update={"host": host.strip("[]"), "port": int(port)})
