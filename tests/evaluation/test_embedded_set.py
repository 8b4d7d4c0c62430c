"""The embedded evaluation set must fit the corpus of whichever Python runs the tests."""

import json
import re
from importlib.resources import files

import pytest

from reasonembed.corpus import CorpusStore, read_corpus

FIELDS = {"query_id", "query", "gold_ids", "excluded_ids", "why"}

# Passages of the language reference are numbered, so another Python version could move them. Each
# phrase is what the passage is gold for. The ids not listed here are the few that move:
MOVING = {
    "topic:atom-identifiers#0",
    "topic:function#3",
    "topic:function#4",
    "topic:typesseq#18",
    "topic:typesseq#21",
}
PHRASES = {
    "topic:assert#0": "when optimization is requested",
    "topic:assignment#10": "assigned-to variables occur left-to-right",
    "topic:assignment#5": "creates a new instance attribute as the target",
    "topic:assignment#6": "writes inst.x as 4",
    "topic:attribute-access#0": "Called when the default attribute access fails",
    "topic:attribute-access#1": "Called unconditionally to implement attribute accesses",
    "topic:attribute-access#12": "instances cannot override the behavior of a property",
    "topic:attribute-access#13": "deny the creation of",
    "topic:attribute-access#14": 'do not support "weak references"',
    "topic:attribute-access#9": "a descriptor is an object attribute",
    "topic:augassign#1": "the old object is modified instead",
    "topic:await#0": "Suspend the execution of *coroutine*",
    "topic:binary#2": "same sign as its second operand",
    "topic:booleans#0": "are interpreted as false",
    "topic:booleans#1": "rather return the last evaluated argument",
    "topic:comparisons#0": 'expressions like "a < b < c"',
    "topic:comparisons#1": "can be chained arbitrarily",
    "topic:comparisons#5": "not-a-number values are",
    "topic:compound#32": "capture pattern binds the subject",
    "topic:compound#34": "A value pattern represents a named value",
    "topic:context-managers#1": "wishes to suppress the exception",
    "topic:customization#1": "does not return an instance of *cls*",
    "topic:customization#11": "functools.total_ordering",
    "topic:customization#14": "will not be usable as items in hashable",
    "topic:customization#15": 'does not define "__hash__()" will have',
    "topic:customization#16": "salted",
    "topic:customization#17": 'When this method is not defined, "__len__()"',
    "topic:customization#6": "can be executed during interpreter shutdown",
    "topic:dynamic-features#0": "occurs at runtime",
    "topic:for#1": "this will not affect the for-loop",
    "topic:formatstrings#0": "by doubling",
    "topic:global#0": "impossible to assign to a global",
    "topic:id-classes#0": 'Not imported by "from module import',
    "topic:import#5": "which do not begin with an underscore",
    "topic:integers#1": "leading zeros in a non-zero",
    "topic:nonlocal#0": "previously bound",
    "topic:numbers#0": "do not include a sign",
    "topic:operator-summary#0": "left-to-right chaining",
    "topic:operator-summary#4": "To compare strings at the level of abstract characters",
    "topic:power#0": "binds more tightly than unary operators on its left",
    "topic:raise#3": "explicitly suppressed by specifying",
    "topic:specialnames#38": "change the behavior of subclasses",
    "topic:string-methods#1": "Casefolding is similar to lowercasing",
    "topic:string-methods#11": "used to form numbers in base 10",
    "topic:string-methods#12": "superscript digits",
    "topic:string-methods#23": "removesuffix",
    "topic:string-methods#25": "regarded as a single separator",
    "topic:string-methods#31": "workaround for apostrophes",
    "topic:strings#3": "treat backslashes as literal",
    "topic:truth#0": "is considered true unless its class defines",
    "topic:try#3": "it is cleared at the end of the",
    "topic:try#8": "the saved exception is discarded",
    "topic:try#9": "will always be the last one executed",
    "topic:types#10": "affixing a comma",
    "topic:types#12": "only one of them can be contained in a set",
    "topic:types#14": "can be used interchangeably to index",
    "topic:types#24": "are not converted to bound methods",
    "topic:types#25": "is called a *generator function*",
    "topic:types#26": "is called a *coroutine function*",
    "topic:types#35": "C3 method resolution",
    "topic:types#9": "may be mutable and may be changed",
    "topic:typesmapping#0": "can be used interchangeably to index",
    "topic:typesmapping#13": "provide a dynamic view",
    "topic:typesmapping#14": "Iterating views while adding",
    "topic:typesmapping#4": "No other operations or methods invoke",
    "topic:typesseq#4": "Forward and reversed iterators over mutable",
    "topic:typesseq#5": "This often haunts",
    "topic:typesseq#6": "lists = [[] for i in range(3)]",
    "topic:typesseq#8": "quadratic runtime cost",
    "topic:with#2": "the exception is suppressed",
    "topic:yield#0": "create a generator function",
}


@pytest.fixture(scope="module")
def store() -> CorpusStore:
    return CorpusStore(read_corpus("python-stdlib", task="python-stdlib"))


@pytest.fixture(scope="module")
def records() -> list[dict]:
    source = files("reasonembed.evaluation") / "data" / "python_stdlib" / "queries.jsonl"
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]


def test_records_have_the_declared_form(records):
    assert len(records) >= 88
    for record in records:
        assert set(record) == FIELDS
        assert 1 <= len(record["gold_ids"]) <= 4
        assert len(set(record["gold_ids"])) == len(record["gold_ids"])
        assert len(set(record["excluded_ids"])) == len(record["excluded_ids"])
        assert record["why"].strip()


def test_ids_and_queries_are_unique(records):
    assert len({record["query_id"] for record in records}) == len(records)
    assert len({record["query"] for record in records}) == len(records)


def test_queries_are_a_few_sentences(records):
    for record in records:
        assert 25 <= len(record["query"].split()) <= 90, record["query_id"]
        assert 2 <= len(re.findall(r"[.?!](?:\s|$)", record["query"])) <= 5, record["query_id"]


def test_all_gold_and_excluded_documents_exist(records, store):
    wanted = {i for record in records for i in (*record["gold_ids"], *record["excluded_ids"])}
    assert sorted(wanted - set(store.doc_ids)) == []


def test_duplicates_of_gold_are_gold_and_never_excluded(records, store):
    for record in records:
        gold = {twin for i in record["gold_ids"] for twin in store.group_members(store.group(i))}
        assert gold == set(record["gold_ids"]), record["query_id"]
        excluded = {store.group(i) for i in record["excluded_ids"]}
        assert excluded.isdisjoint(store.group(i) for i in gold), record["query_id"]


def test_no_query_names_its_gold(records):
    for record in records:
        for doc_id in record["gold_ids"]:
            names = doc_id.removeprefix("topic:").partition("#")[0].split(".")
            for name in names:
                pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
                named = re.search(pattern, record["query"], re.IGNORECASE)
                assert not named, f"{record['query_id']} names {name}"


def test_gold_passages_of_the_language_reference_say_what_they_are_gold_for(records, store):
    passages = {i for record in records for i in record["gold_ids"] if i.startswith("topic:")}
    assert passages == MOVING | set(PHRASES)
    for doc_id, phrase in PHRASES.items():
        assert phrase in " ".join(store.text(doc_id).split()), doc_id
