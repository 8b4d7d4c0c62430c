from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reasonembed.serving.protocol import Unavailable
from reasonembed.tasks import TASKS
from tests.serving.api import assert_error
from tests.serving.shelf import (
    DOCUMENTS,
    QUERIES,
    Grades,
    echo_embeddings,
    grade_of,
    shelf_client,
    vectors_of,
)

SCORE_ATOL = 1e-6  # float32 of a cosine, once summed in float64 and once by numpy
TEXTS = [one.text for one in DOCUMENTS]


def post(path="/v2/rerank", *, client=None, **body):
    return (client or shelf_client()).post(path, json=body)


def cosine_of(query: str, texts, *, instruction="Find.") -> list[float]:
    [query_D] = vectors_of([query], instruction=instruction)
    return (vectors_of(texts) @ query_D).tolist()


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_documents_come_back_by_cosine(path):
    answer = post(path, query=QUERIES[0], documents=TEXTS, model="echo", top_n=3)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    cosines = cosine_of(QUERIES[0], TEXTS)
    expected = sorted(range(len(TEXTS)), key=lambda n: (-np.float32(cosines[n]), n))[:3]
    assert [one["index"] for one in body["results"]] == expected
    np.testing.assert_allclose(
        [one["relevance_score"] for one in body["results"]],
        [cosines[n] for n in expected],
        atol=SCORE_ATOL,
    )
    assert all(set(one) == {"index", "relevance_score"} for one in body["results"])
    assert body["meta"]["scores"] == "cosine"
    assert body["model"] == "echo"
    assert body["meta"]["api_version"] == {"version": "2"}
    assert body["meta"]["warnings"] == []
    tokens = 8 + 1 + 1 + 1 + sum(len(text.split()) + 1 for text in TEXTS)
    assert body["meta"]["billed_units"] == {"search_units": 1, "input_tokens": tokens}


def test_documents_as_objects_and_with_their_texts():
    documents = [{"text": text} for text in TEXTS]
    results = post(query=QUERIES[0], documents=documents, return_documents=True).json()["results"]
    assert [one["document"]["text"] for one in results] == [TEXTS[one["index"]] for one in results]
    plain = post(query=QUERIES[0], documents=TEXTS).json()["results"]
    assert [one["index"] for one in plain] == [one["index"] for one in results]


def test_the_instruction_of_a_task_counts():
    results = post(query=QUERIES[0], documents=TEXTS, prompt_name="economics").json()["results"]
    expected = cosine_of(QUERIES[0], TEXTS, instruction=TASKS["economics"].instruction)
    for one in results:
        assert one["relevance_score"] == pytest.approx(expected[one["index"]], abs=SCORE_ATOL)


def test_what_was_cut_is_named():
    body = post(query="word " * 60, documents=["short", "word " * 60]).json()
    assert body["meta"]["truncated_documents"] == [1]
    assert body["meta"]["warnings"] == ["query was cut", "documents[1] was cut"]


def test_documents_are_cut_where_the_caller_says():
    documents = ["one two three four", "five six"]
    body = post(query="one", documents=documents, max_tokens_per_doc=2).json()
    assert body["meta"]["truncated_documents"] == [0]
    expected = cosine_of("one", ["one two", "five six"])
    for one in body["results"]:
        assert one["relevance_score"] == pytest.approx(expected[one["index"]], abs=SCORE_ATOL)


@pytest.mark.parametrize("model", ["echo:annotator", "org/echo:annotator", "judge"])
def test_grades_where_they_are_asked_for(model):
    client = shelf_client(grading=Grades())
    answer = post(client=client, query=QUERIES[0], documents=TEXTS, model=model)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    grades = [grade_of(text) for text in TEXTS]
    expected = sorted(range(len(TEXTS)), key=lambda n: (-(grades[n] or 0), n))
    assert [one["index"] for one in body["results"]] == expected
    for one in body["results"]:
        grade = grades[one["index"]]
        assert one["grade"] == grade
        assert one["relevance_score"] == (0 if grade is None else (grade - 1) / 4)
    assert (body["model"], body["meta"]["scores"]) == ("judge", "grade")
    assert body["meta"]["failed_documents"] == [3] == [body["results"][-1]["index"]]
    assert body["meta"]["truncated_documents"] == [
        n for n, text in enumerate(TEXTS) if len(text.split()) > 8
    ]


