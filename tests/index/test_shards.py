from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.errors import StorageError
from reasonembed.index.exact import search
from reasonembed.index.places import locate, places_for, read_vectors
from reasonembed.index.shards import block_keys, group_queries, plan_shards
from tests.index.vectors import DIMENSION, NAME, Search, coarse, commit, vectors_artifact


def documents_table(doc_ids):
    return pa.table({"doc_id": doc_ids, "text_id": [f"t-{one}" for one in doc_ids]})


def queries_table(excluded):
    return pa.table(
        {
            "query_id": [f"q{i}" for i in range(len(excluded))],
            "text_id": [f"t-q{i}" for i in range(len(excluded))],
            "excluded": pa.array(excluded, pa.list_(pa.string())),
        }
    )


def one_index(doc_ids, documents_ND, queries_QD, excluded, k):
    position = {one: row for row, one in enumerate(doc_ids)}
    shut = [[position[one] for one in ids if one in position] for ids in excluded]
    return lists(search(queries_QD, documents_ND, k=k, excluded=shut), doc_ids)


def lists(found, doc_ids):
    scores_QK, positions_QK = found
    return {
        f"q{row}": [
            (doc_ids[one], score)
            for one, score in zip(positions, scores.tolist(), strict=True)
            if one >= 0
        ]
        for row, (scores, positions) in enumerate(zip(scores_QK, positions_QK, strict=True))
    }


@settings(max_examples=15, deadline=None)  # each waits for the disk some dozen times
@given(st.data())
def test_shards_and_blocks_give_what_one_index_gives(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    num_documents, num_queries = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    doc_ids = [f"d{i:02d}" for i in range(num_documents)]
    documents_ND, queries_QD = coarse(rng, num_documents), coarse(rng, num_queries)
    excluded = [
        sorted(data.draw(st.sets(st.sampled_from([*doc_ids, "elsewhere"]))))
        for _ in range(num_queries)
    ]
    k = data.draw(st.integers(1, 40))
    with tempfile.TemporaryDirectory() as name:
        run = Search(
            Path(name),
            max_documents=data.draw(st.integers(4, 20)),
            max_queries=data.draw(st.integers(2, 4)),
            k=k,
        )
        order = data.draw(st.permutations(range(num_documents)))
        step = data.draw(st.integers(3, 10))
        for number, start in enumerate(range(0, num_documents, step)):
            rows = order[start : start + step]
            part = f"{'ab'[number % 2]}-{number:03d}"
            commit(run.vectors, part, [f"t-{doc_ids[row]}" for row in rows], documents_ND[rows])
        # Texts of nobody, and the same id once more with another vector, which does not count.
        again = ["t-gone", f"t-{doc_ids[order[0]]}"]
        commit(run.vectors, "c-0", again, np.full((2, DIMENSION), 9, np.float32))
        commit(run.vectors, "d-0", [f"t-q{i}" for i in range(num_queries)], queries_QD)
        found = lists(run(documents_table(doc_ids), queries_table(excluded)), doc_ids)
        assert found == one_index(doc_ids, documents_ND, queries_QD, excluded, k)
        again = run(documents_table(doc_ids), queries_table(excluded))
        assert lists(again, doc_ids) == found
        assert run.searched == 0


def test_growth_searches_new_shards_for_all_and_old_shards_for_new_queries_alone(tmp_path):
    rng = np.random.default_rng(0)
    old_ids, new_ids = [f"m{i}" for i in range(8)], ["a-first", "z-last"]
    documents_ND, queries_QD = coarse(rng, 10), coarse(rng, 5)
    run = Search(tmp_path, max_documents=4, max_queries=2, k=4)
    commit(run.vectors, "one-0", [f"t-{one}" for one in old_ids[:4]], documents_ND[:4])
    commit(run.vectors, "one-1", [f"t-{one}" for one in old_ids[4:]], documents_ND[4:8])
    commit(run.vectors, "q-0", [f"t-q{i}" for i in range(4)], queries_QD[:4])
    excluded = [["m1"], [], ["m7"], []]
    run(documents_table(old_ids), queries_table(excluded))
    assert run.searched == 2 * 2  # shards x blocks

    commit(run.vectors, "two-0", [f"t-{one}" for one in new_ids], documents_ND[8:])
    commit(run.vectors, "r-0", ["t-q4"], queries_QD[4:])
    # A new document repeats a source: it is shut out in its own shard, and no old hits are lost.
    excluded = [["a-first", "m1"], [], ["m7"], [], []]
    doc_ids = sorted(old_ids + new_ids)
    found = lists(run(documents_table(doc_ids), queries_table(excluded)), doc_ids)
    assert run.searched == 1 * 2 + 3 * 1
    rows = [(old_ids + new_ids).index(one) for one in doc_ids]
    assert found == one_index(doc_ids, documents_ND[rows], queries_QD, excluded, 4)


def test_another_k_or_another_exclusion_is_another_search(tmp_path):
    (shard,) = plan(tmp_path, ["a", "b"])
    asked = queries_table([["a"]])
    keys = {
        block_keys(asked, [shard], name=NAME, k=3)[0],
        block_keys(asked, [shard], name=NAME, k=4)[0],
        block_keys(asked, [shard], name="other", k=3)[0],
        block_keys(queries_table([["b"]]), [shard], name=NAME, k=3)[0],
        block_keys(queries_table([["a", "b"]]), [shard], name=NAME, k=3)[0],
    }
    assert len(keys) == 5
    assert block_keys(queries_table([["a", "far"]]), [shard], name=NAME, k=3) == block_keys(
        asked, [shard], name=NAME, k=3
    )


def plan(folder, doc_ids):
    vectors = vectors_artifact(folder, DIMENSION)
    commit(vectors, "x-0", [f"t-{one}" for one in doc_ids], np.ones((len(doc_ids), DIMENSION)))
    return plan_shards(documents_table(doc_ids), locate(vectors), name=NAME, max_documents=9)


def test_a_large_k_makes_small_blocks_and_old_large_ones_are_cut():
    queries = queries_table([[] for _ in range(700)])
    small = group_queries(queries, [], k=4_096, max_queries=8_192)
    assert [block.num_rows for block in small] == [256, 256, 188]
    known = [queries.column("query_id").to_pylist()]
    assert [len(b) for b in group_queries(queries, known, k=4_096, max_queries=9)][:2] == [9, 9]
    assert [len(b) for b in group_queries(queries, known, k=10, max_queries=8_192)] == [700]


def test_a_text_without_a_vector_is_named(tmp_path):
    vectors = vectors_artifact(tmp_path, DIMENSION)
    commit(vectors, "x-0", ["t-a"], np.ones((1, DIMENSION)))
    with pytest.raises(StorageError, match=r"1 of 2 texts have no vector, such as t-b"):
        plan_shards(documents_table(["a", "b"]), locate(vectors), name=NAME, max_documents=9)


def test_vectors_come_in_the_order_asked(tmp_path):
    rng = np.random.default_rng(0)
    vectors, matrix = vectors_artifact(tmp_path, DIMENSION), coarse(rng, 20)
    ids = [f"i{number}" for number in range(20)]
    for start in range(0, 20, 6):
        commit(vectors, f"x-{start}", ids[start : start + 6], matrix[start : start + 6])
    order = rng.permutation(20)[:13]
    places = places_for(pa.array([ids[one] for one in order]), locate(vectors), name=NAME)
    np.testing.assert_array_equal(read_vectors(vectors, places), matrix[order])
