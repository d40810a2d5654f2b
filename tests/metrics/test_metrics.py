"""Measures, significance and fusion against values computed by hand."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from rmsearch.errors import ConfigError
from rmsearch.metrics.comparison import COMPARED, summary
from rmsearch.metrics.measures import MEASURES, Scores, evaluate, ndcg
from rmsearch.metrics.significance import compare, compare_all, holm, intervals, randomisation
from rmsearch.retrieval.fusion import fit_weight, fuse, normalised

QRELS = {"q1": {"a": 2, "b": 0, "c": 1}, "q2": {"x": 1}, "q3": {"z": 0}}
RUN = {"q1": {"d": 3.0, "a": 2.0, "b": 1.0, "c": 0.5}, "q3": {"z": 1.0}, "elsewhere": {"a": 1.0}}


def test_hand_computed_values() -> None:
    scores = evaluate(QRELS, RUN)
    assert scores.query_ids == ["q1", "q2", "q3"] and scores.missing == ["q2"]
    of_q1 = {measure: values[0] for measure, values in scores.values.items()}
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert of_q1["nDCG@1"] == 0
    assert of_q1["nDCG@3"] == pytest.approx((2 / math.log2(3)) / ideal)
    assert of_q1["nDCG@10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert of_q1["AP@100"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert of_q1["AP@3"] == pytest.approx((1 / 2) / 2)
    assert (of_q1["R@3"], of_q1["R@5"], of_q1["P@1"], of_q1["P@5"]) == (0.5, 1, 0, pytest.approx(0.4))
    assert [of_q1[f"RR@{k}"] for k in (1, 3, 10)] == [0, 0.5, 0.5]
    assert set(of_q1) == set(MEASURES)


def test_missing_queries_and_queries_without_positives_count_as_zero() -> None:
    scores = evaluate(QRELS, RUN)
    assert all(values[1] == 0 and values[2] == 0 for values in scores.values.values())
    assert scores.mean("nDCG@10") == pytest.approx(scores.values["nDCG@10"][0] / 3)


def test_grades_below_zero_are_not_relevant() -> None:
    """TREC's spam grade is -2, at which trec_eval's code crashes."""
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    plain, graded = (evaluate({"q": {"a": low, "b": 1, "c": low}}, run).values for low in (0, -2))
    assert all(np.array_equal(plain[measure], graded[measure]) for measure in MEASURES)


def test_reciprocal_rank_cutoffs() -> None:
    run = {"q": {f"k{i}": float(-i) for i in range(1, 30)}}
    for rank in (1, 3, 4, 10, 11):
        scores = evaluate({"q": {f"k{rank}": 1}}, run, ["RR@3", "RR@10", "RR@20"])
        expected = {k: 1 / rank if rank <= k else 0 for k in (3, 10, 20)}
        assert {k: scores.values[f"RR@{k}"][0] for k in expected} == pytest.approx(expected)


def test_a_perfect_and_an_empty_run() -> None:
    assert ndcg({"q": {"a": 3, "b": 1}}, {"q": {"a": 2.0, "b": 1.0}}) == pytest.approx(1)
    assert ndcg({"q": {"a": 3}}, {"q": {}}) == 0 and ndcg({"q": {"a": 3}}, {}) == 0


def test_the_inputs_are_left_alone() -> None:
    run = {"q1": {"b": 1.0, "a": 1.0}}
    evaluate(QRELS, run)
    assert run == {"q1": {"b": 1.0, "a": 1.0}} and list(run["q1"]) == ["b", "a"]


@pytest.mark.parametrize("measure", ["nDCG", "nDCG@0", "NDCG@10", "MAP@5", "P@x"])
def test_unknown_measures(measure: str) -> None:
    with pytest.raises(ConfigError, match="unknown measure"):
        evaluate(QRELS, RUN, [measure])
    with pytest.raises(ConfigError, match="no queries"):
        evaluate({}, RUN)


def test_randomisation_test_against_all_sign_flips() -> None:
    run, base = np.array([0.5, 0.9, 0.4, 1.0, 0.7, 0.3]), np.array([0.4, 0.5, 0.45, 0.2, 0.7, 0.1])
    d = run - base
    flips = np.array(list(itertools.product((1, -1), repeat=6))) @ d / 6
    exact = 2 * min((flips >= d.mean() - 1e-12).mean(), (flips <= d.mean() + 1e-12).mean())
    found = compare(run, base)
    assert found.p_randomisation == pytest.approx(exact)
    assert (found.wins, found.ties, found.losses) == (4, 1, 1)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(6))
    from scipy import stats

    assert found.p_t_test == pytest.approx(2 * stats.t.sf(abs(t), 5))
    assert compare(base, run).p_randomisation == pytest.approx(exact), "two-sided"


def test_randomisation_test_is_seeded_and_never_zero() -> None:
    rng = np.random.default_rng(1)
    run, base = rng.random(200) + 0.5, rng.random(200)
    first, second = compare(run, base, seed=3), compare(run, base, seed=3)
    assert first == second and 0 < first.p_randomisation <= 2.1 / 10_001
    nothing = compare(base, base)
    assert (nothing.p_randomisation, nothing.p_t_test, nothing.ties) == (1, 1, 200)


def test_randomisation_test_against_scipy() -> None:
    """The same flips for the same seed."""
    from scipy import stats

    rng = np.random.default_rng(5)
    runs, base = rng.random((3, 300)) + 0.02, rng.random((3, 300))
    expected = [
        stats.permutation_test(
            (difference,),
            lambda values, axis: values.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=2000,
            rng=np.random.default_rng(3),
        ).pvalue
        for difference in runs - base
    ]
    assert randomisation(runs - base, 2000, 3) == pytest.approx(expected, abs=1e-12)
    assert [each.p_randomisation for each in compare_all(runs, base, 2000, 3)] == pytest.approx(expected)


def test_means_that_differ_by_rounding_only_are_equal() -> None:
    """As of P@10, whose values are tenths: counted in whole numbers, all flips of twelve queries."""
    tenths = np.random.default_rng(5).integers(-2, 3, size=(6, 12))
    flips = np.array(list(itertools.product((1, -1), repeat=12))) @ tenths.T
    totals = tenths.sum(axis=1)
    expected = np.minimum(1, 2 * np.minimum((flips <= totals).mean(axis=0), (flips >= totals).mean(axis=0)))
    assert randomisation(0.7 + tenths / 10 - 0.7, 4096, 0).tolist() == expected.tolist()


def test_many_queries_and_runs_take_seconds() -> None:
    rng = np.random.default_rng(0)
    values = {name: dict(zip(MEASURES, rng.random((len(MEASURES), 4500)), strict=True)) for name in "abcd"}
    started = time.process_time()
    result = summary({name: Scores([str(i) for i in range(4500)], v, []) for name, v in values.items()}, 10_000, 0)
    seconds = time.process_time() - started
    assert seconds < 3, f"{seconds:.1f} s of a core for four runs over 4,500 queries"
    assert set(result["runs"]["d"]["comparison"]) == set(COMPARED)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    p = [compare(rng.random(40), rng.random(40), permutations=1000, seed=i).p_randomisation for i in range(60)]
    assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) < 0.1) < 0.25


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_bootstrap_intervals() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, size=(2, 400))
    (low, high), _ = intervals(values)
    expected = 1.96 * values[0].std() / 20
    assert low == pytest.approx(values[0].mean() - expected, abs=0.003)
    assert high == pytest.approx(values[0].mean() + expected, abs=0.003)
    assert intervals(np.full((1, 5), 0.25)).tolist() == [[0.25, 0.25]]
    assert np.array_equal(intervals(values, seed=2), intervals(values, seed=2))


def test_normalisation() -> None:
    assert normalised({"a": 1.0, "b": 3.0}, "zscore") == {"a": -1.0, "b": 1.0}
    assert normalised({"a": 1.0, "b": 3.0, "c": 2.0}, "minmax") == {"a": 0.0, "b": 1.0, "c": 0.5}
    assert normalised({"a": 7.0, "b": 7.0}, "zscore") == {"a": 0.0, "b": 0.0} and normalised({}, "minmax") == {}


def test_fusion_ends_are_the_two_stages() -> None:
    first, second = {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": -9.0, "b": 0.0, "c": 9.0}
    assert list(fuse(first, second, 0.0, "zscore")) == ["a", "b", "c"]
    assert list(fuse(first, second, 1.0, "minmax")) == ["c", "b", "a"]
    assert list(fuse(first, second, 0.5, "minmax")) == ["a", "b", "c"], "a three-way tie is ordered by id"
    with pytest.raises(ConfigError, match="different keys"):
        fuse(first, {"a": 1.0}, 0.5, "zscore")


def test_fit_finds_the_useful_mix() -> None:
    qrels = {"1": {"a": 1}, "2": {"b": 1}}
    first = {"1": {"a": 2.0, "b": 1.0, "c": 0.0}, "2": {"a": 1.0, "c": 0.9, "b": 0.8}}
    second = {"1": {"b": 1.0, "a": 0.9, "c": 0.0}, "2": {"b": 9.0, "a": 0.0, "c": 0.0}}
    fit = fit_weight(qrels, first, second, "minmax")
    assert fit.ndcg == pytest.approx(1) and 0 < fit.weight < 1 and len(fit.curve) == 21
    assert fit.curve[0.0] < 1 and fit.curve[1.0] < 1
