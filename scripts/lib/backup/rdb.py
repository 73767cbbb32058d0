"""Check an RDB file."""

import re
from pathlib import Path

from lib.backup.crc64 import crc64
from lib.backup.errors import CopyCorrupt

HEADER = re.compile(rb"(REDIS|VALKEY)([0-9]{3,4})")
HEADER_BYTES = 9
END = b"\xff"
CHECKSUM_BYTES = 8


def check(path: Path) -> int:
    """Check an RDB file, also its CRC64, and return the version of the format.

    Raises CopyCorrupt.
    """
    remedy = "Nothing was changed. Run it again."
    size = path.stat().st_size
    with path.open("rb") as file:
        header = HEADER.fullmatch(file.read(HEADER_BYTES))
        if not header or size <= HEADER_BYTES + CHECKSUM_BYTES:
            raise CopyCorrupt(f"{path.name} is not an RDB file", remedy)
        file.seek(size - CHECKSUM_BYTES - 1)
        end = file.read(1)
        checksum = int.from_bytes(file.read(), "little")
    if end != END:
        raise CopyCorrupt(f"{path.name} is incomplete: it was cut", remedy)
    if checksum == 0:
        raise CopyCorrupt(f"{path.name} has no checksum", "Run: CONFIG SET rdbchecksum yes")
    if checksum != crc64(path, size - CHECKSUM_BYTES):
        raise CopyCorrupt(f"{path.name} does not match its CRC64", remedy)
    return int(header[2])
