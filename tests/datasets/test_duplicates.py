"""Near-duplicates: what counts as one, that equal texts are never missed, and that the estimate is one of Jaccard."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.datasets.duplicates import BUCKET, HASHES, MISSED, Sketches, band_rows, near_duplicates, words
from rmsearch.errors import ConfigError

VOCABULARY = [f"w{i}" for i in range(2000)]


def jaccard(a: str, b: str, size: int = 3) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))}

    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right)


def sentence(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(length)]


def test_case_punctuation_and_spelling_of_characters_do_not_count() -> None:
    texts = ["The cat sat, on the mat.", "a dog", "the CAT sat on - the mat", "A dog!", "café", "cafe\u0301", "", " "]
    assert near_duplicates(texts) == [None, None, 0, 1, None, 4, None, 6]
    assert words("It’s 'Fine', DON'T") == ["it's", "fine", "don't"]
    assert near_duplicates([]) == []
    assert near_duplicates(iter(["!?", "?!", "!?"])) == [None, None, 0]  # no word: the text stands for itself


def test_texts_without_spaces_are_taken_by_characters() -> None:
    assert words("東京は日本の首都 Tokyo") == [*"東京は日本の首都", "tokyo"]
    first = "東京は日本の首都であり世界でも有数の大都市として知られています"
    assert near_duplicates([first, first[:-1], "大阪は西日本の中心都市です"]) == [None, 0, None]


def test_changed_texts_are_found_down_to_the_threshold_only() -> None:
    rng = random.Random(0)
    texts, expected = [], []
    for i in range(200):
        base = sentence(rng, 60)
        close, far = list(base), list(base)
        close[30] = "changed"  # 3 of 58 shingles: similarity 0.90
        for place in (5, 15, 25, 35, 45, 55):  # 18 of 58: similarity 0.53
            far[place] = "changed"
        texts += [" ".join(base), " ".join(close), " ".join(far)]
        expected += [None, 3 * i, None]
    assert near_duplicates(texts) == expected
    stricter, looser = near_duplicates(texts, 0.99), near_duplicates(texts, 0.4)
    assert sum(first is not None for first in stricter) <= 2
    assert sum(looser[3 * i + 2] == 3 * i for i in range(200)) >= 196


def test_pairs_at_the_threshold_share_a_band_almost_surely() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.9, 0.99, 1.0):
        rows = band_rows(threshold)
        assert (1 - threshold**rows) ** (HASHES // rows) <= MISSED
    assert band_rows(0.8) == 6 and band_rows(1.0) == HASHES and band_rows(0.001) == 1


def test_signatures_estimate_the_jaccard_similarity() -> None:
    rng = random.Random(1)
    errors = []
    for _ in range(150):
        base = sentence(rng, rng.choice([10, 40, 200]))
        other = [word if rng.random() > 0.05 else rng.choice(VOCABULARY) for word in base]
        pair, seed = [" ".join(base), " ".join(other)], rng.randrange(1000)
        exact = jaccard(*pair)
        errors.append(float(near_duplicates(pair, max(exact - 0.15, 0.01), seed=seed)[1] is None))
        errors.append(float(near_duplicates(pair, min(exact + 0.15, 1.0), seed=seed)[1] == 0 and exact < 0.85))
    assert sum(errors) <= 4  # 0.15 is more than three standard errors


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab c.é日", max_size=12), max_size=30), st.sampled_from([0.3, 0.8, 1.0]))
def test_repeats_point_back_and_equal_texts_are_never_missed(texts: list[str], threshold: float) -> None:
    found = near_duplicates(texts, threshold)
    seen: dict[tuple[str, ...], int] = {}
    for i, (text, first) in enumerate(zip(texts, found, strict=True)):
        equal = seen.setdefault(tuple(words(text)), i)
        assert first is None or 0 <= first < i
        if equal < i:
            assert first is not None and first <= equal
        elif first is not None:
            assert jaccard(text, texts[first]) >= threshold - 0.2
    assert near_duplicates(texts, threshold) == found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(alphabet="ab ", max_size=9), max_size=12), st.integers(0, 12))
def test_adding_in_parts_is_adding_at_once(texts: list[str], cut: int) -> None:
    sketches = Sketches()
    sketches.add(texts[:cut])
    sketches.add(texts[cut:])
    assert len(sketches) == len(texts) and sketches.duplicates(0.8) == near_duplicates(texts)
    before, after = Sketches(), Sketches()
    before.add(texts[:cut])
    after.add(texts[cut:])
    assert before.followed_by(after).duplicates(0.8) == near_duplicates(texts)


def test_a_phrase_that_all_texts_share_hides_no_copies_and_costs_little() -> None:
    rng = random.Random(2)
    texts = ["what is the best way to find a " + " ".join(sentence(rng, 4)) for _ in range(4000)]
    copies = [text + "!" for text in texts[-100:]]
    assert BUCKET < 100
    started = time.process_time()
    found = near_duplicates(texts + copies)
    assert time.process_time() - started < 10
    assert found[4000:] == list(range(3900, 4000)) and sum(f is not None for f in found[:4000]) <= 4


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_bad_thresholds(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        near_duplicates(["a"], threshold)


def test_bad_shingles() -> None:
    with pytest.raises(ConfigError, match="shingle"):
        near_duplicates(["a"], shingle=0)
