"""Read what an RDB says of itself, and check that it is whole."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backup_lib.crc64 import crc64
from backup_lib.errors import CopyCorrupt

MAGIC = re.compile(rb"(REDIS|VALKEY)([0-9]{3,4})")
HEADER = 9
AUX, SELECT, RESIZE = b"\xfa", b"\xfe", b"\xfb"
END = 0xFF
TRAILER = 8


@dataclass(frozen=True)
class Rdb:
    """``version`` is the format's number; ``first`` the number of the first database and how many keys it has.

    That is known only when no module has put something of its own before them.
    """

    version: int
    first: tuple[int, int] | None


def look(path: Path) -> Rdb:
    """Check an RDB and return what it says. Raises CopyCorrupt."""
    remedy = "Nothing was changed; make the copy again."
    size = path.stat().st_size
    with path.open("rb") as file:
        header = MAGIC.fullmatch(file.read(HEADER))
        if not header or size < HEADER + 1 + TRAILER:
            raise CopyCorrupt(f"{path.name} is not an RDB", remedy)
        first = _first(file)
        file.seek(size - TRAILER - 1)
        end = file.read(1 + TRAILER)
    if end[0] != END:
        raise CopyCorrupt(f"{path.name} has no end: it was cut", remedy)
    told = int.from_bytes(end[1:], "little")
    if told == 0:
        raise CopyCorrupt(f"{path.name} has no checksum", "Set rdbchecksum to yes at the server that it comes from.")
    if told != crc64(path, size - TRAILER):
        raise CopyCorrupt(f"{path.name} is not what its CRC64 says", remedy)
    return Rdb(int(header[2]), first)


def _first(file: IO[bytes]) -> tuple[int, int] | None:
    """Read past the fields at the beginning; return the first database's number and keys when they come next."""
    while (opcode := file.read(1)) == AUX:
        if not (_skip(file) and _skip(file)):
            return None
    if opcode != SELECT:
        return None
    number = _length(file)
    if file.read(1) != RESIZE or number is None or (keys := _length(file)) is None:
        return None
    return number, keys


def _length(file: IO[bytes]) -> int | None:
    """Return a length: six bits, fourteen, 32 or 64; None for what is none."""
    first = file.read(1)[0]
    kind, low = first >> 6, first & 0x3F
    if kind == 0:
        return low
    if kind == 1:
        return low << 8 | file.read(1)[0]
    widths = {0x80: 4, 0x81: 8}
    return int.from_bytes(file.read(widths[first]), "big") if first in widths else None


def _skip(file: IO[bytes]) -> bool:
    """Read past a short string or an integer, as the fields at the beginning are; say whether it was one."""
    first = file.read(1)[0]
    kind, low = first >> 6, first & 0x3F
    if kind == 0:
        file.read(low)
    elif kind == 3 and low < 3:  # noqa: PLR2004 -- 3: an integer of 1 << low bytes
        file.read(1 << low)
    else:
        return False
    return True
