"""How pip or uv installs a lock file: the command and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def install_argv(
    lock: Path,
    *,
    pip: bool,
) -> list[str]:
    """Return the command that installs ``lock``: pip's, or uv's where .venv has no pip."""
    argv = [
        "uv",
        "pip",
        "install",
        "--python",
        sys.executable,
    ]
    if pip:
        argv = [
            sys.executable,
            "-m",
            "pip",
            "install",
        ]
    return [
        *argv,
        "--quiet",
        "--require-hashes",
        "-r",
        str(lock),
    ]


def tool_env() -> dict[str, str]:
    """Return what ./inv sets too: no constraints (they lack hashes), pip's settings for uv."""
    env = {"UV_CONSTRAINT": "", "PIP_CONSTRAINT": os.devnull, "PIP_USER": "0"}
    for uv, pip in (("UV_DEFAULT_INDEX", "PIP_INDEX_URL"), ("SSL_CERT_FILE", "PIP_CERT")):
        if pip in os.environ:
            env[uv] = os.environ.get(uv) or os.environ[pip]
    return env
