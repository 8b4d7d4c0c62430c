"""What of a benchmark stands in the training data, and what was kept out of it."""

from __future__ import annotations

from collections.abc import Sequence

from reasonembed.errors import ReasonEmbedError
from reasonembed.remixer.contamination import (
    CHECKS,
    PARTS,
    Benchmark,
    Contamination,
    contamination,
    load_benchmarks,
    training_texts,
)
from reasonembed.report.charts import NOTHING, Html, join, number, table, tag
from reasonembed.report.facts import NOT_RUN, Facts, excerpt, finite

_NUM_EXAMPLES = 4
_HOW = (
    "Only this run's own evaluation is searched for. Name others, as BEIR folders or files of "
    "BRIGHT's examples, under report.benchmarks in the configuration and write the report again."
)
_SAID = (
    "Every query, rewritten query, positive, negative and seed of the samples against every query "
    "and gold document. exact: equal words. near-duplicate: Jaccard of 5-word runs at least 0.8, "
    "found by MinHash and verified. 13-gram: 13 words in a row shared; a shorter text has none. A "
    "cell counts the benchmark's texts that were found, and the training texts that hold them. "
    "Gold documents among positives and negatives are expected where training and evaluation "
    "share a corpus; among seeds there should be none."
)


def contaminated(facts: Facts) -> Html:
    """A table for each benchmark; the run's own evaluation first."""
    corpus = facts.corpus
    if corpus is None or facts.rows("samples", "query_id") is None:
        return NOT_RUN
    benchmarks, problems = _benchmarks(facts)
    seeds = facts.rows("seeds", "source_doc_id")
    texts = training_texts(
        facts.run.artifact("samples").parts(),
        corpus=corpus,
        seeds=seeds.column("source_doc_id").unique().to_pylist() if seeds else (),
    )
    known = [one.with_texts_of(corpus) for one in benchmarks]
    parts: list[object] = [tag("p", _SAID), tag("p", _kept_out(facts))]
    if not facts.config.report.benchmarks:
        parts.append(tag("p", _HOW, class_="muted"))
    parts += [tag("p", problem, class_="bad") for problem in problems]
    facts.contamination = contamination(known, texts) if known else []
    for found in facts.contamination:
        parts += _benchmark(found)
    return join(parts)


def _benchmarks(facts: Facts) -> tuple[list[Benchmark], list[str]]:
    """Those that can be read, and why others cannot."""
    found, problems = [], []
    try:
        found.append(Benchmark.of(facts.run.collection))
    except ReasonEmbedError as error:
        problems.append(f"The run's own evaluation was not searched for: {error}")
    for path in facts.config.report.benchmarks:
        try:
            found += load_benchmarks(path)
        except ReasonEmbedError as error:
            problems.append(f"Not searched for: {error}")
    return found, problems


def _kept_out(facts: Facts) -> str:
    dropped = facts.result("plan").get("not a seed: held out for evaluation")
    if dropped is None:
        return "The seeds were not planned in this run."
    return (
        f"{number(int(finite(dropped)))} documents were kept out of the seeds because the run's "
        "evaluation names them or a document of equal text as gold or as excluded, or because they "
        "are near-duplicates of its gold."
    )


def _benchmark(found: Contamination) -> list[Html]:
    one = found.benchmark
    with_text = sum(text is not None for text in one.gold.values())
    searched = (
        f"{number(len(one.queries))} queries; {number(with_text)} of {number(len(one.gold))} gold "
        "documents with their text"
    )
    named = (
        f"; {number(len(found.named_seeds))} seeds are among the documents that it names, such as "
        f"{found.named_seeds[0]}."
        if found.named_seeds
        else "; no seed is among the documents that it names."
    )
    return [
        tag("h3", one.name),
        *(tag("p", warning, class_="bad") for warning in one.warnings),
        tag("p", searched + named),
        *(_counts(found) if found.counts else [tag("p", "Nothing found.", class_="good")]),
    ]


def _counts(found: Contamination) -> Sequence[Html]:
    total = {"query": len(found.benchmark.queries), "gold document": len(found.benchmark.gold)}
    rows = [
        [kind, part, *(_cell(found, check, kind, part) for check in CHECKS)]
        for kind in total
        for part in PARTS
        if any((check, kind, part) in found.counts for check in CHECKS)
    ]
    examples = [
        tag(
            "li",
            f"{one.check}: {one.kind} ",
            tag("code", one.benchmark_id),
            f" in {one.part} ",
            tag("code", one.text_id),
            f": {excerpt(one.text, 120)}",
        )
        for one in found.examples[:_NUM_EXAMPLES]
    ]
    return [
        table(["of the benchmark", "stands in", *CHECKS], rows, align="llrrr"),
        tag("ul", *examples, class_="muted small"),
    ]


def _cell(found: Contamination, check: str, kind: str, part: str) -> str:
    count = found.counts.get((check, kind, part))
    if count is None:
        return NOTHING
    return f"{number(len(count.benchmark_ids))} in {number(len(count.text_ids))}"
