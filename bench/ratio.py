"""What a benchmark returns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """``ours`` over ``theirs``, both in ``unit``; the ratio should be ``aim`` at most."""

    name: str
    against: str
    unit: str
    ours: float
    theirs: float
    aim: float

    @classmethod
    def of_medians(
        cls, name: str, against: str, ours: Sequence[float], theirs: Sequence[float], aim: float
    ) -> Ratio:
        """Return the ratio of the medians of seconds."""
        return cls(name, against, "s", statistics.median(ours), statistics.median(theirs), aim)

    @property
    def ratio(self) -> float:
        """Return ours over theirs; less is better."""
        return self.ours / self.theirs
