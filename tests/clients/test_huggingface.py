"""`huggingface_hub.InferenceClient`, which speaks to Text Embeddings Inference."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.expected import DOCUMENTS, LIMIT, same

pytestmark = pytest.mark.clients

TEXT = DOCUMENTS["leaf"]


@pytest.mark.parametrize("path", ["", "/embed"])
def test_feature_extraction(server, offline, path):
    made = InferenceClient(model=f"{server.url}{path}", token=server.key)
    found = made.feature_extraction(TEXT)
    assert found.shape == (1, 384) and found.dtype == "float32"
    assert same(found, offline([TEXT]).vectors)
    query = made.feature_extraction(TEXT, prompt_name="query", normalize=True)
    assert same(query, offline([TEXT], role="query").vectors)


def test_base_url(server, offline):
    found = InferenceClient(base_url=server.url, api_key=server.key).feature_extraction(TEXT)
    assert same(found, offline([TEXT]).vectors)


def test_truncation(server, offline):
    made, text = InferenceClient(model=server.url, token=server.key), "word " * LIMIT
    cut = made.feature_extraction(text, truncate=True, truncation_direction="right")
    assert same(cut, offline([text]).vectors)
    with pytest.raises(HfHubHTTPError, match="longer than the limit") as refused:
        made.feature_extraction(text)
    assert refused.value.response.status_code == 400


def test_a_wrong_key(server):
    with pytest.raises(HfHubHTTPError) as refused:
        InferenceClient(model=server.url, token="wrong").feature_extraction(TEXT)
    assert refused.value.response.status_code == 401
