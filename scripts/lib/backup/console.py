"""Progress on stderr, and sizes and ages as people read them. Results go to stdout."""

import sys
from datetime import UTC, datetime

from lib.common.command_line import printable

UNITS = (
    "B",
    "kB",
    "MB",
    "GB",
)
THOUSAND = 1000


def log(text: str) -> None:
    """Print a line with the time."""
    print(f"{datetime.now(UTC):%H:%M:%SZ} {printable(text)}", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Return bytes in decimal units."""
    unit = 0
    while count >= THOUSAND and unit < len(UNITS) - 1:
        count /= THOUSAND
        unit += 1
    return f"{count:.3g} {UNITS[unit]}"


def age(seconds: float) -> str:
    """Return seconds in days, hours, minutes or seconds."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
