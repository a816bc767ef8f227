"""Means, deviations and 95% confidence intervals over repeated measurements.

Two things are random in a result: the seed of the transfer (its images, splits and orders) and
the seed of the pretraining. Repeating the transfer with other seeds measures one backbone. To
measure a recipe, the pretraining must be repeated as well.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

Repetitions = Sequence[Mapping[int, float]]
"""One mapping for each pretraining, in any order: the value by the seed of the transfer."""

Noise = Literal["seeds", "pretrainings"]


def confidence_half_width(values: Sequence[float]) -> float:
    """Half the width of the mean's 95% confidence interval by Student's t.

    It is nan for fewer than two values.
    """
    if len(values) < 2:
        return math.nan
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


class RepeatedSpread(NamedTuple):
    """Mean and deviations over pretrainings that differ only in their seed; nan where undefined."""

    mean: float
    """Mean of the pretrainings' means; every pretraining has the same weight."""
    between: float
    """Standard deviation between the pretrainings' means; nan for fewer than two.

    It includes the variance of the transfer's seeds, divided by the number of seeds."""
    within: float
    """Standard deviation over the seeds of one pretraining, pooled; nan where none has two."""
    pretrainings: int
    values: int
    """Number of values over all pretrainings."""

    @property
    def sd(self) -> float:
        """The deviation shown beside the mean: `between` with two pretrainings, else `within`."""
        return self.between if self.pretrainings > 1 else self.within


class RepeatedDifference(NamedTuple):
    """A difference of two means over pretrainings and seeds; nan where no seed is common to all."""

    mean: float
    half_width: float
    """Half the width of the 95% confidence interval; nan where nothing was repeated."""
    seeds: int
    """Number of seeds that all pretrainings of both sides have."""
    noise: tuple[Noise, ...]
    """The sources of noise that the interval includes."""

    @property
    def stands_out(self) -> bool | None:
        """True if the interval excludes 0; None where no noise was measured."""
        return abs(self.mean) > self.half_width if self.half_width > 0 else None


class _Variance(NamedTuple):
    """An estimated variance of a mean."""

    value: float
    freedom: int
    """Degrees of freedom."""


def repeated_spread(values: Repetitions) -> RepeatedSpread:
    """Mean and deviations over pretrainings; those without a value are left out."""
    measured = [list(by_seed.values()) for by_seed in values if by_seed]
    means = [statistics.fmean(group) for group in measured]
    freedom = sum(len(group) - 1 for group in measured)
    squares = 0.0
    for group in measured:
        if len(group) > 1:
            squares += statistics.variance(group) * (len(group) - 1)
    return RepeatedSpread(
        mean=statistics.fmean(means) if means else math.nan,
        between=statistics.stdev(means) if len(means) > 1 else math.nan,
        within=math.sqrt(squares / freedom) if freedom else math.nan,
        pretrainings=len(measured),
        values=sum(map(len, measured)),
    )


def repeated_difference(
    ours: Repetitions, theirs: Repetitions, *, baseline: bool
) -> RepeatedDifference:
    """Our mean minus theirs over the common seeds, with its 95% confidence interval.

    Only the seeds that all pretrainings of both sides have are used. They are paired: a seed draws
    the same images, splits and orders for every backbone, so the part of the draw that both share
    cancels in the difference. The pretrainings are not paired, since two pretrainings with
    different settings hardly become similar by sharing a seed.

    The variance of the difference is the sum of two parts, one from the seeds and one from the
    pretrainings. Both include the noise of a single measurement, so the interval is rather too
    wide than too narrow. The quantile is Student's, with the degrees of freedom by Welch and
    Satterthwaite. If only one side was repeated, the other is assumed to have the same variance.
    If neither was, the interval describes these two backbones and not their recipes.

    Args:
        ours: the pretrainings of one recipe.
        theirs: the pretrainings of another recipe, or the only entry of a baseline.
        baseline: `theirs` is a baseline, which has no pretraining of ours: its only noise is that
            of the transfer's seed.
    """
    common = sorted(set.intersection(*(set(by_seed) for by_seed in (*ours, *theirs))))
    if not common:
        return RepeatedDifference(math.nan, math.nan, 0, ())
    our_table = [_values_at(common, by_seed) for by_seed in ours]  # pretrainings x seeds
    their_table = [_values_at(common, by_seed) for by_seed in theirs]

    our_by_seed = [statistics.fmean(column) for column in zip(*our_table, strict=True)]
    their_by_seed = [statistics.fmean(column) for column in zip(*their_table, strict=True)]
    differences = [our - their for our, their in zip(our_by_seed, their_by_seed, strict=True)]
    over_seeds = _variances_of_mean([differences])

    our_means = [statistics.fmean(row) for row in our_table]
    their_means = [statistics.fmean(row) for row in their_table]
    over_pretrainings = _variances_of_mean([our_means] if baseline else [our_means, their_means])

    noise: list[Noise] = []
    if over_seeds:
        noise.append("seeds")
    if over_pretrainings:
        noise.append("pretrainings")
    return RepeatedDifference(
        mean=statistics.fmean(differences),
        half_width=_half_width([*over_seeds, *over_pretrainings]),
        seeds=len(common),
        noise=tuple(noise),
    )


def _values_at(seeds: Sequence[int], by_seed: Mapping[int, float]) -> list[float]:
    return [by_seed[seed] for seed in seeds]


def _variances_of_mean(groups: Sequence[Sequence[float]]) -> list[_Variance]:
    """The variance of each group's mean; empty if no group has two values.

    A group of one value is assumed to have the variance of the repeated group, so one estimate
    then stands for both means.
    """
    repeated = [group for group in groups if len(group) > 1]
    if len(repeated) == len(groups):
        return [
            _Variance(statistics.variance(group) / len(group), len(group) - 1) for group in groups
        ]
    factor = sum(1 / len(group) for group in groups)
    return [_Variance(statistics.variance(group) * factor, len(group) - 1) for group in repeated]


def _half_width(variances: Iterable[_Variance]) -> float:
    """Half the 95% interval of a mean with the sum of these variances; nan without any."""
    parts = list(variances)
    if not parts:
        return math.nan
    total = sum(part.value for part in parts)
    if total == 0:
        return 0.0
    from scipy.special import stdtrit

    freedom = total**2 / sum(part.value**2 / part.freedom for part in parts)
    return float(stdtrit(freedom, 0.975)) * math.sqrt(total)
