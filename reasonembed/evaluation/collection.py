"""What systems are compared on: queries, gold documents, and documents a query must not get back.

`qrels` here hold gold only. Some collections write excluded documents into their relevance files as
rows of relevance 0; such rows say "not gold" and nothing else, so they are read and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from reasonembed.errors import EvaluationError
from reasonembed.evaluation import revisions
from reasonembed.schemas import stable_hash

_SHOWN = 5  # ids named in a message


@dataclass(frozen=True)
class Collection:
    """What systems are compared on.

    Attributes:
        name: Of the collection; "bright/biology" where it is part of a benchmark.
        queries: Text by query id; every query has gold.
        qrels: Relevance (1 or more) of the gold documents, by query id and doc id.
        excluded: Documents to remove from a query's ranking before the cut; a query may be absent.
        task: Name in `reasonembed.tasks`.
        instruction: What queries ask for.
        corpus_source: `CorpusConfig.source` of the documents, or None if they lie elsewhere.
        benchmark: What it is a part of, such as "bright" or "bright+gpt4_reason": only collections
            of one benchmark may be averaged. Empty where it stands alone.
        revision: Of the data, as its counts tell; "unknown" if they tell of none that is known,
            empty where nobody keeps count.
        is_long: Whether documents are whole pages, of which one is looked for.

    Raises:
        EvaluationError: Queries and qrels differ, a query has no gold, or gold is excluded.
    """

    name: str
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    excluded: Mapping[str, frozenset[str]]
    task: str
    instruction: str
    corpus_source: str | None
    benchmark: str = ""
    revision: str = ""
    is_long: bool = False

    def __post_init__(self) -> None:
        for what, given in (("qrels", self.qrels), ("exclusions", self.excluded)):
            unknown = sorted(set(given) - set(self.queries))
            if unknown:
                raise EvaluationError(
                    f"{self.name}: {len(unknown)} query ids of the {what} have no text, such as "
                    f"{unknown[:_SHOWN]}"
                )
        for query_id in self.queries:
            gold = self.qrels.get(query_id, {})
            if not gold or min(gold.values()) < 1:
                raise EvaluationError(
                    f"{self.name}: query {query_id!r} needs gold documents of relevance 1 or more, "
                    f"it has {dict(gold)}; leave the query out or judge it"
                )
            both = sorted(gold.keys() & self.excluded.get(query_id, frozenset()))
            if both:
                raise EvaluationError(
                    f"{self.name}: query {query_id!r} has documents that are gold and excluded: "
                    f"{both[:_SHOWN]}; a document can be one of the two"
                )

    def named_documents_of(self, query_id: str) -> frozenset[str]:
        """Documents that a query names, as gold or as excluded."""
        return frozenset(self.qrels[query_id]) | self.excluded.get(query_id, frozenset())

    def named_documents(self) -> frozenset[str]:
        """Documents that any query names; none of them may be a seed of training queries."""
        return frozenset().union(*map(self.named_documents_of, self.queries))

    def fingerprint(self) -> str:
        """Hash of queries, judgments and exclusions."""
        rows = [
            (query_id, text, sorted(self.qrels[query_id].items()))
            for query_id, text in sorted(self.queries.items())
        ]
        excluded = [(id_, sorted(docs)) for id_, docs in sorted(self.excluded.items())]
        return stable_hash(rows, excluded, size=16)

    def check_against(self, doc_ids: Iterable[str]) -> None:
        """Makes sure that the searched corpus holds every gold document.

        An excluded document that the corpus lacks is no error: nothing can return it. Another
        number of documents than the revision has is a warning.

        Raises:
            EvaluationError: Gold documents are missing; the message names some.
        """
        known = set(doc_ids)
        missing = sorted({doc for gold in self.qrels.values() for doc in gold} - known)
        if missing:
            raise EvaluationError(
                f"{self.name}: {len(missing)} gold documents are not in the corpus of "
                f"{len(known)} documents, such as {missing[:_SHOWN]}; is it the right corpus?"
            )
        revisions.check_documents(self.name, revision=self.revision, documents=len(known))

    def credit_duplicates(self, twins: Callable[[str], Iterable[str]]) -> Collection:
        """The same collection with gold extended to documents of equal text.

        Corpora hold up to 38 % duplicates, and the official qrels count a gold document's twin as
        wrong. Report this variant beside the official one, never in its place. A twin that the
        query excludes stays excluded; of twins that were judged differently the best counts.

        Args:
            twins: The doc ids whose text equals that of a document, itself included.
        """
        qrels: dict[str, dict[str, int]] = {}
        for query_id, gold in self.qrels.items():
            out, credited = self.excluded.get(query_id, frozenset()), qrels.setdefault(query_id, {})
            for doc_id, relevance in gold.items():
                for twin in (doc_id, *twins(doc_id)):
                    if twin not in out:
                        credited[twin] = max(relevance, credited.get(twin, relevance))
        return replace(self, name=f"{self.name} (duplicates credited)", qrels=qrels)
