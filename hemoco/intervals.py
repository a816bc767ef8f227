"""How far seeds and pretrainings lie apart, and whether a difference between two backbones stands out of that.

Two things are drawn: the seed of a transfer (images, splits, orders), and the seed of a pretraining. What is known of
one pretraining holds for that backbone; what is to hold for its recipe takes several.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

Repetitions = Sequence[Mapping[int, float]]
"""Of each pretraining, in any order: the value by the transfer's seed."""

Noise = Literal["seeds", "pretrainings"]


class Spread(NamedTuple):
    """Mean and standard deviation of some values; nan where they cannot be had."""

    mean: float
    sd: float
    """Between the values (n - 1); nan for fewer than two."""
    values: int
    """n."""


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


class RepeatedSpread(NamedTuple):
    """Values of some pretrainings that differ by their seed only; nan where they cannot be had."""

    mean: float
    """Of the pretrainings' means, each counts alike."""
    between: float
    """Standard deviation between the pretrainings' means; nan for fewer than two. The noise of the transfer's seeds is
    in it, divided by the root of their number."""
    within: float
    """Standard deviation over the seeds of one pretraining, pooled; nan where none has two."""
    pretrainings: int
    values: int
    """Over all pretrainings."""

    @property
    def sd(self) -> float:
        """The one a mean is shown with: between the pretrainings where there are several, else over the seeds."""
        return self.between if self.pretrainings > 1 else self.within


class RepeatedDifference(NamedTuple):
    """The difference of two means over pretrainings and seeds; nan where no seed is common to all."""

    mean: float
    half_width: float
    """Of its 95% confidence interval; nan where nothing was repeated."""
    seeds: int
    """That all pretrainings of both sides have."""
    noise: tuple[Noise, ...]
    """What the interval is made of."""

    @property
    def stands_out(self) -> bool | None:
        """Whether the interval leaves out 0; None where no noise was seen."""
        return abs(self.mean) > self.half_width if self.half_width > 0 else None


class _Variance(NamedTuple):
    """Of a mean, as estimated."""

    value: float
    freedom: int


def repeated_spread(values: Repetitions) -> RepeatedSpread:
    """Mean and deviations of some pretrainings; those without a value are left out."""
    measured = [list(by_seed.values()) for by_seed in values if by_seed]
    means = spread_of([statistics.fmean(some) for some in measured])
    freedom = sum(len(some) - 1 for some in measured)
    squares = sum(statistics.variance(some) * (len(some) - 1) for some in measured if len(some) > 1)
    within = math.sqrt(squares / freedom) if freedom else math.nan
    return RepeatedSpread(means.mean, means.sd, within, len(measured), sum(map(len, measured)))


def repeated_difference(
    ours: Repetitions, theirs: Repetitions, *, baseline: bool
) -> RepeatedDifference:
    """Ours minus theirs, over the transfer's seeds that all have, with the noise of seeds and of pretrainings.

    The seeds are paired, since a seed draws the same images, splits and orders for every backbone: what the draw adds
    to both drops out of the difference. The pretrainings are not: that two of different settings share a
    seed hardly makes them alike. The variance of the difference is the sum of what seeds and what pretrainings
    contribute; each contains the noise that is left in a single measurement, so that the interval is rather too wide
    than too narrow. Its quantile is Student's with Welch and Satterthwaite's degrees of freedom. Where one side alone
    was repeated, the other is taken to scatter alike; where neither was, the interval is that of these two backbones
    and not of their recipes.

    Args:
        ours: the pretrainings of one recipe.
        theirs: those of another; of a baseline, the only entry.
        baseline: they are no pretrainings of ours: their draw is that of the transfer's seed.
    """
    common = sorted(set.intersection(*(set(by_seed) for by_seed in (*ours, *theirs))))
    if not common:
        return RepeatedDifference(math.nan, math.nan, 0, ())
    sides = [[[by_seed[seed] for seed in common] for by_seed in side] for side in (ours, theirs)]
    over_pretrainings = [
        [statistics.fmean(column) for column in zip(*side, strict=True)] for side in sides
    ]
    differences = [our - their for our, their in zip(*over_pretrainings, strict=True)]
    seeds = _variances_of_mean([differences])
    over_seeds = [
        [statistics.fmean(values) for values in side] for side in (sides[:1] if baseline else sides)
    ]
    pretrainings = _variances_of_mean(over_seeds)
    noise: list[Noise] = []
    noise += ["seeds"] if seeds else []
    noise += ["pretrainings"] if pretrainings else []
    mean = statistics.fmean(differences)
    return RepeatedDifference(mean, _half_width([*seeds, *pretrainings]), len(common), tuple(noise))


def _variances_of_mean(groups: Sequence[Sequence[float]]) -> list[_Variance]:
    """Of the mean of each group; a group of one value is taken to scatter as the others; nothing if all have one."""
    repeated = [group for group in groups if len(group) > 1]
    if len(repeated) == len(groups):
        return [
            _Variance(statistics.variance(group) / len(group), len(group) - 1) for group in groups
        ]
    share = sum(1 / len(group) for group in groups)
    return [_Variance(statistics.variance(group) * share, len(group) - 1) for group in repeated]


def _half_width(variances: Iterable[_Variance]) -> float:
    """Of the 95% interval of a mean whose variance is the sum of these; nan for none."""
    parts = list(variances)
    total = sum(part.value for part in parts)
    if not parts or total == 0:
        return 0.0 if parts else math.nan
    from scipy.special import stdtrit

    freedom = total**2 / sum(part.value**2 / part.freedom for part in parts)
    return float(stdtrit(freedom, 0.975)) * math.sqrt(total)
