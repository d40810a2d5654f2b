"""Is one run better than another? Paired tests over queries, Holm's correction, bootstrap confidence intervals.

Fisher's randomisation test is the primary one: under the null hypothesis the two runs' values of a query may be
swapped (Smucker, Allan and Carterette, CIKM 2007). The paired t-test stands beside it. All p-values are two-sided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rmsearch.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy as np

PERMUTATIONS = 10_000
SAMPLES = 10_000
CONFIDENCE = 0.95
_BLOCK_BYTES = 64 << 20


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
    import numpy as np

    try:
        from scipy import stats
    except ImportError:
        raise MissingExtraError("scipy", "eval") from None
    difference = np.asarray(run, float) - np.asarray(baseline, float)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    p_random = p_t = 1.0
    if wins or losses:
        block = max(1, _BLOCK_BYTES // (16 * len(difference)))
        test = stats.permutation_test(
            (difference,),
            lambda values, axis: values.mean(axis=axis),
            permutation_type="samples",  # of one sample: signs are flipped, which swaps the two runs' values
            vectorized=True,
            n_resamples=permutations,
            batch=block,
            rng=np.random.default_rng(seed),
        )
        p_random = float(test.pvalue)
        if np.ptp(difference) > 0:
            p_t = float(stats.ttest_rel(run, baseline).pvalue)
        else:  # every query changes by the same amount: no variance, so t is infinite
            p_t = 0.0 if len(difference) > 1 else 1.0
    return Comparison(float(difference.mean()), p_random, p_t, wins, len(difference) - wins - losses, losses)


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

    Queries are resampled, all measures together. A sample is its vector of counts, so the means are one matrix product.
    """
    import numpy as np

    count = values.shape[1]
    rng, means = np.random.default_rng(seed), []
    block = max(1, _BLOCK_BYTES // (16 * count))
    for start in range(0, samples, block):
        counts = rng.multinomial(count, np.full(count, 1 / count), size=min(block, samples - start))
        means.append(counts @ values.T / count)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T
