from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.artifacts import Artifact
from reasonembed.config import BM25Retriever, EncoderConfig, MineConfig
from reasonembed.errors import ConfigError, CorpusError
from reasonembed.remixer.duplicates import shingles, similarity
from reasonembed.remixer.mine import (
    Churn,
    RunFile,
    SourceIndex,
    candidates,
    changed_rows,
    churn,
    keeping_to_source,
    plan_queries,
    read_documents,
    shut_out,
    texts_at,
)
from reasonembed.schemas import CANDIDATES, text_id
from reasonembed.tasks import TASKS
from tests.index.vectors import DIMENSION, Search, coarse, commit
from tests.remixer.fakes import corpus_store, corpus_table

LIMIT = 0.6


def corpus(folder, *parts):
    artifact = Artifact.declared(folder / "corpus", "corpus")
    for number, texts in enumerate(parts):
        artifact.commit(f"corpus-{number:06d}", corpus_table(texts))
    return artifact


def queries(*sources):
    return pa.table(
        {
            "query_id": [f"q{i}" for i in range(len(sources))],
            "query": [f"why {i}" for i in range(len(sources))],
            "source_doc_id": pa.array(sources, pa.string()),
            "task": ["generic"] * len(sources),
        }
    )


def mine(folder, store, asked, vectors, *, k, exclude=(), cuts=(4, 2, 3)):
    """Everything from the corpus to candidates, with shards; `vectors` by text id."""
    documents = read_documents(store)
    sources = np.unique(documents.positions(asked["source_doc_id"].to_pylist()))
    index = SourceIndex(texts_at(store, documents.table.take(sources)), max_similarity=LIMIT)
    near = [
        (int(sources[source]), row)
        for row, text in enumerate(texts_at(store, documents.table))
        for source in index.sources_of(text)
    ]
    listed = folder / "listed.txt"
    listed.write_text("".join(f"{one}\n" for one in exclude))
    shut = shut_out(documents, sources.tolist(), near=near, exclude_ids=str(listed))
    planned = plan_queries(asked, documents, shut, tasks=TASKS)
    max_documents, max_queries, rows_in_part = cuts
    search = Search(folder, max_documents=max_documents, max_queries=max_queries, k=k)
    ids = [*documents.table["text_id"].to_pylist(), *planned["text_id"].to_pylist()]
    for number, start in enumerate(range(0, len(ids), rows_in_part)):
        part = ids[start : start + rows_in_part]
        commit(search.vectors, f"a-{number:03d}", part, np.array([vectors(one) for one in part]))
    rows = np.setdiff1d(np.arange(documents.table.num_rows), list(shut.always))
    searched = documents.table.take(rows)
    scores_QK, found_QK = search(searched, planned)
    positions_QK = np.where(found_QK >= 0, np.append(rows, -1)[found_QK], -1)
    config = MineConfig(encoder=EncoderConfig(model="m"), top_k=k)
    found = {"miner": (scores_QK, positions_QK)}
    texts = documents.table["text_id"].to_pylist()
    sources_Q = [texts[row] for row in documents.positions(planned["source_doc_id"].to_pylist())]
    pairs = zip(planned["text_id"].to_pylist(), sources_Q, strict=True)
    return candidates(
        planned,
        found,
        doc_ids=documents.doc_ids,
        source_scores_Q=np.array([vectors(a) @ vectors(b) for a, b in pairs], np.float32),
        config=config,
    )


def by_hand(texts, source, vectors, query_vector, *, k, exclude):
    """One document at a time; what is shut out is decided before anything is ranked.

    The documents, how many are shut out, and the rank of the source were it not.
    """

    def words(text):
        return " ".join(text.split())

    def like_source(text):
        a, b = (shingles(one, size=5) for one in (text, texts[source]))
        return words(text) == words(texts[source]) or similarity(a, b) > LIMIT

    shut = {words(texts[one]) for one in exclude}
    barred = [d for d, text in texts.items() if like_source(text) or words(text) in shut]
    first = {}
    for doc_id in sorted(texts):
        first.setdefault(words(texts[doc_id]), doc_id)
    scored = sorted(
        (-float(vectors(text_id(texts[doc_id], instruction=None)) @ query_vector), doc_id)
        for doc_id in first.values()
        if doc_id not in barred
    )
    stands = texts[first[words(texts[source])]]  # for the source, where white space differs
    own = float(vectors(text_id(stands, instruction=None)) @ query_vector)
    rank = 1 + sum(-score > own for score, _ in scored)
    return [doc_id for _, doc_id in scored[:k]], len(barred), rank


