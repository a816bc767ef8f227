"""How far seeds lie apart, and whether a difference between two backbones stands out of that."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and standard deviation of some values; nan where they cannot be had."""

    mean: float
    sd: float
    """Between the values (n - 1); nan for fewer than two."""
    values: int
    """n."""


class Difference(NamedTuple):
    """The mean of paired differences; nan where there are none."""

    mean: float
    half_width: float
    """Of the 95% confidence interval of the mean (Student's t); nan for fewer than two pairs."""
    pairs: int

    @property
    def stands_out(self) -> bool | None:
        """Whether the interval leaves out 0; None where no noise was seen: of fewer than two pairs, or of equal ones.

        It is the noise of what the seeds draw in a transfer; that of the pretraining's own seed is not in it.
        """
        # nan, or what is nothing drawn
        return abs(self.mean) > self.half_width if self.half_width > 0 else None


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, deviation and number of some values."""
    if not values:
        return Spread(math.nan, math.nan, 0)
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), sd, len(values))


def confidence_half_width(values: Sequence[float]) -> float:
    """Half the width of the mean's 95% confidence interval by Student's t; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Ours minus theirs over the seeds that both have.

    Paired, since a seed draws the same images, splits and orders for every backbone: what the draw adds to both drops
    out of the difference.
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return Difference(spread_of(differences).mean, confidence_half_width(differences), len(differences))
