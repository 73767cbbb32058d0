"""What the environment says, looked at once. A secret comes from a variable or, by its name and ``_FILE``, a file."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backup_lib.errors import NotConfigured

PARTS = ("falkordb", "valkey", "opencode", "files")
KEEP = {"LAST": 7, "DAILY": 7, "WEEKLY": 4, "MONTHLY": 6, "SAFETY": 3}
CRYPT = "OPENCODEBACKUP"
"""The name of the rclone remote that encrypts for us when BACKUP_PASSWORD is set."""

SECRET = re.compile(
    "FALKORDB_PASSWORD|VALKEY_PASSWORD|BACKUP_PASSWORD|DD_API_KEY|RCLONE_CONFIG_[A-Z0-9_]+_"
    "(ACCOUNT|KEY|PASS|PASSWORD|PASSWORD2|TOKEN|ACCESS_KEY_ID|SECRET_ACCESS_KEY|CLIENT_SECRET)"
)
# AWS_CA_BUNDLE is not among them: it breaks rclone's S3 backend.
HANDED_ON = re.compile("PATH|HOME|LANG|TZ|SSL_CERT_(FILE|DIR)|((HTTPS?|NO|ALL)_PROXY)|(https?|no|all)_proxy|RCLONE_.*")


@dataclass(frozen=True)
class Place:
    """Where a server is, and how it lets us in."""

    part: str
    host: str
    port: int
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False

    def __str__(self) -> str:
        """Return what messages call it."""
        return f"{self.part} at {self.host}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """All of it. ``environ`` is what child processes get, with no secret but rclone's own."""

    remote: str
    safety_remote: str
    password: str = field(repr=False)
    parts: tuple[str, ...]
    servers: Mapping[str, Place]
    database: Path
    data: Path
    config: Path
    state: Path
    work: Path
    keep: Mapping[str, int]
    max_age_hours: float
    stall_seconds: float
    advertise: str
    schedule: str
    datadog_key: str = field(repr=False)
    datadog_url: str
    host: str
    environ: Mapping[str, str] = field(repr=False)
    secrets: frozenset[str] = field(repr=False)

    def hide(self, text: str) -> str:
        """Return text of other programs without any secret of ours in it."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def read_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the content of each mounted secret in place of the variable that names its file.

    Raises NotConfigured when a file cannot be read, or a secret is given twice.
    """
    found = {name: value for name, value in environ.items() if value}
    for name, path in environ.items():
        secret = name.removesuffix("_FILE")
        # sftp's own option is called key_file: that one is rclone's to read.
        sftp = environ.get(secret.removesuffix("_KEY") + "_TYPE") == "sftp"
        if not path or name == secret or not SECRET.fullmatch(secret) or sftp:
            continue
        if found.get(secret):
            raise NotConfigured(f"both {secret} and {name} are set", "Set one of them.")
        try:
            found[secret] = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            said = getattr(error, "strerror", None) or type(error).__name__
            raise NotConfigured(f"{name}: {path}: {said}", "Mount the secret there, readable for us.") from None
        del found[name]
    return found


