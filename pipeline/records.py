"""Records that the tasks keep in ``build/``: JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Return a record of ours, or nothing where it is missing or torn: it only saves work, and is written again."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_json(path: Path, record: object) -> None:
    """Write ``record`` whole or not at all, also where the power is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, text = path.with_suffix(f".{os.getpid()}.part"), json.dumps(record, indent=1) + "\n"
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
