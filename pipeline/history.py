"""What was built and released here, for good: JSON lines, appended and synced, never rewritten."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from pipeline.image import now
from pipeline.report import megabytes, say, table, warn
from pipeline.settings import BUILD

FILE = BUILD / "history.jsonl"


def append(record: dict[str, Any], path: Path | None = None) -> None:
    """Append ``record`` with the time as one line, and sync it to disk. Raises OSError where that cannot be done.

    A line that was torn, by a power cut in the middle of it, is ended first: nothing is glued onto it.
    """
    path = path or FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        line = json.dumps({"at": now(), **record}, ensure_ascii=False)
        try:
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)  # a full disk takes half a line
            raise
        os.fsync(file.fileno())


def read(path: Path | None = None) -> tuple[list[dict[str, Any]], int]:
    """Return the records, oldest first, and how many lines are none."""
    path, records, torn = path or FILE, [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
        else:
            torn += 1
    return records, torn


def show(*, lines: bool = False, last: int = 20) -> None:
    """Print the ``last`` records as a table, or all of them as they are, as JSON ``lines``."""
    records, torn = read()
    if torn:
        warn(f"{torn} lines of {FILE.name} are torn or no records of ours, and are left out")
    if lines:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    rows = [
        (record["at"], record["kind"], record.get("outcome", ""), record.get("image", "").removeprefix("sha256:")[:12],
         record.get("tag", ""), megabytes(record["size"]) if record.get("size") else "",
         f"{record['seconds']:.0f} s" if "seconds" in record else "", brief(record))
        for record in records[-last:]
    ]  # fmt: skip
    if rows:
        table(f"The last {len(rows)} of {len(records)}", ("when", "what", "", "image", "tag", "size", "took", ""), rows)
    else:
        say("history: nothing was built or released here yet")


def brief(record: dict[str, Any]) -> str:
    """Return in one phrase why a record ended as it did, or what changed."""
    why = ": ".join(part for part in (record.get("where", ""), record.get("why", "")) if part)
    changed = [*(record.get("moves") or record.get("changes") or []), *record.get("remarks", [])]
    return str(why or "; ".join(changed) or record.get("to", ""))


def inputs_of(image_id: str) -> str:
    """Return the digest of the inputs that an image was made of, empty when no night made it."""
    made = (each.get("inputs", "") for each in reversed(read()[0]) if same(each.get("image", ""), image_id))
    return next(filter(None, made), "")


def same(one: str, other: str) -> bool:
    """Whether two image IDs are one: docker writes the algorithm in front, podman does not."""
    return bool(one) and one.removeprefix("sha256:") == other.removeprefix("sha256:")
