from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from reasonembed.config import LimitsConfig
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.fusion import rrf
from reasonembed.index.store import DOCUMENTS as STORED
from reasonembed.index.store import About, write_index
from reasonembed.serving import writing
from reasonembed.serving.app import create_app
from reasonembed.serving.errors import ApiError
from reasonembed.serving.indexes import LocalPart, ServedIndex
from reasonembed.serving.places import Places
from reasonembed.serving.protocol import StoredDocument, Unavailable
from reasonembed.serving.rerank_forms import RerankAnswer, ScoreAnswer
from reasonembed.serving.reranking import cosines
from reasonembed.serving.search import SearchService
from reasonembed.serving.search_forms import RetrieveAnswer, SearchAnswer, VectorStoreAnswer
from reasonembed.serving.searches import Asked, Found, Rerank, Wanted
from reasonembed.tasks import TASKS
from tests.serving.api import assert_error
from tests.serving.shelf import (
    DOCUMENTS,
    INSTRUCTION,
    QUERIES,
    Grades,
    Rewrites,
    echo_embeddings,
    grade_of,
    run,
    shelf,
    shelf_client,
    shelf_service,
    vectors_of,
)

SCORE_ATOL = 1e-6  # float32 of a cosine, once summed in float64 and once by numpy
IDS = [one.doc_id for one in DOCUMENTS]


def service(*indexes, embeddings=None, **fields) -> SearchService:
    embeddings = embeddings or echo_embeddings()
    return SearchService(embeddings, {one.info.name: one for one in indexes or [shelf()]}, **fields)


def search(asked, *, on: SearchService | None = None, **wanted):
    return run((on or service()).search("garden", asked, wanted=Wanted(**wanted)))


def ids(found: Found) -> list[str]:
    return [hit.doc_id for hit in found.hits]


def slowly(query: str, *, k: int, excluded=(), instruction=INSTRUCTION) -> list[tuple[str, float]]:
    """The dense search, document by document."""
    [query_D] = vectors_of([query], instruction=instruction)
    shut = {one.text for one in DOCUMENTS if one.doc_id in excluded}
    scored = [
        (
            sum(
                float(a) * float(b) for a, b in zip(query_D, vectors_of([one.text])[0], strict=True)
            ),
            one,
        )
        for one in DOCUMENTS
        if one.text not in shut
    ]
    scored.sort(key=lambda pair: (-np.float32(pair[0]), IDS.index(pair[1].doc_id)))
    return [(one.doc_id, score) for score, one in scored[:k]]


# Hits.


@pytest.mark.parametrize("k", [1, 3, 7, 20])
@pytest.mark.parametrize("excluded", [(), ("leaf-1",), ("leaf-copy", "nothing", "root")])
def test_hits_are_those_of_a_slow_search(k, excluded):
    found = search([Asked(one, excluded_ids=excluded) for one in QUERIES], top_k=k)
    for query, one in zip(QUERIES, found.found, strict=True):
        expected = slowly(query, k=k, excluded=excluded)
        assert ids(one) == [doc_id for doc_id, _ in expected]
        np.testing.assert_allclose(
            [hit.score for hit in one.hits], [score for _, score in expected], atol=SCORE_ATOL
        )
        assert [hit.rank for hit in one.hits] == list(range(1, len(expected) + 1))
        assert one.unknown_excluded_ids == ("nothing" in excluded)


def test_a_copy_of_an_excluded_document_is_shut_out_of_every_kind():
    for kind in ("dense", "bm25", "hybrid"):
        found = search([Asked(QUERIES[0], excluded_ids=("leaf-copy",))], kind=kind)
        assert not {"leaf-1", "leaf-copy"} & set(ids(found.found[0]))
        assert ids(found.found[0])


@given(
    parts=st.integers(1, 7),
    k=st.integers(1, 9),
    excluded=st.lists(st.sampled_from(IDS), max_size=5),
    kind=st.sampled_from(["dense", "bm25", "hybrid"]),
)
@settings(max_examples=40, deadline=None)
def test_a_sharded_index_finds_what_a_whole_one_finds(parts, k, excluded, kind):
    asked = [Asked(one, excluded_ids=tuple(excluded)) for one in QUERIES]
    whole = search(asked, top_k=k, kind=kind)
    cut = search(asked, top_k=k, kind=kind, on=service(shelf(parts=parts)))
    assert cut.found == whole.found


@given(order=st.permutations(range(3)), kind=st.sampled_from(["dense", "bm25", "hybrid"]))
@settings(max_examples=20, deadline=None)
def test_a_batch_finds_what_single_searches_find(order, kind):
    asked = [
        Asked(QUERIES[0], excluded_ids=("leaf-2", "gone")),
        Asked(QUERIES[1], instruction="Explain it."),
        Asked(QUERIES[2], task="economics"),
    ]
    singles = [search([one], kind=kind).found[0] for one in asked]
    batch = search([asked[n] for n in order], kind=kind)
    assert list(batch.found) == [singles[n] for n in order]


def test_queries_of_a_batch_are_embedded_at_once():
    embeddings = echo_embeddings()
    search([Asked(one) for one in QUERIES], on=service(embeddings=embeddings))
    assert embeddings.embedder.calls == [3]


