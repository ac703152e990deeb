"""What the paper says, and what measured figures say about it: means, intervals, verdicts."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval of confidence `LEVEL` (Student's t); infinite for a single figure."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        """As a gain, in points."""
        return f"{self.mean:+.1f}" + (f" ± {self.half:.1f}" if math.isfinite(self.half) else "")

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(figures: Sequence[float]) -> Interval:
    """The mean of independent figures and how far it can be trusted.

    Raises:
        ValueError: no figure.

    >>> interval([1.0, 2.0, 3.0]).half.__round__(2)
    2.48
    """
    if not figures:
        raise ValueError("the interval of no figure is unknown: give at least one")
    count, mean = len(figures), statistics.fmean(figures)
    if count == 1:
        return Interval(mean, math.inf, 1)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(figures) / math.sqrt(count), count)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One side is better than another, as the paper found.

    Attributes:
        text: in a sentence.
        better, worse: names of rows.
        paper: its figures and where they stand.
        otherwise: why it may not be so here; told where it is not.
    """

    text: str
    better: str
    worse: str
    paper: str
    otherwise: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the figures say of a claim; `gain` is None where the sides have no seed in common."""

    claim: Claim
    word: str
    gain: Interval | None

    @property
    def is_tried(self) -> bool:
        """Whether there are seeds enough for an interval."""
        return self.gain is not None and self.gain.count > 1


def judge(claim: Claim, rows: Mapping[str, Mapping[int, float]]) -> Verdict:
    """Compares the two sides of a claim, seed by seed.

    Args:
        rows: figures by row and seed. Runs of a seed share their data order, so it is their differences that
            are averaged.
    """
    better, worse = rows.get(claim.better, {}), rows.get(claim.worse, {})
    shared = sorted(better.keys() & worse.keys())
    if not shared:
        return Verdict(claim, "not run", None)
    gain = interval([better[seed] - worse[seed] for seed in shared])
    if gain.count == 1:
        word = "one seed"
    elif gain.low > 0:
        word = "agrees"
    elif gain.high < 0:
        word = "does not"
    else:
        word = "cannot tell"
    return Verdict(claim, word, gain)
