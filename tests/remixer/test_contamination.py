import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reasonembed.errors import EvaluationError
from reasonembed.remixer.contamination import (
    BRIGHT_REVISION,
    Benchmark,
    TrainingText,
    contamination,
    load_benchmarks,
    training_texts,
)
from reasonembed.schemas import SAMPLES, from_rows
from tests.remixer.fakes import corpus_store

WORDS = [f"w{i}" for i in range(40)]
GOLD = " ".join(WORDS)


def search(*texts, queries=None, gold=GOLD, excluded=()):
    benchmark = Benchmark("b", queries or {}, {"g": gold}, frozenset(excluded))
    return contamination([benchmark], [TrainingText(*one) for one in texts])[0]


def found_by(text, **given):
    return {check for check, _, _ in search(("positive", "d", text), **given).counts}


def test_each_check_finds_what_it_is_for():
    assert found_by(GOLD.upper().replace(" ", ",  ")) == {"exact", "near-duplicate", "13-gram"}
    assert found_by(" ".join([*WORDS, "more"])) == {"near-duplicate", "13-gram"}
    assert found_by(" ".join(["a", *WORDS[5:18], "b"])) == {"13-gram"}
    assert found_by(" ".join(["a", *WORDS[5:17], "b"])) == set()
    assert found_by("") == set()


def test_short_texts_are_found_by_their_words_alone():
    assert found_by("the heron waits", gold="The heron waits.") == {"exact", "near-duplicate"}
    assert found_by("the heron sleeps", gold="The heron waits.") == set()


def test_near_duplicates_are_those_of_the_exact_jaccard():
    rng = random.Random(7)
    texts = []
    for _ in range(200):
        words = list(WORDS)
        for _ in range(rng.randint(0, 1)):
            words[rng.randrange(len(words))] = "x"
        texts.append(" ".join(words[: rng.randint(33, 40)]))

    def shingles(text):
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    def jaccard(text):
        a, b = shingles(text), shingles(GOLD)
        return len(a & b) / len(a | b)

    near = {text for text in texts if jaccard(text) >= 0.8}
    assert 5 < len(near) < len(set(texts)) - 5
    assert {text for text in texts if "near-duplicate" in found_by(text)} == near


def test_counts_are_of_distinct_texts_by_kind_and_part():
    found = search(
        ("query", "q1", GOLD),
        ("query", "q2", GOLD),
        ("negative", "d1", "what is a heron"),
        queries={"e1": "What is a heron?", "e2": "Unlike anything."},
    )
    count = found.counts["exact", "gold document", "query"]
    assert (count.benchmark_ids, count.text_ids) == ({"g"}, {"q1", "q2"})
    count = found.counts["exact", "query", "negative"]
    assert (count.benchmark_ids, count.text_ids) == ({"e1"}, {"d1"})
    assert ("13-gram", "query", "negative") not in found.counts
    assert found.examples[0].check == "exact"


def test_seeds_that_the_benchmark_names_are_listed_by_id():
    texts = [("seed", one, f"text of {one}") for one in ("g", "x", "y")]
    found = search(*texts, ("positive", "g", "other text"), excluded={"x"})
    assert found.named_seeds == ["g", "x"]


def test_several_benchmarks_are_told_apart():
    one, two = (Benchmark(name, {name: f"query of {name}"}, {}) for name in "ab")
    first, second = contamination([one, two], [TrainingText("query", "q", "Query of b")])
    assert not first.counts
    assert second.counts


def test_training_texts_name_every_part_and_each_document_once():
    def held(*ids):
        return [{"doc_id": d, "text": f"text {d}", "label": 1.0, "text_hash": d} for d in ids]

    rows = [
        {
            "query_id": f"q{i}",
            "task": "generic",
            "instruction": "",
            "query": f"query {i}",
            "rewritten_query": f"rewritten {i}",
            "positives": held("a"),
            "negatives": held("b", f"n{i}"),
            "source_doc_id": "s",
            "split": "train",
        }
        for i in range(2)
    ]
    parts = [from_rows([row], SAMPLES, where="test") for row in rows]
    texts = list(training_texts(parts, corpus=corpus_store({"s": "seed"}), seeds=["s", "gone"]))
    assert [(one.part, one.text_id) for one in texts] == [
        ("query", "q0"),
        ("rewritten query", "q0"),
        ("positive", "a"),
        ("negative", "b"),
        ("negative", "n0"),
        ("query", "q1"),
        ("rewritten query", "q1"),
        ("negative", "n1"),
        ("seed", "s"),
    ]
    assert texts[-1].text == "seed"


