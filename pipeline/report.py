"""What people read: colour and tables on a terminal, plain lines in cron and in pipes."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Return the one console, on stdout; plain and unwrapped when that is no terminal."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what git or npm says may not fit the user's locale
    return Console(
        emoji=False, width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty(), highlight=False
    )


def say(text: str) -> None:
    """Print one line of what is being done or was seen."""
    console().print(text, markup=False)


def ok(text: str) -> None:
    """Print one line of something that is as it should be."""
    console().print(f"ok    {text}", style="green", markup=False)


def warn(text: str) -> None:
    """Print a warning that cannot be missed: a marked line for each line of ``text``."""
    for line in text.splitlines():
        console().print(f"!!    {line}", style="bold yellow", markup=False)


def fail(text: str) -> None:
    """Print one line of something that is not as it should be."""
    console().print(f"FAIL  {text}", style="bold red", markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a title; without a terminal the same columns, aligned with spaces."""
    from rich.box import SIMPLE
    from rich.table import Table

    box = SIMPLE if sys.stdout.isatty() else None
    grid = Table(*columns, title=title, title_justify="left", box=box, pad_edge=False)
    for row in rows:
        grid.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console().print(grid)


def megabytes(size: float) -> str:
    """Return ``size`` bytes as decimal megabytes, the engines' own unit."""
    return f"{size / 1e6:,.1f} MB"


def without_credentials(url: str) -> str:
    """Return ``url`` without a user name or password: labels, records and messages are for everyone to read."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an impossible URL"
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else url
