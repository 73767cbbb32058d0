"""Every setting of the memory, from the environment alone."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

APIS = ("auto", "responses", "chat", "json")
NAME = re.compile("[A-Za-z0-9_-]{1,100}")


class WrongSetting(Exception):
    """A variable holds what it cannot; the message names it, and no secret."""


class Unavailable(Exception):
    """Something that this needs is not there; the message says what, and which variable sets it."""


def env(name: str, default: str = "") -> str:
    """Return a variable; an empty one is not set: compose hands on as empty what its user left out."""
    return os.environ.get(name) or default


def number(name: str, default: float, least: float, most: float) -> float:
    """Return the number in a variable. Raises WrongSetting when it is none, or out of range."""
    text = env(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise WrongSetting(f"{name} must be a number from {least:g} to {most:g}")
    return value


@dataclass(frozen=True)
class Place:
    """Where a database listens; ``name`` is what its variables begin with."""

    name: str
    port: int
    host: str
    username: str | None
    password: str | None = field(repr=False)
    tls: bool

    @classmethod
    def read(cls, name: str, port: int) -> Place:
        """Return the place that the variables of this name say. Raises WrongSetting."""
        text = env(f"{name}_PORT", str(port))
        if not text.isdecimal() or not 0 < int(text) < 65536:  # noqa: PLR2004 -- TCP's range
            raise WrongSetting(f"{name}_PORT is not a port number")
        tls = env(f"{name}_TLS").lower() in ("1", "true", "yes", "on")
        username, password = env(f"{name}_USERNAME") or None, env(f"{name}_PASSWORD") or None
        return cls(name, int(text), env(f"{name}_HOST", "localhost"), username, password, tls)

    def options(self, seconds: float) -> dict[str, Any]:
        """Return redis-py's arguments; a command may take ``seconds``, a connection five."""
        secure = {"ssl": True, "ssl_check_hostname": True} if self.tls else {}
        return {
            "host": self.host,
            "port": self.port,
            "username": self.username,
            "password": self.password,
            "socket_timeout": seconds,
            "socket_connect_timeout": 5,
            **secure,
        }

    def missing(self, error: BaseException) -> Unavailable:
        """Return what to tell the user when this place does not answer."""
        what = {"FALKORDB": "FalkorDB, which holds the memory,", "VALKEY": "Valkey, which holds the queue,"}[self.name]
        said = f"{type(error).__name__}: {error}" if "auth" in f"{type(error).__name__}{error}".lower() else ""
        hint = f"{self.name}_HOST and {self.name}_PORT say where it is, {self.name}_PASSWORD and {self.name}_TLS how"
        return Unavailable(
            f"{what} does not answer at {self.host}:{self.port}{said and f' ({said})'}; {hint} to reach it"
        )


@dataclass(frozen=True)
class Settings:
    """All settings. Times are in seconds; ``project`` names a graph of FalkorDB and is ``[A-Za-z0-9_-]+``."""

    falkordb: Place
    valkey: Place
    project: str
    api_key: str = field(repr=False)
    base_url: str | None
    api: str
    model: str | None
    small_model: str | None
    embedding_key: str = field(repr=False)
    embedding_url: str | None
    embedding_model: str
    embedding_dim: int
    timeout: float
    workers: int
    concurrency: int
    attempts: int
    backoff: float
    lease: float

    @property
    def has_model(self) -> bool:
        """Say whether a model is configured at all."""
        return bool(self.api_key or self.base_url)

    def need_model(self) -> None:
        """Raise Unavailable when no model is configured."""
        if not self.has_model:
            raise Unavailable(
                "no model is configured: OPENAI_API_KEY is for OpenAI, and OPENAI_BASE_URL with MEMORY_MODEL and"
                " MEMORY_EMBEDDING_MODEL for anything that speaks its protocol"
            )


def read(project: str = "") -> Settings:
    """Return the settings that the environment says. Raises WrongSetting, naming the variable."""
    key, url = env("OPENAI_API_KEY"), env("OPENAI_BASE_URL")
    api = env("MEMORY_MODEL_API", "auto")
    if api not in APIS:
        raise WrongSetting(f"MEMORY_MODEL_API must be one of {', '.join(APIS)}")
    if api == "auto":
        api = "chat" if url and urlsplit(url).hostname != "api.openai.com" else "responses"
    chosen = project or env("MEMORY_PROJECT")
    if chosen and not NAME.fullmatch(chosen):
        raise WrongSetting("MEMORY_PROJECT (--project) may hold letters, digits, _ and -, at most 100")
    return Settings(
        falkordb=Place.read("FALKORDB", 6379),
        valkey=Place.read("VALKEY", 6380),
        project=chosen or project_of(Path.cwd()),
        api_key=key,
        base_url=url or None,
        api=api,
        model=env("MEMORY_MODEL") or None,
        small_model=env("MEMORY_SMALL_MODEL") or env("MEMORY_MODEL") or None,
        embedding_key=env("MEMORY_EMBEDDING_API_KEY", key),
        embedding_url=env("MEMORY_EMBEDDING_BASE_URL", url) or None,
        embedding_model=env("MEMORY_EMBEDDING_MODEL", "text-embedding-3-small"),
        embedding_dim=int(number("MEMORY_EMBEDDING_DIM", 1024, 1, 65536)),
        timeout=number("MEMORY_TIMEOUT", 120, 0.1, 3600),
        workers=int(number("MEMORY_WORKERS", 2, 0, 64)),
        concurrency=int(number("MEMORY_CONCURRENCY", 5, 1, 256)),
        attempts=int(number("MEMORY_ATTEMPTS", 4, 1, 100)),
        backoff=number("MEMORY_BACKOFF", 2, 0.001, 600),
        lease=number("MEMORY_LEASE", 30, 0.5, 3600),
    )


def project_of(directory: Path) -> str:
    """Name the memory of a directory: by its repository's origin, else by the path of the repository or directory.

    The origin makes a project the same in every container, where it is always /workspace.
    """
    root = next((path for path in (directory, *directory.parents) if (path / ".git").exists()), directory)
    # The owner of a mounted directory is somebody else, whose repository git would not read without being told to.
    argv = ["git", "-c", "safe.directory=*", "-C", str(root), "config", "--get", "remote.origin.url"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=False, stdin=subprocess.DEVNULL)
        origin = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        origin = ""
    # https://user:secret@host/owner/name.git and git@host:owner/name are one project.
    origin = re.sub(r"^\w+://|^[^/@]*@(?=[^/]*:)", "", origin).rpartition("@")[2].removesuffix(".git").replace(":", "/")
    identity = origin.lower() or str(root)
    name = re.sub("[^A-Za-z0-9]+", "_", identity.rstrip("/").rpartition("/")[2]).strip("_")[:40] or "root"
    return f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
