from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from reasonembed.artifacts import Artifact
from reasonembed.embedder.vectors import EmbedPlanned, vector_rows
from reasonembed.errors import ModelError
from reasonembed.index.places import by_row_group
from reasonembed.remixer.mine import read_documents, texts_at
from reasonembed.schemas import embeddings
from tests.remixer.fakes import corpus_table

SCHEMA = embeddings(2)


class Lengths:
    """A vector is the length of the text and of the instruction."""

    def encode_queries(self, texts, *, instruction=""):
        return np.array([[len(text), len(instruction)] for text in texts], np.float32)

    def encode_documents(self, texts):
        return np.array([[len(text), -1] for text in texts], np.float32)


def queries(**texts):
    """By id, text and instruction."""
    columns = zip(*texts.values(), strict=True)
    return pa.table(
        dict(zip(("id", "text", "instruction"), [list(texts), *map(list, columns)], strict=True))
    )


def test_each_query_is_embedded_under_its_own_instruction():
    asked = queries(a=("x", "i"), b=("xx", ""), c=("xxx", "i"))
    rows = EmbedPlanned(Lengths(), SCHEMA)(asked).to_pylist()
    assert {row["id"]: row["vector"] for row in rows} == {"a": [1, 1], "b": [2, 0], "c": [3, 1]}


def test_documents_are_read_where_they_lie_and_queries_come_with_them(tmp_path):
    corpus = Artifact.declared(tmp_path / "one", "corpus")
    texts = {f"d{i}": "x" * (i + 1) for i in range(6)}
    corpus.commit("one", corpus_table({one: texts[one] for one in list(texts)[:4]}))
    corpus.commit("two", corpus_table({one: texts[one] for one in list(texts)[4:]}))
    documents = read_documents(corpus)
    places = documents.table.rename_columns({"text_id": "id"}).take([5, 0, 3, 4])
    asked = queries(q=("why", "i"))
    other = Artifact.declared(tmp_path / "two", "corpus")
    other.commit("one", corpus_table({"d0": "x" * 9}))
    there = {"id": ["e"], "corpus": [other.uri], "part": ["one"], "group": [0], "row": [0]}
    placed = places.select(["id", "part", "group", "row"]).append_column(
        "corpus", pa.repeat(corpus.uri, 4)
    )
    planned = pa.concat_tables([placed, pa.table(there), asked], promote_options="permissive")
    found = EmbedPlanned(Lengths(), SCHEMA)(planned)
    assert found.schema == SCHEMA
    assert found["id"].to_pylist() == [*places["id"].to_pylist(), "e", "q"]
    assert [vector[0] for vector in found["vector"].to_pylist()] == [6, 1, 4, 5, 9, 3]
    assert len(list(by_row_group(places))) == 2
    assert texts_at(corpus, places) == ["x" * 6, "x", "xxxx", "xxxxx"]


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ([[1, 2], [np.nan, 0]], "the vector of text b is not finite, 1 of 2"),
        ([[np.inf, 2], [1, 0]], "the vector of text a is not finite"),
        ([[1, 2], [0, 0]], "the vector of text b is zero, 1 of 2"),
        ([[1, 2, 3], [1, 2, 3]], r"shape \(2, 3\) for 2 texts from a on; expected 2 dimensions"),
        ([[1, 2]], r"shape \(1, 2\) for 2 texts"),
    ],
)
def test_vectors_that_cannot_be_searched_are_refused_by_name(vectors, said):
    with pytest.raises(ModelError, match=said):
        vector_rows(pa.chunked_array([["a", "b"]]), np.array(vectors, np.float32), SCHEMA)
