"""What a benchmark returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """``ours`` over ``theirs``, both in ``unit``; ``aim`` is what it should be at most."""

    name: str
    against: str
    unit: str
    ours: float
    theirs: float
    aim: float

    @property
    def ratio(self) -> float:
        """Return ours over theirs; less is better."""
        return self.ours / self.theirs
