"""git in the server's container: a clone for /workspace, and who commits."""

from __future__ import annotations

from urllib.parse import urlsplit

from pipeline.core import process
from pipeline.core.console import without_credentials
from pipeline.core.errors import ProjectRefused
from pipeline.engines.engine import Engine

CLONE_SECONDS = 1800

CLONE = """
if [ -e .git ]; then echo present; exit; fi
[ -z "$(ls -A)" ] || { echo "/workspace is not empty" >&2; exit 1; }
GIT_TERMINAL_PROMPT=0 exec git clone --quiet -- "$1" .
"""

# The state volume keeps it, and what the user sets there later stays.
IDENTITY = """
git config --global user.email >/dev/null && exit
git config --global user.name "$1" && git config --global user.email "$2"
"""


def identify(engine: Engine, container: str) -> None:
    """Give git in the container this user's name and address, unless it has some."""
    values = [_global(f"user.{key}") for key in ("name", "email")]
    if all(values):
        engine.ask(engine.exec(container, "sh", "-c", IDENTITY, "-", *values))


def _global(name: str) -> str:
    return process.run(["git", "config", "--global", name], timeout=10).stdout.strip()


def clone(engine: Engine, container: str, url: str) -> bool:
    """Clone ``url`` into /workspace unless a repository is there; return whether it was cloned.

    Raises ProjectRefused.
    """
    if urlsplit(url).password:
        raise ProjectRefused(
            f"the URL {without_credentials(url)} has a password, which ps would show",
            "Leave it out. For tokens of git see docs/operations.md.",
        )
    argv = engine.exec(container, "sh", "-c", CLONE, "-", url)
    done = engine.ask(argv, timeout=CLONE_SECONDS)
    if not done.ok:
        raise ProjectRefused(
            f"cannot clone {url}: {done.output}",
            "For keys and tokens of git see docs/operations.md. To look: inv shell.",
        )
    return done.stdout.strip() != "present"
