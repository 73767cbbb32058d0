"""When nights run."""

from typing import Any


def schedule(*_: Any, **__: Any) -> None:
    """Schedule."""
