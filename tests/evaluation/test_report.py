"""ndcg and report through their doors: tables, JSON, the documented script, and a page that data cannot break."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_models import use_fakes
from tiny_sets import write_beir

from rmsearch.cli import run_command
from rmsearch.datasets.beir import load_beir
from rmsearch.errors import ConfigError
from rmsearch.evaluation.bm25 import bm25
from rmsearch.evaluation.embed import embed
from rmsearch.evaluation.ndcg import ndcg
from rmsearch.evaluation.report import report
from rmsearch.evaluation.rerank import rerank
from rmsearch.metrics.measures import ndcg as mean_ndcg
from rmsearch.reports.charts import mark, ticks
from rmsearch.reports.comparison import at_depth, depth_curves
from rmsearch.reports.page import render
from rmsearch.retrieval.runs import read_run
from rmsearch.stage import execute

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the default outputs of embed, bm25 and rerank, and the data set beside them."""
    monkeypatch.chdir(tmp_path)
    use_fakes(monkeypatch.setattr)
    folder = str(write_beir(tmp_path / "tiny"))
    execute(embed, dataset_path=folder, model_name="m", top_k=15)
    execute(bm25, dataset_path=folder, run_file="b.trec")
    names = {"embed_output": "relevance_dict_embed.json", "output_eval": "relevance_dict_rerank_eval.json"}
    execute(rerank, dataset_path=folder, model_name="m", **names)
    return tmp_path


def test_json_and_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset-path", "tiny", "--run", "embed=relevance_dict_embed_eval.json", "--run", "b.trec"]
    arguments += ["--run", "rr=relevance_dict_rerank_eval.json", "--baseline", "b", "--output", "n.json"]
    capsys.readouterr()
    assert run_command(ndcg, arguments) == 0
    shown = capsys.readouterr().out
    result = json.loads(Path("n.json").read_text())
    qrels = load_beir("tiny", "test").qrels
    assert result["baseline"] == "b" and list(result["runs"]) == ["b", "embed", "rr"] and result["queries"] == 10
    for name, path in (("embed", "relevance_dict_embed_eval.json"), ("b", "b.trec")):
        mean = mean_ndcg(qrels, read_run(path))
        assert result["runs"][name]["means"]["nDCG@10"] == pytest.approx(mean) and f"{mean:.4f}" in shown
        low, high = result["runs"][name]["intervals"]["nDCG@10"]
        assert low <= mean <= high
    test = result["runs"]["rr"]["comparison"]["nDCG@10"]
    assert test["wins"] + test["ties"] + test["losses"] == 10 and 0 < test["p_randomisation"] <= test["p_holm"] <= 1
    assert "comparison" not in result["runs"]["b"] and "p Holm" in shown and "rr" in shown
    assert len(result["per_query"]["nDCG@10"]["rr"]) == 10
    assert run_command(ndcg, arguments) == 0
    assert capsys.readouterr().out == shown, "asked again, it shows the same from the file"


def test_a_changed_run_is_scored_again(runs: Path) -> None:
    options = {"dataset_path": "tiny", "run": ["e=b.trec"], "output": "n.json"}
    execute(ndcg, **options)
    assert execute(ndcg, **options).skipped
    Path("b.trec").write_text("\n".join(Path("b.trec").read_text().splitlines()[:5]) + "\n")
    assert not execute(ndcg, **options).skipped


def test_the_documented_script_without_flags(runs: Path) -> None:
    """E3: run as a file; it takes the stages' default outputs and the data set that they were made from."""
    script = ROOT / "rmsearch" / "evaluation" / "ndcg.py"
    done = subprocess.run([sys.executable, str(script)], cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tiny, split test, 10 queries", done.stdout) and "rerank" in done.stdout
    relative = ["rmsearch/evaluation/ndcg.py", "--dataset-path", str(runs / "tiny"), "--run", str(runs / "b.trec")]
    done = subprocess.run([sys.executable, *relative], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.9" in done.stdout or "1.0" in done.stdout
    done = subprocess.run([sys.executable, *relative[:1]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --run: no run is given")


def test_missing_queries_are_counted_and_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = dict(list(read_run("b.trec").items())[:3])
    Path("few.json").write_text(json.dumps(few))
    execute(ndcg, dataset_path="tiny", run=["few=few.json"], output="n.json")
    assert json.loads(Path("n.json").read_text())["runs"]["few"]["missing_queries"] == 7
    assert "7 of 10 queries, counted as 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": ["a=b.trec", "a=b.trec"]}, "two runs have the same name"),
        ({"run": ["a=b.trec"], "baseline": "z"}, "there is no run 'z' among a"),
        ({"run": ["a=foreign.json"]}, "shares no query id with the qrels"),
        ({"run": ["a=b.trec"], "permutations": 10}, "--permutations"),
    ],
)
def test_flags_that_cannot_be(runs: Path, options: dict[str, object], message: str) -> None:
    Path("foreign.json").write_text('{"other": {"k": 1}}')
    for stage in (ndcg, report):
        with pytest.raises(ConfigError, match=message):
            execute(stage, dataset_path="tiny", **options)