def test_an_annotator_that_judges_nothing_is_a_503():
    grading = Grades()
    client = shelf_client(grading=grading)
    body = {"query": "a", "documents": ["moss"], "model": "judge"}
    assert_error(post(client=client, **body), 503, code="unavailable")
    grading.failure = Unavailable("no replica")
    assert_error(post(client=client, **body), 503, code="unavailable")


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"documents": ["a"]}, 400, "query", None),
        ({"query": "a"}, 400, "documents", None),
        ({"query": "a", "documents": []}, 400, "documents", None),
        ({"query": "a", "documents": ["b"] * 1_001}, 400, "documents", None),
        ({"query": "a", "documents": ["b", " "]}, 400, "documents", None),
        ({"query": " ", "documents": ["b"]}, 400, "query", None),
        ({"query": "a", "documents": ["b"], "top_n": 0}, 400, "top_n", None),
        (
            {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0},
            400,
            "max_tokens_per_doc",
            None,
        ),
        ({"query": "a", "documents": ["b"], "prompt_name": "x"}, 400, "prompt_name", None),
        ({"query": "a", "documents": ["b"], "prompt_name": "document"}, 400, "prompt_name", None),
        ({"query": "a", "documents": ["b"], "model": "x"}, 404, "model", "model_not_found"),
        ({"query": "a", "documents": ["b"], "model": "judge"}, 404, "model", "model_not_found"),
        ({"query": "a", "documents": [1]}, 400, "documents", None),
    ],
)
def test_what_is_refused(body, status, param, code):
    assert_error(post(**body), status, param=param, code=code)


@pytest.mark.parametrize("field", [{"max_tokens_per_doc": 9}, {"instruction": "Explain."}])
def test_what_the_annotator_cannot_do_is_refused(field):
    client = shelf_client(grading=Grades())
    answer = post(client=client, query="a", documents=["b"], model="judge", **field)
    assert_error(answer, 400, param=next(iter(field)))


def test_the_annotator_is_given_no_query_of_any_length():
    grading = Grades()
    query = "leaf " * 200  # the model's 40 tokens are 640 characters at most
    client = shelf_client(grading=grading)
    meta = post(client=client, query=query, documents=TEXTS, model="judge").json()["meta"]
    assert grading.asked == [(query[:640], len(TEXTS), "generic")]
    assert meta["warnings"][0] == "query was cut"


def test_the_annotator_is_told_the_task_whatever_the_embedder_takes():
    embeddings, grading = echo_embeddings(), Grades()
    embeddings.model = replace(embeddings.model, takes_instruction=False)
    client = shelf_client(grading=grading, embeddings=embeddings)
    body = {"query": "a", "documents": ["b"], "prompt_name": "biology"}
    answer = post(client=client, model="judge", **body)
    assert answer.status_code == 200, answer.text
    assert grading.asked == [("a", 1, "biology")]
    assert_error(post(client=client, **body), 400, param="prompt_name")


# Scores.


def test_scores_of_one_query_with_every_document():
    body = post("/v1/score", queries=QUERIES[0], documents=TEXTS).json()
    assert [one["index"] for one in body["data"]] == list(range(len(TEXTS)))
    np.testing.assert_allclose(
        [one["score"] for one in body["data"]], cosine_of(QUERIES[0], TEXTS), atol=SCORE_ATOL
    )
    assert body["object"] == "list"
    assert body["usage"]["prompt_tokens"] == 11 + sum(len(text.split()) + 1 for text in TEXTS)


def test_scores_of_pairs():
    data = post("/v1/score", queries=QUERIES, documents=TEXTS[:3]).json()["data"]
    expected = [
        cosine_of(*pair)[0] for pair in zip(QUERIES, [[one] for one in TEXTS], strict=False)
    ]
    np.testing.assert_allclose([one["score"] for one in data], expected, atol=SCORE_ATOL)


def test_scores_of_what_does_not_pair_up_are_refused():
    assert_error(post("/v1/score", queries=["a", "b"], documents=["c"]), 400, param="queries")
    assert_error(post("/v1/score", queries=[], documents=["c"]), 400, param="queries")
    assert_error(post("/v1/score", queries="a", documents=["b", ""]), 400, param="documents")
    long = post("/v1/score", queries="a", documents="word " * 60)
    assert_error(long, 400, param="documents")
    cut = post("/v1/score", queries="a", documents="word " * 60, truncate="end").json()
    assert cut["usage"]["truncated_inputs"] == [1]
    unknown = post("/v1/score", queries="a", documents="b", model="x")
    assert_error(unknown, 404, param="model", code="model_not_found")


def test_documents_are_not_tokenised_before_there_is_room_for_them():
    embeddings = echo_embeddings(max_queued_tokens=2_000, max_request_tokens=2_000)
    tokenised = []
    embeddings.preparer.tokenise = lambda text: tokenised.append(text) or []
    client = shelf_client(embeddings=embeddings)
    with embeddings._admission.reserve(2_000):
        body = {"query": "a", "documents": ["b " * 40] * 100, "max_tokens_per_doc": 3}
        answer = post(client=client, **body)
    assert answer.status_code == 429, answer.text
    assert not tokenised