def test_hybrid_fuses_both_lists():
    found = search([Asked(QUERIES[0])], kind="hybrid", top_k=4).found[0]
    lists = {
        kind: ids(search([Asked(QUERIES[0])], kind=kind, top_k=100).found[0])
        for kind in ("dense", "bm25")
    }
    expected = rrf(lists, k=4)
    assert [(hit.doc_id, hit.score) for hit in found.hits] == [
        (e.doc_id, e.score) for e in expected
    ]


def test_the_lowest_score_cuts_the_list():
    every = search([Asked(QUERIES[0])]).found[0]
    lowest = every.hits[2].score
    assert search([Asked(QUERIES[0])], min_score=lowest).found[0].hits == every.hits[:3]


@pytest.mark.parametrize(
    ("asked", "instruction"),
    [
        (Asked(QUERIES[0]), INSTRUCTION),
        (Asked(QUERIES[0], task="economics"), TASKS["economics"].instruction),
        (Asked(QUERIES[0], instruction="Explain."), "Explain."),
    ],
)
def test_the_instruction_that_a_query_gets(asked, instruction):
    found = search([asked], top_k=3).found[0]
    expected = slowly(asked.query, k=3, instruction=instruction)
    np.testing.assert_allclose(
        [hit.score for hit in found.hits], [score for _, score in expected], atol=SCORE_ATOL
    )


def test_documents_are_read_only_where_they_are_asked_for():
    index = shelf()
    plain = search([Asked(QUERIES[0])], on=service(index), top_k=2)
    assert index.parts[0].read == []
    assert all(hit.document is None for hit in plain.found[0].hits)
    full = search([Asked(QUERIES[0])], on=service(index), top_k=2, with_documents=True)
    assert [hit.document.doc_id for hit in full.found[0].hits] == ids(full.found[0])
    assert len(index.parts[0].read) == 2


def test_bm25_embeds_nothing():
    embeddings = echo_embeddings()
    found = search([Asked(QUERIES[0])], kind="bm25", on=service(embeddings=embeddings))
    assert (embeddings.embedder.calls, found.num_tokens) == ([], 0)
    assert found.timings_ms["encode"] == 0 < found.timings_ms["search"]


def test_an_index_without_vectors_is_searched_by_words():
    found = search([Asked(QUERIES[0])], on=service(shelf(kinds=("bm25",))))
    assert found.kind == "bm25"
    with pytest.raises(ApiError, match="has no dense search; it has: bm25") as error:
        search([Asked(QUERIES[0])], on=service(shelf(kinds=("bm25",))), kind="dense")
    assert (error.value.status, error.value.param) == (400, "kind")


def test_a_long_query_is_cut_where_it_may_be():
    asked = [Asked("short"), Asked("word " * 60)]
    with pytest.raises(ApiError) as error:
        search(asked)
    assert error.value.status == 400
    assert search(asked, truncate="end").truncated == (1,)


# Rewriting.


def test_the_rewritten_query_is_searched_for():
    rewriting = Rewrites()
    found = search([Asked(QUERIES[0])], on=service(rewriting=rewriting), rewrite=True).found[0]
    assert found.rewritten_query == f"{QUERIES[0]} abscission layer of cells"
    assert found.hits == search([Asked(found.rewritten_query)]).found[0].hits
    assert rewriting.asked == [((QUERIES[0],), "biology")]


def test_tasks_of_a_batch_are_told_to_the_llm():
    rewriting = Rewrites()
    asked = [Asked("a", task="economics"), Asked("b"), Asked("c", task="economics")]
    found = search(asked, on=service(rewriting=rewriting), rewrite=True)
    assert sorted(rewriting.asked) == [(("a", "c"), "economics"), (("b",), "biology")]
    assert [one.rewritten_query[0] for one in found.found] == ["a", "b", "c"]


def test_a_query_that_the_llm_fails_on_is_searched_as_it_is():
    asked = [Asked("dumb leaves"), Asked(QUERIES[1])]
    found = search(asked, on=service(rewriting=Rewrites()), rewrite=True).found
    assert found[0].rewritten_query is None
    assert found[0].hits == search([asked[0]]).found[0].hits
    assert found[1].rewritten_query is not None


def test_without_an_llm_at_hand_the_queries_are_searched_as_they_are():
    rewriting = Rewrites()
    rewriting.failure = Unavailable("no replica")
    found = search([Asked(QUERIES[0])], on=service(rewriting=rewriting), rewrite=True).found[0]
    assert found == search([Asked(QUERIES[0])]).found[0]


def test_a_rewritten_query_over_the_limit_loses_its_end():
    on = service(rewriting=Rewrites())
    query = " ".join(["leaves"] * 34)  # fits under the limit of 40; with q′ it does not
    found = search([Asked(query)], on=on, rewrite=True)
    assert found.truncated == (0,)


# Reranking.


@pytest.mark.parametrize("kind", ["bm25", "hybrid"])
def test_cosines_put_the_best_first(kind):
    rerank = Rerank("cosine", 5)
    before = search([Asked(QUERIES[0])], kind=kind, top_k=5).found[0]
    after = search([Asked(QUERIES[0])], kind=kind, top_k=3, rerank=rerank).found[0]
    cosine = dict(slowly(QUERIES[0], k=20))
    expected = sorted(ids(before), key=lambda one: -np.float32(cosine[one]))[:3]
    assert ids(after) == expected
    np.testing.assert_allclose(
        [hit.score for hit in after.hits], [cosine[one] for one in expected], atol=SCORE_ATOL
    )


