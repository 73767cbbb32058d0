"""Read what an RDB says of itself, and check that it is whole."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backup_lib.crc64 import crc64
from backup_lib.errors import CopyCorrupt

MAGIC = re.compile(rb"(REDIS|VALKEY)([0-9]{3,4})")
HEADER = 9
END = 0xFF
TRAILER = 8


@dataclass(frozen=True)
class Rdb:
    """``version`` is the format's number; ``server`` and ``seconds`` what wrote it and when."""

    version: int
    server: str
    seconds: int


def look(path: Path) -> Rdb:
    """Check an RDB and return what it says. Raises CopyCorrupt."""
    remedy = "Nothing was changed; make the copy again."
    size = path.stat().st_size
    with path.open("rb") as file:
        header = MAGIC.fullmatch(file.read(HEADER))
        if not header or size < HEADER + 1 + TRAILER:
            raise CopyCorrupt(f"{path.name} is not an RDB", remedy)
        aux = _aux(file)
        file.seek(size - TRAILER - 1)
        end = file.read(1 + TRAILER)
    if end[0] != END:
        raise CopyCorrupt(f"{path.name} has no end: it was cut", remedy)
    told = int.from_bytes(end[1:], "little")
    if told == 0:
        raise CopyCorrupt(f"{path.name} has no checksum", "Set rdbchecksum to yes at the server that it comes from.")
    if told != crc64(path, size - TRAILER):
        raise CopyCorrupt(f"{path.name} is not what its CRC64 says", remedy)
    seconds = aux.get("ctime", "0")
    server = aux.get("redis-ver") or aux.get("valkey-ver", "")
    return Rdb(int(header[2]), server, int(seconds) if seconds.isdigit() else 0)


def _aux(file: IO[bytes]) -> dict[str, str]:
    """Return the fields at the beginning: names and values, which all are short."""
    found: dict[str, str] = {}
    while file.read(1) == b"\xfa":
        name, value = _text(file), _text(file)
        if name is None or value is None:
            break
        found[name] = value
    return found


def _text(file: IO[bytes]) -> str | None:
    """Return a string of less than 64 bytes or an integer, as both are written here; None for anything else."""
    first = file.read(1)
    if not first:
        return None
    kind, low = first[0] >> 6, first[0] & 0x3F
    if kind == 0:
        return file.read(low).decode(errors="replace")
    if kind == 3 and low < 3:  # noqa: PLR2004 -- 3: an integer of 1 << low bytes
        return str(int.from_bytes(file.read(1 << low), "little", signed=True))
    return None
