"""The history of builds and releases: ``build/history.jsonl``, one JSON record per line.

Records are appended and synced to disk, and never changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.core.clock import now
from pipeline.core.console import log, megabytes, table, warn
from pipeline.core.errors import printable
from pipeline.core.settings import BUILD
from pipeline.image.tags import same_id

FILE = BUILD / "history.jsonl"

Record = dict[str, Any]

COLUMNS = ["when", "what", "outcome", "image", "tag", "size", "took", "reason or changes"]


def append(record: Record) -> None:
    """Append ``record`` with the current time, and sync it to disk.

    Raises OSError, for example when the disk is full.
    """
    line = json.dumps({"at": now(), **record}, ensure_ascii=False)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.open("ab") as file:
        # A newline on both sides: a power cut may have left the line before without one.
        file.write(f"\n{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path | None = None) -> tuple[list[Record], int]:
    """Return all records, oldest first, and the number of damaged lines.

    ``path`` is FILE by default.
    """
    path = path or FILE
    records = []
    damaged = 0
    content = path.read_bytes() if path.exists() else b""
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def show(*, lines: bool = False, last: int = 20) -> None:
    """Print the ``last`` records as a table, or with ``lines`` all records as JSON lines."""
    records, damaged = read()
    if damaged:
        warn(f"ignoring {damaged} damaged lines in {FILE.name}")
    if lines:
        for record in records:
            print(json.dumps(record))
    elif records:
        rows = [_row(record) for record in records[-last:]]
        table(f"The last {len(rows)} of {len(records)} records", COLUMNS, rows)
    else:
        log("history: empty; nothing has been built or released")


def _row(record: Record) -> tuple[str, ...]:
    return (
        record["at"],
        record["kind"],
        record.get("outcome", ""),
        record.get("image", "").removeprefix("sha256:")[:12],
        record.get("tag", ""),
        megabytes(record["size"]) if record.get("size") else "",
        f"{record['seconds']:.0f} s" if "seconds" in record else "",
        brief(record),
    )


def brief(record: Record) -> str:
    """Return in one line why a night failed or was skipped, or what changed.

    That is the step and the reason, else the pins that moved with remarks, else the target of a
    push or rollback.
    """
    reasons = filter(None, [record.get("where"), record.get("why")])
    changes = record.get("moves") or record.get("changes") or []
    changes = [*changes, *record.get("remarks", [])]
    text = ": ".join(reasons) or "; ".join(changes) or str(record.get("to", ""))
    return printable(" ".join(text.split()))


def inputs_of(image_id: str) -> str:
    """Return the digest of the inputs that a night built an image from.

    Returns an empty string for an image that no night built.
    """
    for record in reversed(read()[0]):
        if record.get("inputs") and same_id(record.get("image", ""), image_id):
            return str(record["inputs"])
    return ""