def load(given: Mapping[str, str]) -> Settings:
    """Return the settings in an environment. Raises NotConfigured, naming the variable that is wrong."""
    environ = read_secrets(given)

    def text(name: str, default: str = "") -> str:
        return environ.get(name) or default

    def number(name: str, default: float) -> float:
        try:
            value = float(text(name, str(default)))
        except ValueError:
            value = -1
        if not 0 <= value < 1e6:  # noqa: PLR2004 -- eleven days, or a million backups
            raise NotConfigured(f"{name} is not a number that makes sense", "Write it as in 26 or 0.5.")
        return value

    parts = tuple(re.split(r"[\s,]+", text("BACKUP_PARTS", " ".join(PARTS)).strip()))
    if unknown := [part for part in parts if part not in PARTS]:
        raise NotConfigured(f"BACKUP_PARTS: there is no part {unknown[0]}", f"There are {', '.join(PARTS)}.")
    home = Path(text("HOME", "/root"))
    # HOME is what it would be for the server; XDG's variables move it, as they do for OpenCode.
    data, config, state = (
        Path(text(f"XDG_{kind}_HOME", str(home / default))) / "opencode"
        for kind, default in (("DATA", ".local/share"), ("CONFIG", ".config"), ("STATE", ".local/state"))
    )
    site = text("DD_SITE", "datadoghq.com")
    return Settings(
        remote=_remote(text("BACKUP_REMOTE"), environ),
        safety_remote=_remote(text("BACKUP_SAFETY_REMOTE"), environ),
        password=text("BACKUP_PASSWORD"),
        parts=parts,
        servers={part: _place(part, environ) for part in ("falkordb", "valkey")},
        database=data / "opencode.db",
        data=data,
        config=config,
        state=state,
        work=Path(text("BACKUP_WORK_DIR", f"/var/tmp/opencode-backup-{os.getuid()}")),  # noqa: S108 -- checked to be ours
        keep={name: int(number(f"BACKUP_KEEP_{name}", default)) for name, default in KEEP.items()},
        max_age_hours=number("BACKUP_MAX_AGE_HOURS", 26),
        stall_seconds=number("BACKUP_STALL_SECONDS", 60) or 60,
        advertise=text("BACKUP_ADVERTISE"),
        schedule=text("BACKUP_SCHEDULE", "23 3 * * *"),
        datadog_key=text("DD_API_KEY"),
        datadog_url=text("BACKUP_DATADOG_URL", f"https://api.{site}"),
        host=text("DD_HOSTNAME", socket.gethostname()),
        environ={name: value for name, value in environ.items() if HANDED_ON.fullmatch(name)},
        # Shorter ones would take letters out of every word; nobody has such a password.
        secrets=frozenset(value for name, value in environ.items() if SECRET.fullmatch(name) and len(value) > 3),  # noqa: PLR2004
    )


def _remote(remote: str, environ: Mapping[str, str]) -> str:
    example = "as in b2:bucket/path with RCLONE_CONFIG_B2_TYPE=b2, RCLONE_CONFIG_B2_ACCOUNT and RCLONE_CONFIG_B2_KEY"
    if not remote:
        return ""  # `backup --help` and the like need none; whoever uses it asks remote.Remote
    name, colon, _ = remote.partition(":")
    if remote.startswith("/"):
        return remote
    if not colon or not re.fullmatch(r"[\w.+@ -]+", name):
        # rclone would take secrets in a connection string too, and then they would be in `ps`.
        raise NotConfigured("BACKUP_REMOTE is not NAME:PATH or /PATH", f"Write it {example}.")
    if f"RCLONE_CONFIG_{name.upper()}_TYPE" not in environ and "RCLONE_CONFIG" not in environ:
        raise NotConfigured(f"RCLONE_CONFIG_{name.upper()}_TYPE is not set", f"Describe the remote {example}.")
    crypt = environ.get(f"RCLONE_CONFIG_{name.upper()}_TYPE") == "crypt"
    if crypt and environ.get(f"RCLONE_CONFIG_{name.upper()}_FILENAME_ENCRYPTION") != "off":
        # With encrypted names and a wrong password rclone lists nothing, and says that all is well.
        remedy = f"Set RCLONE_CONFIG_{name.upper()}_FILENAME_ENCRYPTION=off, or use BACKUP_PASSWORD instead of crypt."
        raise NotConfigured(f"{name} would encrypt names", remedy)
    return remote


def _place(part: str, environ: Mapping[str, str]) -> Place:
    name = part.upper()
    default = {"falkordb": 6379, "valkey": 6380}[part]
    return place(
        part,
        f"{environ.get(f'{name}_HOST', 'localhost')}:{environ.get(f'{name}_PORT', default)}",
        Place(
            part,
            "",
            0,
            environ.get(f"{name}_USERNAME", ""),
            environ.get(f"{name}_PASSWORD", ""),
            environ.get(f"{name}_TLS", "").lower() in ("1", "true", "yes", "on"),
        ),
    )


def place(part: str, where: str, like: Place) -> Place:
    """Return the server at ``HOST:PORT``, with the credentials of ``like``. Raises NotConfigured."""
    host, _, port = where.rpartition(":")
    if not re.fullmatch(r"[^\s/]+", host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:  # noqa: PLR2004 -- TCP's range
        raise NotConfigured(f"{part}: {where} is not HOST:PORT", "Write it as in localhost:6379.")
    return Place(part, host.strip("[]"), int(port), like.username, like.password, like.tls)