def test_a_dense_search_is_not_embedded_again_to_be_reranked_by_cosine():
    embeddings = echo_embeddings()
    on = service(embeddings=embeddings)
    found = search([Asked(QUERIES[0])], on=on, top_k=3, rerank=Rerank("cosine", 5))
    assert found.found == search([Asked(QUERIES[0])], top_k=3).found
    assert embeddings.embedder.calls == [1]


def test_a_blank_document_is_last_after_cosines():
    documents = [*DOCUMENTS, StoredDocument("void", " ")]
    on = service(shelf(documents=DOCUMENTS))
    index = on.indexes["garden"].parts[0]
    index._documents = [
        StoredDocument(one.doc_id, " ") if one.doc_id == "leaf-1" else one for one in documents
    ]
    found = search([Asked(QUERIES[0])], on=on, kind="bm25", rerank=Rerank("cosine", 10)).found[0]
    assert found.hits[-1].doc_id == "leaf-1"
    assert found.hits[-1].score == -1


def test_grades_put_the_best_first_and_equal_ones_stay_in_order():
    grading = Grades()
    on = service(grading=grading)
    before = search([Asked(QUERIES[0])], top_k=7).found[0]
    words = Asked(QUERIES[0], task="economics")
    search([words], on=on, kind="bm25", top_k=2, rerank=Rerank("annotator", 7))
    after = search([Asked(QUERIES[0])], on=on, top_k=6, rerank=Rerank("annotator", 7)).found[0]
    text = {one.doc_id: one.text for one in DOCUMENTS}
    expected = sorted(ids(before), key=lambda one: -(grade_of(text[one]) or 0))[:6]
    assert ids(after) == expected
    assert [hit.grade for hit in after.hits] == [grade_of(text[one]) for one in expected]
    scores = {hit.doc_id: hit.score for hit in before.hits}
    assert [hit.score for hit in after.hits] == [scores[one] for one in expected]
    assert [asked[2] for asked in grading.asked] == ["economics", "biology"]


def test_a_document_without_a_grade_is_last():
    on = service(grading=Grades())
    found = search([Asked("moss water roots")], on=on, rerank=Rerank("annotator", 10)).found[0]
    assert (found.hits[-1].doc_id, found.hits[-1].grade) == ("moss/a b", None)


def test_cosines_of_zero_vectors_are_zero():
    documents = np.float32([[0, 0], [3, 4], [4, -3]])
    np.testing.assert_array_equal(cosines(np.float32([6, 8]), documents), np.float32([0, 1, 0]))
    np.testing.assert_array_equal(cosines(np.float32([0, 0]), documents), np.zeros(3, np.float32))


# Failures.


def test_a_part_that_is_gone_is_a_503_and_ends_the_others():
    index = shelf(parts=3)
    index.parts[1].failure = Unavailable("no replica of part 1")
    with pytest.raises(ApiError, match="garden") as error:
        search([Asked(QUERIES[0])], on=service(index))
    assert error.value.status == 503
    assert "Retry-After" in error.value.headers


def test_a_cancelled_search_leaves_nothing_behind():
    async def scene() -> list[str]:
        index, begun, ended = shelf(parts=2), asyncio.Semaphore(0), []

        async def slow(*_: object, **__: object) -> None:
            begun.release()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("dense")

        for part in index.parts:
            part.dense = slow
        on = service(index)
        work = asyncio.create_task(on.search("garden", [Asked("a")], wanted=Wanted()))
        for _ in index.parts:
            await begun.acquire()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert on.embeddings.queued_tokens == 0
        return ended

    assert run(scene()) == ["dense", "dense"]


# Over HTTP.


def post(path="/v1/search", *, client=None, **body):
    return (client or shelf_client(shelf())).post(path, json=body)


def test_the_answer_of_a_search():
    answer = post(query=QUERIES[0], top_k=2, return_documents=True, excluded_ids=["x", "leaf-1"])
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = slowly(QUERIES[0], k=2, excluded=("leaf-1",))
    [result] = body.pop("data")
    assert [hit["id"] for hit in result["hits"]] == [doc_id for doc_id, _ in expected]
    assert [hit["rank"] for hit in result["hits"]] == [1, 2]
    text = {one.doc_id: one for one in DOCUMENTS}
    for hit in result["hits"]:
        one = text[hit["id"]]
        assert hit["document"] == {"id": one.doc_id, "text": one.text, "title": one.title}
        assert set(hit) == {"id", "score", "rank", "document"}
    assert (result["query_index"], result["unknown_excluded_ids"]) == (0, 1)
    assert "rewritten_query" not in result
    timings = body.pop("timings_ms")
    assert set(timings) == {"tokenize", "rewrite", "encode", "search", "rerank"}
    tokens = 8 + 3 + 1 + 1  # query, instruction, mark of a query, end
    assert body == {
        "object": "search.results",
        "index": "garden",
        "kind": "dense",
        "model": "echo",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_inputs": []},
    }
    assert answer.headers["x-compute-tokens"] == str(tokens)


def test_several_queries_each_with_their_excluded_ids():
    excluded = [["leaf-1"], [], ["road"]]
    data = post(queries=QUERIES, excluded_ids=excluded).json()["data"]
    for query, shut, one in zip(QUERIES, excluded, data, strict=True):
        expected = slowly(query, k=10, excluded=shut)
        assert [hit["id"] for hit in one["hits"]] == [doc_id for doc_id, _ in expected]


