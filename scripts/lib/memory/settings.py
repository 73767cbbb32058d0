"""Settings of the memory, from environment variables; docs/memory.md describes them."""

import hashlib
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from lib.common.databases import Database
from lib.common.environment import Environment


class Unavailable(Exception):
    """A service is missing; the message says which, and which variable configures it."""


class Lost(Unavailable):
    """The database closed the connection in the middle of a command: it may have crashed."""


class Rejected(Unavailable):
    """FalkorDB answers with an error: it is overloaded or full, or the query is wrong."""


class OpenAI(Environment):
    """The variables that start with ``OPENAI_``: any server with OpenAI's protocol."""

    api_key: str = Field("", repr=False)
    base_url: str = ""


class Settings(Environment):
    """The variables that start with ``MEMORY_``, and those of services. Times are in seconds."""

    project: str = Field(
        default_factory=lambda: project_name(Path.cwd()), pattern="^[A-Za-z0-9_-]{1,100}$"
    )
    # The models; empty means Graphiti's defaults.
    model: str = ""
    small_model: str = ""
    model_api: Literal["auto", "responses", "chat", "json"] = "auto"
    # All facts of a graph need vectors of the same dimension.
    embedding_model: str = "text-embedding-3-small"
    embedding_dim: int = Field(1024, ge=1, le=65536)
    # Empty means the server and the key of the model.
    embedding_base_url: str = ""
    embedding_api_key: str = Field("", repr=False)
    # Projects in parallel, and requests to the model in parallel for each memory.
    workers: int = Field(2, ge=0, le=64)
    concurrency: int = Field(5, ge=1, le=256)
    # The longest answer of the model; some servers refuse requests for more than they can give.
    max_tokens: int = Field(16384, ge=256)
    # Failures before a memory becomes a dead letter, and the first pause after a failure.
    attempts: int = Field(4, ge=1, le=100)
    backoff: float = Field(2, ge=0.001, le=600)
    # Time limit of a request to the model, and the expiry of a dead worker's lease.
    timeout: float = Field(120, ge=0.1, le=3600)
    lease: float = Field(30, ge=0.5, le=3600)
    falkordb: Database = Field(default_factory=partial(Database.of, "FALKORDB"))
    valkey: Database = Field(default_factory=partial(Database.of, "VALKEY"))
    openai: OpenAI = Field(default_factory=lambda: OpenAI.read(os.environ, "OPENAI_"))

    @property
    def has_model(self) -> bool:
        """Return whether a model is configured."""
        return bool(self.openai.api_key or self.openai.base_url)

    @property
    def api(self) -> str:
        """Return how to ask the model: ``model_api``, with ``auto`` resolved."""
        if self.model_api != "auto":
            return self.model_api
        url = self.openai.base_url
        return "chat" if url and urlsplit(url).hostname != "api.openai.com" else "responses"

    def require_model(self) -> None:
        """Raise Unavailable when no model is configured."""
        if not self.has_model:
            raise Unavailable(
                "no model is configured: set OPENAI_API_KEY for OpenAI, or OPENAI_BASE_URL,"
                " MEMORY_MODEL and MEMORY_EMBEDDING_MODEL for a compatible server"
            )


def read_settings(project: str = "") -> Settings:
    """Return the settings; ``project`` overrides MEMORY_PROJECT. Raises InvalidConfiguration."""
    environ = dict(os.environ)
    if project:
        environ["MEMORY_PROJECT"] = project
    return Settings.read(environ, "MEMORY_")


def project_name(directory: Path) -> str:
    """Return the default project of a directory: a name and a hash of its repository's origin.

    The origin is the same in every container, where the path is always /workspace. Without an
    origin, the path of the repository or of the directory is used.
    """
    parents = (directory, *directory.parents)
    root = next((path for path in parents if (path / ".git").exists()), directory)
    # git refuses a repository of another user, such as a mounted one, unless it is declared safe.
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "-C",
        str(root),
    ]
    try:
        result = subprocess.run(
            [
                *command,
                "config",
                "--get",
                "remote.origin.url",
            ],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        origin = result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        origin = ""
    # https://user:secret@host/owner/name.git and git@host:owner/name are one project.
    location = re.sub(r"^\w+://|^[^/@]*@(?=[^/]*:)", "", origin).rpartition("@")[2]
    origin = location.removesuffix(".git").replace(":", "/").lower()
    identity = (origin or str(root)).rstrip("/")
    name = re.sub("[^A-Za-z0-9]+", "_", identity.rpartition("/")[2]).strip("_")
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return f"{name[:40] or 'root'}_{digest[:8]}"
