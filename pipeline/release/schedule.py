"""The entry in the user's crontab that runs ``nightly`` every night."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
import shutil
from collections.abc import Mapping
from datetime import time
from pathlib import Path

from pipeline.core.console import log, ok, warn
from pipeline.core.errors import ScheduleFailed, SettingRefused
from pipeline.core.settings import ROOT
from pipeline.inputs.ca import VARIABLES

DELAY_SECONDS = 3600
"""A night starts at a random moment within this time, which spreads the load on registries."""

KEPT = (
    "CONTAINER",
    "DOCKER_",
    "GIT_SSL_",
    "INVOKE_",
    "NO_PROXY",
    "NPM_CONFIG_",
    "PIP_INDEX_URL",
    "UV_",
    "XDG_",
    "http_proxy",
    "https_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    *VARIABLES,
)
"""Prefixes of the variables that go into the entry: cron passes on none of them."""

SECRET = re.compile(r"^\w*(TOKEN|KEY|SECRET|PASS|AUTH|WEBHOOK)\w*=|://[^/]*@", re.IGNORECASE)
"""A variable whose name or value, as NAME=VALUE, suggests a secret."""


def schedule(
    *,
    at: str = "",
    remove: bool = False,
    show: bool = False,
    dry_run: bool = False,
    root: Path = ROOT,
) -> None:
    """Install, ``show`` or ``remove`` the entry for the checkout ``root``.

    ``at`` is HH:MM; the default is a random minute between 01:00 and 04:59. Installing replaces an
    earlier entry and leaves those of others alone. Raises ScheduleFailed, SettingRefused.
    """
    start = _time(at)
    if not shutil.which("crontab"):
        what = "crontab is not on PATH"
        raise ScheduleFailed(what, "Install cron, or use deploy/systemd (docs/nightly.md).")
    from crontab import CronTab

    digest = hashlib.sha256(str(root).encode()).hexdigest()
    name = f"opencode-server-nightly-{digest[:6]}"
    try:
        table = CronTab(user=True)
        entries = list(table.find_comment(name))
        if show:
            log("\n".join(map(str, entries)) or f"no crontab entry runs nightly in {root}")
            return
        table.remove_all(comment=name)
        if not remove:
            entry = table.new(command(root), comment=name)
            entry.setall(start)
            log(str(entry))
        if not dry_run:
            table.write()
            ok("crontab: entry removed" if remove else f"crontab: nightly runs after {start:%H:%M}")
    except OSError as error:
        raise ScheduleFailed(
            "the crontab cannot be read or written",
            "Check that this user may have one: crontab -l",
            str(error),
        ) from error


def command(root: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Return the entry's command, with the variables that a night needs.

    Variables that may hold a secret are left out, with a warning.
    """
    variables = [f"PATH={environ.get('PATH', os.defpath)}"]
    for name, value in sorted(environ.items()):
        variable = f"{name}={value}"
        if not name.startswith(KEPT) or "\n" in value:
            continue
        if SECRET.search(variable):
            warn(f"{name} may hold a secret and is left out: set it in the crontab (crontab -e)")
        else:
            variables.append(variable)
    inv = [
        str(root / "inv"),
        "nightly",
        "--log",
        "--delay",
        str(DELAY_SECONDS),
    ]
    # In a crontab an unescaped % ends the command: crontab(5).
    return shlex.join(["/usr/bin/env", *variables, *inv]).replace("%", r"\%")


def _time(at: str) -> time:
    if not at:
        return time(random.randrange(1, 5), random.randrange(60))  # noqa: S311 -- no secret
    try:
        return time.fromisoformat(at)
    except ValueError as error:
        raise SettingRefused(f"--at {at} is not a time of day", "Use HH:MM.") from error
