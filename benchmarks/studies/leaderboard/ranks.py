"""Ranks of several variants, as uncertain as seeds and problems make them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_opd.compare.statistics import CONFIDENCE, TWO_WAY_DRAWS, t_quantile
from lit_opd.errors import InputError

Values = NDArray[np.float64]
TIE = 1e-9  # of an accuracy: what rounding may part
NO_SPREAD = 1e-10  # of the largest eigenvalue


def joint_draws(tables: ArrayLike, *, seed: int = 0, draws: int = TWO_WAY_DRAWS) -> Values:
    """What the means of several tables might have been together: draws of ``two_way`` for many variants at once.

    Every draw moves all variants by the same seeds and the same problems drawn again. So the draws of a difference of two
    variants have the variance of ``two_way`` of their difference: Student's t becomes the multivariate t, and the
    factor that takes the rest out of the problems' means becomes the matrix A with A K A' = K - R / S, where K is the
    covariance of the problems' means and R that of the rest between variants. Its eigenvalues below 0 count as 0; where
    there are such, and problems hardly part two variants, their difference varies a little more than there.

    Args:
        tables: [V, S, P], variants on the same seeds and problems.
        seed: of the draws.
        draws: bootstrap samples.
    Returns:
        [draws, V].
    Raises:
        InputError: fewer than two seeds or problems, or values that are not finite.
    """
    values = np.asarray(tables, dtype=np.float64)
    if values.ndim != 3 or min(values.shape[1:], default=0) < 2 or not np.isfinite(values).all():
        raise InputError(f"ranks must be of tables [variants, seeds >= 2, problems >= 2], got {values.shape}")
    _, seeds, problems = values.shape
    means = values.mean((1, 2))
    rows, columns = values.mean(2) - means[:, None], values.mean(1) - means[:, None]
    rest = values - means[:, None, None] - rows[:, :, None] - columns[:, None, :]
    of_rest = np.einsum("isp,jsp->ij", rest, rest) / ((seeds - 1) * (problems - 1))
    of_columns = columns @ columns.T / (problems - 1)
    shrink = _root(of_columns - of_rest / seeds) @ _root(of_columns, inverse=True)
    generator = np.random.default_rng(seed)
    tails = np.sqrt((seeds - 1) / generator.chisquare(seeds - 1, draws))[:, None]
    by_seed = generator.standard_normal((draws, seeds)) @ rows.T / math.sqrt((seeds - 1) * seeds) * tails
    counts = generator.multinomial(problems, np.full(problems, 1 / problems), size=draws)
    again = counts @ (shrink @ columns).T / problems
    normal = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    lacking = math.sqrt(problems / (problems - 1)) * t_quantile(problems - 1) / normal
    return np.asarray(means + by_seed + again * lacking)


def _root(matrix: Values, *, inverse: bool = False) -> Values:
    """Symmetric root of a symmetric matrix, or its pseudo-inverse; eigenvalues that are 0 or below stay out."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > NO_SPREAD * max(values[-1], 0.0)
    roots = np.sqrt(values[kept])
    return np.asarray((vectors[:, kept] * (1 / roots if inverse else roots)) @ vectors[:, kept].T)


@dataclass(frozen=True)
class Standing:
    """Where one variant stands among others; rank 1 is the highest value.

    Args:
        mean: of its rank over the draws.
        low, high: ends of the 95 % interval of its rank.
        shares: [V], how often it holds each rank; a tie is shared.
    """

    mean: float
    low: float
    high: float
    shares: tuple[float, ...]

    @property
    def first(self) -> float:
        """How often it is first."""
        return self.shares[0]


def ranks_of(values: Values) -> Values:
    """Ranks in each draw, the mean of those that a tie spans: [draws, V] of values where more is better.

    >>> ranks_of(np.array([[0.5, 0.9, 0.5]]))
    array([[2.5, 1. , 2.5]])
    """
    above, level = _places(values)
    return above + (level + 1) / 2


def standings(values: Values) -> list[Standing]:
    """A standing for every variant, of draws [draws, V] where more is better."""
    above, level = _places(values)
    ranks, tail = above + (level + 1) / 2, (1 - CONFIDENCE) / 2
    low, high = np.quantile(ranks, [tail, 1 - tail], axis=0)
    places = np.arange(values.shape[1])
    holds = (places >= above[..., None]) & (places < (above + level)[..., None])  # [draws, V, rank]
    shares = (holds / level[..., None]).mean(0)
    return [
        Standing(float(ranks[:, at].mean()), float(low[at]), float(high[at]), tuple(map(float, shares[at])))
        for at in range(values.shape[1])
    ]


def _places(values: Values) -> tuple[Values, Values]:
    """How many others are above, and how many are level with it, itself included; [draws, V] both."""
    gaps = values[:, None, :] - values[:, :, None]  # [draws, V, of others]
    return (gaps > TIE).sum(-1), (np.abs(gaps) <= TIE).sum(-1)
