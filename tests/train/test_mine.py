"""Mining: where negatives come from, what is filtered, that the same seed gives the same file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_sets

from rmsearch.datasets.beir import Beir, Document
from rmsearch.datasets.preferences import read_preferences
from rmsearch.errors import ConfigError, RecordError
from rmsearch.evaluation.embed import embed
from rmsearch.preferences.mining import Miner, Rules, choose_pairs
from rmsearch.preferences.positives import PositivePair, as_claim, pseudo_queries, read_pairs
from rmsearch.retrieval.first_stage import best_positions
from rmsearch.retrieval.rankers import (
    Bm25Ranker,
    CentroidRanker,
    RunRanker,
    VectorRanker,
    Vectors,
    places,
    similar_queries,
)
from rmsearch.stage import execute
from rmsearch.train.mine import mine

RULES: dict[str, Any] = {
    "per_positive": 2,
    "rank_min": 1,
    "rank_max": 10,
    "random_share": 0.0,
    "similar_share": 0.0,
    "max_relative_score": 0.0,
    "margin_scale": 0.0,
    "margin_max": 5.0,
    "weights": [1.0],
}


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return tiny_sets.write_beir(tmp_path / "beir")


def write_run(path: Path, keys: int = 40, queries: int = 24) -> str:
    ids = [f"k{i:03d}" for i in range(keys)]
    path.write_text(
        json.dumps({f"q{q:03d}": {key: 1.0 - i / 100 for i, key in enumerate(ids)} for q in range(queries)})
    )
    return str(path)


def drawn(
    rules: dict[str, Any], ranking: dict[str, float], positives: dict[str, int], draws: int = 200
) -> Counter[str]:
    corpus = {f"k{i}": Document("", f"text {i}") for i in range(30)} | {"copy": Document("", "text 0")}
    data = Beir("x", "train", {"q": "query"}, corpus, {"q": positives})
    ranker = RunRanker("first", {"q": ranking}, places(sorted(corpus)))
    miner = Miner(data, [ranker], {}, Rules(**(RULES | rules)))
    pairs = [PositivePair("q", "k0", "text 0")] * draws
    return Counter(key for _, key, _ in miner.mine(pairs, np.random.default_rng(0)))


RANKING = {"k1": 0.95, "k0": 0.9, "copy": 0.89, "k2": 0.8, "k3": 0.7, "k4": 0.6, "k5": 0.5}


def test_negatives_come_from_the_rank_window_without_positives_and_copies() -> None:
    found = drawn({"rank_min": 2, "rank_max": 5}, RANKING, {"k0": 1})
    assert set(found) == {"k2", "k3"}


def test_keys_scored_close_to_the_positive_are_skipped() -> None:
    found = drawn({"max_relative_score": 0.8, "rank_max": 7}, RANKING, {"k0": 1, "k4": 1})
    assert set(found) == {"k3", "k5"}  # k1 and k2 above 0.72, k4 labelled


def test_random_negatives_have_their_share() -> None:
    found = drawn({"random_share": 0.5, "rank_max": 7}, RANKING, {"k0": 1}, 400)
    far = sum(count for key, count in found.items() if key not in RANKING)
    assert 0.3 < far / sum(found.values()) < 0.5 and "k0" not in found and "copy" not in found


def test_no_negative_is_its_positive_in_capitals_or_other_white_space(tmp_path: Path) -> None:
    texts = {"a": "Salt harms mice", "b": "SALT HARMS MICE", "c": "salt  harms\nmice", "d": "Trains run late"}
    titled = {"e": "Salt", "f": "SALT"}  # two titles above the text of a
    corpus = [{"_id": key, "text": text} for key, text in texts.items()]
    corpus += [{"_id": key, "title": title, "text": "Harms mice"} for key, title in titled.items()]
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (data / "queries.jsonl").write_text('{"_id": "q", "text": "does salt harm mice?"}\n')
    (data / "qrels" / "train.tsv").write_text("q\ta\t1\n")
    out = str(tmp_path / "pairs.jsonl")
    execute(mine, dataset_path=str(data), bm25=True, negatives_per_positive=6, positives=20, output=out)
    assert {record.rejected_key for record in read_preferences(out)} == {"Trains run late"}


def test_margins_are_weighted_score_differences() -> None:
    corpus = {key: Document("", key) for key in RANKING}
    data = Beir("x", "train", {"q": "query"}, corpus, {"q": {"k0": 1}})
    place = places(sorted(corpus))
    first, second = (
        RunRanker("1", {"q": RANKING}, place),
        RunRanker("2", {"q": {"k0": 5.0, "k2": 2.0, "k3": 1.0}}, place),
    )
    rules = Rules(**(RULES | {"margin_scale": 10.0, "weights": [1.0, 0.1], "per_positive": 6}))
    miner = Miner(data, [first, second], {}, rules)
    margins = {key: margin for _, key, margin in miner.mine([PositivePair("q", "k0", "k0")], np.random.default_rng(0))}
    assert margins["k2"] == pytest.approx(10 * (0.1 + 0.1 * 3))
    assert margins["k1"] == pytest.approx(10 * (-0.05 + 0.1 * 4))  # not in the second run: its lowest score
    assert all(margin is not None and 0 <= margin <= 5 for margin in margins.values())
    assert max(margin for margin in margins.values() if margin is not None) == 5.0  # k5 would have 10 * (0.4 + 0.1 * 4)


def test_bm25_of_a_key_and_of_its_text_agree() -> None:
    corpus = {
        "a": Document("Salt", "harms mice in cages"),
        "b": Document("", "trains run late"),
        "c": Document("", "salt"),
    }
    data = Beir("x", "train", {"q": "does salt harm mice?"}, corpus, {"q": {"a": 1}})
    ranker = Bm25Ranker(data)
    scores = ranker.block(["q"])[0]
    assert scores[0] == pytest.approx(ranker.of_text("q", "Salt harms mice in cages"), rel=1e-5)
    assert 0 < scores[2] < scores[0] < 1 and scores[1] == -np.inf
    assert best_positions(scores, 3).tolist() == [0, 2]


def test_centroids_leave_the_query_itself_out() -> None:
    corpus = {name: Document("", name) for name in "abc"}
    queries = {f"q{i}": f"query {i}" for i in range(3)}
    data = Beir("x", "train", queries, corpus, {"q0": {"a": 1}, "q1": {"a": 1}, "q2": {"b": 1}})
    asked = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    ranker = CentroidRanker(data, asked)
    scores = ranker.block(["q0", "q2"])
    assert scores[0, 0] == pytest.approx(0.6)  # only q1 is left of a's centroid
    assert scores[1, 1] == 0 and scores[0, 1] == 0  # b has no other query; q2 is orthogonal to q0
    assert scores[1, 0] == pytest.approx(0.8 / np.linalg.norm([1.6, 0.8]), rel=1e-5)
    assert scores[0, 2] == -np.inf  # nobody asked for c
    assert similar_queries(list(queries), asked, 1) == {"q0": ["q1"], "q1": ["q2"], "q2": ["q1"]}


def test_changed_texts_have_their_own_similarity() -> None:
    data = Beir("x", "train", {"q": "query"}, {"a": Document("", "a")}, {"q": {"a": 1}})
    one, other = np.array([[1, 0]], np.float32), np.array([[0.6, 0.8]], np.float32)
    ranker = VectorRanker("model", data, Vectors(one, one, other, ["cut"]))
    assert ranker.block(["q"])[0, 0] == 1 and ranker.of_text("q", "cut") == pytest.approx(0.6)
    assert ranker.of_text("q", "other") is None


def test_balance_makes_keys_equally_frequent() -> None:
    pairs = [PositivePair(f"q{i}", "often" if i < 90 else "rare", "t") for i in range(100)]
    rng = np.random.default_rng(0)
    even = Counter(a.key_id for a in choose_pairs(pairs, 2000, 0.0, rng))
    assert 0.4 < even["rare"] / 2000 < 0.6
    as_is = choose_pairs(pairs, 250, 1.0, rng)
    assert max(Counter(a.query_id for a in as_is).values()) == 3
    assert Counter(a.query_id for a in choose_pairs(pairs, 0, 1.0, rng)) == {f"q{i}": 1 for i in range(100)}


def test_from_runs_the_same_seed_gives_the_same_file(beir: Path, tmp_path: Path) -> None:
    options = {"dataset_path": str(beir), "split": "dev", "runs": [write_run(tmp_path / "run.json")]}
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    runs = [execute(mine, output=str(f), seed=s, **options) for f, s in zip(files, (1, 1, 2), strict=True)]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    records = list(read_preferences(str(files[0])))
    assert runs[0].counts["pairs"] == len(records) > 50
    for record in records:
        assert record.chosen_key != record.rejected_key and record.query_id is not None
    positives = {(r.query_id, r.chosen_key_id) for r in records}
    assert not any((r.query_id, r.rejected_key_id) in positives for r in records)
    assert execute(mine, output=str(files[0]), seed=1, **options).skipped


def test_from_pairs_with_an_embedding_model_and_bm25(tmp_path: Path) -> None:
    rows = [{"question": f"which {t}?", "answer": f"the {t} {w}"} for t in tiny_sets.TOPICS for w in ("one", "two")]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_models.sentence_encoder(tmp_path / "model")
    out = tmp_path / "out.parquet"
    options = {"pairs": str(source), "model_name": str(model), "bm25": True, "similar_query_share": 0.3}
    more = {"margin_scale": 2.0, "run_weights": [1.0, 0.5], "max_relative_score": 0.99, "negatives_per_positive": 3}
    run = execute(mine, output=str(out), **options, **more)
    records = list(read_preferences(str(out)))
    assert len(records) == run.counts["pairs"] >= 55 and run.counts["positives"] == 20
    assert run.counts["from_similar"] > 5 and all(r.margin is not None and r.margin >= 0 for r in records)
    for record in records:  # the other answer of the same question is a positive, so never a negative
        assert record.query.split()[1].strip("?") not in record.rejected_key


def test_vectors_are_kept_for_other_runs_and_taken_from_those_of_embed(beir: Path, tmp_path: Path) -> None:
    cache, model = str(tmp_path / "vectors"), str(tiny_models.sentence_encoder(tmp_path / "model"))
    common = {"dataset_path": str(beir), "split": "dev", "model_name": model, "cache_dir": cache}
    ranked = execute(embed, output=str(tmp_path / "e.json"), output_eval=str(tmp_path / "e_eval.json"), **common)
    first = execute(mine, output=str(tmp_path / "a.jsonl"), **common)
    second = execute(mine, output=str(tmp_path / "b.jsonl"), **common | {"cache_dir": None})
    assert first.counts["cached"] == ranked.counts["embedded"] > 0 and first.counts["embedded"] == 0
    assert second.counts["cached"] == 0 and second.counts["embedded"] == ranked.counts["embedded"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_corpus_alone_gives_titles_and_sentences_as_queries() -> None:
    text = "We looked at mice in a cage. They ate salt for a long week (n=3). In conclusion, we found that salt kills."
    corpus = {"d": Document("Salt and the health of mice", text), "e": Document("", "Too short.")}
    data, pairs = pseudo_queries(Beir("x", "train", {}, corpus, {}), "both", 2, seed=0)
    queries = [data.queries[pair.query_id] for pair in pairs]
    assert queries[0] == "Salt and the health of mice" and pairs[0].bare and pairs[0].text == text
    assert len(pairs) == 3 - 1 or "Salt kills." not in queries  # too short a claim is left out
    assert all(pair.text != corpus["d"].key for pair in pairs)
    assert "They ate salt for a long week." in queries


@pytest.mark.parametrize(
    ("sentence", "claim"),
    [
        ("In conclusion, our results suggest that salt (NaCl) harms mice.", "Salt harms mice."),
        ("Salt harms mice.", "Salt harms mice."),
        ("Together, these data demonstrate that p53 binds DNA.", "P53 binds DNA."),
    ],
)
def test_claims_lose_their_openings(sentence: str, claim: str) -> None:
    assert as_claim(sentence) == claim


def test_pseudo_queries_mine_end_to_end(beir: Path, tmp_path: Path) -> None:
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    for row in corpus:
        row["title"] = f"{row['text']} {row['_id']}"
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    out = tmp_path / "out.jsonl"
    run = execute(
        mine, dataset_path=str(beir), split="dev", pseudo_queries="titles", bm25=True, positives=10, output=str(out)
    )
    records = list(read_preferences(str(out)))
    assert run.counts["positives"] == 10 and len(records) >= 30
    assert all(record.query.split()[-1] not in record.chosen_key for record in records)  # the title is left away


def test_bad_flags_and_files(beir: Path, tmp_path: Path) -> None:
    run_file, out = write_run(tmp_path / "run.json"), str(tmp_path / "out.jsonl")
    good = {"dataset_path": str(beir), "split": "dev", "runs": [run_file], "output": out}
    for change, problem in (
        ({"rank_min": 5, "rank_max": 2}, "rank-min"),
        ({"random_share": 0.8, "similar_query_share": 0.5}, "more than 1"),
        ({"similar_query_share": 0.5}, "--model-name"),
        ({"run_weights": [1.0, 2.0]}, "--run-weights"),
        ({"pseudo_queries": "titles"}, "--runs"),
        ({"runs": [write_run(tmp_path / "long.json", keys=60)]}, "corpus lacks"),
    ):
        with pytest.raises(ConfigError, match=problem):
            execute(mine, **(good | change))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"unknown": {"k001": 1.0}}))
    with pytest.raises(ConfigError, match="none of the"):
        execute(mine, **(good | {"runs": [str(other)]}))
    assert not Path(out).exists()


def test_pairs_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "x", "answer": "y"}\n')
    with pytest.raises(RecordError, match="--query-field"):
        read_pairs(str(path), None, None)
    with pytest.raises(RecordError, match="no field 'b'"):
        read_pairs(str(path), "b", None)
    path.write_text('{"query": "x", "answer": "y"}\n{"query": "x", "answer": " "}\n')
    with pytest.raises(RecordError, match=r"pairs\.jsonl:1: answer is empty"):
        read_pairs(str(path), None, None)