def test_a_plain_list_of_excluded_ids_holds_for_all_queries():
    data = post(queries=QUERIES, excluded_ids=["leaf-1"]).json()["data"]
    assert all("leaf-copy" not in [hit["id"] for hit in one["hits"]] for one in data)


def test_a_batch_has_settings_of_its_own_for_each_search():
    searches = [
        {"query": QUERIES[0], "prompt_name": "economics"},
        {"query": QUERIES[0], "excluded_ids": ["leaf-1"]},
        {"query": QUERIES[1], "instruction": "Explain."},
    ]
    client = shelf_client(shelf())
    batch = post("/v1/search/batch", client=client, searches=searches).json()
    singles = [post(client=client, **one).json()["data"][0]["hits"] for one in searches]
    assert [one["hits"] for one in batch["data"]] == singles
    assert [one["query_index"] for one in batch["data"]] == [0, 1, 2]


def test_rewriting_over_http_says_what_was_searched_for():
    client = shelf_client(shelf(), rewriting=Rewrites())
    data = post(client=client, queries=["dumb", QUERIES[0]], rewrite=True).json()["data"]
    assert data[0]["rewritten_query"] is None
    assert data[1]["rewritten_query"].startswith(QUERIES[0])


@pytest.mark.parametrize(
    ("model", "is_graded"),
    [(None, True), ("echo", False), ("org/echo", False), ("echo:annotator", True), ("judge", True)],
)
def test_the_reranker_is_chosen_by_name(model, is_graded):
    client = shelf_client(shelf(), grading=Grades())
    answer = post(client=client, query=QUERIES[0], kind="bm25", rerank={"model": model})
    assert answer.status_code == 200, answer.text
    hits = answer.json()["data"][0]["hits"]
    assert all(("grade" in hit) == is_graded for hit in hits)
    key = "grade" if is_graded else "score"
    values = [hit[key] or 0 for hit in hits]
    assert values == sorted(values, reverse=True)


def test_the_only_index_needs_no_name_and_one_of_several_does():
    assert post(query="leaves").json()["index"] == "garden"
    two = shelf_client(shelf(), shelf("attic"))
    assert post(client=two, query="leaves", index="attic").json()["index"] == "attic"
    message = assert_error(post(client=two, query="leaves"), 400, param="index")
    assert "attic, garden" in message


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"query": "a", "index": "nothing"}, 404, "index", "index_not_found"),
        ({}, 400, "query", None),
        ({"query": "a", "queries": ["b"]}, 400, "query", None),
        ({"query": "  "}, 400, "query", None),
        ({"queries": []}, 400, "queries", None),
        ({"queries": ["a", ""]}, 400, "queries", None),
        ({"query": "a", "kind": "sparse"}, 400, "kind", None),
        ({"query": "a", "top_k": 0}, 400, "top_k", None),
        ({"query": "a", "top_k": 1_001}, 400, "top_k", None),
        ({"query": "a", "top_k": "3"}, 400, "top_k", None),
        ({"query": "a", "prompt_name": "document"}, 400, "prompt_name", None),
        ({"query": "a", "prompt_name": "biology", "instruction": "b"}, 400, "prompt_name", None),
        ({"query": "a", "instruction": " "}, 400, "instruction", None),
        ({"queries": ["a", "b"], "excluded_ids": [["c"]]}, 400, "excluded_ids", None),
        ({"query": "a", "excluded_ids": [1]}, 400, "excluded_ids", None),
        ({"query": "a", "rewrite": True}, 400, "rewrite", None),
        ({"query": "a", "rerank": {"model": "x"}}, 404, "rerank.model", "model_not_found"),
        (
            {"query": "a", "rerank": {"model": "echo:annotator"}},
            404,
            "rerank.model",
            "model_not_found",
        ),
        ({"query": "a", "rerank": {"depth": 3}}, 400, "rerank.depth", None),
        ({"query": "a", "rerank": {"depth": 1_001}}, 400, "rerank.depth", None),
        ({"queries": ["a"] * 101, "top_k": 1_000}, 400, "top_k", None),
        ({"query": "a", "min_score": "x"}, 400, "min_score", None),
        ({"query": "a", "filters": {}}, 400, "filters", None),
        ({"query": "word " * 60}, 400, "query", None),
    ],
)
def test_what_is_refused(body, status, param, code):
    assert_error(post(**body), status, param=param, code=code)


def test_a_service_without_an_index_says_so():
    client = shelf_client()
    for path, body in [
        ("/v1/search", {"query": "a"}),
        ("/v1/search/batch", {"searches": [{"query": "a"}]}),
        ("/retrieve", {"queries": ["a"]}),
        ("/v1/vector_stores/x/search", {"query": "a"}),
    ]:
        answer = client.post(path, json=body)
        message = assert_error(answer, 404, param="index", code="index_not_found")
        assert "--index" in message
    assert client.get("/v1/indexes").json() == {"object": "list", "data": []}