@st.composite
def planted(draw):
    """Few families of texts, changed in single words and in white space."""
    texts = {}
    for i in range(draw(st.integers(1, 16))):
        family = draw(st.integers(0, 2))
        words = [f"w{family}x{j}" for j in range(16)]
        for place in draw(st.sets(st.integers(0, 15), max_size=2)):
            words[place] = draw(st.sampled_from(["new", "other"]))
        texts[f"d{i:02d}"] = draw(st.sampled_from([" ", "  "])).join(words)
    ids = st.sampled_from(sorted(texts))
    return texts, draw(st.lists(ids, min_size=1, max_size=4)), draw(st.sets(ids, max_size=2))


@settings(max_examples=40, deadline=None)
@given(planted(), st.integers(1, 20), st.integers(0, 2**16), st.data())
def test_source_and_all_that_repeats_it_are_shut_out_before_the_cut(planting, k, seed, data):
    texts, sources, exclude = planting
    rng = np.random.default_rng(seed)
    table: dict[str, np.ndarray] = {}

    def vectors(id_):
        return table.setdefault(id_, coarse(rng, 1)[0])

    cuts = [data.draw(st.integers(2, 9)) for _ in range(3)]
    with tempfile.TemporaryDirectory() as name:
        store, asked = corpus(Path(name), texts), queries(*sources)
        found = mine(Path(name), store, asked, vectors, k=k, exclude=sorted(exclude), cuts=cuts)
    for number, (row, source) in enumerate(zip(found.to_pylist(), sources, strict=True)):
        instruction = TASKS["generic"].instruction
        query_vector = vectors(text_id(f"why {number}", instruction=instruction))
        wanted, num_excluded, rank = by_hand(
            texts, source, vectors, query_vector, k=k, exclude=exclude
        )
        assert row["doc_ids"] == wanted
        assert row["source_rank"] == (rank if rank <= k else None)
        assert row["num_excluded"] == num_excluded
        ranks = [origin for origins in row["origins"] for origin in origins]
        assert ranks == [{"retriever": "miner", "rank": i + 1} for i in range(len(wanted))]


def test_candidates_are_the_nearest_that_may_be_returned(tmp_path):
    texts = {"source": "a", "twin": "a", "near": "b", "far": "c"}
    first = {"a": 9, "b": 5, "c": 1}
    values = {text_id(text, instruction=None): value for text, value in first.items()}

    def vectors(id_):
        return np.array([values.get(id_, 1), 0, 0], dtype=np.float32)

    table = mine(tmp_path, corpus(tmp_path, texts), queries("twin"), vectors, k=3)
    assert table.schema == CANDIDATES
    assert table.to_pylist() == [
        {
            "query_id": "q0",
            "source_doc_id": "twin",
            "task": "generic",
            "doc_ids": ["near", "far"],
            "scores": [5.0, 1.0],
            "origins": [[{"retriever": "miner", "rank": 1}], [{"retriever": "miner", "rank": 2}]],
            "num_excluded": 2,
            "source_rank": 1,
        }
    ]


def test_a_corpus_of_one_text_leaves_an_empty_row_not_a_missing_one(tmp_path):
    store = corpus(tmp_path, {"a": "same", "b": "same"})
    (row,) = mine(tmp_path, store, queries("a"), lambda _: np.ones(DIMENSION), k=3).to_pylist()
    assert (row["doc_ids"], row["scores"], row["num_excluded"]) == ([], [], 2)


def test_more_candidates_than_the_gpu_index_of_faiss_gives(tmp_path):
    texts = {f"d{i:04d}": f"text number {i}" for i in range(2_200)}
    rng = np.random.default_rng(0)
    store = corpus(tmp_path, texts)
    cuts = (900, 5, 700)
    found = mine(tmp_path, store, queries("d0007"), lambda _: coarse(rng, 1)[0], k=2_150, cuts=cuts)
    assert len(set(found["doc_ids"][0].as_py())) == 2_150


# Documents.


def test_the_first_committed_document_stands_for_its_group(tmp_path):
    artifact = corpus(tmp_path, {"m": "one", "c": "two", "n": " one "}, {"a": "one", "b": "three"})
    documents = read_documents(artifact)
    assert documents.doc_ids.to_pylist() == ["b", "c", "m"]
    assert documents.num_copies.tolist() == [1, 1, 3]
    assert documents.positions(["a", "n", "b"]).tolist() == [2, 2, 0]
    assert texts_at(artifact, documents.table) == ["three", "two", "one"]
    ids = [text_id(one, instruction=None) for one in ("three", "two", "one")]
    assert documents.table["text_id"].to_pylist() == ids
    assert documents.table["chars"].to_pylist() == [5, 3, 3]


