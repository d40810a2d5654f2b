"""Write queries for every row of a corpus with a language model: titles, keywords, questions, unanswered questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from rmsearch.cli import main
from rmsearch.datasets.chain import QUERY_TYPES, QueryRecord
from rmsearch.datasets.corpus import CorpusFlags
from rmsearch.engines.generation import Generation
from rmsearch.llm.answers import Queries, answer_schema, counts, read_queries
from rmsearch.llm.asking import GeneratorFlags, Question, ask
from rmsearch.llm.budget import Fitting
from rmsearch.llm.instructions import instruction
from rmsearch.llm.languages import language
from rmsearch.stage import Run, option, stage, target
from rmsearch.storage.records import write_records


class MakeQueryRecsConfig(CorpusFlags, GeneratorFlags):
    """Config of `rmsearch train make_query_recs`."""

    output: str = target(..., "Query records to write (.json, .jsonl, .csv, .parquet, each also .gz).")
    max_characters: int = option(
        8000,
        "Characters of a row that the model is shown at most; fewer when instruction, row and answer would not fit "
        "into --max-model-len.",
        ge=100,
    )
    same_language: bool = option(True, "Ask again when the queries are surely in another language than the row.")


class AskedRow(NamedTuple):
    """What of a row is needed to read its answer."""

    id: str
    language: str | None


NEXT = "rmsearch train filter_query_recs --input {output} --output filtered_query_recs.json --filter questions"


@stage("train.make_query_recs", next_step=NEXT)
def make_query_recs(config: MakeQueryRecsConfig, run: Run) -> None:
    """Write queries for every row of a corpus with a language model.

    Per row 2 to 3 titles, 3 to 5 keyword queries, 3 to 6 questions from easy to hard, and 2 to 3 questions that the row
    does not answer (irr_questions), in the row's language. A record's query_id is DF_ID-TYPE-NUMBER. The whole corpus
    is read through once before the first question is asked, so that a faulty row costs no answers. Rows stream; no more
    than twice --in-flight are held. Empty and repeated queries, apologies, and what is too long or more than was asked
    for are dropped and counted; an answer without a usable query is asked for again, then rejected.
    """
    spec, schema, amounts = instruction("make_query_recs"), answer_schema(), counts()
    rows = sum(1 for _ in config.rows())
    fit = Fitting(config, spec.messages(text="", **amounts), config.max_characters)
    tally: Counter[str] = Counter()

    def questions() -> Iterator[Question[AskedRow]]:
        for row in config.rows():
            shown = fit(row.text)
            tally["cut_rows"] += len(shown) < len(row.text)
            written_in = language(shown) if config.same_language else None
            yield Question(AskedRow(row.id, written_in), spec.messages(text=shown, **amounts), schema)

    def parse(row: AskedRow, generation: Generation) -> Queries:
        queries = read_queries(generation)
        _check_language(row, queries)
        return queries

    def records() -> Iterator[QueryRecord]:
        for answer in ask(run, config, questions(), parse, total=rows):
            for query_type in QUERY_TYPES:
                for number, query in enumerate(answer.value.by_type[query_type], 1):
                    tally[f"written_{query_type}"] += 1
                    query_id = f"{answer.item.id}-{query_type}-{number}"
                    yield QueryRecord(
                        query=query, df_id=answer.item.id, query_type=query_type, query_id=query_id, prompt=spec.tag
                    )
            for reason, count in answer.value.dropped.items():
                tally[f"dropped_{reason}"] += count
        run.check_rejects(rows)

    written = write_records(config.output, records())
    run.counts |= {"rows": rows, "queries": written} | dict(sorted(tally.items()))
    run.note(prompt=spec.tag)


def _check_language(row: AskedRow, queries: Queries) -> None:
    """ValueError when the queries together are surely in another language than the row."""
    if row.language is None:
        return
    found = language("\n".join(query for texts in queries.by_type.values() for query in texts))
    if found not in (row.language, None):
        raise ValueError(f"the queries are in another language ({found}) than the row ({row.language})")


if __name__ == "__main__":
    main(make_query_recs)
