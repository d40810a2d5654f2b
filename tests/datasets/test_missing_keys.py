"""Qrels that name keys which the corpus lacks: relevant and never found, in every stage that reads qrels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_models import use_fakes
from tiny_sets import write_beir

from rmsearch.cli import run_command
from rmsearch.datasets.beir import load_beir
from rmsearch.errors import ConfigError, RecordError
from rmsearch.evaluation.bm25 import bm25
from rmsearch.evaluation.embed import embed
from rmsearch.evaluation.ndcg import ndcg
from rmsearch.evaluation.report import report
from rmsearch.stage import execute
from rmsearch.storage.records import read_records, write_records
from rmsearch.train.judge_dataset import judge_dataset
from rmsearch.train.make_test_set import make_test_set
from rmsearch.train.mine import mine
from rmsearch.train.sample_dpo_batch import sample_dpo_batch

ARGUANA = Path(__file__).resolve().parents[3] / "shared" / "data" / "arguana"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two lines of the test split name keys that are not there: one of the five of q001, and all of q019."""
    monkeypatch.chdir(tmp_path)
    folder = write_beir(Path("tiny"), keys=80)
    qrels = folder / "qrels" / "test.tsv"
    kept = [line for line in qrels.read_text().splitlines() if not line.startswith(("q001\t", "q019\t"))]
    own = [f"q001\t{key}\t1" for key in ("k001", "k011", "k021", "gone1", "k031")] + ["q019\tgone2\t1"]
    qrels.write_text("\n".join([*kept, *own]) + "\n")
    return str(folder)


def options(**more: Any) -> dict[str, Any]:
    return {"dataset_path": "tiny", "max_missing_share": 0.05, **more}