def test_documents_agree_with_the_corpus_store(tmp_path):
    texts = {"b": "one", "a": "one", "c": "two", "d": "one   "}
    documents, store = read_documents(corpus(tmp_path, texts)), corpus_store(texts)
    for doc_id in texts:
        stands = documents.doc_ids[int(documents.positions([doc_id])[0])].as_py()
        assert store.group(stands) == store.group(doc_id)


def test_a_source_outside_the_corpus_is_refused(tmp_path):
    documents = read_documents(corpus(tmp_path, {"a": "x"}))
    with pytest.raises(CorpusError, match="'gone' is not in the corpus of 1 documents"):
        documents.positions(["a", "gone"])


def test_no_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="run the stage corpus"):
        read_documents(corpus(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"), [("a\nnope\n", "'nope' is not in the corpus"), (None, "cannot be read")]
)
def test_a_list_of_excluded_ids_that_cannot_be_meant_is_refused(tmp_path, text, said):
    documents = read_documents(corpus(tmp_path, {"a": "x"}))
    file = tmp_path / "ids.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        shut_out(documents, [0], near=[], exclude_ids=str(file))


# Near-duplicates.


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc ", max_size=60), max_size=6),
    st.lists(st.text("abc ", max_size=60), max_size=6),
    st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.8, 0.99]),
)
def test_the_index_finds_every_pair_that_is_more_alike_than_allowed(sources, texts, limit):
    index = SourceIndex(sources, max_similarity=limit)
    for text in texts:
        grams = shingles(text, size=5)
        assert index.sources_of(text) == [
            number
            for number, source in enumerate(sources)
            if similarity(grams, shingles(source, size=5)) > limit
        ]


# Runs of others.


def run_file(folder, *lines):
    file = folder / "other.trec"
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def planned(doc_ids, **excluded):
    ids = sorted(excluded)
    table = {"query_id": ids, "excluded": [excluded[one] for one in ids]}
    return pa.table(
        table, schema=pa.schema([("query_id", pa.string()), ("excluded", pa.list_(pa.string()))])
    )


def test_a_run_file_is_cut_after_exclusion_and_duplicates_count_once(tmp_path):
    texts = {"a": "one", "b": "two", "c": "three", "d": "four", "twin": "one"}
    documents = read_documents(corpus(tmp_path, texts))
    lines = [
        f"q0 Q0 {doc_id} 1 {score} x"
        for doc_id, score in (("b", 9), ("twin", 8), ("a", 7), ("c", 6), ("d", 5))
    ]
    file = RunFile(run_file(tmp_path, *lines), documents, always=frozenset({3}))
    queries_ = planned(documents.doc_ids, q0=["b"], q1=[])
    scores, positions = file.search(queries_, k=2)
    names = [[documents.doc_ids[int(i)].as_py() for i in row if i >= 0] for row in positions]
    assert documents.doc_ids[3].as_py() == "d"
    assert names == [["a", "c"], []]
    assert scores[0].tolist() == [8, 6]
    assert file.missing(["q0", "q1", "q2"]) == 2


def test_a_run_file_is_looked_up_at_once_whatever_the_number_of_queries(tmp_path, monkeypatch):
    documents = read_documents(corpus(tmp_path, {f"d{i:02d}": f"text {i}" for i in range(20)}))
    path = run_file(tmp_path, *(f"q{i:02d} Q0 d{i:02d} 1 1 x" for i in range(20)))
    asked = planned(documents.doc_ids, **{f"q{i:02d}": [f"d{i:02d}"] * (i % 2) for i in range(20)})
    lookups = []

    def counted(*arguments, _real=pc.index_in, **named):
        lookups.append(arguments)
        return _real(*arguments, **named)

    monkeypatch.setattr(pc, "index_in", counted)
    _, positions = RunFile(path, documents, always=frozenset()).search(asked, k=1)
    assert positions[:, 0].tolist() == [-1 if i % 2 else i for i in range(20)]
    assert len(lookups) == 2  # its documents, and what is excluded


def test_a_run_file_may_be_in_any_form(tmp_path):
    documents = read_documents(corpus(tmp_path, {"a": "one", "b": "two"}))
    path = tmp_path / "run.json"
    path.write_text('{"q0": {"a": 1.5, "b": 2.5}}')
    asked = planned(documents.doc_ids, q0=[])
    scores, _ = RunFile(str(path), documents, always=frozenset()).search(asked, k=2)
    assert scores[0].tolist() == [2.5, 1.5]