class Checker(HTMLParser):
    """Collects tags, text and attributes; every element must be closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command(report, ["--examples", "3"]) == 0
    assert capsys.readouterr().out.strip() == str((runs / "report.html").resolve())
    page = (runs / "report.html").read_text()
    found = Checker()
    found.feed(page)
    assert found.open == [] and {"svg", "table", "details"} <= found.tags
    for text in ("Summary", "by rerank depth", "Gains and losses: rerank", "All measures", "How the runs were made"):
        assert text in found.text
    assert "evaluation.rerank" in found.text and "template" not in found.tags
    assert "script" not in found.tags and not [v for n, v in found.attributes if n in ("src", "href")]
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "prefers-color-scheme: dark" in page and len(page) < 400_000
    assert run_command(report, ["--examples", "3"]) == 0, "up to date, and it says where the page is"
    assert "report.html" in capsys.readouterr().out


def test_data_cannot_become_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    folder = write_beir(tmp_path / "tiny")
    for name in ("queries.jsonl", "corpus.jsonl"):
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join(json.dumps({**r, "text": evil + r["text"]}) + "\n" for r in records))
    qrels = load_beir(str(folder), "test").qrels
    good = {query: {key: 1.0 for key in keys} for query, keys in qrels.items()}
    Path("good.json").write_text(json.dumps(good))
    Path("bad.json").write_text(json.dumps({query: {evil: 1.0} for query in qrels}))
    for baseline in ("good", evil[:20]):
        runs = ["good=good.json", f"{evil[:20]}=bad.json"]
        execute(report, dataset_path=str(folder), run=runs, baseline=baseline, title=evil, output="r.html")
        found = Checker()
        found.feed(Path("r.html").read_text())
        assert not {"script", "img"} & found.tags and not [n for n, _ in found.attributes if n.startswith("on")]
        assert evil[:20] in found.text


def test_templates_escape_all_and_charts_round_numbers() -> None:
    page = render("page.html.j2", '<b> "&', ["<i>"]).decode()
    assert page.count("&lt;b&gt; &#34;&amp;") == 2 and "&lt;i&gt;" in page and not {"<b>", "<i>"} & set(page.split())
    assert mark("line", "<b>", x1=0.123, class_="a").attributes == {"x1": "0.12", "class": "a"}


def test_depth_curves() -> None:
    qrels = {"q": {"d": 1}}
    first = {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}
    second = {"q": {"d": 9.0, "c": 8.0, "b": 7.0, "a": 6.0}}
    assert [list(at_depth(first, second, d)["q"]) for d in (1, 3, 4)] == [list("abcd"), list("cbad"), list("dcba")]
    assert list(at_depth(first, {"q": {"c": 1.0}}, 4)["q"]) == list("cabd"), "keys without a score keep their order"
    curves = depth_curves(qrels, {"first": first, "second": second, "other": {"q": {"z": 1.0}}})
    assert list(curves) == ["second"], "only runs that reorder the first one's candidates"
    assert list(curves["second"]) == [1, 2, 4]
    assert curves["second"][1] == pytest.approx(mean_ndcg(qrels, first)) and curves["second"][4] == pytest.approx(1)


def test_ticks_are_round_and_cover_the_range() -> None:
    for low, high in ((0.0626, 0.4434), (0.64, 0.66), (0.0, 0.0), (0.5, 0.5), (0, 1)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
