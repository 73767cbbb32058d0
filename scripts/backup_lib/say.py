"""What is told while it happens, on stderr; results go to stdout."""

import sys
from datetime import UTC, datetime

LETTERS = ("B", "kB", "MB", "GB")


def say(text: str) -> None:
    """Print a line with the time, free of what would move a terminal's cursor."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    print(f"{datetime.now(UTC):%H:%M:%SZ} {plain}", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Return bytes as people read them."""
    for letter in LETTERS[:-1]:
        if count < 1000:  # noqa: PLR2004 -- as disks are sold
            return f"{count:.3g} {letter}"
        count /= 1000
    return f"{count:.3g} {LETTERS[-1]}"


def age(seconds: float) -> str:
    """Return a time as people read it."""
    for length, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {letter}"
    return f"{seconds:.0f} s"