# ---- files ----------------------------------------------------------------------------------


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def examples(number=2):
    return [
        {"id": str(i), "query": f"post {i}", "gold_ids": ["a", "b"], "excluded_ids": ["N/A"]}
        for i in range(number)
    ]


def test_a_beir_folder_with_and_without_documents(tmp_path):
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "a question"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\nq\td2\t1\n")
    (bare,) = load_benchmarks(str(tmp_path))
    assert bare.gold == {"d1": None, "d2": None}
    assert bare.with_texts_of(corpus_store({"d1": "ours"})).gold == {"d1": "ours", "d2": None}
    write(
        tmp_path / "corpus.jsonl",
        [{"_id": "d1", "title": "Title", "text": "text"}, {"_id": "d9", "text": "no gold"}],
    )
    (whole,) = load_benchmarks(str(tmp_path))
    assert whole.gold == {"d1": "Title\ntext", "d2": None}
    assert "1 gold documents are not there, such as ['d2']" in whole.warnings[0]


def test_bright_topics_have_ids_and_both_counts_where_these_are_unknown(tmp_path):
    file = write(tmp_path / "topics.bright-earth-science-original.jsonl.gz", examples())
    (found,) = load_benchmarks(str(file))
    assert found.name == "BRIGHT earth_science"
    assert found.queries == {"0": "post 0", "1": "post 1"}
    assert found.gold == {"a": None, "b": None}
    assert found.excluded == frozenset()
    assert [w.split("has ", 1)[1].split()[0] for w in found.warnings] == ["2", "4"]
    assert "116" in found.warnings[0]
    assert "585" in found.warnings[1]
    assert load_benchmarks(str(tmp_path)) == [found]


def test_a_file_of_the_known_revision_raises_no_warning(tmp_path):
    known = BRIGHT_REVISION["theoremqa_theorems"]
    rows = [
        {"id": str(i), "query": f"post {i}", "gold_ids": [f"g{i}"], "excluded_ids": ["x"]}
        for i in range(known.queries)
    ]
    rows[0]["gold_ids"] = [f"h{i}" for i in range(known.gold - known.queries + 1)] * 2
    (found,) = load_benchmarks(str(write(tmp_path / "theoremqa_theorems.jsonl", rows)))
    assert found.warnings == ()
    assert found.excluded == {"x"}


def test_the_hub_s_folders_give_the_documents_texts(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "documents").mkdir()
    documents = [{"id": "a", "content": "text of a"}, {"id": "z", "content": "other"}]
    for folder, rows in (("examples", examples()), ("documents", documents)):
        file = tmp_path / folder / "pony-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    (found,) = load_benchmarks(str(tmp_path))
    assert found.gold == {"a": "text of a", "b": None}
    assert any("2 documents; the revision" in warning for warning in found.warnings)
    assert any("1 gold documents are not there" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "1", "query": "x", "excluded_ids": []}], "'gold_ids' must be a list"),
        ([{"id": "1", "query": " ", "gold_ids": [], "excluded_ids": []}], "'query' must be"),
        (examples() + examples(1), "stands there twice"),
        ([[1]], "expected an object"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, rows, said):
    file = write(tmp_path / "biology.jsonl", rows)
    with pytest.raises(EvaluationError, match=said) as error:
        load_benchmarks(str(file))
    assert f"line {len(rows)}" in str(error.value)


def test_what_is_no_benchmark_says_what_would_be(tmp_path):
    with pytest.raises(EvaluationError, match=r"neither a BEIR folder .* nor a file"):
        load_benchmarks(str(tmp_path / "nothing"))
    (tmp_path / "biology.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_benchmarks(str(tmp_path / "biology.jsonl.gz"))
