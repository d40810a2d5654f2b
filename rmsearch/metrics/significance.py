"""Is one run better than another? Paired tests over queries, Holm's correction, bootstrap confidence intervals.

Fisher's randomisation test is the primary one: under the null hypothesis the two runs' values of a query may be
swapped (Smucker, Allan and Carterette, CIKM 2007). The paired t-test stands beside it. All p-values are two-sided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmsearch.errors import MissingExtraError

PERMUTATIONS = 10_000
SAMPLES = 10_000
CONFIDENCE = 0.95
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline on one measure. Wins, ties and losses count queries; p-values are two-sided."""

    difference: float
    p_randomisation: float
    p_t_test: float
    wins: int
    ties: int
    losses: int


def compare(run: np.ndarray, baseline: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Comparison:
    """Compare per-query values (float64[n] each, the same queries in the same order)."""
    return compare_all(np.asarray(run, float)[None], np.asarray(baseline, float)[None], permutations, seed)[0]


def compare_all(runs: np.ndarray, baselines: np.ndarray, permutations: int, seed: int) -> list[Comparison]:
    """Compare each row of ``runs`` (float64[m, n]) with the same row of ``baselines``: `compare` for many pairs."""
    differences = runs - baselines
    p_values = randomisation(differences, permutations, seed)
    return [_comparison(*each) for each in zip(runs, baselines, differences, p_values.tolist(), strict=True)]


def _comparison(run: np.ndarray, baseline: np.ndarray, difference: np.ndarray, p_random: float) -> Comparison:
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtraError("scipy", "eval") from None
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    p_t = 1.0
    if np.ptp(difference) > 0:
        p_t = float(stats.ttest_rel(run, baseline).pvalue)
    elif wins or losses:  # every query changes by the same amount: no variance, so t is infinite
        p_t = 0.0 if len(difference) > 1 else 1.0
    return Comparison(float(difference.mean()), p_random, p_t, wins, len(difference) - wins - losses, losses)


def randomisation(differences: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """Two-sided p-values, float64[m], of the paired randomisation test on differences float64[m, n].

    Flips the signs of the queries' differences at random, which swaps the two runs' values, and counts how often the
    mean is as far out as the observed one; the observed order counts as one more permutation. With few queries all
    flips are tried, and p is exact. The same flips serve all rows, so that a block of them is one matrix product.
    """
    count = differences.shape[1]
    totals = differences.sum(axis=1)
    tolerance = 100 * np.finfo(float).eps * np.abs(differences).sum(axis=1)  # equal but for rounding is equal
    exact = count < 63 and 2**count <= permutations
    rng, tried = np.random.default_rng(seed), 2**count if exact else permutations
    lower, upper = (np.full(len(differences), int(not exact)) for _ in range(2))
    block = max(1, _BLOCK_BYTES // (16 * count))
    for start in range(0, tried, block):
        rows = min(block, tried - start)
        if exact:
            kept = np.arange(start, start + rows)[:, None] >> np.arange(count) & 1
        else:  # the lowest bit of 32: the flips that scipy.stats.permutation_test draws from this seed
            kept = (rng.integers(1 << 32, size=(rows, count), dtype=np.uint32) & 1).view(np.int32)
        flipped = 2 * (kept.astype(float) @ differences.T) - totals
        lower += (flipped <= totals + tolerance).sum(axis=0)
        upper += (flipped >= totals - tolerance).sum(axis=0)
    return np.minimum(1.0, 2 * np.minimum(lower, upper) / (tried + (not exact)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def intervals(values: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap percentile intervals (95 %) of means: float64[m, 2] of float64[m, n].

    Queries are resampled, all rows together. A sample is its vector of counts, so the means are one matrix product.
    """
    count = values.shape[1]
    rng, means = np.random.default_rng(seed), []
    block = max(1, _BLOCK_BYTES // (16 * count))
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        counts = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(counts.astype(float) @ values.T / count)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T