def test_an_unknown_document_in_a_run_file_is_named_with_its_query(tmp_path):
    documents = read_documents(corpus(tmp_path, {"a": "one"}))
    path = run_file(tmp_path, "q0 Q0 a 1 3.5 x", "", "q0 Q0 zz 2 3.0 x")
    with pytest.raises(ConfigError, match=r"other\.trec, query 'q0': document 'zz' is not in"):
        RunFile(path, documents, always=frozenset())
    with pytest.raises(ConfigError, match="no run file at"):
        RunFile(path + "x", documents, always=frozenset())


# Fusion, and what became of earlier candidates.


def two_lists(fusion, **settings_):
    config = MineConfig(
        encoder=EncoderConfig(model="m"),
        also={"bm25": BM25Retriever(kind="bm25")},
        fusion=fusion,
        top_k=3,
        **settings_,
    )
    asked = queries("a").append_column("num_excluded", pa.array([1], pa.int32()))
    scores = np.array([[3, 2, 1]], np.float32)
    found = {
        "bm25": (scores, np.array([[2, 3, -1]])),
        "miner": (scores, np.array([[1, 2, 0]])),
    }
    (row,) = candidates(
        asked,
        found,
        doc_ids=pa.array(["a", "b", "c", "d"]),
        source_scores_Q=np.array([2.5], np.float32),
        config=config,
    ).to_pylist()
    return row


def test_several_retrievers_are_fused_and_every_origin_is_kept():
    row = two_lists("rrf")
    assert row["doc_ids"] == ["c", "b", "d"]
    assert row["source_rank"] == 2  # by the miner, whatever the fusion gives
    assert row["scores"] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])
    assert row["origins"] == [
        [{"retriever": "miner", "rank": 2}, {"retriever": "bm25", "rank": 1}],
        [{"retriever": "miner", "rank": 1}],
        [{"retriever": "bm25", "rank": 2}],
    ]
    assert two_lists("quota", quotas={"miner": 2, "bm25": 1})["doc_ids"] == ["b", "c", "a"]


def test_queries_that_stray_are_those_whose_source_is_far_or_not_found():
    table = mined(near=[], far=[], unknown=[])
    ranks = pa.array([2, 3, None], pa.int32())
    table = table.set_column(table.schema.get_field_index("source_rank"), "source_rank", ranks)
    assert keeping_to_source(table, max_source_rank=2)["query_id"].to_pylist() == ["near"]
    assert keeping_to_source(table, max_source_rank=None).equals(table)


def test_the_source_s_rank_does_not_hang_on_what_other_queries_find():
    """Lists are as wide as the longest of their block; where all is found, the rank is known."""
    config = MineConfig(encoder=EncoderConfig(model="m"), top_k=10)
    asked = queries("a").append_column("num_excluded", pa.array([1], pa.int32()))
    ids = pa.array(["a", "b", "c"])

    def rank(width):
        scores = np.full((1, width), -np.inf, np.float32)
        positions = np.full((1, width), -1)
        scores[0, :2], positions[0, :2] = [2, 1], [1, 2]
        found = {"miner": (scores, positions)}
        last = np.zeros(1, np.float32)
        (row,) = candidates(
            asked, found, doc_ids=ids, source_scores_Q=last, config=config
        ).to_pylist()
        return row["source_rank"]

    assert rank(2) == rank(7) == 3


def mined(**lists):
    rows = [
        {
            "query_id": query_id,
            "source_doc_id": "s",
            "task": "generic",
            "doc_ids": ids,
            "scores": [1.0] * len(ids),
            "origins": [[] for _ in ids],
            "num_excluded": 1,
            "source_rank": 1,
        }
        for query_id, ids in lists.items()
    ]
    return pa.Table.from_pylist(rows, schema=CANDIDATES)


def test_churn_counts_queries_and_the_share_of_candidates_that_went():
    old = mined(a=["1", "2"], b=["1", "2"], c=["1", "2"], gone=["1"], empty=[])
    new = mined(a=["1", "2"], b=["2", "1"], c=["2", "3"], new=["4"], empty=["5"])
    assert churn(new, old) == Churn(compared=4, changed=3, replaced=0.5)
    assert changed_rows(new, old)["query_id"].to_pylist() == ["b", "c", "new", "empty"]
    assert changed_rows(new, new).num_rows == 0
