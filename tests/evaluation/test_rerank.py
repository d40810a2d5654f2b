"""Rerank: every candidate scored once, killed and resumed, stale candidates refused, fusion fitted elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_models import FakeScorer, overlap, use_fakes
from tiny_models import bert_cross_encoder
from tiny_sets import write_beir

from rmsearch.cli import run_command
from rmsearch.datasets.beir import load_beir
from rmsearch.errors import ConfigError, InputMissingError, RecordError, RetryableError
from rmsearch.evaluation.bm25 import bm25
from rmsearch.evaluation.embed import embed
from rmsearch.evaluation.rerank import rerank
from rmsearch.retrieval.runs import read_run
from rmsearch.stage import execute

FAKE = Path(__file__).parents[1] / "support" / "fake_models.py"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with its candidates in e.json (test) and d.json (dev)."""
    monkeypatch.chdir(tmp_path)
    use_fakes(monkeypatch.setattr)
    folder = write_beir(tmp_path / "tiny")
    for split, name in (("test", "e"), ("dev", "d")):
        paths = {"output": f"{name}.json", "output_eval": f"{name}_eval.json"}
        execute(embed, dataset_path=str(folder), model_name="m", split=split, top_k=15, **paths)
    return folder


def options(tiny: Path, **more: Any) -> dict[str, Any]:
    return {"dataset_path": str(tiny), "embed_output": "e.json", "output_eval": "r.json", "model_name": "m", **more}


def test_every_candidate_is_scored_and_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", "log")
    run = execute(rerank, **options(tiny, output="full.jsonl", run_file="r.trec"))
    beir, first, found = load_beir(str(tiny), "test"), read_run("e_eval.json"), read_run("r.json")
    assert found.keys() == first.keys() == beir.queries.keys()
    for query, scores in found.items():
        assert scores.keys() == first[query].keys(), "all candidates, none cut to ten"
        assert scores == {key: pytest.approx(overlap(beir.queries[query], beir.key_text(key))) for key in scores}
        assert list(scores) == sorted(scores, key=lambda key: (-scores[key], key))
    assert read_run("r.trec") == found == read_run("full.jsonl")
    record = json.loads(Path("full.jsonl").read_text().splitlines()[0])
    assert set(record) == {
        "query_id", "pre_key_ids", "key_ids", "embed_relevances", "rerank_relevances", "positive_key_ids",
    }  # fmt: skip
    assert record["pre_key_ids"] == list(first[record["query_id"]])
    assert run.counts["pairs"] == 150 == len(Path("log").read_text().splitlines())
    assert (
        not Path("full.jsonl.journal").exists()
        and execute(rerank, **options(tiny, output="full.jsonl", run_file="r.trec")).skipped
    )


def test_the_documented_command_and_top_k(tiny: Path) -> None:
    """E2: --output left out; --timeout accepted."""
    arguments = f"""--dataset-path {tiny} --embed-output e.json --output-eval out/rerank_eval.json
        --model-name m --tensor-parallel-size 1 --num-instances 1 --request-batch-size 128""".split()
    assert run_command(rerank, arguments) == 0
    found = read_run("out/rerank_eval.json")
    assert all(len(scores) == 15 for scores in found.values())
    more = ["--timeout", "10000", "--top-k", "4", "--device-groups", "0,1;2,3"]
    arguments[arguments.index("out/rerank_eval.json")] = "out/four.json"
    assert run_command(rerank, [*arguments, *more]) == 0
    assert read_run("out/four.json") == {query: dict(list(scores.items())[:4]) for query, scores in found.items()}


def test_candidates_from_bm25_and_from_a_run_file(tiny: Path) -> None:
    execute(bm25, dataset_path=str(tiny), output="b.json", output_eval="b_eval.json", run_file="b.trec")
    execute(rerank, **options(tiny, embed_output="b.json", output_eval="r1.json"))
    execute(rerank, **options(tiny, embed_output="b.trec", output_eval="r2.json"))
    assert read_run("r1.json") == read_run("r2.json")


def change(path: str, edit: Any) -> None:
    records = json.loads(Path(path).read_text())
    edit(records)
    Path(path).write_text(json.dumps(records))


def test_candidates_of_other_data_are_refused(tiny: Path, tmp_path: Path) -> None:
    other = write_beir(tmp_path / "other", seed=5)
    with pytest.raises(ConfigError, match=r"e\.json: was made from other corpus \('tiny', split 'test'\)"):
        execute(rerank, **options(other))
    with pytest.raises(ConfigError, match="was made from other queries"):
        execute(rerank, **options(tiny, split="dev"))
    line = '{"_id": "new", "text": "x"}\n'
    (tiny / "corpus.jsonl").write_text((tiny / "corpus.jsonl").read_text() + line)
    with pytest.raises(ConfigError, match="was made from other corpus"):
        execute(rerank, **options(tiny))
    assert not Path("r.json").exists()


def test_unknown_ids_are_refused(tiny: Path) -> None:
    change("e.json", lambda records: records[3]["key_ids"].__setitem__(0, 17))  # upstream's line numbers
    with pytest.raises(RecordError, match=r"e\.json:4: the key id '17' is not in the corpus\. Run embed again"):
        execute(rerank, **options(tiny))
    change("e.json", lambda records: records[1].__setitem__("query_id", "0"))
    with pytest.raises(RecordError, match=r"e\.json:2: the query id '0' is not in the data set"):
        execute(rerank, **options(tiny))
    with pytest.raises(InputMissingError):
        execute(rerank, **options(tiny, embed_output="nothing.json"))