def test_a_model_without_instructions_takes_tasks_for_the_llm_alone():
    embeddings = echo_embeddings()
    embeddings.model = replace(embeddings.model, takes_instruction=False)
    rewriting = Rewrites()
    client = shelf_client(shelf(instruction=None), embeddings=embeddings, rewriting=rewriting)
    plain = post(client=client, query=QUERIES[0])
    told = post(client=client, query=QUERIES[0], prompt_name="economics")
    assert told.json()["data"] == plain.json()["data"]
    post(client=client, query=QUERIES[0], prompt_name="economics", rewrite=True)
    assert rewriting.asked == [((QUERIES[0],), "economics")]
    refused = post(client=client, query=QUERIES[0], instruction="Explain.")
    assert_error(refused, 400, param="instruction")
    for more in ({"kind": "bm25"}, {"rewrite": True}):
        refused = post(client=client, query=QUERIES[0], instruction="Explain.", **more)
        assert_error(refused, 400, param="instruction")
    assert len(rewriting.asked) == 1  # nobody is asked for what is refused


# Other forms.


def test_retrieve_has_the_form_of_search_r1():
    body = {"queries": QUERIES[:2], "topk": 2, "return_scores": True}
    answer = shelf_client(shelf()).post("/retrieve", json=body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"result"}
    texts = {one.doc_id: one.text for one in DOCUMENTS}
    for query, row in zip(QUERIES, answer.json()["result"], strict=False):
        expected = slowly(query, k=2)
        assert row == [
            {
                "document": {"id": doc_id, "contents": texts[doc_id]},
                "score": pytest.approx(score, abs=SCORE_ATOL),
            }
            for doc_id, score in expected
        ]


def test_retrieve_without_scores_gives_plain_documents():
    answer = shelf_client(shelf()).post("/retrieve", json={"queries": [QUERIES[0]]})
    [row] = answer.json()["result"]
    assert [one["id"] for one in row] == [doc_id for doc_id, _ in slowly(QUERIES[0], k=3)]
    assert all(set(one) == {"id", "contents"} for one in row)


def test_retrieve_survives_what_models_in_training_write():
    client = shelf_client(shelf())
    assert client.post("/retrieve", json={"queries": []}).json() == {"result": []}
    queries = ["", QUERIES[0], " \n", "word " * 500]
    result = client.post("/retrieve", json={"queries": queries, "topk": 2}).json()["result"]
    assert [len(row) for row in result] == [0, 2, 0, 2]
    assert [one["id"] for one in result[1]] == [doc_id for doc_id, _ in slowly(QUERIES[0], k=2)]


def test_retrieve_names_its_index_in_the_address():
    client = shelf_client(shelf(), shelf("attic", documents=DOCUMENTS[:2]))
    body = {"queries": [QUERIES[0]], "topk": 9}
    assert_error(client.post("/retrieve", json=body), 400, param="index")
    assert len(client.post("/retrieve?index=attic", json=body).json()["result"][0]) == 2
    words = client.post("/retrieve?index=attic&kind=bm25", json=body).json()["result"][0]
    assert [one["id"] for one in words] == ["leaf-1"]
    wrong = client.post("/retrieve?index=attic&kind=none", json=body)
    assert_error(wrong, 400, param="kind")


def test_the_form_of_vector_stores():
    client = shelf_client(shelf(), rewriting=Rewrites())
    body = {"query": QUERIES[0], "max_num_results": 3, "ranking_options": {"ranker": "auto"}}
    page = client.post("/v1/vector_stores/garden/search", json=body).json()
    expected = slowly(QUERIES[0], k=3)
    assert [one["file_id"] for one in page["data"]] == [doc_id for doc_id, _ in expected]
    titles = {one.doc_id: one.title or one.doc_id for one in DOCUMENTS}
    for one in page["data"]:
        assert set(one) == {"file_id", "filename", "score", "attributes", "content"}
        assert one["filename"] == titles[one["file_id"]]
        assert [part["type"] for part in one["content"]] == ["text"]
    assert page["search_query"] == [QUERIES[0]]
    assert (page["object"], page["has_more"], page["next_page"]) == (
        "vector_store.search_results.page",
        False,
        None,
    )
    rewritten = client.post(
        "/v1/vector_stores/garden/search", json={"query": QUERIES[0], "rewrite_query": True}
    )
    assert rewritten.json()["search_query"] == [f"{QUERIES[0]} abscission layer of cells"]


def test_several_queries_to_a_vector_store_give_each_document_its_best_score():
    client = shelf_client(shelf())
    page = client.post(
        "/v1/vector_stores/garden/search", json={"query": QUERIES, "max_num_results": 50}
    ).json()
    best: dict[str, float] = {}
    for query in QUERIES:
        for doc_id, score in slowly(query, k=50):
            best[doc_id] = max(score, best.get(doc_id, -1))
    scores = {one["file_id"]: one["score"] for one in page["data"]}
    assert scores == pytest.approx(best, abs=SCORE_ATOL)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_filters_are_refused_not_ignored():
    body = {"query": "a", "filters": {"type": "eq", "key": "x", "value": 1}}
    answer = shelf_client(shelf()).post("/v1/vector_stores/garden/search", json=body)
    assert_error(answer, 400, param="filters")
    unknown = shelf_client(shelf()).post("/v1/vector_stores/other/search", json={"query": "a"})
    assert_error(unknown, 404, param="index", code="index_not_found")


# Reading.


