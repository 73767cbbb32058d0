"""Files of JSON: those of state in ``build/``, written atomically, and those that people edit."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

STRINGS = r'("(?:[^"\\]|\\.)*")|'
COMMENT = re.compile(rf"{STRINGS}//[^\n]*|/\*.*?\*/", re.DOTALL)
TRAILING_COMMA = re.compile(rf"{STRINGS},(?=\s*[]}}])", re.DOTALL)
"""What OpenCode accepts in its configuration beside JSON; strings are matched to be kept."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where the file is missing or damaged.

    The files are caches or logs: what is lost is written again.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_json(path: Path, record: object) -> None:
    """Write ``record`` so that a crash or power failure leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{json.dumps(record, indent=1)}\n")


def write_text(path: Path, text: str, mode: int = 0) -> None:
    """Write ``text`` as ``write_json`` does; ``mode`` replaces the one of the umask."""
    draft = path.with_suffix(f".{os.getpid()}.part")
    with draft.open("w") as file:
        file.write(text)
        if mode:
            os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_jsonc(path: Path) -> Any:
    """Return a file of JSON with comments, trailing commas and a BOM, as OpenCode reads it.

    Raises OSError, or ValueError with the line of the fault.
    """
    text = path.read_text(encoding="utf-8-sig")
    # Newlines stay, for the line numbers of errors.
    text = COMMENT.sub(lambda found: found[1] or re.sub(r"[^\n]", " ", found[0]), text)
    return json.loads(TRAILING_COMMA.sub(lambda found: found[1] or " ", text))
