"""What is in a preference set, and what is wrong with it: ``python -m rmsearch.train.inspect``."""

from __future__ import annotations

if __name__ == "inspect":  # a file of this folder is run by its path, and the standard library's module is asked for
    import sys
    from pathlib import Path

    folder = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != folder]
    del sys.modules[__name__]
    __import__(__name__)  # Python takes what now stands in sys.modules
else:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from pydantic import field_validator

    from rmsearch.cli import main
    from rmsearch.errors import RejectedError
    from rmsearch.progress import say
    from rmsearch.reports.page import counted, render
    from rmsearch.reports.preference_checks import Check, CheckFlags, check_judges, check_overlap, check_set
    from rmsearch.reports.preference_columns import Columns
    from rmsearch.reports.preference_entries import entries_at, read_entries
    from rmsearch.reports.preference_measures import filled, measure, overlap, places_in, reports, sample
    from rmsearch.retrieval.candidates import records_of
    from rmsearch.stage import Run, option, source, stage, target
    from rmsearch.storage import uri as storage
    from rmsearch.storage.records import read_json, write_json

    class InspectConfig(CheckFlags):
        """Config of `rmsearch train inspect`."""

        dataset_list_train: list[str] = source(
            ...,
            "Preference pairs, or ADPO rows (.json, .jsonl, .csv, .parquet, each also .gz); several files are one set.",
        )
        dataset_list_test: str | None = source(None, "Held-out pairs: are their queries in the training set?")
        output: str = target("inspect.html", "The page.")
        output_json: str | None = target(None, "The same facts and checks as JSON.")
        strict: bool = option(False, "Exit with 2 when a check fails (the page is written all the same).")
        examples: int = option(20, "Random pairs to read.", ge=0)
        opening_words: int = option(3, "Queries that begin with this many equal words count as of one template.", ge=1)
        near_duplicate: float = option(0.8, "Similarity (Jaccard, of word triples) of near-duplicates.", gt=0, le=1)
        compared_texts: int = option(
            200_000,
            "Compare the first so many distinct queries, and keys, for near-duplicates (some 400 bytes each).",
            ge=1,
        )
        seed: int = option(42, "Seed of the choice of pairs to read.", ge=0)

        @field_validator("dataset_list_train", mode="before")
        @classmethod
        def _split(cls, value: object) -> object:
            return value.split(",") if isinstance(value, str) else value

        @property
        def sets(self) -> dict[str, list[str]]:
            """Name -> files."""
            tests = {"test": [self.dataset_list_test]} if self.dataset_list_test else {}
            return {"train": self.dataset_list_train} | tests

    def show(config: InspectConfig) -> None:
        """Print the failed checks of the finished run and where the page is."""
        for line in read_json(f"{config.output}.run.json")["notes"]["failed"]:
            say("warning", stage="train.inspect", check=line)
        show_place(config.output)

    def show_place(output: str) -> None:
        """Print where the page is."""
        print(output if storage.is_s3(output) else str(Path(output).resolve()))

    @stage("train.inspect", show=show)
    def inspect(config: InspectConfig, run: Run) -> None:
        """Show what is in a preference set, and check it.

        Reads raw pairs, upstream's chosen_msg pairs or ADPO rows, and writes one page: counts per query type and
        source, lengths, margins, ties and position bias (from a judge's run record beside the file), overlap of
        training and test set, near-duplicates, the keys chosen and rejected most, random pairs to read. Each failed
        check is one warning; with --strict it is exit code 2. Per pair some 70 bytes are kept, per distinct text
        compared 400; texts are read again where they are shown.
        """
        records = {uri: records_of(uri) for uris in config.sets.values() for uri in uris}
        facts = gather(config, run, records)
        checks = [check for of, each in facts["sets"].items() for check in check_set(of, each, config)]
        checks += check_judges(facts["reports"], config)
        if facts["overlap"] is not None:
            checks.append(check_overlap(facts["overlap"], config))
        with storage.writer(config.output) as file:
            file.write(page(facts, checks, {storage.name(uri): each for uri, each in records.items()}))
        if config.output_json:
            write_json(config.output_json, {**facts, "checks": [check.facts() for check in checks]}, indent=1)
        failed = [check for check in checks if not check.passed]
        run.counts |= {"pairs": facts["sets"]["train"]["counts"]["pairs"], "checks": len(checks), "failed": len(failed)}
        run.note(failed=[check.line for check in failed])
        for check in failed:
            run.say("warning", check=check.line, remedy=check.remedy)
        if failed and config.strict:
            names = ", ".join(check.title for check in failed)
            raise RejectedError(f"{names}: failed", where="--strict", remedy=f"Mend the data, see {config.output}")
        show_place(config.output)

    def gather(config: InspectConfig, run: Run, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """All facts about the sets: one pass over each file, and another one for the few texts that are shown."""
        columns = {of: Columns(config.opening_words, config.compared_texts) for of in config.sets}
        with run.progress(unit="pairs") as bar:
            for of, uris in config.sets.items():
                for entry in (entry for uri in uris for entry in read_entries(uri)):
                    columns[of].add(entry)
                    bar.advance()
        sets = {}
        for of, uris in config.sets.items():
            facts = measure(columns[of], config.near_duplicate)
            size = config.examples if of == "train" else 0
            shown = {"facts": facts, "sample": sample(columns[of], size, config.seed)}
            texts = entries_at(uris, {place.position for place in places_in(shown)})
            sets[of] = filled(shown, texts)
            sets[of]["facts"]["files"] = uris
        both = overlap(columns["train"], columns["test"], config.near_duplicate) if "test" in columns else None
        return {
            "sets": {of: each["facts"] for of, each in sets.items()},
            "overlap": both,
            "reports": reports(records),
            "sample": sets["train"]["sample"],
        }

    def page(
        facts: Mapping[str, Any], checks: Sequence[Check], records: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> bytes:
        """The page of what `gather` found; records: file -> its run records."""
        counts = facts["sets"]["train"]["counts"]
        names = {name: None for each in facts["reports"] for name in each if name not in ("file", "fingerprint")}
        return render(
            "preferences.html.j2",
            f"Preferences of {' and '.join(records)}",
            [counted(counts["pairs"], "pair"), counted(counts["queries"], "query"), counted(counts["keys"], "key")],
            checks=checks,
            judge_counts=list(names),
            records=records,
            **facts,
        )

    if __name__ == "__main__":
        main(inspect)