def test_the_list_of_indexes():
    data = shelf_client(shelf(), shelf("attic", kinds=("bm25",))).get("/v1/indexes").json()["data"]
    assert [one["name"] for one in data] == ["garden", "attic"]
    assert data[0] == {
        "name": "garden",
        "num_documents": 7,
        "num_queries": 2,
        "dimension": 64,
        "model": "echo",
        "fingerprint": "f",
        "task": "biology",
        "instruction": INSTRUCTION,
        "kinds": ["dense", "bm25", "hybrid"],
    }


def test_benchmark_queries_by_page():
    client = shelf_client(shelf())
    first = client.get("/v1/indexes/garden/queries?limit=1").json()
    assert first == {
        "object": "list",
        "data": [
            {
                "id": "q1",
                "query": QUERIES[0],
                "gold": {"leaf-1": 1, "leaf-2": 2},
                "excluded_ids": ["leaf-copy"],
            }
        ],
        "total": 2,
        "has_more": True,
    }
    second = client.get("/v1/indexes/garden/queries?limit=1&offset=1").json()
    assert ([one["id"] for one in second["data"]], second["has_more"]) == (["q2"], False)
    assert client.get("/v1/indexes/garden/queries?offset=9").json()["data"] == []
    assert_error(client.get("/v1/indexes/garden/queries?limit=0"), 400, param="limit")
    unknown = client.get("/v1/indexes/other/queries")
    assert_error(unknown, 404, param="index", code="index_not_found")


def test_a_document_by_its_id():
    client = shelf_client(shelf())
    assert client.get("/v1/documents/garden/leaf-2").json() == {
        "id": "leaf-2",
        "text": DOCUMENTS[1].text,
        "title": "Abscission",
    }
    for path in ("moss/a%20b", "moss%2Fa%20b"):
        assert client.get(f"/v1/documents/garden/{path}").json()["id"] == "moss/a b"
    missing = client.get("/v1/documents/garden/nobody")
    assert_error(missing, 404, param="id", code="document_not_found")
    assert_error(client.get("/v1/documents/x/root"), 404, param="index", code="index_not_found")


def test_an_index_that_is_gone_is_a_503():
    index = shelf()
    index.parts[0].failure = Unavailable("no replica")
    client = shelf_client(index)
    for answer in (post(client=client, query="a"), client.get("/v1/documents/garden/root")):
        assert_error(answer, 503, code="unavailable")
        assert int(answer.headers["retry-after"]) >= 1


def test_an_index_on_disk_finds_the_same(tmp_path):
    texts = [one.text for one in DOCUMENTS]
    table = pa.table(
        {
            "doc_id": IDS,
            "title": [one.title for one in DOCUMENTS],
            "text": pa.array(texts, pa.large_string()),
            "group": pa.array([texts.index(text) for text in texts], pa.int32()),
        },
        schema=STORED,
    )
    about = About("garden", "echo", "f", "biology", INSTRUCTION, {})
    vectors_ND = vectors_of(texts)
    write_index(
        tmp_path / "garden",
        about,
        table,
        dimension=vectors_ND.shape[1],
        fill=lambda out: np.copyto(out, vectors_ND),
        bm25=BM25Index(texts),
    )
    parts = [LocalPart.load(tmp_path / "garden", part=(number, 2)) for number in range(2)]
    on = service(ServedIndex(parts[0].info, parts))
    asked = [Asked(one, excluded_ids=("leaf-copy", "nobody")) for one in QUERIES]
    for kind in ("dense", "bm25", "hybrid"):
        stored = search(asked, on=on, kind=kind, with_documents=True)
        assert stored.found == search(asked, kind=kind, with_documents=True).found
    for part in parts:
        part.close()


def test_more_searches_than_may_be_under_way_are_refused_at_once():
    async def scene():
        index, gate = shelf(), asyncio.Event()
        on, dense = service(index, limits=LimitsConfig(max_queued_searches=4)), index.parts[0].dense

        async def slow(*args, **fields):
            await gate.wait()
            return await dense(*args, **fields)

        index.parts[0].dense = slow
        asked = [Asked(one) for one in QUERIES]
        first = asyncio.create_task(on.search("garden", asked, wanted=Wanted()))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="3 queries of at most 4") as error:
            await on.search("garden", asked[:2], wanted=Wanted())
        second = asyncio.create_task(on.search("garden", asked[:1], wanted=Wanted()))
        gate.set()
        await first, await second
        many = await on.search("garden", asked * 3, wanted=Wanted())  # alone, any number will do
        return error.value, len(many.found), on.places.taken

    error, number, taken = run(scene())
    assert (error.status, error.code, number, taken) == (429, "overloaded", 9, 0)
    assert int(error.headers["Retry-After"]) >= 1


def test_when_there_will_be_room_follows_from_how_long_work_takes():
    now = 0.0
    places = Places(10, what="queries", clock=lambda: now)
    with places.take(10):
        now += 20.0
    with places.take(8), pytest.raises(ApiError) as error, places.take(6):
        pass
    assert error.value.headers["Retry-After"] == "10"  # 4 of 8 end in half of the 20 seconds
    assert places.taken == 0


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        (
            "/v1/search",
            {"query": "leaves", "return_documents": True, "rewrite": True},
            SearchAnswer,
        ),
        ("/v1/search", {"query": "leaves", "rerank": {"depth": 10}}, SearchAnswer),
        ("/v1/search/batch", {"searches": [{"query": "leaves"}]}, SearchAnswer),
        ("/retrieve", {"queries": ["leaves"], "return_scores": True}, RetrieveAnswer),
        ("/v1/vector_stores/garden/search", {"query": "leaves"}, VectorStoreAnswer),
        ("/v1/rerank", {"query": "leaves", "documents": ["a"], "model": "judge"}, RerankAnswer),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "return_documents": True}, RerankAnswer),
        ("/v1/score", {"queries": "leaves", "documents": ["a"]}, ScoreAnswer),
    ],
)
def test_answers_have_the_form_that_is_published(path, body, form):
    client = shelf_client(shelf(), rewriting=Rewrites(), grading=Grades())
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    read = form.model_validate(answer.json(), extra="forbid")
    assert read.model_dump(mode="json", exclude_unset=True) == answer.json()


