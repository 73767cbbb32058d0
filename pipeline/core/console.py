"""Output for people: colour and tables on a terminal, plain lines in a pipe or a log file."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.core.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Return the console on stdout; without a terminal its lines are neither coloured nor wrapped.

    rich is imported here, since ``inv --list`` does not need it.
    """
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        # The output of git or npm may hold characters that the user's locale lacks.
        sys.stdout.reconfigure(errors="replace")
    terminal = sys.stdout.isatty()
    return Console(
        emoji=False, width=None if terminal else 200, soft_wrap=not terminal, highlight=False
    )


def log(text: str, style: str = "") -> None:
    """Print a line of progress; ``style`` is one of rich's, such as dim.

    Text in square brackets is printed as it is, not taken for rich's markup.
    """
    console().print(printable(text), style=style, markup=False)


def ok(text: str) -> None:
    """Print a line about a success."""
    log(f"ok    {text}", "green")


def warn(text: str) -> None:
    """Print a warning; each line of ``text`` is marked."""
    for line in text.splitlines():
        log(f"!!    {line}", "bold yellow")


def fail(text: str) -> None:
    """Print a line about a failure."""
    log(f"FAIL  {text}", "bold red")


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> None:
    """Print rows under a title; without a terminal the columns are aligned with spaces.

    ``columns`` are the headings; each row has as many cells.
    """
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    box = SIMPLE if sys.stdout.isatty() else None
    grid = Table(*columns, title=title, title_justify="left", box=box, pad_edge=False)
    for row in rows:
        grid.add_row(*[escape(printable(str(cell))) for cell in row])
    console().print(grid)


def megabytes(size: float) -> str:
    """Return ``size`` bytes as decimal megabytes, the unit that the engines print.

    megabytes(731_234_567) is 731.2 MB.
    """
    return f"{size / 1e6:,.1f} MB"


def without_credentials(url: str) -> str:
    """Return ``url`` without user name and password, for labels, records and messages.

    https://me:token@example.com/x becomes https://example.com/x.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an invalid URL"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