def test_they_are_counted_and_told_in_one_line(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    beir = load_beir(tiny, "test", max_missing_share=0.05)
    (line,) = capsys.readouterr().err.splitlines()
    lines = len(Path("tiny/qrels/test.tsv").read_text().splitlines()) - 1
    assert line.startswith("warning") and f"2 of {lines} qrels lines ({2 / lines:.2%})" in line and "test.tsv" in line
    assert beir.relevant("q001") == ["gone1", "k001", "k011", "k021", "k031"] and beir.missing_keys == 2
    assert beir.positives("q001") == ["k001", "k011", "k021", "k031"] and beir.positives("q019") == []
    run = execute(bm25, **options())
    assert run.counts["missing_keys"] == 2
    assert json.loads(Path("relevance_dict_bm25.json.run.json").read_text())["counts"]["missing_keys"] == 2
    candidates = {each["query_id"]: each for each in read_records("relevance_dict_bm25.json")}
    assert candidates["q019"]["positive_key_ids"] == ["gone2"] and "gone1" in candidates["q001"]["positive_key_ids"]


def test_more_than_the_share_is_refused_with_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = len(Path("tiny/qrels/test.tsv").read_text().splitlines()) - 1
    assert run_command(bm25, ["--dataset-path", tiny]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "gone1" in each]
    assert f"2 of {lines} qrels lines ({2 / lines:.2%})" in line and "--max-missing-share (now 0.02)" in line
    assert not Path("relevance_dict_bm25.json").exists()
    assert run_command(bm25, ["--dataset-path", tiny, "--max-missing-share", "0.05"]) == 0


def test_the_flag_at_its_default_leaves_outputs_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_beir(Path("tiny"))
    first = execute(bm25, dataset_path="tiny")
    assert execute(bm25, dataset_path="tiny", max_missing_share=0.02).skipped
    other = execute(bm25, dataset_path="tiny", max_missing_share=0)
    assert not other.skipped and other.fingerprint != first.fingerprint


def test_the_ideal_counts_them(tiny: str) -> None:
    beir = load_beir(tiny, "test", max_missing_share=0.05)
    best_first = {query: [*beir.positives(query), "k000"] for query in beir.queries}
    Path("r.json").write_text(json.dumps({q: {k: -at for at, k in enumerate(ks)} for q, ks in best_first.items()}))
    execute(ndcg, dataset_path=tiny, run=["b=r.json"], output="n.json")
    found = json.loads(Path("n.json").read_text())
    gains = [1 / math.log2(2 + at) for at in range(5)]
    assert found["per_query"]["nDCG@10"]["b"]["q001"] == pytest.approx(sum(gains[:4]) / sum(gains))
    assert found["per_query"]["nDCG@10"]["b"]["q019"] == 0 and found["queries"] == 11


def test_embed_and_report(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch.setattr)
    execute(embed, **options(model_name="m", top_k=20))
    execute(bm25, **options())
    runs = ["embed=relevance_dict_embed_eval.json", "bm25=relevance_dict_bm25_eval.json"]
    assert execute(report, **options(run=runs, examples=20)).counts["missing_keys"] == 2
    report_of_defaults = execute(report, run=runs, output="again.html")
    assert report_of_defaults.counts["queries"] == 11, "the share comes with the data set of the first run's record"


def test_training_data_has_the_others_only(tiny: str) -> None:
    execute(make_test_set, **options())
    assert "q019" not in {pair["query_id"] for pair in read_records("dataset_list_test.json")}
    assert len([pair for pair in read_records("dataset_list_test.json") if pair["query_id"] == "q001"]) == 4
    run = execute(mine, **options(split="test", bm25=True, output="mined.jsonl"))
    chosen = {pair["chosen_key_id"] for pair in read_records("mined.jsonl") if pair["query_id"] == "q001"}
    assert chosen == {"k001", "k011", "k021", "k031"} and run.counts["missing_keys"] == 2
    run = execute(sample_dpo_batch, **options(split="test", output="sets.json"))
    sets = list(read_records("sets.json"))
    assert "q019" not in {each["query_id"] for each in sets} and run.counts["missing_keys"] == 2
    run = execute(
        judge_dataset, judge="labels", query_key_set="sets.json", dataset_path=tiny, split="test", test_share=0
    )
    assert run.counts["labelled_queries"] == len({each["query_id"] for each in sets})


def test_sampling_from_a_corpus_of_its_own(tiny: str) -> None:
    """--source-csv with --qrels: the share is that of the rows."""
    beir = load_beir(tiny, "test", max_missing_share=0.05)
    write_records("rows.csv", ({"id": key, "text": each.key} for key, each in beir.corpus.items()))
    write_records("queries.json", ({"query": q, "query_id": i, "df_id": "k001"} for i, q in beir.queries.items()))
    given = {"source_csv": "rows.csv", "filtered_queries_json": "queries.json", "qrels": "tiny/qrels/test.tsv"}
    with pytest.raises(RecordError, match=r"'gone1' is not in the corpus.*qrels lines"):
        execute(sample_dpo_batch, **given, output="sets.json")
    execute(sample_dpo_batch, **given, max_missing_share=0.05, output="sets.json")
    assert "q019" not in {each["query_id"] for each in read_records("sets.json")}


def test_a_query_that_is_not_there_is_still_refused(tiny: str) -> None:
    """It cannot be asked; trec_eval would leave it out of the mean, and BEIR's loader ends with a KeyError."""
    with Path("tiny/qrels/test.tsv").open("a") as file:
        file.write("q999\tk001\t1\n")
    with pytest.raises(RecordError, match="'q999' is not in the queries"):
        load_beir(tiny, "test", max_missing_share=1)


def test_nothing_but_missing_keys(tiny: str) -> None:
    Path("tiny/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq001\tgone\t1\n")
    assert load_beir(tiny, "test", max_missing_share=1).missing_keys == 1
    with pytest.raises(ConfigError, match="no relevant pair"):
        execute(make_test_set, dataset_path=tiny, max_missing_share=1)


@pytest.mark.skipif(not ARGUANA.exists(), reason="needs ../shared/data/arguana")
def test_arguana_as_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = execute(bm25, dataset_path=str(ARGUANA))
    assert run.counts["missing_keys"] == 5 and run.counts["queries"] == 1406
    execute(ndcg, dataset_path=str(ARGUANA), run=["b=relevance_dict_bm25_eval.json"], output="n.json")
    found = json.loads(Path("n.json").read_text())
    assert found["queries"] == 1406 and found["runs"]["b"]["means"]["nDCG@10"] > 0.3
    assert found["per_query"]["nDCG@10"]["b"]["test-society-asfhwapg-con04a"] == 0