# Bounds.


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "/v1/search",
            {"queries": ["a"] * 3, "top_k": 2, "excluded_ids": ["x", "y"]},
            "excluded_ids",
        ),
        ("/v1/search", {"query": "a", "top_k": 2, "excluded_ids": ["x"] * 6}, "excluded_ids"),
        (
            "/v1/search/batch",
            {"top_k": 2, "searches": [{"query": "a", "excluded_ids": ["x"] * 3}] * 2},
            "excluded_ids",
        ),
        ("/v1/search", {"query": "a", "top_k": 9}, "top_k"),
        ("/v1/search", {"queries": ["a"] * 5, "top_k": 5}, "top_k"),
        ("/retrieve", {"queries": ["a"], "topk": 9}, "topk"),
        ("/retrieve", {"queries": ["a"] * 5, "topk": 5}, "topk"),
        (
            "/v1/vector_stores/garden/search",
            {"query": "a", "max_num_results": 9},
            "max_num_results",
        ),
        (
            "/v1/vector_stores/garden/search",
            {"query": ["a"] * 5, "max_num_results": 5},
            "max_num_results",
        ),
    ],
)
def test_every_form_has_the_same_bounds(path, body, param):
    limits = {"max_excluded_ids": 5, "max_top_k": 8, "max_hits": 20}
    client = shelf_client(shelf(), limits=limits)
    assert_error(post(path, client=client, **body), 400, param=param)
    assert client.get("/info").json()["limits"] | limits == client.get("/info").json()["limits"]


def test_an_excluded_list_of_many_queries_is_looked_up_once():
    index, asked = shelf(), []

    async def find(doc_ids):
        asked.append(list(doc_ids))
        return [None if one == "nobody" else 0 for one in doc_ids]

    index.parts[0].find = find
    wanted = [Asked(one, excluded_ids=("leaf-1", "nobody")) for one in QUERIES]
    found = search(wanted, on=service(index)).found
    assert [sorted(one) for one in asked] == [["leaf-1", "nobody"]]
    assert [one.unknown_excluded_ids for one in found] == [1, 1, 1]