def test_missing_and_foreign_queries_are_counted(tiny: Path) -> None:
    both = json.loads(Path("e.json").read_text())[:4] + json.loads(Path("d.json").read_text())
    Path("mixed.json").write_text(json.dumps(both))
    run = execute(rerank, **options(tiny, embed_output="mixed.json"))
    assert run.counts["queries_of_other_splits"] == 12 and run.counts["queries_without_candidates"] == 6
    assert len(read_run("r.json")) == 4
    Path("foreign.json").write_text(json.dumps(both[4:]))
    with pytest.raises(ConfigError, match="holds no candidates for the 10 queries of the split 'test'"):
        execute(rerank, **options(tiny, embed_output="foreign.json"))


def test_killed_reranking_goes_on_where_it_stopped(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(FAKE), "evaluation.rerank", "--dataset-path", str(tiny), "--embed-output", "e.json"]
    command += [
        "--model-name",
        "m",
        "--request-batch-size",
        "16",
        "--output-eval",
        "killed.json",
        "--engine",
        "transformers",
    ]
    environment = {**os.environ, "FAKE_LOG": str(tmp_path / "log")}

    def go(**more: str) -> int:
        return subprocess.run(command, cwd=tmp_path, env={**environment, **more}, capture_output=True).returncode

    assert go(FAKE_DIE_AFTER="70") == -9 and go(FAKE_DIE_AFTER="40") == -9
    assert not Path("killed.json").exists()
    assert go() == 0
    asked = Counter((tmp_path / "log").read_text().splitlines())
    assert sum(asked.values()) <= 150 + 2 * 16, "only the batch in flight is paid for again, once for each kill"
    execute(rerank, **options(tiny, output_eval="whole.json"))
    assert Path("killed.json").read_bytes() == Path("whole.json").read_bytes()


def test_fusion_with_a_given_share(tiny: Path) -> None:
    execute(rerank, **options(tiny, fuse="minmax", fuse_weight=0.0, output_fused="f.json"))
    assert {q: list(s) for q, s in read_run("f.json").items()} == {
        q: list(s) for q, s in read_run("e_eval.json").items()
    }
    execute(rerank, **options(tiny, fuse="zscore", fuse_weight=1.0, output_fused="f.json", top_k=3))
    assert {q: list(s) for q, s in read_run("f.json").items()} == {q: list(s) for q, s in read_run("r.json").items()}


def test_fusion_fitted_on_the_dev_split(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", "log")
    run = execute(rerank, **options(tiny, fuse="zscore", fuse_fit="d.json", output_fused="f.json"))
    assert 0 <= float(run.counts["fuse_weight"]) <= 1
    record = json.loads(Path("r.json.run.json").read_text())
    fit = record["notes"]["fusion_fit"]
    assert fit["split"] == "dev" and len(fit["curve"]) == 21 and fit["ndcg@10"] == max(fit["curve"].values())
    assert len(Path("log").read_text().splitlines()) == 150 + 12 * 15


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fuse_fit": "d.json", "fuse_fit_split": "test"}, "is the evaluated split 'test'"),
        ({}, "either --fuse-weight or --fuse-fit"),
        ({"fuse_weight": 0.5, "fuse_fit": "d.json"}, "either --fuse-weight or --fuse-fit"),
        ({"fuse_weight": 0.5, "output_fused": None}, "needs --output-fused"),
        ({"fuse_weight": 1.5}, "--fuse-weight"),
        ({"fuse": "none", "output_fused": "f.json"}, "--output-fused needs --fuse"),
    ],
)
def test_fusion_flags_that_contradict(tiny: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        execute(rerank, **options(tiny, **{"fuse": "zscore", "output_fused": "f.json", **more}))


def test_the_share_is_never_fitted_on_evaluated_queries(tiny: Path) -> None:
    (tiny / "qrels" / "copy.tsv").write_text((tiny / "qrels" / "test.tsv").read_text())
    with pytest.raises(ConfigError, match="10 queries are in the evaluated split too"):
        execute(rerank, **options(tiny, fuse="zscore", fuse_fit="e.json", fuse_fit_split="copy", output_fused="f.json"))


def test_latency_is_measured_on_demand(tiny: Path) -> None:
    run = execute(rerank, **options(tiny, latency_queries=5))
    assert run.counts["scored"] == 150, "timed pairs are not counted as the run's"
    assert 0 < float(run.counts["latency_p50_ms"]) <= float(run.counts["latency_p95_ms"])
    assert run.notes["latency"]["queries"] == 5 and run.notes["latency"]["pairs_per_query"] == 15


def test_a_model_that_never_answers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def stuck(self: Any, pairs: Any) -> Any:
        await asyncio.sleep(60)
        yield

    monkeypatch.setattr(FakeScorer, "stream", stuck)
    with pytest.raises(RetryableError, match=r"no score came for 0\.05 seconds"):
        execute(rerank, **options(tiny, timeout=0.05))


def test_a_real_cross_encoder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    model = bert_cross_encoder(tmp_path / "model")
    run = execute(rerank, **options(tiny, model_name=str(model), engine="transformers", output="full.json"))
    assert run.counts["pairs"] == 150 and run.counts["tokens"] > 150 and run.notes["contract"]["order"] == "query_first"
    record = json.loads(Path("full.json.run.json").read_text())
    assert record["inputs"][f"model_name={model}"] != "by name" and record["notes"]["contract"]["template_hash"]
    assert all(len(set(scores.values())) > 1 for scores in read_run("r.json").values())
