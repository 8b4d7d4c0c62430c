from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from reasonembed.errors import ConfigError
from reasonembed.index.exports import FORMS, export_index
from reasonembed.index.store import StoredIndex
from tests.index.stored import documents, example, write

QUERIES_QD = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
# Other programs sum in float32, in an order of their own.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return example(tmp_path_factory.mktemp("exported") / "tiny")


def expected(stored):
    """Ids and scores of the five best; copies tie, so they are compared by score."""
    scores_QK, positions_QK = stored.dense(QUERIES_QD, k=5)
    return [stored.doc_ids(row) for row in positions_QK], scores_QK


def assert_found(stored, ids, scores):
    wanted, wanted_scores = expected(stored)
    np.testing.assert_allclose(scores, wanted_scores, rtol=TOLERANCE, atol=TOLERANCE)
    copies = {"d004": "d001", "d007": "d001"}
    for found, ours in zip(ids, wanted, strict=True):
        assert sorted(copies.get(one, one) for one in found) == sorted(
            copies.get(one, one) for one in ours
        )


def test_faiss_finds_the_same(stored, tmp_path):
    faiss = pytest.importorskip("faiss", reason="the extra cpu or gpu brings FAISS")
    files = export_index(stored, tmp_path / "tiny.faiss", form="faiss")
    assert [file.name for file in files] == ["tiny.faiss", "tiny.faiss.ids.jsonl"]
    index = faiss.read_index(str(files[0]))
    assert isinstance(index, faiss.IndexFlatIP) and index.ntotal == len(stored)
    doc_ids = [json.loads(line) for line in files[1].read_text().splitlines()]
    scores, positions = index.search(QUERIES_QD, 5)
    assert_found(stored, [[doc_ids[one] for one in row] for row in positions], scores)


def test_qdrants_points_hold_everything_and_have_its_schema(stored, tmp_path):
    points, collection = export_index(stored, tmp_path / "points.jsonl", form="qdrant")
    assert json.loads(collection.read_text()) == {"vectors": {"size": 4, "distance": "Dot"}}
    rows = [json.loads(line) for line in points.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(12))  # Qdrant takes whole numbers and UUIDs
    vectors_ND = np.array([row["vector"] for row in rows], np.float32)
    np.testing.assert_array_equal(vectors_ND, stored.vectors_ND)  # to the last bit
    for row, document in zip(rows, stored.documents(range(12)), strict=True):
        assert row.keys() == {"id", "vector", "payload"}
        assert row["payload"] == {
            "doc_id": document.doc_id,
            "title": document.title,
            "text": document.text,
        }


def test_qdrant_takes_the_points_and_finds_the_same(stored, tmp_path):
    qdrant = pytest.importorskip("qdrant_client", reason="pip install qdrant-client to check")
    points, collection = export_index(stored, tmp_path / "points.jsonl", form="qdrant")
    client = qdrant.QdrantClient(":memory:")
    params = qdrant.models.VectorParams(**json.loads(collection.read_text())["vectors"])
    client.create_collection("tiny", vectors_config=params)
    rows = [
        qdrant.models.PointStruct(**json.loads(line)) for line in points.read_text().splitlines()
    ]
    client.upsert("tiny", points=rows)
    found = [client.query_points("tiny", query=one.tolist(), limit=5).points for one in QUERIES_QD]
    assert_found(
        stored,
        [[point.payload["doc_id"] for point in row] for row in found],
        [[point.score for point in row] for row in found],
    )


def test_lance_holds_the_same(stored, tmp_path):
    lance = pytest.importorskip("lance", reason="pip install pylance to check")
    [place] = export_index(stored, tmp_path / "tiny.lance", form="lance")
    table = lance.dataset(str(place)).to_table()
    assert table.column_names == ["doc_id", "title", "text", "vector"]
    assert table.select(["doc_id", "title", "text"]).to_pylist() == stored.rows().to_pylist()
    vectors_ND = np.array(table.column("vector").to_pylist(), np.float32)
    np.testing.assert_array_equal(vectors_ND, stored.vectors_ND)


@pytest.mark.parametrize(
    ("form", "module", "package"), [("faiss", "faiss", "faiss-cpu"), ("lance", "lance", "pylance")]
)
def test_a_missing_package_is_named(stored, tmp_path, monkeypatch, form, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        export_index(stored, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def test_what_lies_there_is_left_alone(stored, tmp_path):
    (tmp_path / "points.jsonl.collection.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"collection\.json exists; choose another --out"):
        export_index(stored, tmp_path / "points.jsonl", form="qdrant")
    assert (tmp_path / "points.jsonl.collection.json").read_text() == "mine"
    assert not (tmp_path / "points.jsonl").exists()


def test_what_a_killed_export_left_is_written_over(stored, tmp_path):
    (tmp_path / ".points.jsonl.partial").write_text("half")
    points, _ = export_index(stored, tmp_path / "points.jsonl", form="qdrant")
    assert len(points.read_text().splitlines()) == 12
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "points.jsonl",
        "points.jsonl.collection.json",
    ]


def test_an_unknown_form_and_an_index_without_vectors(stored, tmp_path):
    with pytest.raises(ConfigError, match=f"'milvus': the forms are {', '.join(FORMS)}"):
        export_index(stored, tmp_path / "out", form="milvus")
    write(tmp_path / "words", documents(["a dict"]), bm25=True)
    with pytest.raises(ConfigError, match="holds no vectors to export; build it without"):
        export_index(StoredIndex.load(tmp_path / "words"), tmp_path / "out", form="faiss")