LONG = "leaf " * 200  # the model's 40 tokens are 640 characters at most


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "bm25"},
        {"kind": "hybrid"},
        {"rewrite": True},
        {"rerank": {"model": "echo:annotator"}},  # which reads it with every document
    ],
)
def test_words_and_the_llm_are_given_no_text_of_any_length(body):
    rewriting, grading = Rewrites(), Grades()
    client = shelf_client(shelf(), rewriting=rewriting, grading=grading)
    refused = post(client=client, queries=["a", LONG], **body)
    assert "640 characters" in assert_error(refused, 400, param="queries")
    assert not rewriting.asked and not grading.asked
    answer = post(client=client, queries=["a", LONG], truncate="end", **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["truncated_inputs"][-1] == 1
    assert all(len(one) <= 640 for asked, _ in rewriting.asked for one in asked)
    assert all(len(query) <= 640 for query, _, _ in grading.asked)


def size_of(*doc_ids: str) -> int:
    text_of = {one.doc_id: one.text for one in DOCUMENTS}
    return sum(len(text_of[one].encode()) for one in doc_ids)


@pytest.mark.parametrize("read", [1, 512])
def test_hits_whose_documents_are_larger_than_an_answer_are_refused(read, monkeypatch):
    monkeypatch.setattr("reasonembed.serving.search._READ", read)
    body = {"queries": QUERIES[:1] * 3, "top_k": 2, "return_documents": True}
    found = post(client=shelf_client(shelf()), **body).json()["data"]
    size = size_of(*(hit["id"] for one in found for hit in one["hits"]))
    just = shelf_client(shelf(), limits={"max_answer_bytes": size})
    assert post(client=just, **body).json()["data"] == found
    less = shelf_client(shelf(), limits={"max_answer_bytes": size - 1})
    refused = post(client=less, **body)
    assert "max_answer_bytes" in assert_error(refused, 400, param="top_k")
    assert post(client=less, **body | {"return_documents": False}).status_code == 200
    assert post(client=less, **body | {"queries": QUERIES[:1]}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/search", {"query": QUERIES[0], "return_documents": True}),
        ("/retrieve", {"queries": QUERIES[:1]}),
        ("/v1/vector_stores/garden/search", {"query": QUERIES[0]}),
    ],
)
def test_documents_of_hits_have_their_place_among_the_answers_before_they_are_written(path, body):
    service = shelf_service(shelf(), limits={"max_answer_bytes": 1_000})
    client = TestClient(create_app(service))
    with service.outgoing.count(900):
        answer = post(path, client=client, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert service.outgoing.held == 0
    assert post(path, client=client, **body).status_code == 200
    assert service.outgoing.held == 0


def test_long_queries_of_models_in_training_lose_their_end():
    client = shelf_client(shelf())
    answer = post("/retrieve?kind=bm25", client=client, queries=[LONG, "moss"])
    assert answer.status_code == 200 and len(answer.json()["result"][1]) == 1


def test_the_annotator_has_one_queue_whoever_asks():
    async def scene():
        grading, gate = Grades(), asyncio.Event()
        grade = grading.grade

        async def slow(*args, **fields):
            await gate.wait()
            return await grade(*args, **fields)

        grading.grade = slow
        app = create_app(
            shelf_service(shelf(), grading=grading, limits={"max_rerank_documents": 7})
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            given = {"query": "a", "documents": ["b"] * 7, "model": "judge"}
            looked_at = {"query": "moss", "top_k": 7, "rerank": {"depth": 7}}
            reranks = [asyncio.create_task(client.post("/v1/rerank", json=given)) for _ in range(2)]
            searches = [
                asyncio.create_task(client.post("/v1/search", json=looked_at)) for _ in range(2)
            ]
            await asyncio.sleep(0.3)
            async with asyncio.timeout(10):  # what is not refused would wait for the gate
                refused = [
                    await client.post("/v1/search", json=looked_at),
                    await client.post("/v1/rerank", json=given),
                ]
            gate.set()
            done = await asyncio.gather(*reranks, *searches)
            later = await client.post("/v1/search", json=looked_at)
            metrics = (await client.get("/metrics")).text
        return refused, [*done, later], metrics

    refused, done, metrics = run(scene())
    for answer in refused:
        message = assert_error_429(answer)
        assert "documents to grade" in message
    assert [one.status_code for one in done] == [200] * 5
    assert 'reasonembed_rejected_total{reason="overloaded"} 2.0' in metrics


def assert_error_429(answer) -> str:
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["type"] == "rate_limit_error"
    return answer.json()["error"]["message"]


def test_the_llm_has_so_many_queries_to_rewrite_and_no_more():
    async def scene():
        rewriting, gate = Rewrites(), asyncio.Event()
        rewrite = rewriting.rewrite

        async def slow(*args, **fields):
            await gate.wait()
            return await rewrite(*args, **fields)

        rewriting.rewrite = slow
        on = service(rewriting=rewriting)
        asked, wanted = [Asked("a")] * 200, Wanted(rewrite=True)
        first = asyncio.create_task(on.search("garden", asked, wanted=wanted))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="queries to rewrite") as error:
            async with asyncio.timeout(10):
                await on.search("garden", asked, wanted=wanted)
        plain = await on.search("garden", asked, wanted=Wanted())
        gate.set()
        await first
        return error.value.status, len(plain.found), on.rewritten.taken, on.places.taken

    assert run(scene()) == (429, 200, 0, 0)


def test_without_an_annotator_at_hand_hits_stay_in_the_order_of_the_search(caplog):
    grading = Grades()
    grading.failure = Unavailable("no replica of the LLM")
    wanted = {"top_k": 7, "rerank": Rerank("annotator", 7)}
    [found] = search([Asked(QUERIES[0])], on=service(grading=grading), **wanted).found
    [plain] = search([Asked(QUERIES[0])], top_k=7).found
    assert ids(found) == ids(plain) and {hit.grade for hit in found.hits} == {None}
    assert "no replica of the LLM" in caplog.text


def test_the_answer_names_the_served_model_not_what_the_index_says():
    index = shelf()
    index.info = replace(index.info, model="/home/ann/runs/mine")
    assert post(client=shelf_client(index), query="leaves").json()["model"] == "echo"


def test_the_digest_stays_inside():
    index = shelf()
    index.info = replace(index.info, digest="0123")
    client = shelf_client(index)
    assert "digest" not in client.get("/v1/indexes").json()["data"][0]


def test_cosines_row_by_row_are_those_one_by_one():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 9, 5)).astype(np.float32)
    left[3], right[5] = 0, 0
    alone = [cosines(one, other[None])[0] for one, other in zip(left, right, strict=True)]
    np.testing.assert_array_equal(cosines(left, right), alone)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"queries": ["a"] * 90, "documents": ["b"] * 90}),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 90}),
        (
            "/v1/search",
            {
                "queries": [" ".join(QUERIES)] * 20,
                "kind": "bm25",
                "rerank": {"model": "echo", "depth": 10},
            },
        ),
    ],
)
def test_many_cosines_are_computed_beside_the_event_loop(path, body, monkeypatch):
    threads = []

    def noted(*args):
        threads.append(threading.current_thread().name)
        return cosines(*args)

    for module in ("search", "routes.rerank"):
        monkeypatch.setattr(f"reasonembed.serving.{module}.cosines", noted)
    assert post(path, **body).status_code == 200
    assert threads and not any("portal" in one for one in threads), threads


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 400, "return_documents": True}),
        ("/v1/vector_stores/garden/search", {"query": ["moss"] * 50, "max_num_results": 7}),
    ],
)
def test_large_answers_are_written_beside_the_event_loop(path, body, monkeypatch):
    threads = set()

    def noted(value):
        threads.add(threading.current_thread().name)
        return plain(value)

    plain = writing.plain
    monkeypatch.setattr(writing, "plain", noted)
    assert post(path, **body).status_code == 200
    assert threads and not any("portal" in one for one in threads), threads
