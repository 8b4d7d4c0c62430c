"""Our exact search against FAISS's exhaustive index, the field's reference."""

import numpy as np
import pytest

from reasonembed.index.exact import search

faiss = pytest.importorskip("faiss")

# Both sum 64 products in float32, in other orders.
SCORE_TOLERANCE = 1e-5


@pytest.mark.parametrize("k", [1, 10, 100])
def test_same_documents_and_scores_as_index_flat_ip(k):
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((3_000, 64)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries = documents[:40] + 0.5 * rng.standard_normal((40, 64)).astype(np.float32)
    index = faiss.IndexFlatIP(64)
    index.add(documents)
    wanted_scores, wanted = index.search(queries, k)
    scores, positions = search(queries, documents, k=k)
    np.testing.assert_allclose(scores, wanted_scores, atol=SCORE_TOLERANCE)
    # Neighbours whose scores differ by rounding alone may change places.
    changed = positions != wanted
    assert changed.mean() < 0.001
    assert all(set(a) == set(b) for a, b in zip(positions[:, :1], wanted[:, :1], strict=True))


def test_exclusion_gives_what_faiss_gives_without_those_documents():
    rng = np.random.default_rng(1)
    documents = rng.standard_normal((500, 64)).astype(np.float32)
    queries = rng.standard_normal((5, 64)).astype(np.float32)
    excluded = [set(rng.choice(500, size=200, replace=False).tolist()) for _ in range(5)]
    _, positions = search(queries, documents, k=20, excluded=excluded)
    for query, shut, found in zip(queries, excluded, positions, strict=True):
        kept = np.array(sorted(set(range(500)) - shut))
        index = faiss.IndexFlatIP(64)
        index.add(documents[kept])
        _, wanted = index.search(query[None], 20)
        assert kept[wanted[0]].tolist() == found.tolist()
